"""The training loop: any network, any loss; EMA, resume, validation, logging; one process or many.

All randomness of a step follows from the seed and the step's number. So a run that was stopped at any moment and
resumed ends with the weights of an unbroken one, and several processes draw the same numbers as a single one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dbad.checkpoints.weights import load_pickle, save_pickle
from dbad.diffusion.noise import stream
from dbad.errors import UserError
from dbad.files.atomic import ensure_folders
from dbad.runtime.signals import stop_signals
from dbad.training.early_stopping import Best
from dbad.training.plan import IMAGES, Hooks, Place, Plan
from dbad.training.progress import Clock, EpochSums, Log, forecast, refusal

M = TypeVar("M", bound=nn.Module)


class StepBatches:
    """Batch sampler: for every step the list of (step, slot, index of the image) that this process computes.

    Images come in a new random order every epoch; a batch at the end of an epoch is completed from the next one.
    """

    def __init__(self, num_images: int, batch_size: int, first_step: int, num_steps: int, seed: int,
                 process: int = 0, num_processes: int = 1):
        if batch_size % num_processes:
            raise UserError(f"--batch_size {batch_size}: expected a multiple of the {num_processes} processes")
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.steps = range(first_step, num_steps)
        self.slots = range(process * batch_size // num_processes, (process + 1) * batch_size // num_processes)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        orders: dict[int, Tensor] = {}
        for step in self.steps:
            batch = []
            for slot in self.slots:
                epoch, place = divmod(step * self.batch_size + slot, self.num_images)
                if epoch not in orders:
                    orders = {k: v for k, v in orders.items() if k >= epoch - 1}
                    orders[epoch] = torch.randperm(self.num_images, generator=stream(self.seed, "order", epoch))
                batch.append((step, slot, int(orders[epoch][place])))
            yield batch

    def __len__(self) -> int:
        return len(self.steps)


def fit(model: M, data: Dataset, loss_of: Callable[[M, Any], dict[str, Tensor]], plan: Plan, place: Place, *,
        batch_size: int, device: torch.device, hooks: Hooks | None = None) -> M:
    """Train `model` and return it with its EMA weights, or with those of its best epoch if `hooks` has a `best`.

        data         data set that makes a whole batch from a list of (step, slot, index), see `StepBatches`
        loss_of      (model, batch on `device`) -> {"loss": scalar, and other scalars to log}
        batch_size   images per batch, over all processes

    A finished run is not repeated. Frozen weights are not saved: the caller's model must have them. On Ctrl-C and
    SIGTERM the step in progress is finished and saved. After `kill -9` at most `progress.SAVE_EVERY_S` seconds of work
    are repeated, more if a save takes longer than `progress.LONG_SAVE_S`. The log has the losses of an unbroken run.
    A training of more than a day on a CPU is a `UserError` after its first steps, unless `place.yes`; the files of the
    folder are then as they were.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    accelerator = Accelerator(cpu=device.type == "cpu")
    hooks = hooks or Hooks()
    main, best = accelerator.is_main_process, hooks.best
    state = _State(model.to(accelerator.device), plan, accelerator, best)
    if place.resume and place.last.is_file():
        state.restore(place.last)
    ensure_folders(diffusion_checkpoint_dir=place.folder, log_dir=place.log_dir)
    log = Log(place.folder, place.log_dir, place.phase, state.step, hooks.on_begin) if main else None
    if log:
        _say_where(log.phase, state)
        if state.finished and hooks.on_begin:
            hooks.on_begin()
    if best and not best.weights:       # nothing was restored
        state.judge(state.report(hooks.on_report) if main else {})
    if not state.finished:
        batches = StepBatches(len(cast(Sized, data)), batch_size, state.step * plan.accumulate,
                              plan.num_steps * plan.accumulate, plan.seed, accelerator.process_index,
                              accelerator.num_processes)
        # No worker processes: they inherit the signal handlers of this one, and ending them hung on a GPU.
        loader = DataLoader(data, batch_sampler=batches, pin_memory=device.type == "cuda", collate_fn=_as_is)
        _loop(accelerator, state, loader, loss_of, place, log, hooks.on_report)
    state.use_ema()
    if best:
        best.copy_to(state.trainable)
    return model


def _say_where(phase: str, state: _State) -> None:
    """Print where a training goes on, or that there is nothing to do."""
    if state.finished:
        print(f"{phase}: already trained, {state.step} steps")
    elif state.step:
        print(f"training {phase}: resuming at step {state.step} of {state.plan.num_steps}")


def _loop(accelerator: Accelerator, state: _State, loader: DataLoader, loss_of: Callable, place: Place,
          log: Log | None, on_report: Callable | None) -> None:
    """Train until the plan's end or until a signal asks to stop; only the process with a `log` reports and saves."""
    plan, clock = state.plan, Clock()
    wrapped, optimizer = accelerator.prepare(state.model, state.optimizer)
    bar = tqdm(total=plan.num_steps, initial=state.step, unit="step", desc=f"training {log.phase}" if log else None,
               disable=log is None, mininterval=1.0)
    with bar, stop_signals(lambda: clock.longest_step_s) if log else stop_signals() as asked:
        for number, batch in enumerate(loader, start=1):
            wrapped.train()
            whole = number % plan.accumulate == 0       # the step has all its batches
            with clock.network(), nullcontext() if whole else accelerator.no_sync(wrapped):
                losses = loss_of(wrapped, {key: value.to(accelerator.device) for key, value in batch.items()})
                accelerator.backward(losses["loss"] / plan.accumulate)
            state.losses.add(losses)
            if not whole:
                continue
            with clock.network():
                norm = accelerator.clip_grad_norm_(state.trainable, plan.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            state.advance()
            bar.update()
            if state.step % plan.steps_per_epoch == 0 or state.finished:
                means = state.losses.means(accelerator)
                _check_finite(means["loss"], state.step)
                means |= clock.epoch()
                bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
                with clock.aside():
                    state.judge(_report(state, log, on_report, means))
                accelerator.wait_for_everyone()
                state.losses.restart()
            step_s = clock.step()
            refused = _forecast(bar, state, step_s, accelerator, place) if step_s and log else None
            refuse, stopped, due = _together(accelerator, bool(refused), asked(), clock.save_is_due())
            if refuse:
                raise UserError(refused or "refused by the main process")
            if stopped or state.finished or due:
                _check_finite(float(losses["loss"].detach() + norm), state.step)
                with clock.saving():
                    state.save(place.last if log and log.begin() else None)
            if stopped:
                raise KeyboardInterrupt
            if state.finished:
                break


def _report(state: _State, log: Log | None, on_report: Callable | None, means: dict[str, float]) -> dict[str, float]:
    """Log the end of an epoch with its `means` and what `on_report` found; empty in a process without a log."""
    if log is None:
        return {}
    log.begin()
    found = state.report(on_report)
    log.write(state.epoch, state.step, means | found)
    return found


def _forecast(bar: tqdm, state: _State, step_s: float, accelerator: Accelerator, place: Place) -> str | None:
    """Say how long the rest of a training takes; where that is too long, return the words to refuse it with."""
    left, at_most = state.plan.num_steps - state.step, state.best is not None
    refused = None if place.yes or accelerator.device.type != "cpu" else refusal(step_s, left, at_most)
    if not state.finished and not refused:
        bar.write(f"{bar.desc}: {forecast(step_s, left, at_most)}")
    return refused


def _together(accelerator: Accelerator, *wishes: bool) -> list[bool]:
    """For each wish, True in all processes if any has it, so that they stop and save after the same step."""
    if accelerator.num_processes == 1:
        return list(wishes)
    votes = torch.tensor(wishes, dtype=torch.float32, device=accelerator.device)
    return (accelerator.reduce(votes, "sum") > 0).tolist()


def _as_is(batch: Any) -> Any:
    """Return the batch unchanged: the data set makes whole batches itself."""
    return batch


class _Part(Protocol):
    """A part of a training's state."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class _State:
    """The state of a training, and all that resuming it needs."""

    def __init__(self, model: nn.Module, plan: Plan, accelerator: Accelerator, best: Best | None = None):
        self.model, self.plan, self.best, self.step = model, plan, best, 0
        self.accelerator, self.losses = accelerator, EpochSums()
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, plan.learning_rate, betas=plan.betas,
                                           weight_decay=plan.weight_decay, fused=plan.fused or None)
        self.rate = get_scheduler(plan.schedule, self.optimizer, num_training_steps=plan.num_steps,
                                  num_warmup_steps=min(plan.warmup_steps, plan.num_steps // 10))
        self.ema = EMAModel(self.trainable, decay=plan.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75,
                            foreach=True)
        self._parts: dict[str, _Part] = {"model": model, "optimizer": self.optimizer, "rate": self.rate,
                                         "ema": self.ema}
        if best:
            self._parts["best"] = best

    @property
    def finished(self) -> bool:
        return self.step >= self.plan.num_steps or (self.best is not None and self.best.exhausted)

    @property
    def epoch(self) -> int:
        """The epoch in progress, or the one that has just ended; from 1."""
        return -(-self.step // self.plan.steps_per_epoch)

    def advance(self) -> None:
        """Update the learning rate and the moving average after a step of the optimiser."""
        self.rate.step()
        self.ema.step(self.trainable)
        self.step += 1

    def report(self, on_report: Callable[[Any, int], dict[str, float]] | None) -> dict[str, float]:
        """The learning rate and, every `report_every` epochs and at the end, the values of `on_report` for the EMA."""
        found = {"learning_rate": float(self.rate.get_last_lr()[0])}
        if on_report and (self.epoch % self.plan.report_every == 0 or self.finished):
            self.ema.store(self.trainable)
            self.use_ema()
            self.model.eval()
            found |= on_report(self.model, self.epoch)
            self.ema.restore(self.trainable)
        return found

    def judge(self, found: dict[str, float]) -> None:
        """Pass the held-out loss, which only the main process has `found`, to the `Best` of every process."""
        if self.best:
            loss = torch.tensor(found["val_loss"] if found else 0.0, device=self.accelerator.device)
            self.best.judge(self.epoch, float(self.accelerator.reduce(loss, "sum")), self.ema.shadow_params)

    def use_ema(self) -> None:
        self.ema.copy_to(self.trainable)

    def frozen(self) -> dict[str, Tensor]:
        """The weights that are not trained, by their names in the model's state."""
        names = {name for name, p in self.model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        return {name: value for name, value in self.model.state_dict().items() if name in names}

    def save(self, path: Path | None) -> None:
        """Write the file that `restore` reads. All processes must call it together; no file without a `path`."""
        losses = self.losses.state(self.accelerator)
        if path is None:
            return
        parts = {key: part.state_dict() for key, part in self._parts.items()}
        for name in self.frozen():
            del parts["model"][name]
        save_pickle({**parts, "step": self.step, "settings": self.plan.settings, "epoch": losses}, path)

    def restore(self, path: Path) -> None:
        """Load a file of `save`; a state that was trained with other settings is a `UserError`."""
        saved = load_pickle(path, "move it away, or give --no_resume, to begin again")
        if not isinstance(saved, dict) or not {*self._parts, "step", "settings"} <= saved.keys():
            raise UserError(f"{path}: not a training state; move it away, or give --no_resume to begin again")
        now, then = self.plan.settings, saved["settings"]
        other = sorted((key for key in now.keys() | then.keys() if now.get(key) != then.get(key)),
                       key=lambda name: (name == IMAGES, name not in now.keys() & then.keys(), name))
        if other:
            name = other[0]
            how = "on other images" if name == IMAGES else f"with --{name} {then.get(name)}, now it is {now.get(name)}"
            raise UserError(f"{path}: was trained {how}; give the same options to go on, --no_resume to begin again, "
                            "or another --run_id")
        saved["model"] = self.frozen() | saved["model"]
        for key, part in self._parts.items():
            part.load_state_dict(saved[key])
        self.ema.to(self.trainable[0].device)
        self.step = saved["step"]
        if "epoch" in saved:            # missing in older files: the epoch's mean is then over its remaining steps
            self.losses.restore(saved["epoch"], self.accelerator)


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise UserError(f"the training loss or its gradient became {loss} by step {step}; try a smaller "
                        "--learning_rate, --precision fp32, or look for broken images")
