"""The automatic choice of settings: a search on good images, some with pseudo-anomalies (dbad.damage).

The outputs of the networks are computed once for every setting that they depend on. The settings of later steps
(normalisation, contributions, blur, image score) are searched on the same outputs and cost little more.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from dbad import metrics
from dbad.calibration.thresholds import map_quantile
from dbad.damage.pseudo import make_all
from dbad.data.augment import random_crops
from dbad.data.images import read_images, to_float
from dbad.diffusion.noise import stream
from dbad.families.detector import Detector
from dbad.families.settings import Settings
from dbad.fields import Declared
from dbad.files.tables import write_table
from dbad.finite import check_finite, naming
from dbad.maps import central_window
from dbad.records import Sample

NUM_PSEUDO = 80         # pseudo-anomalies, about
LEAST_IMAGES = 10       # good images of a search, however short its time
JUDGED_SIDE = 128       # px; of larger maps every second or third pixel is enough for a comparison

Parts = Mapping[str, dict[str, Tensor]]     # of the "good" and the "pseudo" images, (N, 1, S, S) each by name
S = TypeVar("S", bound=Settings)
D = TypeVar("D", bound=Detector)


@dataclass(frozen=True)
class PseudoValidation:
    """The images that settings are judged by, all in [-1, 1] at the network's size.

        good        good images (G, 3, S, S)
        pseudo      the same images with anomalies drawn on them (P, 3, S, S)
        masks       the places of the anomalies (P, 1, S, S), in {0, 1}
        reference   other good images (R, 3, S, S), by which maps are normalised
    """

    good: Tensor
    pseudo: Tensor
    masks: Tensor
    reference: Tensor


def network_images(detector: Detector, samples: Sequence[Sample]) -> Tensor:
    """The images at the network's size, (N, 3, S, S) in [-1, 1]; where it works in tiles, a random crop of each."""
    pixels = read_images(samples, None if detector.patching else detector.size, intensity=detector.intensity)
    if not detector.patching:
        return to_float(torch.stack(pixels))
    return to_float(random_crops(pixels, detector.size, [stream(0, "tuning", s.path.name) for s in samples]))


def pseudo_validation(good: Tensor, names: Sequence[str], reference: Tensor, seed: int,
                      count: int = NUM_PSEUDO) -> PseudoValidation:
    """Draw about `count` pseudo-anomalies on good images (G, 3, S, S) whose files are called `names`."""
    drawn = make_all(good, names, seed, per_image=-(-count // len(good)))
    pseudo, masks = (torch.stack([getattr(d, name) for d in drawn]) for name in ("image", "mask"))
    return PseudoValidation(good, pseudo, masks, reference)


def within(images: PseudoValidation, image_s: float, left_s: float) -> PseudoValidation:
    """The first of the images, so few that the networks see each once in `left_s` seconds, at `image_s` seconds each.

    There are at least `LEAST_IMAGES` good ones with their pseudo-anomalies, whatever the time.
    """
    per_image = len(images.pseudo) // len(images.good)
    seconds = image_s * (len(images.good) + len(images.pseudo) + len(images.reference))
    if seconds <= left_s:
        return images
    count = min(len(images.good), max(LEAST_IMAGES, int(len(images.good) * left_s / seconds)))
    damaged = slice(count * per_image)
    return PseudoValidation(images.good[:count], images.pseudo[damaged], images.masks[damaged],
                            images.reference[:count])


@dataclass(frozen=True)
class Trial(Generic[S]):
    """Settings that were tried, and how they did on the pseudo-validation: AUPRO to 0.3, image AUROC, pixel AP."""

    settings: S
    aupro: float
    auroc: float
    pixel_ap: float

    @property
    def merit(self) -> float:
        """The mean of the three, which a search maximises."""
        return (self.aupro + self.auroc + self.pixel_ap) / 3


class Search(ABC, Generic[S, D]):
    """Coordinate search; `fixed` are names of options that keep their value. The outcome is `best`, all are `trials`.

    A gain of merit below `least_gain` counts as chance, and the current setting stays. After `minutes` nothing more is
    tried; the first settings always are.
    """

    least_gain: ClassVar[float]
    unit: ClassVar[str] = "map"     # of the progress

    def __init__(self, detector: D, images: PseudoValidation, fixed: Collection[str] = (),
                 minutes: float = 30.0):
        self.detector, self.images, self.fixed = detector, images, set(fixed)
        self.deadline = time.monotonic() + 60 * minutes
        self.trials: list[Trial[S]] = []
        self.best: Trial[S]
        self.stopped = False

    def run(self) -> Trial[S]:
        """Search and return the best trial."""
        with tqdm(total=self.most(), desc="tuning", unit=self.unit) as self.bar:
            self.search()
            self.bar.total = self.bar.n
        return self.best

    @abstractmethod
    def most(self) -> int:
        """The largest number of steps that the search may take, for its progress bar."""

    @abstractmethod
    def search(self) -> None:
        """Try settings, the detector's first, and leave the best in `best`."""

    @abstractmethod
    def parts(self, settings: S) -> Parts:
        """The parts of the anomaly maps under settings."""

    def out_of_time(self) -> bool:
        """True once the time is over and nothing more is to be tried."""
        self.stopped = self.stopped or time.monotonic() > self.deadline
        return self.stopped

    def try_out(self, settings: S) -> Trial[S]:
        """The trial of settings; those that were tried before are not tried again."""
        done = next((trial for trial in self.trials if trial.settings == settings), None)
        if done is None:
            done = Trial(settings, *self.judge(settings))
            self.trials.append(done)
        return done

    def better(self, before: Trial[S], trial: Trial[S]) -> Trial[S]:
        """The trial, if it is better than the one before by more than chance."""
        return trial if trial.merit > before.merit + self.least_gain else before

    def free(self, before: Trial[S], name: str, values: Iterable[Any]) -> list[Any]:
        """The values to try for a setting; a fixed one keeps its value."""
        return [getattr(before.settings, name)] if name in self.fixed else list(values)

    def judge(self, settings: S) -> tuple[float, float, float]:
        """AUPRO to 0.3, image AUROC and pixel AP of settings."""
        detector = replace(self.detector, settings=settings)
        side = detector.size
        window = (..., *central_window((side, side), settings.center_crop))
        (good, low), (pseudo, high) = combined(detector, self.parts(settings), window)
        masks = torch.cat([torch.zeros_like(good), self.images.masks])[window].bool()
        stride = max(1, side // JUDGED_SIDE)
        masks, maps = (values[:, 0, ::stride, ::stride].numpy() for values in (
            masks, torch.cat([good, pseudo])[window]))
        pixel = metrics.pixel_metrics(masks, maps, "exact")
        auroc = metrics.auroc([0] * len(low) + [1] * len(high), torch.cat([low, high]).numpy())
        return pixel["aupro_0.3"], auroc, pixel["ap"]


def combined(detector: Detector, parts: Parts, window: tuple) -> list[tuple[Tensor, Tensor]]:
    """Anomaly maps (N, 1, H, W) and scores (N,) of the "good" images and of the "pseudo" ones, given their parts.

    The scales are those of the good ones within the `window`.
    """
    names = {kind: [f"{kind} image {number + 1} of the tuning" for number in range(
        len(next(iter(found.values()))))] for kind, found in parts.items()}
    with naming(names["good"]):
        check_finite({f"{name} map": values for name, values in parts["good"].items()})
    scales = {name: map_quantile([values[window].numpy()], 0.999) for name, values in parts["good"].items()}
    found = []
    for kind in ("good", "pseudo"):
        with naming(names[kind]):
            found.append(detector.combine(parts[kind], scales))
    return found


def changes(first: Trial[S], best: Trial[S]) -> dict[str, Any]:
    """The settings in which the best trial differs from the first."""
    before, after = first.settings.record(), best.settings.record()
    return {name: value for name, value in after.items() if value != before[name]}


def outcome(first: Trial[S], best: Trial[S]) -> str:
    """The result of a search, in words."""
    return (f"AUPRO {first.aupro:.3f} -> {best.aupro:.3f}, image AUROC {first.auroc:.3f} -> {best.auroc:.3f}, "
            f"pixel AP {first.pixel_ap:.3f} -> {best.pixel_ap:.3f}")


def write_trials(path: Path, trials: Sequence[Trial[S]], best: Trial[S], groups: Sequence[type[Declared]]) -> None:
    """Write tuning.csv, a row per trial, with the settings of the option `groups` that a search looks at."""
    names = list(dict.fromkeys(field.name for group in groups for field in fields(group)))
    rows = []
    for trial in trials:
        values = (getattr(trial.settings, name) for name in names)
        rows.append([*(" ".join(map(str, value)) if isinstance(value, tuple) else value for value in values),
                     trial.aupro, trial.auroc, trial.pixel_ap, trial.merit, int(trial is best)])
    write_table(path, [*names, "aupro", "image_auroc", "pixel_ap", "merit", "chosen"], rows)
