"""The training loop: stopped anywhere and gone on with, it ends where an unbroken run does."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from helpers import CPU, one_line, random_images, tiny_unet
from torch import nn
from torch.nn import functional as F

from dbad.diffusion.batches import NoisedImages, denoising_loss, validation_loss
from dbad.diffusion.ddim import schedule
from dbad.diffusion.noise import draw, stream
from dbad.errors import UserError
from dbad.files.names import LAST, LOG
from dbad.training import progress
from dbad.training.loop import StepBatches, fit
from dbad.training.plan import Hooks, Place, Plan

ABAR = schedule(1000, "linear")
NUM_STEPS = 11
PLAN = Plan(num_steps=NUM_STEPS, steps_per_epoch=3, report_every=2, learning_rate=1e-2, warmup_steps=2, seed=5,
            settings={"seed": 5, "channels": [32, 32]})


class Pictures(torch.utils.data.Dataset):
    """Images whose grain follows from the step and the slot, as in a training."""

    def __init__(self, num_images: int = 7):
        self.images = random_images(num_images, 4)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, wanted):
        grain = draw("gaussian", (3, 4, 4), [stream(0, step, slot) for step, slot, _ in wanted])
        return {"image": self.images[[index for _, _, index in wanted]], "noise": grain,
                "step": torch.tensor([step for step, _, _ in wanted])}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))


def loss_of(model, batch):
    return {"loss": F.mse_loss(model(batch["image"] + batch["noise"]), batch["image"])}


def failing_at(step: int, failure):
    """`loss_of` that calls `failure` before the loss of the given step (counted from 1) is computed."""
    def loss(model, batch):
        if int(batch["step"][0]) + 1 == step:
            failure()
        return loss_of(model, batch)
    return loss


def raise_interrupt():
    raise KeyboardInterrupt


def train(folder: Path, loss=loss_of, plan: Plan = PLAN, model: nn.Module | None = None, phase: str = "diffusion",
          resume: bool = True, device: torch.device = CPU, **hooks) -> nn.Module:
    folder.mkdir(exist_ok=True)
    return fit(model or network(), Pictures(), loss, plan, Place(folder, folder / "events", phase, resume),
               batch_size=4, device=device, hooks=Hooks(**hooks))


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def logged(folder: Path) -> list[dict]:
    """The log but for times, which no two runs have in common."""
    return [{key: value for key, value in line.items() if key not in ("seconds", "outside_network")}
            for line in log(folder)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return train(folder), folder


# Stopped and gone on with

def test_the_same_training_ends_with_the_same_weights(unbroken, tmp_path):
    assert same(train(tmp_path), unbroken[0])
    assert not same(train(tmp_path / "other", plan=dataclasses.replace(PLAN, seed=6)), unbroken[0])


@pytest.mark.parametrize("step", range(1, NUM_STEPS + 1))
def test_stopped_at_any_step_and_gone_on_with_it_ends_as_an_unbroken_run(step, unbroken, tmp_path):
    """Ctrl-C: the step in progress is finished and saved."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, failing_at(step, lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert torch.load(tmp_path / LAST, weights_only=True)["step"] == step
    seen = []
    resumed = train(tmp_path, lambda model, batch: seen.append(int(batch["step"][0])) or loss_of(model, batch))
    assert seen == list(range(step, NUM_STEPS))
    assert same(resumed, unbroken[0]) and logged(tmp_path) == logged(unbroken[1])


@pytest.mark.parametrize("step, saved", [(2, 1), (6, 5), (7, 6), (11, 10)])
def test_broken_off_within_a_step_it_goes_on_from_the_last_save(step, saved, unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SAVE_EVERY_S", 0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, failing_at(step, raise_interrupt))
    assert torch.load(tmp_path / LAST, weights_only=True)["step"] == saved
    assert same(train(tmp_path), unbroken[0]) and logged(tmp_path) == logged(unbroken[1])


def test_broken_off_before_anything_was_saved_it_begins_again(unbroken, tmp_path):
    """Lines of the log that belong to lost work are not there twice."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, failing_at(8, raise_interrupt))
    assert not (tmp_path / LAST).exists() and [line["step"] for line in log(tmp_path)] == [3, 6]
    assert same(train(tmp_path), unbroken[0]) and logged(tmp_path) == logged(unbroken[1])


def test_broken_off_and_gone_on_with_many_times_nothing_is_different(unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SAVE_EVERY_S", 0)
    for step in (2, 3, 4, 7, 10):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, failing_at(step, raise_interrupt))
    assert same(train(tmp_path), unbroken[0]) and logged(tmp_path) == logged(unbroken[1])


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import test_training
from dbad.training import progress
progress.SAVE_EVERY_S = 0
test_training.train(Path(sys.argv[1]), test_training.failing_at(5, lambda: os.kill(os.getpid(), signal.SIGKILL)))
"""


def test_after_kill_9_in_the_middle_of_an_epoch_it_goes_on_from_the_last_save(unbroken, tmp_path):
    """The mean loss of the epoch is that over all of its steps, also those before the kill."""
    here = Path(__file__).parent
    code = CHILD.format(paths=[str(here), str(here.parent)])
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert torch.load(tmp_path / LAST, weights_only=True)["step"] == 4      # the second of the three of an epoch
    assert same(train(tmp_path), unbroken[0]) and logged(tmp_path) == logged(unbroken[1])


def test_a_state_of_before_the_epoch_s_losses_were_kept_is_gone_on_with(unbroken, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, failing_at(5, lambda: os.kill(os.getpid(), signal.SIGINT)))
    state = torch.load(tmp_path / LAST, weights_only=True)
    del state["epoch"]
    torch.save(state, tmp_path / LAST)
    assert same(train(tmp_path), unbroken[0])
    assert [line["step"] for line in log(tmp_path)] == [3, 6, 9, 11]


def test_a_damaged_state_is_told_and_left_alone(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, failing_at(5, lambda: os.kill(os.getpid(), signal.SIGINT)))
    weight = torch.load(tmp_path / LAST, weights_only=True)["model"]["0.weight"].numpy().tobytes()
    content = bytearray((tmp_path / LAST).read_bytes())
    content[content.index(weight) + 7] ^= 1
    (tmp_path / LAST).write_bytes(content)
    with pytest.raises(UserError, match="last.pt: damaged .*; move it away, or give --no_resume, to begin again"
                       ) as error:
        train(tmp_path)
    one_line(error)
    assert (tmp_path / LAST).read_bytes() == content


def test_an_unfinished_line_of_the_log_does_not_keep_a_run_from_going_on(unbroken, tmp_path):
    """A power cut may leave half a line."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, failing_at(4, lambda: os.kill(os.getpid(), signal.SIGINT)))
    with open(tmp_path / LOG, "a") as file:
        file.write('{"phase": "diffusion", "epo')
    assert same(train(tmp_path), unbroken[0])
    assert [line["step"] for line in log(tmp_path)] == [3, 6, 9, 11]


def test_a_finished_run_is_not_repeated(unbroken, tmp_path):
    train(tmp_path)
    content = (tmp_path / LOG).read_bytes(), (tmp_path / LAST).read_bytes()

    def never(model, batch):
        raise AssertionError("a finished run was trained on")

    assert same(train(tmp_path, never, model=network(seed=9)), unbroken[0])
    assert content == ((tmp_path / LOG).read_bytes(), (tmp_path / LAST).read_bytes())


def test_without_resume_it_begins_again(unbroken, tmp_path):
    train(tmp_path, model=network(seed=9))
    assert same(train(tmp_path, resume=False), unbroken[0])
    assert [line["step"] for line in log(tmp_path)] == [3, 6, 9, 11]


@pytest.mark.parametrize("settings", [{"seed": 6, "channels": [32, 32]}, {"seed": 5}, {"seed": 5, "channels": [32]},
                                      PLAN.settings | {"flip": True}])
def test_a_run_is_not_gone_on_with_under_other_settings(settings, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, failing_at(4, lambda: os.kill(os.getpid(), signal.SIGINT)))
    begun, before = [], (tmp_path / LAST).read_bytes()
    with pytest.raises(UserError, match="was trained with --.*--no_resume") as error:
        train(tmp_path, plan=dataclasses.replace(PLAN, settings=settings), on_begin=lambda: begun.append(1))
    assert str(tmp_path / LAST) in one_line(error)
    assert not begun and (tmp_path / LAST).read_bytes() == before


@pytest.mark.parametrize("content", [{"a": 1}, [1], {"model": {}, "step": 1}])
def test_a_file_that_is_no_training_state_is_refused(content, tmp_path):
    torch.save(content, tmp_path / LAST)
    with pytest.raises(UserError, match="not a training state") as error:
        train(tmp_path)
    assert str(tmp_path / LAST) in one_line(error)


def test_two_phases_keep_their_states_and_lines_apart(unbroken, tmp_path):
    train(tmp_path)
    train(tmp_path, phase="extractor")
    assert {p.name for p in tmp_path.glob("*.pt")} == {LAST, f"extractor_{LAST}"}
    assert [(line["phase"], line["step"]) for line in log(tmp_path)] == [
        (phase, step) for phase in ("diffusion", "extractor") for step in (3, 6, 9, 11)]


def test_the_averaged_weights_are_on_the_device_of_the_network_when_a_run_goes_on(tmp_path, monkeypatch):
    """They are read onto the CPU, so that they have to be moved after they were read."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, failing_at(4, lambda: os.kill(os.getpid(), signal.SIGINT)))
    calls = []
    load, to, step = EMAModel.load_state_dict, EMAModel.to, EMAModel.step
    monkeypatch.setattr(EMAModel, "load_state_dict", lambda self, state: calls.append("load") or load(self, state))
    monkeypatch.setattr(EMAModel, "to", lambda self, *a, **k: calls.append("to") or to(self, *a, **k))
    monkeypatch.setattr(EMAModel, "step", lambda self, p: calls.append("step") or step(self, p))
    train(tmp_path)
    assert "to" in calls[calls.index("load"):calls.index("step")]


@pytest.fixture
def fresh_accelerate():
    """accelerate remembers the first device of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("fresh_accelerate")
def test_on_a_gpu_a_stopped_run_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, failing_at(4, lambda: os.kill(os.getpid(), signal.SIGINT)), device=torch.device("cuda"))
    model = train(tmp_path, device=torch.device("cuda"))
    assert next(model.parameters()).is_cuda and [line["step"] for line in log(tmp_path)][-1] == NUM_STEPS


# What a training does

def test_training_lowers_the_loss(tmp_path):
    plan = dataclasses.replace(PLAN, num_steps=120, steps_per_epoch=20, report_every=100)
    train(tmp_path, plan=plan)
    losses = [line["loss"] for line in log(tmp_path)]
    assert losses[-1] < 0.8 * losses[0]


def test_the_fused_optimiser_comes_to_the_same_weights_but_for_rounding_and_goes_on(unbroken, tmp_path):
    plan = dataclasses.replace(PLAN, fused=True)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, failing_at(5, lambda: os.kill(os.getpid(), signal.SIGINT)), plan)
    resumed = train(tmp_path, plan=plan)
    assert not same(resumed, network())
    for found, expected in zip(resumed.parameters(), unbroken[0].parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_model_comes_back_with_its_averaged_weights(tmp_path):
    """They follow from EMA with warm-up: decay 1 - (1 + k)^(-3/4), at most 0.9999, after k + 1 steps."""
    history = []

    def remember(model, batch):
        history.append([p.detach().clone() for p in model.parameters()])
        return loss_of(model, batch)

    model = train(tmp_path, remember)
    history.append(list(torch.load(tmp_path / LAST, weights_only=True)["model"].values()))
    average = history[0]
    for k, weights in enumerate(history[1:]):
        decay = max(0.0, min(1 - (1 + k) ** -0.75, PLAN.ema_decay))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)]
    for found, expected in zip(model.parameters(), average, strict=True):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-6)


def test_reports_see_the_averaged_weights_and_leave_the_training_as_it_is(unbroken, tmp_path):
    reports = []

    def report(model, epoch):
        reports.append((epoch, model.training, [p.detach().clone() for p in model.parameters()]))
        return {"val_loss": 1.5 * epoch}

    model = train(tmp_path, on_report=report)
    assert same(model, unbroken[0])
    assert [(epoch, in_training) for epoch, in_training, _ in reports] == [(2, False), (4, False)]
    assert all(torch.equal(a, b) for a, b in zip(reports[-1][2], model.parameters(), strict=True))
    assert [line.get("val_loss") for line in log(tmp_path)] == [None, 3.0, None, 6.0]


def test_the_log_has_the_mean_loss_of_each_epoch(tmp_path):
    losses = []

    def remember(model, batch):
        result = loss_of(model, batch)
        losses.append(float(result["loss"].detach()))
        return result | {"weight": torch.tensor(2.0)}

    train(tmp_path, remember)
    lines = log(tmp_path)
    for line, part in zip(lines, (losses[:3], losses[3:6], losses[6:9], losses[9:]), strict=True):
        assert line["loss"] == pytest.approx(sum(part) / len(part), rel=1e-5) and line["weight"] == 2
        assert line["phase"] == "diffusion" and line["seconds"] >= 0 and 0 <= line["outside_network"] <= 1
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4] and lines[-1]["learning_rate"] == 0


def events(folder: Path) -> dict[str, list[int]]:
    """The steps of every curve that TensorBoard shows of a phase."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(folder / "events/diffusion")).Reload()
    return {tag: [event.step for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_how_long_it_takes_is_said_once_and_of_a_resumed_run_what_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "MEASURED_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, failing_at(6, lambda: os.kill(os.getpid(), signal.SIGINT)))
    for left in (NUM_STEPS - 4, NUM_STEPS - 6 - 4):         # three steps are not counted, and one is measured
        said = [line for line in capsys.readouterr().out.splitlines() if "s/step" in line]
        assert len(said) == 1 and re.fullmatch(rf"training diffusion: about \S+ seconds \(\S+ s/step, {left} steps\)",
                                               said[0])
        train(tmp_path)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def slow(monkeypatch) -> None:
    """A second step is known to take long, and a day is short."""
    monkeypatch.setattr(progress, "WARM_UP_STEPS", 1)
    monkeypatch.setattr(progress, "MEASURED_S", 1e-9)
    monkeypatch.setattr(progress, "LONGEST_S", 1e-9)


@pytest.mark.parametrize("before", ["nothing", "finished", "stopped"])
def test_a_training_of_days_on_a_cpu_is_refused_and_every_file_stays(before, tmp_path, monkeypatch):
    if before == "finished":
        train(tmp_path)
    elif before == "stopped":
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, failing_at(6, lambda: os.kill(os.getpid(), signal.SIGINT)))
    kept, begun = files_of(tmp_path), []
    slow(monkeypatch)
    with pytest.raises(UserError) as error:
        train(tmp_path, resume=before == "stopped", on_begin=lambda: begun.append(1))
    assert re.fullmatch(r"about 1 seconds \(.* s/step, \d+ steps\) on this CPU; expected less than a day: try --preset "
                        "small, or give --yes", one_line(error))
    assert files_of(tmp_path) == kept and not begun


def test_a_training_of_days_is_done_where_that_is_agreed_to(unbroken, tmp_path, monkeypatch):
    slow(monkeypatch)
    model = fit(network(), Pictures(), loss_of, PLAN, Place(tmp_path, tmp_path / "events", "diffusion", yes=True),
                batch_size=4, device=CPU)
    assert same(model, unbroken[0])


def test_it_is_said_where_a_training_goes_on_and_that_a_finished_one_is_done(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, failing_at(6, lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert "resuming" not in capsys.readouterr().out
    train(tmp_path)
    assert capsys.readouterr().out == f"training diffusion: resuming at step 6 of {NUM_STEPS}\n"
    train(tmp_path)
    assert capsys.readouterr().out == f"diffusion: already trained, {NUM_STEPS} steps\n"


def test_tensorboard_shows_every_epoch_once_also_of_a_run_that_was_broken_off(unbroken, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, failing_at(8, raise_interrupt))         # nothing saved: two epochs are trained again
    train(tmp_path)
    assert events(tmp_path) == events(unbroken[1]) != {}
    assert set(map(tuple, events(tmp_path).values())) == {(3, 6, 9, 11)}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_training_and_says_what_to_try(value, tmp_path):
    def spoilt(model, batch):
        result = loss_of(model, batch)
        return {"loss": result["loss"] * value} if int(batch["step"][0]) == 4 else result

    with pytest.raises(UserError, match="try a smaller --learning_rate") as error:
        train(tmp_path, spoilt)
    assert "became nan" in one_line(error) or "became inf" in one_line(error)
    assert not (tmp_path / LAST).exists() and [line["step"] for line in log(tmp_path)] == [3]


def test_a_state_that_is_not_finite_is_never_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SAVE_EVERY_S", 0)
    with pytest.raises(UserError):
        train(tmp_path, lambda model, batch: {"loss": loss_of(model, batch)["loss"]
                                              * (math.nan if int(batch["step"][0]) == 4 else 1)})
    state = torch.load(tmp_path / LAST, weights_only=True)
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["model"].values())


def test_a_gradient_is_cut_to_its_largest_norm(tmp_path):
    """AdamW does not feel the length of a gradient that is always the same, so this looks at the gradient itself."""
    norms = []

    class Watched(nn.Conv2d):
        pass

    model = Watched(3, 3, 1)
    step = torch.optim.AdamW.step

    def watching(self, *args, **keywords):
        norms.append(float(torch.stack([p.grad.norm() for p in model.parameters()]).norm()))
        return step(self, *args, **keywords)

    torch.optim.AdamW.step, before = watching, torch.optim.AdamW.step
    try:
        train(tmp_path, lambda m, batch: {"loss": 1e4 * loss_of(m, batch)["loss"]}, model=model)
    finally:
        torch.optim.AdamW.step = before
    assert len(norms) == NUM_STEPS and all(norm == pytest.approx(1, rel=1e-3) for norm in norms)


def test_frozen_parameters_stay_as_they_are(tmp_path):
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    train(tmp_path, model=model)
    assert torch.equal(model[0].weight, before) and not torch.equal(model[2].weight, network()[2].weight)


# Batches

@pytest.mark.parametrize("num_images, batch_size, num_processes", [(7, 4, 2), (10, 6, 3), (3, 8, 4), (5, 5, 1)])
def test_processes_together_yield_what_one_would(num_images, batch_size, num_processes):
    single = list(StepBatches(num_images, batch_size, 0, 9, seed=1))
    several = [list(StepBatches(num_images, batch_size, 0, 9, 1, p, num_processes)) for p in range(num_processes)]
    assert [sum(parts, []) for parts in zip(*several, strict=True)] == single
    assert len(single) == 9 and {len(batch) for batch in single} == {batch_size}
    assert {len(batch) for part in several for batch in part} == {batch_size // num_processes}


@pytest.mark.parametrize("num_images, batch_size", [(7, 4), (4, 4), (3, 8), (10, 1)])
def test_each_image_comes_once_per_epoch_in_an_order_of_its_own(num_images, batch_size):
    num_epochs = 12
    batches = StepBatches(num_images, batch_size, 0, num_images * num_epochs, seed=1)
    order = [index for batch in batches for _, _, index in batch][:num_images * num_epochs]
    epochs = [order[i:i + num_images] for i in range(0, len(order), num_images)]
    assert all(sorted(epoch) == list(range(num_images)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > num_epochs / 3


def test_batches_from_any_step_on_are_those_of_the_whole_run():
    whole = list(StepBatches(7, 4, 0, 20, seed=1))
    for first in (1, 5, 13, 19, 20):
        rest = StepBatches(7, 4, first, 20, seed=1)
        assert list(rest) == whole[first:] and len(rest) == 20 - first
    assert [[(s, k) for s, k, _ in batch] for batch in whole] == [[(s, k) for k in range(4)] for s in range(20)]
    assert list(StepBatches(7, 4, 0, 20, seed=2)) != whole


def test_a_batch_that_cannot_be_shared_among_the_processes_is_refused():
    with pytest.raises(UserError, match="--batch_size 5: expected a multiple of the 2 processes") as error:
        StepBatches(7, 5, 0, 9, 1, 0, 2)
    one_line(error)


# Noised images

def noised(purpose: str = "train", num_timesteps: int = 250, **options) -> NoisedImages:
    images = ((random_images(6) + 1) * 127.5).round().to(torch.uint8)
    return NoisedImages(list(images), **{"seed": 3, "purpose": purpose, "batch_size": 4, "noise_kind": "gaussian",
                                         "num_timesteps": num_timesteps} | options)


WANTED = [(5, 0, 2), (5, 1, 0), (5, 2, 5), (5, 3, 2)]


@pytest.mark.parametrize("options", [{}, {"noise_kind": "simplex"}, {"crop_px": 8},
                                     {"flip": True, "rotate": 20.0, "color_jitter": 0.2}])
def test_a_batch_is_the_same_however_it_is_shared_out(options):
    data = noised(**options)
    whole = data.__getitems__(WANTED)
    parts = [data.__getitems__(part) for part in (WANTED[:1], WANTED[1:])]
    for key, value in whole.items():
        torch.testing.assert_close(torch.cat([part[key] for part in parts]), value)
    side = options.get("crop_px", 16)
    assert whole["image"].shape == whole["noise"].shape == (4, 3, side, side)
    assert whole["image"].min() >= -1 and whole["image"].max() <= 1 and whole["timestep"].dtype == torch.int64


def test_every_step_slot_purpose_and_seed_has_noise_of_its_own():
    first = noised().__getitems__(WANTED)["noise"]
    others = [noised().__getitems__([(6, slot, i) for _, slot, i in WANTED])["noise"],
              noised("validation").__getitems__(WANTED)["noise"], noised(seed=4).__getitems__(WANTED)["noise"],
              first.flip(0)]
    assert all((first - other).abs().max() > 0.1 for other in others)


@pytest.mark.parametrize("num_timesteps", [1, 3, 250, 1000])
def test_timesteps_are_in_range_and_one_of_each_stratum(num_timesteps):
    data = noised(num_timesteps=num_timesteps)
    times = torch.stack([data.__getitems__([(step, slot, 0) for slot in range(4)])["timestep"] for step in range(300)])
    assert times.min() >= 0 and times.max() <= num_timesteps - 1
    edges = torch.arange(5) * num_timesteps / 4
    assert (times >= edges[:-1].floor()).all() and (times <= edges[1:]).all()
    assert len(set(times.flatten().tolist())) > 0.6 * num_timesteps
    assert abs(float(times.double().mean()) - (num_timesteps - 1) / 2) < 0.01 * num_timesteps + 0.05


def test_timesteps_do_not_follow_from_the_augmentation_that_shares_their_stream():
    """Mirrored images do not get other noise levels than the rest."""
    data = noised(flip=True, batch_size=1, num_timesteps=1000)
    batch = data.__getitems__([(step, 0, 0) for step in range(400)])
    mirrored = (batch["image"] == batch["image"][0]).flatten(1).all(dim=1)
    means = [float(batch["timestep"][m].double().mean()) for m in (mirrored, ~mirrored)]
    assert 100 < mirrored.sum() < 300 and abs(means[0] - means[1]) < 120


class Knows(nn.Module):
    """Predicts the noise of a known batch, off by `error`."""

    def __init__(self, batch, error: float = 0.0):
        super().__init__()
        self.batch, self.error, self.seen = batch, error, None

    def forward(self, x_t, t):
        self.seen = x_t, t
        return SimpleNamespace(sample=self.batch["noise"] + self.error)


def test_the_loss_is_the_mean_squared_error_of_the_noise():
    batch = noised().__getitems__(WANTED)
    assert denoising_loss(Knows(batch), batch, ABAR, "fp32") == 0
    model = Knows(batch, error=0.5)
    assert float(denoising_loss(model, batch, ABAR, "fp32")) == pytest.approx(0.25)
    x_t, t = model.seen
    assert torch.equal(t, batch["timestep"])
    for i in range(4):
        level = float(ABAR[t[i]])
        expected = level ** 0.5 * batch["image"][i] + (1 - level) ** 0.5 * batch["noise"][i]
        torch.testing.assert_close(x_t[i], expected, rtol=1e-4, atol=1e-5)


def test_the_validation_loss_sees_every_image_and_is_the_same_every_time():
    data, unet = noised("validation"), tiny_unet()

    def loss_of(batch):
        return denoising_loss(unet, batch, ABAR, "fp32")
    loss = validation_loss(data, loss_of, CPU)
    assert loss == validation_loss(data, loss_of, CPU) and 0.1 < loss < 10
    seen = []

    class Watched(NoisedImages):
        def __getitems__(self, wanted):
            seen.extend(index for _, _, index in wanted)
            return super().__getitems__(wanted)

    watched = Watched(**{f.name: getattr(data, f.name) for f in dataclasses.fields(data)})
    assert validation_loss(watched, loss_of, CPU) == loss and set(seen) == set(range(6))
