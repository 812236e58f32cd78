"""Intervals for the difference of two runs on the same test images, by a paired bootstrap over images.

A draw takes as many images as there are, with replacement, the same ones for both runs. The interval holds the middle
95 % of the differences of 1000 draws; the draws are the same in every process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from dbad import metrics
from dbad.metrics import formulas
from dbad.metrics.ranking import Ranking

DRAWS, SURE = 1000, 0.95
NUM_EDGES = 2048

Interval = tuple[float, float]
Numbers = Mapping[str, float | None]


@dataclass(frozen=True)
class Scored:
    """The images of a run, in the order that both runs share.

        labels     (N,) 1 defective, 0 good
        scores     (N,)
        called     (N,) bool, called defective at the saved threshold; None without one
    """

    labels: np.ndarray
    scores: np.ndarray
    called: np.ndarray | None


def image_numbers(run: Scored, chosen: np.ndarray) -> Numbers:
    """The metrics of the chosen images, by their dotted names in metrics.csv."""
    labels, scores = run.labels[chosen], run.scores[chosen]
    found: dict[str, float | None] = {}
    if 0 < labels.sum() < len(labels):
        numbers = metrics.image_metrics(labels, scores)
        found = {f"image.{name}": numbers[name] for name in ("auroc", "ap", "f1_max")}
    if run.called is not None and len(labels):
        rates = metrics.rates(labels, run.called[chosen].astype(np.float64), 0.5).as_dict()
        found |= {f"image_rates.{name}": rates[name] for name in (
            "true_positive_rate", "false_positive_rate", "accuracy", "precision", "f1")}
    return found


class Ranked:
    """The pixels of a run's maps, counted once by image and value, so that a draw of images costs a few sums.

    Values between two of at most 2 `NUM_EDGES` edges count as equal. The edges are quantiles of the pixels on defects
    and of all pixels; maps with fewer different values are measured exactly.
    """

    def __init__(self, masks: Sequence[np.ndarray | None], maps: Sequence[np.ndarray]):
        """`masks` (H, W) bool and `maps` (H, W) float of equal shapes, one of each for every image; None: left out."""
        kept = [(number, mask, values) for number, (mask, values) in enumerate(zip(masks, maps, strict=True))
                if mask is not None]
        everything = np.concatenate([values.ravel() for _, _, values in kept])
        defective = np.concatenate([values[mask] for _, mask, values in kept])
        edges = np.unique(np.concatenate([_quantiles(found) for found in (everything, defective) if len(found)]))
        shape = len(masks), len(edges) + 1
        self.defective, self.good, self.share = (np.zeros(shape, np.float32) for _ in range(3))    # (image, bin)
        self.regions = np.zeros(len(masks))
        for number, mask, values in kept:
            bins = np.searchsorted(-edges[::-1], -values, side="left")      # the highest values come first
            marked, self.regions[number] = ndimage.label(mask, np.ones((3, 3)))
            part = 1 / np.bincount(marked.ravel())[marked[mask]]            # of its region, for every pixel
            self.defective[number] = np.bincount(bins[mask], minlength=shape[1])
            self.good[number] = np.bincount(bins[~mask], minlength=shape[1])
            self.share[number] = np.bincount(bins[mask], part, minlength=shape[1])

    def numbers(self, chosen: np.ndarray) -> Numbers:
        """The metrics of the chosen images, which may occur several times; none without a defect or a good pixel."""
        times = np.bincount(chosen, minlength=len(self.regions)).astype(np.float32)     # as BLAS multiplies floats
        defective, good = (np.rint(times @ part).astype(np.int64) for part in (self.defective, self.good))     # (bin,)
        share = times @ self.share
        if not defective.sum() or not good.sum():
            return {}
        with_defect, good_from = np.flatnonzero(defective), np.cumsum(good)
        ranking = Ranking(-with_defect, defective[with_defect], share[with_defect] / float(times @ self.regions),
                          (good_from - good)[with_defect], good_from[with_defect], int(good.sum()), -len(good))
        found = formulas.pixel_metrics(ranking, "counts")
        return {f"pixel.{name}": found[name] for name in (
            "auroc", "ap", "f1_max", *(f"aupro_{limit}" for limit in metrics.AUPRO_LIMITS))}


def _quantiles(values: np.ndarray) -> np.ndarray:
    return np.quantile(values, np.linspace(0, 1, NUM_EDGES), method="lower")


def difference_intervals(one: Callable[[np.ndarray], Numbers], other: Callable[[np.ndarray], Numbers],
                         num_images: int, seed: int = 0) -> dict[str, Interval]:
    """The interval of other - one for every number that both functions give for most draws.

    The functions take the numbers of the chosen images, (N,) of 0 to N - 1.
    """
    random = np.random.default_rng(seed)
    found: dict[str, list[float]] = {}
    for _ in range(DRAWS):
        chosen = random.integers(0, num_images, num_images)
        first, second = one(chosen), other(chosen)
        for name, value in first.items():
            against = second.get(name)
            if value is not None and against is not None:
                found.setdefault(name, []).append(against - value)
    tail = (1 - SURE) / 2
    return {name: (float(np.quantile(values, tail)), float(np.quantile(values, 1 - tail)))
            for name, values in found.items() if len(values) > DRAWS / 2}
