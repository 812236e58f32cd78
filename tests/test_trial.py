"""How long a training takes is tried on random data, without a training."""

import re
from pathlib import Path

import pytest
import torch
from helpers import CPU
from torch import nn

from dbad.training import progress, trial
from dbad.training.trial import batch_seconds, say_forecast

IMAGES = torch.zeros(4, 3, 8, 8)


class Blank(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(IMAGES)

    def __getitems__(self, wanted):
        return {"image": IMAGES[[index for _, _, index in wanted]]}


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 3, 3))


def loss_of(model, batch):
    return {"loss": model(batch["image"]).square().mean()}


def test_a_step_is_really_done_forwards_and_back():
    model, calls = network(), []
    model[0].weight.register_hook(lambda gradient: calls.append("back"))
    seconds, whole = batch_seconds(model, {"image": IMAGES}, loss_of)
    assert seconds > 0 and whole and calls == ["back"] * (1 + trial.NUM_TRIED)


@pytest.mark.parametrize("at", ["forwards", "back"])
def test_a_step_that_takes_too_long_is_broken_off(at, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(trial.time, "monotonic", lambda: now[0])
    model, done = network(), []
    if at == "forwards":
        model[1].register_forward_hook(lambda *_: now.__setitem__(0, 100.0))
        model[2].register_forward_hook(lambda *_: done.append("too far"))
    else:
        model[2].weight.register_hook(lambda gradient: now.__setitem__(0, 100.0))
        model[0].weight.register_hook(lambda gradient: done.append("too far"))
    assert batch_seconds(model, {"image": IMAGES}, loss_of) == (100.0, False)
    assert not done and not nn.modules.module._global_forward_hooks


def said(capsys, seconds: float, whole: bool, monkeypatch, **more) -> str:
    monkeypatch.setattr(trial, "batch_seconds", lambda *_: (seconds, whole))
    say_forecast("diffusion", network(), Blank(), loss_of, 900, device=CPU, **more)
    return capsys.readouterr().out


def test_it_is_said_how_long_all_steps_take(capsys, monkeypatch):
    assert said(capsys, 2.0, True, monkeypatch) == "training diffusion: about 30 minutes (2 s/step, 900 steps)\n"
    assert said(capsys, 1.0, True, monkeypatch, accumulate=2, at_most=True) == (
        "training diffusion: at most about 30 minutes (2 s/step, 900 steps)\n")
    assert said(capsys, 12.0, False, monkeypatch, at_most=True) == (
        "training diffusion: at least 3 hours (12 s/step, 900 steps)\n")


def test_it_is_said_that_a_training_would_be_refused(capsys, monkeypatch):
    assert said(capsys, progress.LONGEST_S, True, monkeypatch).endswith(
        "; it needs --yes, being more than a day on a CPU\n")


@pytest.mark.parametrize("name, phase, steps", [
    ("train_ddim.py", "diffusion", 6), ("train_extractor.py", "extractor", 135),
    ("train_lafite.py --grid 8 --feature_channels 32", "features", 600),
    ("finetune_autoencoder.py --resolution 32 --perceptual none", "autoencoder", 1000)])
def test_a_dry_run_tries_a_step_and_writes_nothing(workplace, script, tiny_flags, capsys, name, phase, steps):
    name, *flags = name.split()
    if phase == "autoencoder":
        flags += "--item hazelnut --dataset_path data --size tiny --device cpu --precision fp32".split()
    else:
        flags += " ".join(tiny_flags(name)).replace("--epochs_extractor 1", "").split()
    before = sorted(Path().rglob("*"))
    script(name, *flags, "--dry_run")
    assert re.search(rf"^training {phase}: (at most )?about .* s/step, {steps} steps\)$", capsys.readouterr().out, re.M)
    assert sorted(Path().rglob("*")) == before


def test_of_real_data_the_images_are_counted_but_not_read(workplace, script, tiny_flags, capsys):
    for path in Path("data/hazelnut/train/good").iterdir():
        path.write_bytes(b"no image")
    flags = " ".join(tiny_flags("train_ddim.py")).replace("--steps_diffusion 6", "--epochs_diffusion 10")
    script("train_ddim.py", *flags.split(), "--dry_run")
    assert "23 steps)" in capsys.readouterr().out       # 10 epochs of 9 images in batches of 4
