"""A family of its own in this file alone: nothing else of the project knows it, and everything works with it."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers import json_of, make_category, rows_of, save_drawn

from dbad import load_detector
from dbad.data.categories import open_category, split_category
from dbad.data.images import read_images, to_float
from dbad.errors import UserError
from dbad.families.detector import Detector
from dbad.families.family import Family, Scripts
from dbad.families.registry import FAMILIES, register
from dbad.families.settings import Settings
from dbad.fields import opt
from dbad.inspection.calibrate import begin_files, calibrate_all, finish_files
from dbad.inspection.calibrated import resolve_calibrated
from dbad.inspection.options import InspectionOptions, NewImageOptions
from dbad.inspection.run import inspect_run, results_of
from dbad.inspection.several import Job, run_jobs, write_set_summary
from dbad.options.resolve import plain, resolve, run_folder
from dbad.options.shared import RunOptions, ThresholdOptions, TrainingOptions
from dbad.runtime.device import Machine


@dataclass(frozen=True, kw_only=True)
class ToySettings(Settings):
    """One setting of its own."""

    strength: float = opt("factor of the distance", later=1.0, least=0)

    @property
    def contributions(self):
        return {"distance": 1.0}


@dataclass(frozen=True, eq=False, kw_only=True)
class ToyDetector(Detector):
    """Distance to the mean of the good images."""

    family = "toy"
    mean: torch.Tensor

    @property
    def size(self):
        return self.mean.shape[-1]

    def parts(self, images):
        distance = self.settings.strength * (images - self.mean).abs().mean(dim=1, keepdim=True)
        return {"distance": distance}, self.mean.expand_as(images)


def open_toy(folder, settings, machine):
    return ToyDetector(settings=settings, machine=machine, mean=torch.load(folder / "mean.pt", weights_only=True))


TOY = Family(name="toy", about="distance to the mean image", settings=ToySettings, together=True, open=open_toy,
             scripts=Scripts("toy.py", "toy.py", "toy.py"), files=lambda settings: {"mean": "mean.pt"})


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions, NewImageOptions, InspectionOptions, ThresholdOptions, TrainingOptions):
    """What a script of the family would offer."""

    strength: float = ToySettings.__dataclass_fields__["strength"]


def calibrate(options):
    """What a script that trains the family would do, without the training."""
    options, folder = resolve(options), run_folder(options)
    train, held_out = split_category(open_category(options), options.holdout)
    settings = ToySettings.of(options)
    mean = to_float(torch.stack(read_images(train, 16))).mean(dim=0, keepdim=True)
    detector = ToyDetector(settings=settings, machine=Machine(torch.device("cpu"), "fp32", 2), mean=mean)
    record = plain(options) | {"method": "toy", "item": [options.item]}
    begin_files(folder, record, ())
    torch.save(mean, folder / "mean.pt")
    finish_files(folder, record, calibrate_all(TOY, lambda name: detector, {options.item: held_out}, options))


def inspect(options):
    """What its inspecting script would do."""
    return inspect_run(*resolve_calibrated(options, "toy"), results_of(options, "toy"))


def test_a_family_is_a_folder_and_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    register(TOY)
    try:
        for name in ("bolt", "nut"):
            make_category(tmp_path / "data", name, num_train=6)
        options = Options(item="bolt", dataset_path=Path("data"), num_workers=0, device="cpu", holdout=0.4)
        calibrate(options)
        folder = inspect(options).folder                                               # test images and report
        assert len(rows_of(folder)) == 3 and json_of(folder / "metrics.json")["pixel"]["auroc"] > 0
        assert "distance to the mean image" in (folder / "report.html").read_text()
        new = save_drawn(tmp_path / "new" / "part.png", 3)
        assert len(rows_of(inspect(replace(options, images=(str(new),))).folder)) == 1     # new images
        score = load_detector("checkpoints/bolt", device="cpu")(new).score          # from Python
        assert score == float(rows_of("results/bolt-images")[0]["score"])

        several = {name: replace(options, item=name) for name in ("bolt", "nut")}   # nut was never calibrated
        job = Job(several, {name: Path("results", name) for name in several}, lambda each: None, None, inspect)
        with pytest.raises(UserError, match=r"1 of 2 runs failed: nut \(checkpoints/nut: no run of toy.py"):
            run_jobs([job], lambda runs: write_set_summary(replace(options, item=("bolt", "nut")), runs))
        assert Path("results/index.html").is_file() and "bolt" in Path("results/summary.md").read_text()
    finally:
        del FAMILIES["toy"]
