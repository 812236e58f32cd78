"""A model of the diad family on disk: written, read, and described by model_config.json.

A run folder holds

    model_config.json                                                 what builds its networks
    build_arg_config.json                                             what it was assembled from
    autoencoder.safetensors   unet.safetensors   guide.safetensors    state dicts
    prompt.safetensors                                                the embedding of the empty prompt
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from dbad.checkpoints.blueprints import first_line
from dbad.checkpoints.weights import model_config
from dbad.errors import UserError
from dbad.families.diad.files import FAMILY, read_diad_config
from dbad.families.diad.model import Diad, compose, shown_shape
from dbad.files.atomic import write_json
from dbad.files.checksums import read_tensors, write_tensors
from dbad.files.names import MODEL_CONFIG, NETWORKS


def diad_config(model: Diad) -> dict[str, Any]:
    """The contents of model_config.json, as plain values."""
    return {"family": FAMILY, "resolution": model.resolution, "hint_channels": list(model.guide.hint_channels),
            "autoencoder": model_config(model.autoencoder), "unet": model_config(model.unet)}


def diad_of(config: Mapping[str, Any]) -> Diad:
    """The model, with random weights, that the contents of model_config.json describe."""
    return compose(AutoencoderKL(**config["autoencoder"]), UNet2DConditionModel(**config["unet"]),
                   config["hint_channels"], config["resolution"])


def save_diad(model: Diad, folder: Path) -> None:
    """Write the model into its run folder; each file whole or not at all, model_config.json last."""
    for name in NETWORKS:
        write_tensors(getattr(model, name).state_dict(), folder / f"{name}.safetensors")
    write_tensors({"prompt": model.prompt}, folder / "prompt.safetensors")
    write_json(folder / MODEL_CONFIG, diad_config(model))


def load_diad(folder: Path, dtype: torch.dtype | None = None) -> Diad:
    """The model of a run folder, in eval mode; `dtype` None keeps that of the files.

    The networks are made on the meta device, without memory, and take the tensors as they are read.
    """
    path, config = folder / MODEL_CONFIG, read_diad_config(folder)
    try:
        with torch.device("meta"):
            model = diad_of(config)
    except Exception as error:      # diffusers has as many ways to fail as there are wrong values
        raise UserError(f"{path}: does not describe a model of the {FAMILY} family ({first_line(error)})") from None
    for name in NETWORKS:
        file = folder / f"{name}.safetensors"
        assign(getattr(model, name), load_part(file, dtype), file, path)
    prompt = load_part(folder / "prompt.safetensors", dtype).get("prompt")
    if prompt is None or prompt.shape != model.prompt.shape:
        raise UserError(f"{folder / 'prompt.safetensors'}: expected a tensor prompt, {shown_shape(model.prompt.shape)}")
    model.prompt = prompt
    return model


def load_part(path: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The state dict in a safetensors file; a missing or broken one is a `UserError` that names it."""
    return {key: value.to(dtype or value.dtype) for key, value in read_tensors(path)[0].items()}


def assign(model: nn.Module, state: Mapping[str, Tensor], path: Path, description: Path | None = None) -> None:
    """Give `model` the tensors themselves, without a copy; other names or shapes than its own are a `UserError`.

    `path` is where the tensors come from, `description` the file that says what the model is like.
    """
    own, given = ({key: value.shape for key, value in tensors.items()} for tensors in (model.state_dict(), state))
    wrong = sorted(key for key in own.keys() | given.keys() if own.get(key) != given.get(key))
    if wrong:
        than = f" than {description} describes" if description else ""
        raise UserError(f"{path}: weights of another architecture{than} ({len(own.keys() - given.keys())} missing, "
                        f"{len(given.keys() - own.keys())} unknown, such as {wrong[0]}: "
                        f"{shown_shape(given.get(wrong[0]))} instead of {shown_shape(own.get(wrong[0]))})")
    model.load_state_dict(state, assign=True)
