"""State dicts with the names of the latent-diffusion code -> this project's networks.

Diffusers renames most of them; only the SFF block's names are DiAD's own. Its `down11` to `down33` count the
sources o[6] to o[8] first and the targets o[9] to o[11] second:

    model.diffusion_model.*     unet.*                  control_model.*             guide.*
    first_stage_model.*         autoencoder.*           control_model.downJK.0.*    guide.fusion.down.3(J-1)+(K-1).*
    cond_stage_model.*          prompt: the text encoder, run once

No name or shape tells the number of attention heads; it is 8 in all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from diffusers.models import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor

from dbad.errors import UserError
from dbad.families.diad.autoencoder import PUBLISHED_SCALE
from dbad.families.diad.empty_prompt import prompt_of
from dbad.families.diad.model import Diad, SemanticGuide, build_unet
from dbad.families.diad.single_files import under
from dbad.families.diad.storage import assign

UNET, GUIDE, FIRST_STAGE, TEXT = "model.diffusion_model.", "control_model.", "first_stage_model.", "cond_stage_model."
_LAYERS = {"layers_per_block": 2}


def is_diad(names: Iterable[str]) -> bool:
    """True if these are the names of DiAD's published networks."""
    return {f"{GUIDE}down11.0.weight", f"{GUIDE}input_hint_block.0.weight",
            f"{UNET}input_blocks.0.0.weight"} <= set(names)


def convert_unet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A U-Net's state dict without prefix -> that of a `UNet2DConditionModel`."""
    return convert_ldm_unet_checkpoint({UNET + key: value for key, value in state.items()}, _LAYERS)


def convert_guide(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of DiAD's SG network without prefix -> that of a `SemanticGuide`."""
    controlnet = convert_controlnet_checkpoint({GUIDE + key: value for key, value in state.items()}, _LAYERS)
    converted = {f"controlnet.{key}": value for key, value in controlnet.items() if value is not None}
    hint = "controlnet.controlnet_cond_embedding."
    converted = {key.replace(hint, "embedding."): value for key, value in converted.items()}
    fused = {f"fusion.down.{3 * j + k}.weight": f"down{j + 1}{k + 1}.0.weight" for j in range(3) for k in range(3)}
    return converted | {ours: state[theirs] for ours, theirs in fused.items() if theirs in state}


def convert_diad(state: Mapping[str, Tensor], path: Path, resolution: int = 256) -> Diad:
    """DiAD's state dict, for which `is_diad` holds -> the model, which takes the tensors of the file itself."""
    unet, autoencoder = unet_of(convert_unet(under(state, UNET)), path), autoencoder_of(state, path)
    converted, prompt = convert_guide(under(state, GUIDE)), prompt_of(under(state, TEXT), path)
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


def unet_of(state: Mapping[str, Tensor], path: Path) -> UNet2DConditionModel:
    """The U-Net of a state dict with diffusers' names; it is as wide as the tensors, and takes them."""
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


def autoencoder_of(state: Mapping[str, Tensor], path: Path) -> AutoencoderKL:
    """The auto-encoder of a state dict with the latent-diffusion code's names; it is as large as the tensors say."""
    state = under(state, FIRST_STAGE) or state
    state = {key: value for key, value in state.items()
             if key.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))}
    first = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(8)]
    channels = [state[name].shape[0] for name in first if name in state]
    layers = sum(f"encoder.down.0.block.{index}.conv1.weight" in state for index in range(8))
    if not channels or "decoder.conv_in.weight" not in state:
        raise UserError(f"{path}: has no auto-encoder of the latent-diffusion code, whose names begin with encoder. "
                        f"and decoder., or with {FIRST_STAGE}")
    with torch.device("meta"):
        autoencoder = AutoencoderKL(
            block_out_channels=tuple(channels), layers_per_block=layers, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels), scaling_factor=PUBLISHED_SCALE)
    assign(autoencoder, convert_ldm_vae_checkpoint(state, autoencoder.config), path)
    return autoencoder.eval()
