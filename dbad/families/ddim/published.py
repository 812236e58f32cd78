"""Published files of DDAD and Diffusion-Based-AD, recognised by their contents, not their names.

    Diffusion-Based-AD   github.com/NilsB98/Diffusion-Based-AD: a folder with model_config.json, train_arg_config.json
                         and the state dict of a UNet2DModel; the state dict of a feature extractor
    DDAD                 github.com/arimousa/DDAD: the state dicts of a U-Net (2000) and of a feature extractor (feat4)
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dbad.checkpoints.weights import load_pickle
from dbad.errors import UserError
from dbad.families.ddim.weights import is_ddad
from dbad.files.atomic import read_json
from dbad.files.names import TRAIN_OPTIONS

DDAD, DIFFUSION_BASED_AD = "DDAD", "Diffusion-Based-AD"


class Found(NamedTuple):
    """The published files that a path holds, at least one of the two, and the project they come from."""

    project: str
    unet: Path | None
    extractor: Path | None


def recognise(path: Path) -> Found:
    """The published files in the file or folder `path`; if there are none, a `UserError` describes what it holds."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if _may_be_checkpoint(file))
    kinds = {file: _kind(read_checkpoint(file)) for file in files}
    parts = {part: [file for file, kind in kinds.items() if kind and kind[1] == part] for part in ("unet", "extractor")}
    if not any(parts.values()):
        held = _describe(read_checkpoint(path)) if path.is_file() else _listing(path)
        raise UserError(f"{path}: {held}; expected a U-Net or a feature extractor of {DDAD} or {DIFFUSION_BASED_AD}, "
                        "or the file of DiAD")
    named = read_json(path / TRAIN_OPTIONS) if (path / TRAIN_OPTIONS).is_file() else {}
    if "preset" in named:
        raise UserError(f"{path}: a run of this project, which needs no conversion")
    unet = _only(parts["unet"], path, "U-Nets", named.get("checkpoint_name"))
    extractor = _only(parts["extractor"], path, "feature extractors", named.get("extractor_path"))
    project = next(kind[0] for file, kind in kinds.items() if kind and file in (unet, extractor))
    return Found(project, unet, extractor)


def _may_be_checkpoint(path: Path) -> bool:
    """True if the file begins like one of torch.save: as a zip archive or, before torch 1.6, as a pickle."""
    if not path.is_file() or path.suffix not in ("", ".pt", ".pth"):
        return False
    with open(path, "rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")


def read_checkpoint(path: Path) -> Any:
    """The contents of a checkpoint; nothing in it is run, and its tensors stay in the file until they are used."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        if zipfile.is_zipfile(path):
            raise UserError(f"{path}: holds more than tensors and plain values, such as a whole model; refused, since "
                            "loading it could run code; load it with the code that wrote it, if you trust it, and save "
                            "its state dict: torch.save(model.state_dict(), 'weights.pt')") from None
    except Exception:       # the format before torch 1.6 cannot be mapped; every other failure comes again below
        pass
    return load_pickle(path)


def bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the prefix that DataParallel gave every name."""
    return {key.removeprefix("module."): value for key, value in state.items()}


def _is_state_dict(content: Any) -> bool:
    """True if the contents of a file are tensors by name and nothing else."""
    return isinstance(content, Mapping) and bool(content) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())


def _kind(content: Any) -> tuple[str, str] | None:
    """The project and the part, "unet" or "extractor", of the contents of a file; None for anything else."""
    names = set(bare(content)) if _is_state_dict(content) else set()
    if is_ddad(names):
        return DDAD, "unet"
    if {"conv_in.weight", "time_embedding.linear_1.weight", "conv_out.weight"} <= names:
        return DIFFUSION_BASED_AD, "unet"
    for project, prefix in ((DIFFUSION_BASED_AD, "model."), (DDAD, "")):
        if {f"{prefix}conv1.weight", f"{prefix}layer2.0.conv1.weight", f"{prefix}layer3.0.conv1.weight"} <= names:
            return project, "extractor"
    return None


def _describe(content: Any) -> str:
    """The contents of a file that is no published checkpoint, in words."""
    if _is_state_dict(content):
        return f"found a state dict of {len(content)} tensors ({_some(content)})"
    if isinstance(content, Mapping) and set(content) == {"name", "layers", "resolution", "state_dict"}:
        return "found a feature extractor of this project, which needs no conversion"
    if isinstance(content, Mapping):
        return f"found a dictionary ({_some(content)})"
    return f"found {type(content).__name__}"


def _listing(folder: Path) -> str:
    """The contents of a folder without published files, in words."""
    names = sorted(file.name + "/" * file.is_dir() for file in folder.iterdir())
    return f"found {_some(names)}" if names else "found an empty folder"


def _some(names: Sequence[Any] | Mapping[Any, Any], most: int = 4) -> str:
    """The first names, and the number of the others."""
    shown = [str(name) for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def _only(files: list[Path], folder: Path, what: str, named: str | None) -> Path | None:
    """The only file or, of several, the one that the training was told to write."""
    wanted = PureWindowsPath(str(named)).name       # the last part of a path of any system
    chosen = [file for file in files if len(files) == 1 or file.name == wanted]
    if files and not chosen:
        raise UserError(f"{folder}: has {len(files)} {what} ({_some([file.name for file in files])}); expected the "
                        "path of one; a U-Net and a feature extractor may be imported one after the other")
    return chosen[0] if chosen else None
