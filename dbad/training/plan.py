"""The settings of a training: its length and speed, its folders, and its callbacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbad.files.names import last_file
from dbad.training.early_stopping import Best

IMAGES = "images"       # the setting that holds the fingerprint of the training images


@dataclass(frozen=True)
class Plan:
    """The length and speed of a training by AdamW.

        num_steps          optimiser steps
        steps_per_epoch    steps after which the mean loss is logged
        report_every       epochs between calls of `on_report` (validation, samples, checkpoints)
        settings           plain values that shape the result; a run resumes only with equal settings
        accumulate         batches whose mean gradient makes a step; each counts as a step of `StepBatches`
        schedule           of the learning rate: "cosine" falls to 0 after warm-up, "constant" has neither
        fused              AdamW in one kernel: faster, less memory, different rounding
    """

    num_steps: int
    steps_per_epoch: int
    report_every: int
    learning_rate: float
    warmup_steps: int
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = 1e-6
    betas: tuple[float, float] = (0.95, 0.999)
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999
    accumulate: int = 1
    schedule: str = "cosine"
    fused: bool = False


@dataclass(frozen=True)
class Place:
    """The folders that a training writes to, and whether it resumes from them.

        folder     run folder, made if it is missing: one line per epoch in log.jsonl, and the last state
        log_dir    folder of TensorBoard's events, one sub-folder per phase
        phase      name of the training in logs and progress bars
        resume     resume from the last state, if there is one
        yes        train even if it takes more than a day on a CPU
    """

    folder: Path
    log_dir: Path
    phase: str
    resume: bool = True
    yes: bool = False

    @property
    def last(self) -> Path:
        """The file of the last state: last.pt of the phase "diffusion", <phase>_last.pt of any other."""
        return self.folder / last_file(self.phase)


@dataclass(frozen=True)
class Hooks:
    """Callbacks of a training; only the main process calls them.

        on_begin     called once it is certain that the run can start or resume, and does not take too long
        on_report    called with the EMA model and the epoch; its result is logged
        best         stops the training early, by the "val_loss" that `on_report` must then return, first for epoch 0
    """

    on_begin: Callable[[], None] | None = None
    on_report: Callable[[Any, int], dict[str, float]] | None = None
    best: Best | None = None
