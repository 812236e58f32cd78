"""The progress of a training: the mean losses of an epoch, the time it takes, and the log of both."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dbad.checkpoints.weights import log_line, trim_log
from dbad.files.atomic import cannot_be_written

SAVE_EVERY_S = 60       # the most work that a power cut can cost
LONG_SAVE_S = 6         # if a save takes longer, saves become rarer in proportion
WARM_UP_STEPS = 3       # slower than the others: memory is allocated, kernels are chosen
LONG_STEP_S = 10.0      # one longer step is enough to measure the time of a step, even if it is the slow first one
MEASURED_S = 2.0        # otherwise the time of a step is a mean over at least this long
LONGEST_S = 86_400.0    # a longer training on a CPU needs the user's agreement


class EpochSums:
    """The losses of the epoch so far, summed over its batches by this process."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of a batch."""
        for key, value in losses.items():
            self.sums[key] = self.sums.get(key, 0) + value.detach()
        self.count += 1

    def restart(self) -> None:
        """Reset the sums for a new epoch."""
        self.sums, self.count = {}, 0

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Mean losses over the batches and all processes, which must call it together."""
        return {key: float(accelerator.reduce(value / self.count, "mean")) for key, value in self.sums.items()}

    def state(self, accelerator: Accelerator) -> dict[str, Any]:
        """The state for `restore`: for each loss the sums of all processes (P,), which must call it together."""
        return {"count": self.count, "sums": {
            key: accelerator.gather(value.reshape(1)).cpu() for key, value in self.sums.items()}}

    def restore(self, state: Mapping[str, Any], accelerator: Accelerator) -> None:
        """Continue from a `state`. If the number of processes has changed, each takes the mean of the sums."""
        self.count, shares = state["count"], accelerator.num_processes
        for key, values in state["sums"].items():
            own = values[accelerator.process_index] if len(values) == shares else values.sum() / len(values)
            self.sums[key] = own.to(accelerator.device)


class Clock:
    """Seconds of an epoch and of a step; `outside_network` is the share of time not spent in the network.

    On a GPU the network is computed while the loop goes on, so the share is meaningful on a CPU only. Every step on a
    GPU, except the first, waits for the one before.
    """

    def __init__(self):
        self.longest_step_s: float | None = None
        self._saved = self._begun = self._step_begun = time.monotonic()
        self._pause_s, self._network_s, self._aside_s = SAVE_EVERY_S, 0.0, 0.0
        self._steps, self._measured_s, self._step_is_known = 0, 0.0, False

    @contextmanager
    def network(self) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self._network_s += time.monotonic() - begun

    def epoch(self) -> dict[str, float]:
        """End an epoch: its seconds, and the share of them outside the network. The next one begins at once."""
        now = time.monotonic()
        seconds, network_s = now - self._begun, self._network_s
        self._begun, self._network_s = now, 0.0
        return {"seconds": round(seconds, 3), "outside_network": round(1 - network_s / seconds, 4)}

    def step(self) -> float | None:
        """End a step. Once, after the first steps, returns the seconds that a step takes; otherwise None."""
        now = time.monotonic()
        self.longest_step_s = max(now - self._step_begun, self.longest_step_s or 0.0)
        worked_s = now - self._step_begun - self._aside_s
        self._step_begun, self._aside_s = now, 0.0
        self._steps += 1
        if self._step_is_known:
            return None
        if worked_s > LONG_STEP_S:
            self._step_is_known = True
            return worked_s
        if self._steps <= WARM_UP_STEPS:
            return None
        self._measured_s += worked_s
        self._step_is_known = self._measured_s >= MEASURED_S
        return self._measured_s / (self._steps - WARM_UP_STEPS) if self._step_is_known else None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the time of the block out of the time of the step."""
        begun = time.monotonic()
        yield
        self._aside_s += time.monotonic() - begun

    def save_is_due(self) -> bool:
        return time.monotonic() - self._saved > self._pause_s

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Time a save: the longer it takes, the later the next one is due."""
        begun = time.monotonic()
        with self.aside():
            yield
        self._saved = time.monotonic()
        self._pause_s = SAVE_EVERY_S * max(1.0, (self._saved - begun) / LONG_SAVE_S)


def refusal(step_s: float, num_steps: int, at_most: bool = False) -> str | None:
    """The reason not to train so many steps on a CPU; None if they take less than `LONGEST_S`."""
    if step_s * num_steps <= LONGEST_S:
        return None
    return (f"{forecast(step_s, num_steps, at_most)} on this CPU; expected less than a day: try --preset small, or "
            "give --yes")


def forecast(step_s: float, num_steps: int, at_most: bool = False) -> str:
    """The time that the steps will take, in words: about 12 minutes (0.48 s/step, 1500 steps)."""
    seconds = max(1.0, step_s * num_steps)
    size, unit = next((size, unit) for size, unit in (
        (86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds")) if seconds >= 2 * size or size == 1)
    return (f"{'at most ' if at_most else ''}about {_shown(seconds / size)} {unit} "
            f"({_shown(step_s)} s/step, {num_steps} steps)")


def _shown(value: float) -> str:
    """The number with two digits, without a fraction from 10 on."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


class Log:
    """The run's log.jsonl and the TensorBoard events of a phase, without duplicates after a resume.

    Lines and events after `step` belong to work that is repeated: lines are removed, TensorBoard hides the events.
    Nothing is changed before `begin`, which also calls `on_begin`.
    """

    def __init__(self, folder: Path, log_dir: Path, phase: str, step: int,
                 on_begin: Callable[[], None] | None = None):
        self.folder, self.log_dir, self.phase = folder, log_dir / phase, phase
        self._step, self._on_begin = step, on_begin
        self._events: SummaryWriter | None = None

    def begin(self) -> SummaryWriter:
        """Prepare the folders for what the training writes, the first time it is called; gives TensorBoard's file."""
        if self._events is None:
            if self._on_begin:
                self._on_begin()
            trim_log(self.folder, self.phase, self._step)
            with cannot_be_written(self.log_dir):
                self._events = SummaryWriter(str(self.log_dir), purge_step=self._step + 1)
        return self._events

    def write(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Log a finished epoch."""
        events = self.begin()
        log_line(self.folder, json.dumps({"phase": self.phase, "epoch": epoch, "step": step, **values}))
        with cannot_be_written(self.log_dir):
            for key, value in values.items():
                events.add_scalar(f"{self.phase}/{key}", value, step)
            events.flush()
