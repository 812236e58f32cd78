"""The JSON files of a model of the diad family: its networks, and the options it was assembled with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.models import AutoencoderKL, UNet2DConditionModel

from dbad.checkpoints.blueprints import planned
from dbad.declared import Types, check_declared
from dbad.errors import UserError
from dbad.fields import LEVELS
from dbad.files.atomic import read_json
from dbad.files.names import BUILD_OPTIONS, MODEL_CONFIG

FAMILY = "diad"
_CONFIG: Types = {"family": str, "resolution": int, "hint_channels": tuple[int, ...], "autoencoder": dict[str, Any],
                  "unet": dict[str, Any]}
_BUILT: Types = {"autoencoder": Path | None, "random": bool}    # as far as it is read
_WIDEST = 4096


def read_diad_config(folder: Path) -> dict[str, Any]:
    """The contents of model_config.json, checked; a folder without a model of the family is a `UserError`."""
    path = folder / MODEL_CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: has no {MODEL_CONFIG}; build a model there first: python build_diad.py --out "
                        f"{folder} ...")
    config = read_json(path)
    if config.get("family") != FAMILY:
        raise UserError(f"{path}: does not describe a model of the {FAMILY} family; expected what build_diad.py writes")
    check_declared(config, _CONFIG, path, tuple(_CONFIG))
    widths = config["hint_channels"]
    if not 1 <= len(widths) <= LEVELS or not all(1 <= width <= _WIDEST for width in widths):
        raise UserError(f"{path}: hint_channels {widths}: expected 1 to {LEVELS} numbers from 1 to {_WIDEST}")
    planned(AutoencoderKL, config["autoencoder"], f"{path}: autoencoder")
    planned(UNet2DConditionModel, config["unet"], f"{path}: unet")
    return config


def read_built(folder: Path) -> dict[str, Any]:
    """The contents of build_arg_config.json, checked; nothing where a model was imported."""
    path = folder / BUILD_OPTIONS
    if not path.is_file():
        return {}
    built = read_json(path)
    check_declared(built, _BUILT, path, tuple(_BUILT))
    return built
