"""The time of a training step, tried on random data before there is a training; nothing is read or written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from dbad.training.progress import forecast, refusal

LIMIT_S = 12.0      # a step that takes longer is broken off
NUM_TRIED = 4       # steps that are measured, after a first one that is slower

M = TypeVar("M", bound=nn.Module)


class _OutOfTime(Exception):
    """The time for a trial is over."""


def say_forecast(phase: str, model: M, data: Any, loss_of: Callable[[M, dict[str, Tensor]], dict[str, Tensor]],
                 num_steps: int, *, device: torch.device, accumulate: int = 1, at_most: bool = False) -> None:
    """Print how long a training of `num_steps` steps takes, and whether it is refused without --yes.

    The other arguments are those of `loop.fit`; `data` is a data set like the training's, of as many random images as a
    batch has. Where a step takes longer than `LIMIT_S`, "at least" is printed.
    """
    batch = data.__getitems__([(0, slot, slot) for slot in range(len(data))])
    batch_s, whole = batch_seconds(model.to(device), {name: value.to(device) for name, value in batch.items()}, loss_of)
    step_s = batch_s * accumulate
    words = forecast(step_s, num_steps, at_most and whole)
    too_long = device.type == "cpu" and refusal(step_s, num_steps)
    print(f"training {phase}: {words if whole else words.replace('about', 'at least', 1)}"
          + "; it needs --yes, being more than a day on a CPU" * bool(too_long))


def batch_seconds(model: M, batch: dict[str, Tensor], loss_of: Callable[[M, dict[str, Tensor]], dict[str, Tensor]]
                  ) -> tuple[float, bool]:
    """The seconds of a training step on a batch; False beside them if it was broken off after `LIMIT_S`."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer, average = torch.optim.AdamW(trainable, lr=0.0), EMAModel(trainable, foreach=True)
    model.train()
    begun = before = time.monotonic()
    taken: list[float] = []
    try:
        with _limited(begun + LIMIT_S):
            while len(taken) <= NUM_TRIED and time.monotonic() - begun <= LIMIT_S / 2:
                before = time.monotonic()
                loss = loss_of(model, batch)["loss"]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                average.step(trainable)
                float(loss.detach())      # waits for an accelerator
                taken.append(time.monotonic() - before)
    except _OutOfTime:
        if not taken:
            return time.monotonic() - before, False
    measured = taken[1:] or taken
    return sum(measured) / len(measured), True


@contextmanager
def _limited(deadline: float) -> Iterator[None]:
    """Raise `_OutOfTime` in the first layer, on the way forwards or back, that ends after the deadline."""
    def check(*_: Any) -> None:
        if time.monotonic() > deadline:
            raise _OutOfTime

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:
        check()
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(check)

    handle = nn.modules.module.register_module_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()
