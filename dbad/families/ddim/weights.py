"""DDAD's U-Net (github.com/arimousa/DDAD) as a diffusers `UNet2DModel`, exactly.

The file holds a state dict only, saved from DataParallel or not. What the state dict's names and shapes do not say
follows from the published code: attention sits at 32, 16 and 8 px and has 4 heads with 64 base channels (DDAD) and 2
with 32 (DDAD-S). The two networks are the same formula:

    DDAD                                          UNet2DModel
    time: sin before cos, w_k = 10000^(-k/half)   flip_sin_to_cos False, freq_shift 0
    residual block: GroupNorm, SiLU, resampling   ResnetBlock2D with time_embedding_norm "default"; a resampling one as
    of both branches, 3x3; + time; GroupNorm,     ResnetDownsampleBlock2D and ResnetUpsampleBlock2D have it, and as
    SiLU, 3x3; 1x1 skip where channels change     AttnDown/UpBlock2D have it with down/upsample_type "resnet"
    resampling: 2x2 mean; nearest                 the same
    32 groups, eps 1e-5                           norm_num_groups 32, norm_eps 1e-5, its defaults
    to_qkv: per head its q, its k, its v          to_q, to_k, to_v: per projection all heads

A `UNet2DModel`'s configuration cannot say one thing: it fixes the channels of a head, DDAD the number of heads,
whatever channels the level has. `attention_heads` in model_config.json says it; see `checkpoints.load_unet`.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from diffusers.models import UNet2DModel
from torch import Tensor

from dbad.checkpoints.weights import model_config
from dbad.errors import UserError

HEADS = {64: 4, 32: 2}      # by base channels; nothing in the file tells it
_LARGEST_ATTENTION_PX = 32
_BLOCK = {
    "time_embedding.1": "time_embedding.linear_1", "time_embedding.3": "time_embedding.linear_2",
    "down.0.0": "conv_in", "middle.0": "mid_block.resnets.0", "middle.1": "mid_block.attentions.0",
    "middle.2": "mid_block.resnets.1", "out.0": "conv_norm_out", "out.2": "conv_out",
}
_LAYER = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "embed_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut", "norm": "group_norm", "proj_out": "to_out.0",
}


def is_ddad(names: Set[str]) -> bool:
    """True if these names, without DataParallel's `module.`, are those of DDAD's U-Net."""
    return {"time_embedding.1.weight", "down.0.0.weight", "middle.1.to_qkv.weight", "up.0.0.in_layers.2.weight",
            "out.2.weight"} <= names


def convert(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """DDAD's state dict, for which `is_ddad` holds -> the contents of model_config.json and the U-Net's state dict.

    Raises `UserError`, which does not name the file, where the network is of another shape than DDAD's code makes.
    """
    base, in_channels = state["down.0.0.weight"].shape[:2]
    if base not in HEADS:
        raise UserError(f"DDAD's U-Net with {base} base channels: expected 64 (DDAD) or 32 (DDAD-S); for others the "
                        "number of attention heads is unknown")
    if in_channels != 3:
        raise UserError(f"DDAD's U-Net for images of {in_channels} channels: expected 3")

    # The blocks of one level end with the one that resamples; in the decoder that is told by a second residual block.
    num_up = len({key.split(".")[1] for key in state if key.startswith("up.")})
    per_level = next((n + 1 for n in range(num_up) if _upsampler(state, n)), num_up)
    levels = range(num_up // per_level)
    first = [f"down.{1 + level * per_level}" for level in levels]
    attended = [f"{name}.1.to_qkv.weight" in state for name in first]
    if not any(attended):
        raise UserError("a U-Net like DDAD's, but without attention at 32 px")
    if any(f"{name}.0.in_layers.2.weight" not in state for name in first):
        raise UserError("a U-Net like DDAD's, but with other levels in the encoder than in the decoder")

    config = {
        "sample_size": _LARGEST_ATTENTION_PX << attended.index(True), "in_channels": 3, "out_channels": 3,
        "block_out_channels": [state[f"{name}.0.in_layers.2.weight"].shape[0] for name in first],
        "down_block_types": ["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attended],
        "up_block_types": ["AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attended)],
        "layers_per_block": per_level - 1, "downsample_type": "resnet", "upsample_type": "resnet",
        "flip_sin_to_cos": False, "dropout": 0.3 if base == 32 else 0.0, "attention_head_dim": base // HEADS[base],
    }
    blocks = _BLOCK | _blocks(state, len(levels), per_level)
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        words = key.split(".")
        depth = 3 if words[0] in ("down", "up") else 2
        block, layer, kind = ".".join(words[:depth]), ".".join(words[depth:-1]), words[-1]
        if block not in blocks or layer not in {"", "to_qkv", *_LAYER}:
            raise UserError(f"a U-Net like DDAD's, but with {key}, which DDAD's does not have")
        if layer == "to_qkv":
            parts = zip(("to_q", "to_k", "to_v"), _split_heads(value, HEADS[base]), strict=True)
            converted |= {f"{blocks[block]}.{name}.{kind}": part for name, part in parts}
        else:
            name = ".".join(filter(None, (blocks[block], _LAYER.get(layer), kind)))
            converted[name] = value[..., 0] if layer == "proj_out" and kind == "weight" else value
    return _complete(config, converted) | {"attention_heads": HEADS[base]}, converted


def _upsampler(state: Mapping[str, Tensor], n: int) -> str | None:
    """The name of the up-sampling block in the decoder's n-th module, which is its last, after attention if any."""
    return next((f"up.{n}.{k}" for k in (1, 2) if f"up.{n}.{k}.in_layers.2.weight" in state), None)


def _blocks(state: Mapping[str, Tensor], num_levels: int, per_level: int) -> dict[str, str]:
    """DDAD's names of the blocks of encoder and decoder -> diffusers' names.

    DDAD counts on through the levels, diffusers within each. A level of the encoder has one residual block less than
    one of the decoder, and the down-sampling one in its place.
    """
    names = {}
    for level in range(num_levels):
        for j in range(per_level):
            n = level * per_level + j
            down, up = f"down_blocks.{level}", f"up_blocks.{level}"
            is_last = j == per_level - 1
            names[f"down.{n + 1}.0"] = f"{down}.downsamplers.0" if is_last else f"{down}.resnets.{j}"
            names[f"down.{n + 1}.1"] = f"{down}.attentions.{j}"
            names[f"up.{n}.0"] = f"{up}.resnets.{j}"
            names[f"up.{n}.1"] = f"{up}.attentions.{j}"
            if name := _upsampler(state, n):
                names[name] = f"{up}.upsamplers.0"
    return names


def _split_heads(qkv: Tensor, heads: int) -> list[Tensor]:
    """(3 C, C, 1) or (3 C,), ordered head, q/k/v, channel -> q, k, v: (C, C) or (C,) each, ordered head, channel."""
    rows = qkv.flatten(1) if qkv.ndim > 1 else qkv
    return [part.flatten(0, 1) for part in rows.unflatten(0, (heads, 3, -1)).unbind(1)]


def _complete(config: dict[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The whole configuration of the network that `config` builds, if the state dict fits it name by name."""
    with torch.device("meta"):
        unet = UNet2DModel(**config)
    own = {key: value.shape for key, value in unet.state_dict().items()}
    wrong = sorted(own.items() ^ {(key, value.shape) for key, value in state.items()})
    if wrong:
        raise UserError(f"a U-Net like DDAD's, but its {wrong[0][0]} is missing, unknown or of another shape")
    return model_config(unet)
