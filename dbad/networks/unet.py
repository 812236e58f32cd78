"""The U-Nets that denoise images and feature maps."""

from __future__ import annotations

import torch
from diffusers.models import UNet2DModel

from dbad.checkpoints.blueprints import MOST_PARAMETERS, num_parameters
from dbad.errors import UserError


def build_unet(resolution: int, channels: tuple[int, ...], layers_per_block: int,
               attention_levels: tuple[int, ...], image_channels: int = 3,
               options: tuple[str, str] = ("resolution", "channels")) -> UNet2DModel:
    """The denoising U-Net. Level 0 has the full resolution, and each further level halves the side.

    Attention has heads of 32 channels: diffusers' default of 8 is slow to train. Without attention levels the middle
    block has no attention either. `options` are the names of resolution and channels in error messages.
    """
    levels = range(len(channels))
    divisor = 2 ** (len(channels) - 1)
    if resolution % divisor:
        raise UserError(f"--{options[0]} {resolution}: the network halves the image {len(channels) - 1} times; "
                        f"expected a multiple of {divisor}")
    if any(c < 32 or c % 32 for c in channels):
        raise UserError(f"--{options[1]} {' '.join(map(str, channels))}: expected multiples of 32")
    if any(level not in levels for level in attention_levels):
        raise UserError(f"--attention_levels {' '.join(map(str, attention_levels))}: expected numbers from 0 to "
                        f"{levels[-1]}, the deepest level")
    kind = ["Attn" if level in attention_levels else "" for level in levels]
    config = dict(
        sample_size=resolution, in_channels=image_channels, out_channels=image_channels,
        layers_per_block=layers_per_block,
        block_out_channels=tuple(channels), attention_head_dim=32, add_attention=bool(attention_levels),
        down_block_types=tuple(f"{k}DownBlock2D" for k in kind),
        up_block_types=tuple(f"{k}UpBlock2D" for k in reversed(kind)),
    )
    with torch.device("meta"):
        count = num_parameters(UNet2DModel(**config))
    if count > MOST_PARAMETERS:
        raise UserError(f"--{options[1]} {' '.join(map(str, channels))}: a network of {count:.3g} parameters; expected "
                        f"at most {MOST_PARAMETERS:.3g}")
    return UNet2DModel(**config)
