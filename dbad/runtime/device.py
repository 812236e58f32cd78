"""The machine that networks run on: device, number format, memory order."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, cast

import torch

from dbad.errors import UserError


class Machine(NamedTuple):
    """The machine of networks: the device, their precision "fp32" or "bf16", and the number of images per batch."""

    device: torch.device
    precision: str
    batch_size: int

    @classmethod
    def of(cls, device: str = "auto", precision: str = "auto", batch_size: int = 8) -> Machine:
        """The machine that --device, --precision and --batch_size name."""
        chosen = pick_device(device)
        return cls(chosen, pick_precision(precision, chosen), batch_size)


def pick_device(name: str) -> torch.device:
    """The torch device for `--device`; auto takes CUDA, else MPS, else the CPU. A missing device is an error."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; try --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: this machine has no MPS device; try --device cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        _be_repeatable()
    return device


def _be_repeatable() -> None:
    """Make CUDA give the same bits for the same seed, and compute in float32 if float32 is set.

    By default, convolutions in float32 are computed in tf32, with the mantissa of a half; features and scores then
    differ from those of a CPU by up to a hundredth. Attention uses the one kernel that is made of plain products. The
    fused ones (flash, memory-efficient, cuDNN) add up gradients in the order in which blocks of threads end, which
    differs every time. The plain kernel takes more memory, the square of the number of places.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # read when the first product is computed
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    torch.use_deterministic_algorithms(True, warn_only=True)
    attend(fused=False)
    # Filling them costs a write of every output. The attribute is made at run time, so no type says that it is there.
    cast(Any, torch.utils.deterministic).fill_uninitialized_memory = False
    warnings.filterwarnings("ignore", ".*does not have a deterministic implementation.*")


def attend(fused: bool) -> None:
    """Allow CUDA's fused attention kernels if `fused`, else only plain products, whose gradients are repeatable."""
    cuda = torch.backends.cuda
    cuda.enable_math_sdp(True)
    cuda.enable_flash_sdp(fused)
    cuda.enable_mem_efficient_sdp(fused)
    if hasattr(cuda, "enable_cudnn_sdp"):       # since torch 2.5
        cuda.enable_cudnn_sdp(fused)


def pick_precision(name: str, device: torch.device) -> str:
    """The precision for `--precision`, "fp32" or "bf16"; auto takes bf16 if the processor computes in it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and _cpu_has("amx_bf16", "avx512_bf16") else "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context in which networks run: convolutions and products in `precision`, sums and norms in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def memory_format(device: torch.device) -> torch.memory_format:
    """The fastest memory order: channels last on tensor cores and AMX, by several times; elsewhere the plain order."""
    fast = device.type == "cuda" or (device.type == "cpu" and _cpu_has("amx_bf16"))
    return torch.channels_last if fast else torch.contiguous_format


def place(network: torch.nn.Module, device: torch.device, order: torch.memory_format = torch.preserve_format) -> None:
    """Move a network to the device, in place and in eval mode, with its weights in the memory `order`.

    A network that is there already is left alone, as its first parameter tells: walking through all of them takes as
    long as making an anomaly map.
    """
    first = next(network.parameters(), None)
    if first is not None and not network.training and first.device.type == device.type and (
            device.index in (None, first.device.index)) and (
            order is torch.preserve_format or first.dim() != 4 or first.is_contiguous(memory_format=order)):
        return
    network.to(device=device, memory_format=order).eval()       # ty: ignore[no-matching-overload]  not in torch's stubs


def packs_weights(device: torch.device) -> bool:
    """True if convolutions in bf16 on `device` can keep their weights in the order that its kernels need."""
    return (device.type == "cpu" and _cpu_has("amx_bf16", "avx512_bf16") and torch.backends.mkldnn.is_available()
            and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight"))


def _cpu_has(*features: str) -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(feature) for feature in features)


class MemoryOptions(Protocol):
    """The options that a training's use of memory depends on, beside those whose names `memory_advice` gets."""

    @property
    def gradient_checkpointing(self) -> bool: ...

    @property
    def precision(self) -> str: ...


@contextlib.contextmanager
def memory_advice(options: MemoryOptions, batch_size: str, accumulate: str, *others: str, otherwise: str
                  ) -> Iterator[None]:
    """Turn an out-of-memory error into a line that says what to change; the first changes hardly affect the result.

        batch_size, accumulate, others   names of the options that determine the memory needed
        otherwise                        the last resort, in words
    """
    try:
        yield
    except torch.OutOfMemoryError:
        now = ", ".join(f"--{name} {getattr(options, name)}" for name in (batch_size, accumulate, *others))
        images, batches = getattr(options, batch_size), getattr(options, accumulate)
        ways = [f"--{batch_size} {images // 2} --{accumulate} {batches * 2}"] * (images > 1)
        ways += ["--gradient_checkpointing"] * (not options.gradient_checkpointing)
        ways += ["--precision bf16"] * (options.precision != "bf16") + [otherwise]
        raise UserError(f"the device ran out of memory with {now}; try {', or '.join(ways)}") from None
