"""The settings of a calibration: their types, and what those were that older files do not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from dbad.data.intensity import AS_BEFORE, Depth
from dbad.options.command_line import (
    DiadMapOptions,
    FeatureMapOptions,
    MapOptions,
    ReconstructionOptions,
    RunOptions,
    setting_names,
)
from dbad.options.declared import Types, types_of

_TYPES: Types = types_of(RunOptions, ReconstructionOptions, MapOptions, FeatureMapOptions, DiadMapOptions) | {
    "method": Literal["ddim", "lafite", "knn", "diad"], "extractor_path": str, "discriminator": str, "extractor": str,
    "extractor_layers": tuple[int, ...], "extractor_weights": str, "feature_resolution": int}
_INTENSITY: Types = {"intensity": str, "intensity_bits": Depth | None}      # of every family, see `Intensity.settings`


def setting_types(method: str) -> Types:
    """The settings of a family's detectors, and the types of their values."""
    return {name: _TYPES[name] for name in setting_names(method)} | _INTENSITY


# Settings that came later than the first calibrations, each with what was done before.
LATER: Mapping[str, Any] = AS_BEFORE.settings()
