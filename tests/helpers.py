"""What several tests need: drawn images, tiny folders, networks that know the answer, a look at what a script did."""

import csv
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dbad.calibration.thresholds import Calibration
from dbad.diffusion.ddim import schedule
from dbad.diffusion.noise import stream
from dbad.families.ddim.detector import DdimDetector
from dbad.families.ddim.options import DdimSettings, Reconstruction
from dbad.families.ddim.reconstruct import Denoiser
from dbad.metrics.measure import Measurement
from dbad.metrics.protocol import Protocol
from dbad.metrics.verdicts import Curves, Thresholds
from dbad.networks.unet import build_unet
from dbad.options.resolve import subset
from dbad.records import Sample, ScoreRow
from dbad.runtime.device import Machine

CPU = torch.device("cpu")
PROGRESS = re.compile(r"(training|calibrating|inspecting|drawing|memory bank)[^|]*\|.*\]\s*$")       # tqdm's bars


def drawn(index: int = 0, size: int | tuple[int, int] = 16) -> np.ndarray:
    """A smooth picture of its own for every index, (height, width, 3) uint8; `size` is a side or (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(6 * x * (k + 1) + index) * np.cos(5 * y + k * index) for k in range(3)]
    return ((np.stack(waves, axis=2) + 1) * 127.5).round().astype(np.uint8)


def save_drawn(path: Path, index: int = 0, size: int | tuple[int, int] = 16) -> Path:
    """Write `drawn` as a file, with the folders it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(drawn(index, size)).save(path)
    return path


def save_mask(path: Path, size: int | tuple[int, int] = 16, value: int = 255, mode: str = "L") -> Path:
    """Write a mask whose upper left quarter has `value` and the rest 0."""
    height, width = (size, size) if isinstance(size, int) else size
    mask = np.zeros((height, width), np.uint8)
    mask[:height // 2, :width // 2] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).convert(mode).save(path)
    return path


def make_category(root: Path, name: str = "bolt", num_train: int = 3, size: int = 16) -> Path:
    """A category in the layout of MVTec AD: good images, one good and two defective test images with masks."""
    for index in range(num_train):
        save_drawn(root / name / "train" / "good" / f"{index:03}.png", index, size)
    save_drawn(root / name / "test" / "good" / "000.png", 50, size)
    for index in range(2):
        save_drawn(root / name / "test" / "crack" / f"{index:03}.png", 60 + index, size)
        save_mask(root / name / "ground_truth" / "crack" / f"{index:03}_mask.png", size)
    return root


def random_images(num_images: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    """(N, 3, size, size) float32 in [-1, 1], each pixel one of the 256 levels a file can hold."""
    levels = torch.randint(0, 256, (num_images, 3, size, size), generator=torch.Generator().manual_seed(seed))
    return levels.float() / 127.5 - 1


def row_of(sample: Sample, score: float = 0.0) -> ScoreRow:
    """The row of a test image without calibration."""
    return ScoreRow(sample.path.name, sample.category, sample.defect, sample.label, score, None, None, None)


def measured(entries: Iterable[tuple], protocol: Protocol, threshold: float = 1.0) -> tuple[dict, Curves]:
    """The metrics and curves of images of which only the maps matter; their scores are the maxima.

    `entries` are (sample, map), with the mask behind it and what else `Measurement.add` takes.
    """
    measurement = Measurement(Thresholds(threshold, threshold), protocol)
    for sample, values, *truth in entries:
        measurement.add(row_of(sample, float(values.max())), values.astype(np.float32), *truth or (None,))
    return measurement.result()


def streams(num_images: int, *keys) -> list[torch.Generator]:
    """One random stream per image, the same ones for the same keys."""
    return [stream(0, "test", *keys, index) for index in range(num_images)]


def tiny_unet(size: int = 16, seed: int = 0):
    """A random U-Net with two levels of 32 channels, the same one for the same seed."""
    torch.manual_seed(seed)
    return build_unet(size, (32, 32), 1, ()).eval()


class Oracle:
    """A denoiser that believes every image to be `clean`, and remembers what it was asked.

    It predicts the noise that leads from `clean` to x_t.
    """

    def __init__(self, clean: torch.Tensor, abar: torch.Tensor):
        self.clean, self.abar, self.calls = clean, abar, []

    def __call__(self, x_t: torch.Tensor, t: int):
        self.calls.append((t, x_t.clone()))
        level = float(self.abar[t])
        return SimpleNamespace(sample=(x_t - level ** 0.5 * self.clean) / (1 - level) ** 0.5)


def one_line(error) -> str:
    """The message of a raised `UserError`, which has one line, for `error` = pytest's ExceptionInfo."""
    message = str(error.value)
    assert message and "\n" not in message
    return message


def complaint(capsys, script, name: str, *words: object) -> str:
    """The one line, without the script's name, with which a script refuses what a user got wrong."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script(name, *words)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and not PROGRESS.match(line)]
    assert stop.value.code == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{name}: "), lines
    return lines[0].removeprefix(f"{name}: ")


def rows_of(folder: Path | str, name: str = "scores.csv") -> list[dict[str, str]]:
    """The lines of a CSV file that a script wrote, each by the names of its columns."""
    with open(Path(folder, name), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def json_of(path: Path | str) -> dict:
    """What a JSON file says."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def stamp(path: Path) -> tuple[int, int]:
    """Changes whenever the file is written again."""
    return path.stat().st_ino, path.stat().st_mtime_ns


def stamps(folder: Path | str) -> dict[str, tuple[int, int]]:
    """The `stamp` of every file in a folder and below."""
    return {str(path): stamp(path) for path in Path(folder).rglob("*") if path.is_file()}


def everything() -> dict[str, tuple[int, int]]:
    """The `stamps` of all runs and results here."""
    return stamps("checkpoints") | stamps("results")


SETTINGS = DdimSettings(
    conditioning="ddad", recon_weight=1.0, eta=0.0, start_at_timestep=250, steps_to_regenerate=2, sampler="ddim",
    num_samples=1, pixel_difference="max_square", layer_weights=(1.0,), map_norm="none", top_share=0.0,
    feature_smoothing_kernel=3, blur_sigma=4.0, tile_overlap=0.25, center_crop=0, pl_contrib=0.7, fl_contrib=0.7,
    seed=0, patching=False, intensity="auto")
MACHINE = Machine(CPU, "fp32", 8)
CALIBRATION = Calibration({"pixel": 0.01, "feature": 0.1}, 1.0, 2.0)


def reconstruction(**changes) -> Reconstruction:
    """How an image is reconstructed: deterministic, from timestep 250, but for the `changes`."""
    return replace(subset(Reconstruction, SETTINGS), **changes)


def tiny_detector(extractor, size: int = 16, noise_kind: str = "gaussian", calibration=CALIBRATION,
                  normalisation=None, **changes) -> DdimDetector:
    """A detector with a random U-Net; `changes` are those of its settings and of the machine. Calibrated by hand."""
    machine = {name: changes.pop(name) for name in MACHINE._fields if name in changes}
    denoiser = Denoiser(tiny_unet(size), schedule(1000, "linear"), noise_kind)
    return DdimDetector(settings=replace(SETTINGS, **changes), machine=MACHINE._replace(**machine), denoiser=denoiser,
                        extractor=extractor, calibration=calibration, normalisation=normalisation)


def with_settings(detector, **changes):
    """The detector under other settings."""
    return replace(detector, settings=replace(detector.settings, **changes))
