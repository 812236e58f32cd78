"""Ranges of options: values that are refused before any file is read, and where they are read from a file."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dbad.data.intensity import Intensity
from dbad.errors import UserError, printable

LONGEST_NAME = 120      # bytes; results are called after run and category together, and file systems take 255

_AT_LEAST = {
    "batch_size": 1, "seed": 0, "num_workers": 0, "resolution": 8, "feature_resolution": 32, "epochs_diffusion": 0,
    "steps_diffusion": 0, "epochs_extractor": 0, "save_n_epochs": 1, "train_steps": 2, "start_at_timestep": 1,
    "steps_to_regenerate": 1, "feature_smoothing_kernel": 1, "warmup_steps": 0, "layers_per_block": 1,
    "max_timestep": 0, "recon_weight": 0, "blur_sigma": 0, "pl_contrib": 0, "fl_contrib": 0, "rotate": 0,
    "color_jitter": 0, "eta": 0, "center_crop": 0, "top_share": 0, "num_samples": 1,
    "neighbours": 1, "feature_start": 1, "feature_steps_back": 1, "context_power": 0,
    "discriminator_contrib": 0, "knn_contrib": 0, "edit_contrib": 0, "denoise_contrib": 0, "inversion_contrib": 0,
    "grid": 4, "components": 1, "steps_features": 1, "feature_batch_size": 1, "latent_start": 1,
    "latent_steps_back": 1, "map_sigma": 0, "steps_latent": 0, "latent_batch_size": 1, "latent_accumulate": 1,
    "latent_max_timestep": 1, "autoencoder_steps": 1, "tune_minutes": 0, "accumulate": 1, "num_steps": 1,
    "epoch_steps": 1, "patience": 0, "perceptual_weight": 0, "kl_weight": 0, "discriminator_weight": 0,
    "discriminator_start": 0,
}
# More would take the memory of any machine, or overflow; `MOST` for all others.
MOST, SEEDS = 10 ** 9, 2 ** 63
_AT_MOST = {
    "batch_size": 65536, "feature_batch_size": 65536, "latent_batch_size": 65536, "num_workers": 1024,
    "resolution": 4096, "feature_resolution": 4096, "grid": 512, "channels": 4096, "feature_channels": 4096,
    "layers_per_block": 16, "components": 65536, "train_steps": 100_000, "blur_sigma": 256, "map_sigma": 256,
    "feature_smoothing_kernel": 255, "rotate": 360, "color_jitter": 10, "context_power": 10, "bank_mb": 1_000_000,
    "num_samples": 10_000, "seed": SEEDS - 1, "seeds": SEEDS - 1,
}
LEVELS = 10             # of a network, at most
_BETWEEN = {"holdout": (0, 1), "pixel_quantile": (0, 1), "false_alarm_rate": (0, 1), "learning_rate": (0, 1),
            "extractor_learning_rate": (0, 1), "feature_learning_rate": (0, 1),
            "latent_learning_rate": (0, 1)}


def check(options: Any) -> None:
    """Raise `UserError` for a value outside its range; what depends on files is checked where they are read.

    `options` are a dataclass, or values by name of the types that are declared for them; None counts as not given.
    """
    values = options if isinstance(options, Mapping) else {
        field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    for name, value in values.items():
        _check_alone(name, value if isinstance(value, (list, tuple)) else [value])
    for name, least in _AT_LEAST.items():
        if values.get(name) is not None and not values[name] >= least:  # `not >=` also refuses not-a-number
            raise UserError(f"--{name} {values[name]}: expected at least {least}")
    for name, (low, high) in _BETWEEN.items():
        if values.get(name) is not None and not low < values[name] < high:
            raise UserError(f"--{name} {values[name]}: expected a number between {low} and {high}")
    for name in ("pxl_threshold", "feature_threshold", "bank_mb"):
        if values.get(name) is not None and not values[name] > 0:
            raise UserError(f"--{name} {values[name]}: expected a number above 0")
    if values.get("intensity") is not None:
        Intensity(values["intensity"])
    for seed in values.get("seeds") or ():
        if seed < 0:
            raise UserError(f"--seeds {seed}: expected at least 0")
    for name in ("channels", "feature_channels"):
        if values.get(name) is not None and not 1 <= len(values[name]) <= LEVELS:
            raise UserError(f"--{name} {_shown(values[name])}: expected 1 to {LEVELS} numbers, one for each level")
    betas = values.get("adam_betas")
    if betas is not None and (len(betas) != 2 or not all(0 <= beta < 1 for beta in betas)):
        raise UserError(f"--adam_betas {' '.join(map(str, betas))}: expected two numbers from 0 to below 1")
    if (values.get("eta") or 0) > 1:
        raise UserError(f"--eta {values['eta']}: expected a number from 0 (deterministic) to 1 (as DDPM)")
    if values.get("sampler") == "dpm++" and values.get("eta"):
        raise UserError(f"--eta {values['eta']}: --sampler dpm++ adds no noise; expected 0")
    if (values.get("center_crop") or 0) > 256:
        raise UserError(f"--center_crop {values['center_crop']}: expected at most 256, the side of the whole image")
    if (values.get("feature_smoothing_kernel") or 1) % 2 == 0:
        raise UserError(f"--feature_smoothing_kernel {values['feature_smoothing_kernel']}: expected an odd number")
    if values.get("epochs_diffusion") is not None and values.get("steps_diffusion") is not None:
        raise UserError("--epochs_diffusion and --steps_diffusion are both given: expected one of them")
    if (values.get("top_share") or 0) > 1:
        raise UserError(f"--top_share {values['top_share']}: expected a share, at most 1")
    if values.get("tile_overlap") is not None and not 0 <= values["tile_overlap"] <= 0.9:
        raise UserError(f"--tile_overlap {values['tile_overlap']}: expected a share from 0 to 0.9")
    if values.get("patching") and values.get("map_norm") == "location":
        raise UserError("--map_norm location: images that are cut into tiles have no common places; try contrast")
    weights = values.get("layer_weights")
    if weights is not None and (min(weights, default=-1) < 0 or max(weights) == 0):
        raise UserError(f"--layer_weights {' '.join(map(str, weights))}: expected numbers from 0, one of them above")
    if values.get("pl_contrib") == 0 and values.get("fl_contrib") == 0:
        raise UserError("--pl_contrib and --fl_contrib are both 0: the anomaly map would be empty")
    names = [f"{name}_contrib" for name in ("discriminator", "knn", "edit", "denoise", "inversion")]
    if [values.get(name) for name in names].count(0) == len(names):
        raise UserError(f"--{', --'.join(names[:-1])} and --{names[-1]} are all 0: the anomaly map would be empty")
    if values.get("feature_start") is not None and values["feature_start"] > 1000:
        raise UserError(f"--feature_start {values['feature_start']}: expected at most 1000, the timesteps there are")
    if values.get("feature_start") is not None and (values.get("feature_steps_back") or 1) > values["feature_start"]:
        raise UserError(f"--feature_steps_back {values['feature_steps_back']}: more steps than the "
                        f"{values['feature_start']} timesteps of --feature_start")
    reachable = values.get("latent_max_timestep") or 1000
    if reachable > 1000:
        raise UserError(f"--latent_max_timestep {reachable}: expected at most 1000, the timesteps there are")
    if (values.get("latent_start") or 0) > reachable:
        raise UserError(f"--latent_start {values['latent_start']}: beyond the {reachable} timesteps of "
                        "--latent_max_timestep")
    if values.get("latent_start") is not None and (values.get("latent_steps_back") or 1) > values["latent_start"]:
        raise UserError(f"--latent_steps_back {values['latent_steps_back']}: more steps than the "
                        f"{values['latent_start']} timesteps of --latent_start")
    start, steps = values.get("start_at_timestep"), values.get("steps_to_regenerate")
    if start is not None and steps is not None and steps > start:
        raise UserError(f"--steps_to_regenerate {steps}: more steps than the {start} timesteps of --start_at_timestep")
    train_steps = values.get("train_steps")
    for name in ("start_at_timestep", "max_timestep"):
        if train_steps is not None and values.get(name) is not None and values[name] > train_steps:
            raise UserError(f"--{name} {values[name]}: beyond the {train_steps} timesteps of --train_steps")
    if start is not None and values.get("max_timestep") and start > values["max_timestep"]:
        raise UserError(f"--start_at_timestep {start}: beyond the {values['max_timestep']} timesteps of --max_timestep")
    check_plain_names(values)


def check_plain_names(values: Mapping[str, Any]) -> None:
    """Raise `UserError` where an option of `values` that files are called after is no plain name."""
    for name in ("item", "run_id", "diffusion_checkpoint_name"):
        for text in [values[name]] if isinstance(values.get(name), str) else values.get(name) or ():
            if len(os.fsencode(text)) > LONGEST_NAME:
                raise UserError(f"--{name} {text[:20]}...: expected a name of at most {LONGEST_NAME} bytes")
            if Path(text).name != text or text in ("", "..") or text != printable(text):
                raise UserError(f"--{name} {text!r}: expected a plain name, without folders or line breaks")
    folder = str(values.get("log_dir") or "")
    if folder.encode("utf-8", "replace") != os.fsencode(folder):
        raise UserError(f"--log_dir {folder}: expected a name in UTF-8, as TensorBoard does")


def _check_alone(name: str, values: Sequence[Any]) -> None:
    """Raise `UserError` for a number that no computation can take, or a text that no file can be called."""
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    most = _AT_MOST.get(name, MOST)
    if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
        raise UserError(f"--{name} {_shown(values)}: expected a finite number")
    if name not in _BETWEEN and not all(number <= most for number in numbers):
        expected = "a number below 2^63" if most == SEEDS - 1 else f"at most {most}"
        raise UserError(f"--{name} {_shown(values)}: expected {expected}")
    if any("\0" in str(value) for value in values):
        raise UserError(f"--{name} {_shown(values)}: expected a text without null characters")


def _shown(values: Sequence[Any]) -> str:
    return " ".join(map(str, values))
