"""Published weights of Stable Diffusion 1.5, of KL auto-encoders and of DiAD -> this project's models.

    holds                               as
    Stable Diffusion 1.x                a diffusers folder, or one .safetensors or .ckpt file
    an auto-encoder                     a run folder, a diffusers folder, or one file: alone or in Stable Diffusion's
    DiAD, arXiv:2312.06607              one .ckpt file

Nothing here needs the internet, and nothing in a file is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from dbad.checkpoints.blueprints import first_line
from dbad.errors import UserError
from dbad.families.diad.autoencoder import load_autoencoder
from dbad.families.diad.conversion import TEXT, UNET, autoencoder_of, convert_diad, convert_unet, is_diad, unet_of
from dbad.families.diad.empty_prompt import prompt_of
from dbad.families.diad.files import FAMILY, read_diad_config
from dbad.families.diad.model import PROMPT_TOKENS
from dbad.families.diad.single_files import existing_weights, read_weights, under
from dbad.families.diad.storage import assign, load_part, save_diad
from dbad.files.atomic import read_json
from dbad.files.names import AUTOENCODER, MODEL_CONFIG

_OTHER_VERSIONS = {1024: "2.x", 1280: "XL (refiner)", 2048: "XL"}       # by the width of the text's embedding


def read_stable_diffusion(path: Path) -> tuple[UNet2DConditionModel, Tensor | None]:
    """Stable Diffusion's U-Net, and the embedding of the empty prompt if there is a text encoder too."""
    if path.is_dir():
        if not (path / "unet" / "config.json").is_file():
            raise UserError(f"{path}: has no unet/config.json; expected a folder of Stable Diffusion 1.5 in diffusers' "
                            "format, or its single file")
        config = read_json(path / "unet" / "config.json")
        _check_version(path, config.get("cross_attention_dim"), config.get("addition_embed_type") is not None,
                       config.get("in_channels"))
        unet = _from_diffusers(UNet2DConditionModel, path / "unet").state_dict()
        files = [path / "text_encoder" / name for name in ("model.safetensors", "model.fp16.safetensors",
                                                           "pytorch_model.bin")]
        text = next((read_weights(file) for file in files if file.is_file()), {})
    else:
        state = existing_weights(path)
        unet, text = under(state, UNET), under(state, TEXT)
        if "input_blocks.0.0.weight" not in unet:
            raise UserError(f"{path}: has no U-Net of Stable Diffusion 1.5, whose names begin with {UNET}")
        width = next((value.shape[1] for key, value in unet.items() if key.endswith("attn2.to_k.weight")), None)
        _check_version(path, width, "label_emb.0.0.weight" in unet, unet["input_blocks.0.0.weight"].shape[1])
        unet = convert_unet(unet)
    return unet_of(unet, path), prompt_of(text, path) if text else None


def _check_version(path: Path, width: Any, is_xl: bool, in_channels: Any) -> None:
    """Raise `UserError` for a U-Net of another version of Stable Diffusion than the first."""
    other = "XL" if is_xl else _OTHER_VERSIONS.get(width) if isinstance(width, int) else None
    if other:
        raise UserError(f"{path}: a U-Net of Stable Diffusion {other} (embeddings {width} wide); expected version 1.5 "
                        "(768)")
    if in_channels != 4:
        raise UserError(f"{path}: a U-Net with {in_channels} input channels, such as for inpainting; expected 4")


def read_autoencoder(path: Path) -> AutoencoderKL:
    """The auto-encoder in `path`, whichever of the forms above it has, in eval mode."""
    if not path.is_dir():
        return autoencoder_of(existing_weights(path), path)
    if (path / MODEL_CONFIG).is_file():
        if read_json(path / MODEL_CONFIG).get("family") != FAMILY:
            return load_autoencoder(path)
        config, file = read_diad_config(path), path / AUTOENCODER
        with torch.device("meta"):
            autoencoder = AutoencoderKL(**config["autoencoder"])
        assign(autoencoder, load_part(file), file, path / MODEL_CONFIG)
        return autoencoder.eval()
    folder = next((folder for folder in (path / "vae", path) if (folder / "config.json").is_file()), None)
    if folder is None:
        raise UserError(f"{path}: has no auto-encoder; expected a run folder of finetune_autoencoder.py, or "
                        "config.json or vae/config.json in diffusers' format")
    return _from_diffusers(AutoencoderKL, folder)


def read_prompt(path: Path) -> Tensor:
    """The one tensor (1, 77, width) that a .safetensors or .pt file holds, such as a run's prompt.safetensors."""
    state = existing_weights(path)
    found = list(state.values())
    if len(found) != 1 or found[0].ndim != 3 or found[0].shape[:2] != (1, PROMPT_TOKENS):
        raise UserError(f"{path}: expected one tensor of shape 1x{PROMPT_TOKENS}xWIDTH, found "
                        + ", ".join("x".join(map(str, value.shape)) for value in found[:4]))
    return found[0]


def _from_diffusers(cls: type[AutoencoderKL] | type[UNet2DConditionModel], folder: Path) -> Any:
    """A model that diffusers saved, without any download."""
    try:
        return cls.from_pretrained(folder, local_files_only=True).eval()
    except Exception as error:      # diffusers has as many ways to fail as there are damaged folders
        raise UserError(f"{folder}: not readable as {cls.__name__} ({first_line(error)})") from None


def is_diad_file(path: Path) -> bool:
    """True if `path` is a file with DiAD's networks; False for no file, or for one that is refused."""
    try:
        return path.is_file() and is_diad(read_weights(path))
    except UserError:
        return False


def import_diad(path: Path, out: Path) -> str:
    """Convert DiAD's file into the run folder `out`, which must not hold a model yet; returns what was done."""
    if (out / MODEL_CONFIG).exists():
        raise UserError(f"--out {out}: contains {MODEL_CONFIG} already; nothing is overwritten; expected a new folder")
    state = read_weights(path)
    model = convert_diad(state, path)
    save_diad(model, out)
    count = sum(value.numel() for value in model.parameters()) / 1e6
    lines = [f"found the networks of DiAD, {count:.0f} M parameters: {path}"]
    if not any(bool(weight.any()) for weight in model.guide.fusion.down.parameters()):
        lines.append("note: the convolutions of its SFF block are all zero; they were initialised so and never learnt")
    return "\n".join([*lines, f"wrote a model of the diad family, {model.resolution} px, in {out}"])
