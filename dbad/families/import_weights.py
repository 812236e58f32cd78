"""Published checkpoints -> run folders of this project.

    python -m dbad.checkpoints import downloads/screw --out checkpoints/screw

Three projects' files are known, by what they hold and not by what they are called:

    Diffusion-Based-AD   github.com/NilsB98/Diffusion-Based-AD: a folder with model_config.json, train_arg_config.json
                         and the state dict of a UNet2DModel; the state dict of a feature extractor
    DDAD                 github.com/arimousa/DDAD: the state dicts of a U-Net (2000) and of a feature extractor (feat4)
    DiAD                 arXiv:2312.06607: one .ckpt file with all of its networks

PATH is one of the files, or a folder with one U-Net, one feature extractor, or both. A second import with the same
--out adds what the first had not. DiAD's file has a folder to itself.
"""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel
from torch import Tensor

from dbad.checkpoints.weights import load_network, load_pickle, model_config, save_weights
from dbad.declared import Types, check_declared, types_of
from dbad.errors import UserError
from dbad.families.ddim.options import ProcessOptions
from dbad.families.ddim.weights import HEADS, convert, is_ddad
from dbad.families.diad.weights import import_diad, is_diad_file
from dbad.files.atomic import read_json, write_json
from dbad.files.locks import writing_out
from dbad.files.names import EXTRACTOR, MODEL_CONFIG, TRAIN_OPTIONS
from dbad.networks.extractors import Extractor, build_extractor, save_extractor
from dbad.runtime import parsing
from dbad.runtime.failures import one_line_failures

DDAD, DIFFUSION_BASED_AD = "DDAD", "Diffusion-Based-AD"
WEIGHTS = "final.pt"                # where the scripts look for them
BACKBONES = ("wide_resnet101_2", "wide_resnet50_2", "resnet50")
COMPARED_LAYERS = (2, 3)        # strides 8 and 16, in both projects' maps; DDAD only adapts layer 1 with them

# What Diffusion-Based-AD writes into its train_arg_config.json, as far as it is read.
PUBLISHED_OPTIONS: Types = types_of(ProcessOptions) | {
    "mvtec_item": str, "crop": bool | None, "epochs": int, "flip": bool | None, "rotate": float | None,
    "color_jitter": float | None, "reconstruction_weight": float, "eta": float}

# w of DDAD's published results. It was picked by hand on the test images of each category.
PUBLISHED_W = {
    "carpet": 0, "grid": 4, "leather": 11, "tile": 4, "wood": 11, "bottle": 3, "cable": 3, "capsule": 8, "hazelnut": 5,
    "metal_nut": 7, "pill": 9, "screw": 2, "toothbrush": 0, "transistor": 0, "zipper": 10, "candle": 6, "capsules": 5,
    "cashew": 0, "chewinggum": 6, "fryum": 4, "macaroni1": 5, "macaroni2": 2, "pcb1": 9, "pcb2": 5, "pcb3": 6,
    "pcb4": 6, "pipe_fryum": 8,
}


class Found(NamedTuple):
    """The published files that a path holds, at least one of the two, and the project they come from."""

    project: str
    unet: Path | None
    extractor: Path | None


class Network(NamedTuple):
    """A published U-Net in this project's form: the contents of three files of a run folder, and what to tell of it."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    options: dict[str, Any]
    remarks: list[str]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `run`."""
    parser = parsing.Parser(prog="python -m dbad.checkpoints import", description=__doc__, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=parsing.path, metavar="PATH", help="published file, or the folder it is in")
    parser.add_argument("--out", type=parsing.path, required=True,
                        help="run folder to write, such as checkpoints/screw")
    with one_line_failures():
        given = parser.parse_args(argv)
        print(run(given.path, given.out))


def run(path: Path, out: Path) -> str:
    """Convert what `path` holds into the run folder `out`; returns what was found and written, in sentences.

    Nothing is written over, and nothing is written before all of it is converted.
    """
    if is_diad_file(path):
        return import_diad(path, out)
    found = recognise(path)
    new = [WEIGHTS, MODEL_CONFIG, TRAIN_OPTIONS] if found.unet else []
    new += [EXTRACTOR] if found.extractor else []
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: expected a folder, found a file in its place")
    if taken := [name for name in new if (out / name).exists()]:
        raise UserError(f"--out {out}: has {taken[0]} already, and nothing is written over; expected a new folder")

    # Convert.
    lines, resolution, network, extractor = [], 256, None, None
    if found.unet:
        network = (_ddad if found.project == DDAD else _diffusion_based_ad)(found.unet)
        resolution = network.config["sample_size"]
        count = sum(value.numel() for value in network.weights.values()) / 1e6
        lines.append(f"found a U-Net of {found.project}, {resolution} px, {count:.2f} M parameters: {found.unet}")
    elif (out / MODEL_CONFIG).is_file():
        described = read_json(out / MODEL_CONFIG)
        check_declared(described, {"sample_size": int}, out / MODEL_CONFIG, ("sample_size",))
        resolution = described["sample_size"]
    if found.extractor:
        extractor = _extractor(found.extractor, resolution)
        lines.append(f"found a feature extractor of {found.project}, {extractor.name}: {found.extractor}")

    # Write; model_config.json comes last, since it makes a run of the folder.
    with writing_out(out):
        if network:
            save_weights(network.weights, out / WEIGHTS)
        if extractor:
            save_extractor(extractor, out / EXTRACTOR)
        if network:
            write_json(out / TRAIN_OPTIONS, network.options)
            write_json(out / MODEL_CONFIG, network.config)
            lines += network.remarks
    return "\n".join([*lines, f"wrote {', '.join(new)} in {out}", *_next_steps(out)])


def recognise(path: Path) -> Found:
    """What the file or folder `path` holds; anything else than published files is a `UserError` that describes it."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if _may_be_checkpoint(file))
    kinds = {file: _kind(_read(file)) for file in files}
    parts = {part: [file for file, kind in kinds.items() if kind and kind[1] == part] for part in ("unet", "extractor")}
    if not any(parts.values()):
        raise UserError(f"{path}: {_describe(_read(path)) if path.is_file() else _listing(path)}; expected a U-Net or "
                        f"a feature extractor of {DDAD} or {DIFFUSION_BASED_AD}, or the file of DiAD")
    named = read_json(path / TRAIN_OPTIONS) if (path / TRAIN_OPTIONS).is_file() else {}
    if "preset" in named:
        raise UserError(f"{path}: a run of this project, which needs no conversion")
    unet = _only(parts["unet"], path, "U-Nets", named.get("checkpoint_name"))
    extractor = _only(parts["extractor"], path, "feature extractors", named.get("extractor_path"))
    return Found(kinds[unet or extractor][0], unet, extractor)


# ----------------------------------------------------------------------------------------------- what files hold

def _may_be_checkpoint(path: Path) -> bool:
    """Whether the file begins as torch.save lets it begin: as a zip archive or, before torch 1.6, as a pickle."""
    if not path.is_file() or path.suffix not in ("", ".pt", ".pth"):
        return False
    with open(path, "rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")


def _read(path: Path) -> Any:
    """The contents of a checkpoint, without running anything; its tensors stay in the file until they are used."""
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


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the prefix that DataParallel gave every name."""
    return {key.removeprefix("module."): value for key, value in state.items()}


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())


def _kind(content: Any) -> tuple[str, str] | None:
    """The project and the part, "unet" or "extractor", of the contents of a file; None for anything else."""
    names = set(_bare(content)) if _is_state_dict(content) else set()
    if is_ddad(names):
        return DDAD, "unet"
    if {"conv_in.weight", "time_embedding.linear_1.weight", "conv_out.weight"} <= names:
        return DIFFUSION_BASED_AD, "unet"
    for project, prefix in ((DIFFUSION_BASED_AD, "model."), (DDAD, "")):
        if {f"{prefix}conv1.weight", f"{prefix}layer2.0.conv1.weight", f"{prefix}layer3.0.conv1.weight"} <= names:
            return project, "extractor"
    return None


def _describe(content: Any) -> str:
    """What a file holds that is not a published checkpoint."""
    if _is_state_dict(content):
        return f"found a state dict of {len(content)} tensors ({_some(content)})"
    if isinstance(content, Mapping) and set(content) == {"name", "layers", "resolution", "state_dict"}:
        return "found a feature extractor of this project, which needs no conversion"
    if isinstance(content, Mapping):
        return f"found a dictionary ({_some(content)})"
    return f"found {type(content).__name__}"


def _listing(folder: Path) -> str:
    names = sorted(file.name + "/" * file.is_dir() for file in folder.iterdir())
    return f"found {_some(names)}" if names else "found an empty folder"


def _some(names: Sequence[Any] | Mapping[Any, Any], most: int = 4) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def _only(files: list[Path], folder: Path, what: str, named: str | None) -> Path | None:
    """The one file there is or, of several, the one that the training was told to write."""
    wanted = PureWindowsPath(str(named)).name       # the last part of a path of any system
    chosen = [file for file in files if len(files) == 1 or file.name == wanted]
    if files and not chosen:
        raise UserError(f"{folder}: has {len(files)} {what} ({_some([file.name for file in files])}); expected the "
                        "path of one; a U-Net and a feature extractor may be imported one after the other")
    return chosen[0] if chosen else None


# --------------------------------------------------------------------------------------------------- conversion

def _ddad(path: Path) -> Network:
    """DDAD's U-Net, and the settings of its published results.

    Two things are not as in its code: where w would move the reconstruction past the image, ours stops at the image
    (`denoising.conditioned_step`), and its fusion weight v is left out, which belongs to maps that are scaled by the
    maxima of a batch of test images.
    """
    state = _bare(_read(path))
    try:
        config, weights = convert(state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    category = path.resolve().parent.name
    w = PUBLISHED_W.get(category)
    options = _options(config["sample_size"], path) | {
        "conditioning": "ddad", "recon_weight": float(2 if w is None else w), "eta": 1.0, "start_at_timestep": 250,
        "steps_to_regenerate": 10, "learning_rate": 3e-4}
    if w is not None:
        options["item"] = category
    if path.name.isdecimal():       # the code calls its files so
        options["epochs_diffusion"] = int(path.name)
    origin = "w of its example settings, 2" if w is None else f"w published for {category}, {w}"
    return Network(config, weights, options, [
        f"set conditioned denoising with the {origin} (--recon_weight), 10 steps from 250, eta 1; each w was picked by "
        f"hand on test images, and {HEADS[config['block_out_channels'][0]]} attention heads are assumed, as published"])


def _diffusion_based_ad(path: Path) -> Network:
    """The U-Net of Diffusion-Based-AD, whose two JSON files lie beside it, and the settings of its scripts."""
    names = path.parent / MODEL_CONFIG, path.parent / TRAIN_OPTIONS
    arguments, trained = (read_json(name) for name in names)
    if "mvtec_item" not in trained:
        raise UserError(f"{names[1]}: lacks mvtec_item, which {DIFFUSION_BASED_AD} writes (a run of this project needs "
                        "no conversion)")
    check_declared(trained, PUBLISHED_OPTIONS, names[1], ("epochs", "reconstruction_weight", "eta"))
    unet = load_network(UNet2DModel, path.parent, path.name)
    options = _options(unet.config["sample_size"], path) | {
        "item": trained["mvtec_item"], "patching": trained.get("crop") or False,
        "train_steps": trained.get("train_steps", 1000), "beta_schedule": trained.get("beta_schedule", "linear"),
        "noise_kind": trained.get("noise_kind", "gaussian"), "learning_rate": 1e-4,
        "epochs_diffusion": trained["epochs"], "flip": trained.get("flip") or False,
        "rotate": float(trained.get("rotate") or 0), "color_jitter": float(trained.get("color_jitter") or 0),
        "conditioning": "blend", "recon_weight": float(trained["reconstruction_weight"]),
        "eta": float(trained["eta"]), "start_at_timestep": 250, "steps_to_regenerate": 25}
    check_declared(options, dict.fromkeys(options, Any), names[1])
    remarks = [f"set blending with weight {options['recon_weight']:g} (--recon_weight), 25 steps from 250, eta "
               f"{options['eta']:g}"]
    if options["noise_kind"] == "simplex":
        remarks.append("its simplex noise was weaker than what this project draws, which has unit variance: expect "
                       "other reconstructions than its own")
    return Network(model_config(unet), unet.state_dict(), options, remarks)


def _options(resolution: int, path: Path) -> dict[str, Any]:
    """The contents of train_arg_config.json that both projects share; the rest is left to the preset base.

    `holdout` is not among them: the original held nothing out.
    """
    return {"preset": "base", "resolution": resolution, "feature_resolution": resolution, "patching": False,
            "train_steps": 1000, "beta_schedule": "linear", "noise_kind": "gaussian", "max_timestep": 0,
            "steps_diffusion": None, "imported_from": str(path)}


def _extractor(path: Path, resolution: int) -> Extractor:
    """A published feature extractor; it stands on torch's meta device but for its weights, as saving needs no more."""
    state = {f"backbone.{key.removeprefix('model.')}": value for key, value in _bare(_read(path)).items()
             if not key.startswith(("module.layer4.", "module.fc.", "layer4.", "fc."))}
    shapes = {key: value.shape for key, value in state.items()}
    for name in BACKBONES:
        with torch.device("meta"):
            extractor = build_extractor(name, COMPARED_LAYERS, resolution, pretrained=False)
        if shapes == {key: value.shape for key, value in extractor.state_dict().items()}:
            extractor.load_state_dict(state, assign=True)
            return extractor
    raise UserError(f"{path}: weights of a ResNet, but of none of {', '.join(BACKBONES)}")


def _next_steps(out: Path) -> list[str]:
    """What the user can do with the run folder `out` now."""
    if not (out / MODEL_CONFIG).is_file():
        return [f"next: import a U-Net too, with --out {out}"]
    item = read_json(out / TRAIN_OPTIONS).get("item", "NAME")
    where = "" if out.parent == Path("checkpoints") else f" --diffusion_checkpoint_dir {out.parent}"
    flags = f"--item {item} --run_id {out.name}{where} --dataset_path FOLDER"
    if not (out / EXTRACTOR).is_file():
        return [f"next: import a feature extractor too, with --out {out}, or: python train_extractor.py {flags}"]
    return [f"next: python evaluation.py {flags}; then inference_ddim.py with the same options",
            "note: its training saw all of train/good, so the good images that evaluation.py sets the thresholds with "
            "are not new to it: false alarms on new images may be more frequent than promised"]
