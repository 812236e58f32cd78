"""A CUDA device on a machine that has none: tensors without values that know where they are.

    with cuda_device() as device:
        with torch.device(device):
            net = build_unet(...)
        net(images.to(device))      # runs, and fails where tensors of two devices meet

torch's fake tensors carry shape, type and device through every operation. Whatever asks for values (`float(x)`,
`x.cpu().numpy()`, `x[mask]`) gets made-up ones, so that whole searches run; they say nothing but where a tensor is.
There are no gradients: torch's backward pass asks for a driver.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dbad import maps

_numpy = Tensor.numpy


class _Mode(FakeTensorMode):
    """Fake tensors that answer questions about their values, each time by a larger number below 1."""

    asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        ops = torch.ops.aten
        if func is ops._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            self.asked += 1
            return self.asked / (self.asked + 10) if args[0].is_floating_point() else 1
        if func in (ops.index.Tensor, ops.index_put_.default):
            args = (args[0], [_numbers(index) for index in args[1]], *args[2:])
        if func is ops.nonzero.default:
            return _numbers(args[0])[:, None]
        if func is ops.bincount.default:
            return torch.zeros(args[-1], dtype=torch.float64, device=args[0].device)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _numbers(index: Tensor | None) -> Tensor | None:
    """A mask of one dimension as the numbers of all that it is about: how many are true, fake tensors cannot know."""
    if index is None or index.dtype != torch.bool:
        return index
    return torch.arange(len(index), device=index.device)


def _values(self: Tensor, **how) -> np.ndarray:
    """`Tensor.numpy` with made-up values; refused for tensors that are not on the CPU, as torch does."""
    if not isinstance(self, FakeTensor):
        return _numpy(self, **how)
    if self.device.type != "cpu":
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")
    kind = str(self.dtype).removeprefix("torch.")
    random = np.random.default_rng(0)
    found = random.random(tuple(self.shape)) if self.is_floating_point() else random.integers(0, 2, tuple(self.shape))
    return found.astype(kind)


def _moved(module: nn.Module, *args, **kwargs) -> nn.Module:
    """`nn.Module.to`, which cannot make a fake parameter of a real one in place."""
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                kind = dtype if value.is_floating_point() else None
                part._parameters[name] = nn.Parameter(value.detach().to(device, kind), value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = value.to(device, dtype if value.is_floating_point() else None)
    return module


@contextmanager
def cuda_device() -> Iterator[torch.device]:
    """The device; tensors that are made or used inside are fake, and modules that are moved become so."""
    with ExitStack() as stack:
        stack.enter_context(_Mode(allow_non_fake_inputs=True))
        stack.enter_context(mock.patch.object(nn.Module, "to", _moved))
        stack.enter_context(mock.patch.object(Tensor, "numpy", _values))
        stack.callback(maps._blur_matrix.cache_clear)      # it would hand on fake ones
        yield torch.device("cuda")
