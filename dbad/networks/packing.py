"""Prepare models for inference: number format, memory format, and weights in the layout of the CPU's kernels."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from dbad.runtime.device import packs_weights

M = TypeVar("M", bound=nn.Module)


class PackedConv2d(nn.Module):
    """A convolution whose weights are converted to the layout of oneDNN's kernels once, not at every call.

    Calls with another input shape than the first are correct, but may be slower. The output is bfloat16, like the
    weights. There are no gradients, and the state_dict has no weights.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.how = conv.padding, conv.stride, conv.dilation, conv.groups
        self.bias, self.packed = conv.bias, None
        self.weight: Tensor | None = conv.weight        # None once it is packed

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.bfloat16)
        if self.packed is None:         # the best layout depends on the shape
            assert self.weight is not None
            weight, self.weight = self.weight.detach().to_mkldnn(), None        # keeps one copy, not two
            self.packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight, *self.how, x.shape)  # ty: ignore
        return torch.ops.mkldnn._convolution_pointwise(x, self.packed, self.bias, *self.how, "none", [], "")


def ready(model: M, device: torch.device, precision: str) -> M:
    """Prepare `model` for inference on `device` and return it; it can no longer be trained or saved.

    With `precision` bf16 the weights become bfloat16, so that autocast does not cast them at every call.
    """
    model = nn.Module.to(model.eval().requires_grad_(False), device, torch.bfloat16 if precision == "bf16" else None)
    model = nn.Module.to(model, memory_format=torch.channels_last)
    if precision == "bf16" and packs_weights(device):
        _pack(model)
    return model


def _pack(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child) is nn.Conv2d and child.padding_mode == "zeros" and isinstance(child.padding, tuple):
            setattr(module, name, PackedConv2d(child))
        else:
            _pack(child)
