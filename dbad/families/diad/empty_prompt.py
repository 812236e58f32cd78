"""The embedding of the empty prompt, from the weights of Stable Diffusion's text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbad.errors import UserError
from dbad.families.diad.model import PROMPT_TOKENS
from dbad.families.diad.single_files import under


def prompt_of(text: Mapping[str, Tensor], path: Path) -> Tensor:
    """`empty_prompt` of the text encoder in the file `path`; another encoder than CLIP's is a `UserError`."""
    try:
        return empty_prompt(text)
    except (KeyError, StopIteration, RuntimeError):
        raise UserError(f"{path}: its text encoder is not CLIP's as in Stable Diffusion 1.5") from None


@torch.no_grad()
def empty_prompt(state: Mapping[str, Tensor]) -> Tensor:
    """The embedding of an empty prompt by CLIP's text encoder (arXiv:2103.00020), (1, 77, width) float32.

        state   the state dict of the text encoder, under any prefix

    An empty prompt is one token for its beginning, the last but one of the vocabulary, and then tokens for its end, the
    last of the vocabulary. Layers normalise first, attend to earlier tokens only, and have heads of 64 channels.
    """
    last = "embeddings.token_embedding.weight"
    state = under(state, next(key for key in state if key.endswith(last)).removesuffix(last))
    tokens, positions = state[last], state["embeddings.position_embedding.weight"]
    ids = torch.tensor([len(tokens) - 2] + [len(tokens) - 1] * (PROMPT_TOKENS - 1))
    x = (tokens[ids] + positions[:PROMPT_TOKENS]).float()[None]
    causal = nn.Transformer.generate_square_subsequent_mask(PROMPT_TOKENS)
    for index in range(sum(key.endswith("layer_norm1.weight") for key in state)):
        x = _text_layer(under(state, f"encoder.layers.{index}."))(x, src_mask=causal)
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
