"""The settings of a calibration: their types, and what those were that older files do not have."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from dbad.config import (
    DiadMapOptions,
    FeatureMapOptions,
    MapOptions,
    ReconstructionOptions,
    RunOptions,
    setting_names,
)
from dbad.declared import Types, types_of

_GROUPS = (RunOptions, ReconstructionOptions, MapOptions, FeatureMapOptions, DiadMapOptions)
_TYPES: Types = types_of(*_GROUPS) | {      # and of those that are no options of a detector
    "method": Literal["ddim", "lafite", "knn", "diad"], "extractor_path": str, "discriminator": str, "extractor": str,
    "extractor_layers": tuple[int, ...], "extractor_weights": str, "feature_resolution": int}


def setting_types(method: str) -> Types:
    """The settings of a family's detectors, and the types of their values."""
    return {name: _TYPES[name] for name in setting_names(method)}


def settings_before(method: str) -> dict[str, Any]:
    """The settings that a family has got later than others, each with what was done before; see `config.opt`."""
    names = setting_names(method)
    return {field.name: field.metadata["before"] for group in _GROUPS for field in dataclasses.fields(group)
            if field.name in names and field.metadata["before"] is not dataclasses.MISSING}
