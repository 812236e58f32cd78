"""State dicts of single published files, .safetensors and .ckpt, read without running any code in them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbad.checkpoints.weights import load_pickle
from dbad.errors import UserError
from dbad.families.diad.storage import load_part


class _Nothing:
    """A stand-in for the objects that a training keeps in a .ckpt beside its tensors; it does nothing."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


# Stable Diffusion's first files hold objects of these classes. Stand-ins of the same names are loaded instead.
_BOOKKEEPING: list[Any] = [type(name, (_Nothing,), {"__module__": module, "__qualname__": name}) for module, name in (
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"), ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"))]


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a .safetensors or .ckpt file; tensors stay on the disk until they are used.

    Any other file is a `UserError`.
    """
    if path.suffix == ".safetensors":
        return load_part(path)
    with torch.serialization.safe_globals(_BOOKKEEPING):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, OSError, RuntimeError, ValueError):
            content = load_pickle(path)         # files of before torch 1.6 cannot be mapped; others are described
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path}: expected names and tensors, found {type(content).__name__}")
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}


def existing_weights(path: Path) -> dict[str, Tensor]:
    """`read_weights`; a missing file is a `UserError` too."""
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    return read_weights(path)


def under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of `state` whose names begin with `prefix`, under their names without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
