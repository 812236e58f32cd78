"""Published networks of DDAD and Diffusion-Based-AD -> run folders, with the settings that they were published with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models import UNet2DModel
from torch import Tensor

from dbad.checkpoints.weights import load_network, model_config, save_weights
from dbad.declared import Types, check_declared, types_of
from dbad.errors import UserError
from dbad.families.ddim.options import ProcessOptions
from dbad.families.ddim.published import DDAD, DIFFUSION_BASED_AD, bare, read_checkpoint, recognise
from dbad.families.ddim.weights import HEADS, convert
from dbad.files.atomic import read_json, write_json
from dbad.files.locks import writing_out
from dbad.files.names import EXTRACTOR, MODEL_CONFIG, TRAIN_OPTIONS
from dbad.networks.extractors import Extractor, build_extractor, save_extractor

WEIGHTS = "final.pt"                # where the scripts look for them
BACKBONES = ("wide_resnet101_2", "wide_resnet50_2", "resnet50")
COMPARED_LAYERS = (2, 3)        # strides 8 and 16, in both projects' maps; DDAD only adapts layer 1 with them

# The part of Diffusion-Based-AD's train_arg_config.json that is read.
PUBLISHED_OPTIONS: Types = {
    **types_of(ProcessOptions),
    "mvtec_item": str, "crop": bool | None, "epochs": int, "flip": bool | None, "rotate": float | None,
    "color_jitter": float | None, "reconstruction_weight": float, "eta": float}

# w of DDAD's published results. It was picked by hand on the test images of each category.
PUBLISHED_W = {
    "carpet": 0, "grid": 4, "leather": 11, "tile": 4, "wood": 11, "bottle": 3, "cable": 3, "capsule": 8, "hazelnut": 5,
    "metal_nut": 7, "pill": 9, "screw": 2, "toothbrush": 0, "transistor": 0, "zipper": 10, "candle": 6, "capsules": 5,
    "cashew": 0, "chewinggum": 6, "fryum": 4, "macaroni1": 5, "macaroni2": 2, "pcb1": 9, "pcb2": 5, "pcb3": 6,
    "pcb4": 6, "pipe_fryum": 8,
}


class Network(NamedTuple):
    """A published U-Net in this project's form: the contents of three files of a run folder, and remarks to print."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    options: dict[str, Any]
    remarks: list[str]


def import_ddim(path: Path, out: Path) -> str:
    """Convert what `path` holds into the run folder `out`; returns what was found and written, in sentences.

    No file is written over, and none is written before everything is converted.
    """
    found = recognise(path)
    new = [WEIGHTS, MODEL_CONFIG, TRAIN_OPTIONS] if found.unet else []
    new += [EXTRACTOR] if found.extractor else []
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: expected a folder, found a file")
    if taken := [name for name in new if (out / name).exists()]:
        raise UserError(f"--out {out}: contains {taken[0]} already; nothing is overwritten; expected a new folder")

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
        extractor = extractor_of(found.extractor, resolution)
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


def _ddad(path: Path) -> Network:
    """DDAD's U-Net, and the settings of its published results.

    Two things differ from its code. Where w would move the reconstruction past the image, ours stops at the image
    (`diffusion.ddim.conditioned_step`). Its fusion weight v is left out: it belongs to maps that are scaled by the
    maxima of a batch of test images.
    """
    state = bare(read_checkpoint(path))
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
    if path.name.isdecimal():       # DDAD's code names its files by the epoch
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
        remarks.append("its simplex noise was weaker than the noise here, which has unit variance, so reconstructions "
                       "differ")
    return Network(model_config(unet), unet.state_dict(), options, remarks)


def _options(resolution: int, path: Path) -> dict[str, Any]:
    """The settings that both projects share, for train_arg_config.json; the preset base has the rest.

    `holdout` is not among them, since the original trainings held nothing out.
    """
    return {"preset": "base", "resolution": resolution, "feature_resolution": resolution, "patching": False,
            "train_steps": 1000, "beta_schedule": "linear", "noise_kind": "gaussian", "max_timestep": 0,
            "steps_diffusion": None, "imported_from": str(path)}


def extractor_of(path: Path, resolution: int) -> Extractor:
    """A published feature extractor. Only its weights are in memory, not its other parts, as saving needs no more."""
    state = {f"backbone.{key.removeprefix('model.')}": value for key, value in bare(read_checkpoint(path)).items()
             if not key.startswith(("module.layer4.", "module.fc.", "layer4.", "fc."))}
    shapes = {key: value.shape for key, value in state.items()}
    for name in BACKBONES:
        with torch.device("meta"):
            extractor = build_extractor(name, COMPARED_LAYERS, resolution, pretrained=False)
        if shapes == {key: value.shape for key, value in extractor.state_dict().items()}:
            extractor.load_state_dict(state, assign=True)
            return extractor
    raise UserError(f"{path}: weights of an unknown ResNet; expected one of {', '.join(BACKBONES)}")


def _next_steps(out: Path) -> list[str]:
    """The lines that tell what to do with the run folder `out` now."""
    if not (out / MODEL_CONFIG).is_file():
        return [f"next: import a U-Net too, with --out {out}"]
    item = read_json(out / TRAIN_OPTIONS).get("item", "NAME")
    where = "" if out.parent == Path("checkpoints") else f" --diffusion_checkpoint_dir {out.parent}"
    flags = f"--item {item} --run_id {out.name}{where} --dataset_path FOLDER"
    if not (out / EXTRACTOR).is_file():
        return [f"next: import a feature extractor too, with --out {out}, or: python train_extractor.py {flags}"]
    return [f"next: python evaluation.py {flags}; then inference_ddim.py with the same options",
            "note: it was trained on all of train/good, so the good images for the thresholds are not new to it; new "
            "images may give more false alarms than promised"]
