"""Published weights of Stable Diffusion 1.5, of KL auto-encoders and of DiAD -> this project's models.

    holds                               as
    Stable Diffusion 1.x                a diffusers folder, or one .safetensors or .ckpt file
    an auto-encoder                     a run folder, a diffusers folder, or one file: alone or in Stable Diffusion's
    DiAD, arXiv:2312.06607              one .ckpt file

Single files have the names of the latent-diffusion code, which diffusers knows how to rename; only the SFF block's are
its own. Its `down11` to `down33` count the sources o[6] to o[8] first and the targets o[9] to o[11] second:

    model.diffusion_model.*     unet.*                  control_model.*             guide.*
    first_stage_model.*         autoencoder.*           control_model.downJK.0.*    guide.fusion.down.3(J-1)+(K-1).*
    cond_stage_model.*          prompt: the text encoder, asked once

No name or shape tells the number of attention heads; it is 8 in all of them. Nothing here needs a network, and nothing
in a file is run.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor, nn
from torch.nn import functional as F

from dbad.checkpoints.blueprints import first_line
from dbad.checkpoints.weights import load_pickle
from dbad.errors import UserError
from dbad.families.diad.autoencoder import PUBLISHED_SCALE, load_autoencoder
from dbad.families.diad.files import FAMILY, read_diad_config
from dbad.families.diad.model import PROMPT_TOKENS, Diad, SemanticGuide, build_unet
from dbad.families.diad.storage import assign, load_part, save_diad
from dbad.files.atomic import read_json
from dbad.files.names import AUTOENCODER, MODEL_CONFIG

_UNET, _GUIDE = "model.diffusion_model.", "control_model."
_AUTOENCODER, _TEXT = "first_stage_model.", "cond_stage_model."
_LAYERS = {"layers_per_block": 2}
_OTHER_VERSIONS = {1024: "2.x", 1280: "XL (refiner)", 2048: "XL"}       # by the width of the text's embedding


# -------------------------------------------------------------------------------------------- what files hold

class _Nothing:
    """What a training's bookkeeping in a .ckpt becomes: it takes everything and does nothing."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


# Stable Diffusion's first files name these beside their tensors. Classes of the same names are put in their place.
_BOOKKEEPING = [type(name, (_Nothing,), {"__module__": module, "__qualname__": name}) for module, name in (
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"), ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"))]


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a .safetensors or .ckpt file, left on the disk until it is used; other files are refused."""
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


def is_diad(names: Iterable[str]) -> bool:
    """Whether these are the names of DiAD's published networks."""
    return {f"{_GUIDE}down11.0.weight", f"{_GUIDE}input_hint_block.0.weight",
            f"{_UNET}input_blocks.0.0.weight"} <= set(names)


def is_diad_file(path: Path) -> bool:
    """Whether `path` is a file with DiAD's networks; no file and no state dict of anything else is an error here."""
    try:
        return path.is_file() and is_diad(read_weights(path))
    except UserError:
        return False


# ------------------------------------------------------------------------------------------------------- parts

def read_stable_diffusion(path: Path) -> tuple[UNet2DConditionModel, Tensor | None]:
    """Stable Diffusion's U-Net, and the embedding of the empty prompt if a text encoder is there too."""
    if path.is_dir():
        if not (path / "unet" / "config.json").is_file():
            raise UserError(f"{path}: has no unet/config.json; expected a folder of Stable Diffusion 1.5 as diffusers "
                            "saves it, or its single file")
        config = read_json(path / "unet" / "config.json")
        _check_version(path, config.get("cross_attention_dim"), config.get("addition_embed_type") is not None,
                       config.get("in_channels"))
        unet = _from_diffusers(UNet2DConditionModel, path / "unet").state_dict()
        files = [path / "text_encoder" / name for name in ("model.safetensors", "model.fp16.safetensors",
                                                           "pytorch_model.bin")]
        text = next((read_weights(file) for file in files if file.is_file()), {})
    else:
        state = _existing(path)
        unet, text = _under(state, _UNET), _under(state, _TEXT)
        if "input_blocks.0.0.weight" not in unet:
            raise UserError(f"{path}: has no U-Net of Stable Diffusion 1.5, whose names begin with {_UNET}")
        width = next((value.shape[1] for key, value in unet.items() if key.endswith("attn2.to_k.weight")), None)
        _check_version(path, width, "label_emb.0.0.weight" in unet, unet["input_blocks.0.0.weight"].shape[1])
        unet = convert_unet(unet)
    return _unet(unet, path), _prompt(text, path) if text else None


def _unet(state: Mapping[str, Tensor], path: Path) -> UNet2DConditionModel:
    """The U-Net with diffusers' names, as wide as its tensors say, which it takes."""
    names = [f"down_blocks.{level}.resnets.0.conv1.weight" for level in range(8)]
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    if attention not in state:
        raise UserError(f"{path}: a U-Net without attention to a text at its first level; expected that of Stable "
                        "Diffusion 1.5")
    try:
        with torch.device("meta"):
            unet = build_unet([state[name].shape[0] for name in names if name in state], state[attention].shape[1])
    except UserError as error:
        raise UserError(f"{path}: a U-Net of {error}") from None
    assign(unet, state, path)
    return unet.eval()


def _check_version(path: Path, width: Any, is_xl: bool, in_channels: Any) -> None:
    """Raise `UserError` for a U-Net of Stable Diffusion that is not one of its first version."""
    other = "XL" if is_xl else _OTHER_VERSIONS.get(width) if isinstance(width, int) else None
    if other:
        raise UserError(f"{path}: a U-Net of Stable Diffusion {other} (embeddings {width} wide); expected version 1.5 "
                        "(768)")
    if in_channels != 4:
        raise UserError(f"{path}: a U-Net with {in_channels} input channels, such as for inpainting; expected 4")


def read_autoencoder(path: Path) -> AutoencoderKL:
    """An auto-encoder of images, whatever of the above `path` is, in eval mode."""
    if not path.is_dir():
        return _autoencoder(_existing(path), path)
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
                        "config.json or vae/config.json as diffusers saves them")
    return _from_diffusers(AutoencoderKL, folder)


def _autoencoder(state: Mapping[str, Tensor], path: Path) -> AutoencoderKL:
    """The auto-encoder with the latent-diffusion code's names, as large as its tensors say, which it takes."""
    state = _under(state, _AUTOENCODER) or state
    state = {key: value for key, value in state.items()
             if key.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))}
    first = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(8)]
    channels = [state[name].shape[0] for name in first if name in state]
    layers = sum(f"encoder.down.0.block.{index}.conv1.weight" in state for index in range(8))
    if not channels or "decoder.conv_in.weight" not in state:
        raise UserError(f"{path}: has no auto-encoder of the latent-diffusion code, whose names begin with encoder. "
                        f"and decoder., or with {_AUTOENCODER}")
    with torch.device("meta"):
        autoencoder = AutoencoderKL(
            block_out_channels=tuple(channels), layers_per_block=layers, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels), scaling_factor=PUBLISHED_SCALE)
    assign(autoencoder, convert_ldm_vae_checkpoint(state, autoencoder.config), path)
    return autoencoder.eval()


def read_prompt(path: Path) -> Tensor:
    """The one tensor (1, 77, width) that a .safetensors or .pt file holds, such as a run's prompt.safetensors."""
    state = _existing(path)
    found = list(state.values())
    if len(found) != 1 or found[0].ndim != 3 or found[0].shape[:2] != (1, PROMPT_TOKENS):
        raise UserError(f"{path}: expected one tensor of shape 1x{PROMPT_TOKENS}xWIDTH, found "
                        + ", ".join("x".join(map(str, value.shape)) for value in found[:4]))
    return found[0]


def _existing(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    return read_weights(path)


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What `state` has under `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _from_diffusers(cls: type, folder: Path) -> Any:
    """A model that diffusers saved, from this machine alone."""
    try:
        return cls.from_pretrained(folder, local_files_only=True).eval()
    except Exception as error:      # diffusers has as many ways to fail as there are damaged folders
        raise UserError(f"{folder}: not readable as {cls.__name__} ({first_line(error)})") from None


# -------------------------------------------------------------------------------------------------- conversion

def convert_unet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of the latent-diffusion code, without prefix -> those of a `UNet2DConditionModel`."""
    return convert_ldm_unet_checkpoint({_UNET + key: value for key, value in state.items()}, _LAYERS)


def convert_guide(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DiAD's names, without prefix -> those of a `SemanticGuide`."""
    controlnet = convert_controlnet_checkpoint({_GUIDE + key: value for key, value in state.items()}, _LAYERS)
    converted = {f"controlnet.{key}": value for key, value in controlnet.items() if value is not None}
    hint = "controlnet.controlnet_cond_embedding."
    converted = {key.replace(hint, "embedding."): value for key, value in converted.items()}
    fused = {f"fusion.down.{3 * j + k}.weight": f"down{j + 1}{k + 1}.0.weight" for j in range(3) for k in range(3)}
    return converted | {ours: state[theirs] for ours, theirs in fused.items() if theirs in state}


def convert_diad(state: Mapping[str, Tensor], path: Path, resolution: int = 256) -> Diad:
    """DiAD's state dict, for which `is_diad` holds -> the model; its tensors are the file's own."""
    unet, autoencoder = _unet(convert_unet(_under(state, _UNET)), path), _autoencoder(state, path)
    converted, prompt = convert_guide(_under(state, _GUIDE)), _prompt(_under(state, _TEXT), path)
    widths = [f"embedding.{name}.weight" for name in ("conv_in", *(f"blocks.{index}" for index in range(1, 16, 2)))]
    with torch.device("meta"):
        guide = SemanticGuide(ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=tuple(
                converted[name].shape[0] for name in widths if name in converted), load_weights_from_unet=False))
    assign(guide, converted, path)
    try:
        return Diad(resolution, autoencoder, unet, guide, prompt).eval()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


# ------------------------------------------------------------------------------------------------------- prompt

def _prompt(text: Mapping[str, Tensor], path: Path) -> Tensor:
    try:
        return empty_prompt(text)
    except (KeyError, StopIteration, RuntimeError):
        raise UserError(f"{path}: its text encoder is not CLIP's as in Stable Diffusion 1.5") from None


@torch.no_grad()
def empty_prompt(state: Mapping[str, Tensor]) -> Tensor:
    """What CLIP's text encoder (arXiv:2103.00020) says to an empty prompt, (1, 77, width) float32.

        state   the state dict of the text encoder, under any prefix
    An empty prompt is the token of the beginning, which is the last but one of the vocabulary, and the last one, that
    of the end, for the rest. Layers normalise first, see only what comes before, and have heads of 64 channels.
    """
    last = "embeddings.token_embedding.weight"
    state = _under(state, next(key for key in state if key.endswith(last)).removesuffix(last))
    tokens, positions = state[last], state["embeddings.position_embedding.weight"]
    ids = torch.tensor([len(tokens) - 2] + [len(tokens) - 1] * (PROMPT_TOKENS - 1))
    x = (tokens[ids] + positions[:PROMPT_TOKENS]).float()[None]
    causal = nn.Transformer.generate_square_subsequent_mask(PROMPT_TOKENS)
    for index in range(sum(key.endswith("layer_norm1.weight") for key in state)):
        x = _text_layer(_under(state, f"encoder.layers.{index}."))(x, src_mask=causal)
    weight, bias = (state[f"final_layer_norm.{kind}"].float() for kind in ("weight", "bias"))
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _text_layer(state: Mapping[str, Tensor]) -> nn.TransformerEncoderLayer:
    """One layer of CLIP's text encoder."""
    renamed: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        qkv = torch.cat([state[f"self_attn.{name}_proj.{kind}"] for name in "qkv"])
        names = {"self_attn.out_proj": "self_attn.out_proj", "linear1": "mlp.fc1", "linear2": "mlp.fc2",
                 "norm1": "layer_norm1", "norm2": "layer_norm2"}
        renamed |= {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for ours, theirs in names.items()}
        renamed[f"self_attn.in_proj_{kind}"] = qkv
    hidden, width = renamed["linear1.weight"].shape
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(width, width // 64, hidden, dropout=0.0, batch_first=True, norm_first=True,
                                           activation=lambda x: x * torch.sigmoid(1.702 * x))
    layer.load_state_dict({key: value.float() for key, value in renamed.items()}, assign=True)
    return layer.eval()


# ------------------------------------------------------------------------------------------------------- import

def import_diad(path: Path, out: Path) -> str:
    """Convert DiAD's file into the run folder `out`, which must not hold a model yet; returns what was done."""
    if (out / MODEL_CONFIG).exists():
        raise UserError(f"--out {out}: has {MODEL_CONFIG} already, and nothing is written over; expected a new folder")
    state = read_weights(path)
    model = convert_diad(state, path)
    save_diad(model, out)
    count = sum(value.numel() for value in model.parameters()) / 1e6
    lines = [f"found the networks of DiAD, {count:.0f} M parameters: {path}"]
    if not any(bool(convolution.weight.any()) for convolution in model.guide.fusion.down):
        lines.append("note: the convolutions of its SFF block are all zero; they were so at first and never learnt")
    return "\n".join([*lines, f"wrote a model of the diad family, {model.resolution} px, in {out}"])
