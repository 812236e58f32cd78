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
from dbad.intensity import AS_BEFORE

_GROUPS = (RunOptions, ReconstructionOptions, MapOptions, FeatureMapOptions, DiadMapOptions)
_TYPES: Types = types_of(*_GROUPS) | {      # and of those that are no options of a detector
    "method": Literal["ddim", "lafite", "knn", "diad"], "extractor_path": str, "discriminator": str, "extractor": str,
    "extractor_layers": tuple[int, ...], "extractor_weights": str, "feature_resolution": int}
_INTENSITY: Types = {"intensity": str, "intensity_bits": int | None}        # of every family, see `Intensity.settings`


def setting_types(method: str) -> Types:
    """The settings of a family's detectors, and the types of their values."""
    return {name: _TYPES[name] for name in setting_names(method)} | _INTENSITY


def settings_before(method: str) -> dict[str, Any]:
    """The settings that a family has got later than others, each with what was done before; see `config.opt`."""
    names = setting_names(method)
    fields = (field for group in _GROUPS for field in dataclasses.fields(group) if field.name in names)
    return AS_BEFORE.settings() | {field.name: field.metadata["before"] for field in fields
                                   if field.metadata["before"] is not dataclasses.MISSING}
