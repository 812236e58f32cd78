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
        """The metrics of the chosen images, which may occur several times."""
        counts = np.bincount(chosen, minlength=len(self.regions)).astype(np.float32)
        hits, alarms, found = (np.concatenate([[0.0], np.cumsum(counts @ part, dtype=np.float64)])
                               for part in (self.defective, self.good, self.share))
        if not hits[-1] or not alarms[-1]:
            return {}
        recall, false, overlap = hits / hits[-1], alarms / alarms[-1], found / float(counts @ self.regions)
        precision = hits / np.maximum(hits + alarms, 1)
        f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
        areas = {f"pixel.aupro_{limit}": _area_up_to(limit, overlap, false) / limit for limit in metrics.AUPRO_LIMITS}
        return {"pixel.auroc": _area(recall, false), "pixel.ap": float(np.diff(recall) @ precision[1:]),
                "pixel.f1_max": float(f1.max()), **areas}


def _area_up_to(limit: float, y: np.ndarray, x: np.ndarray) -> float:
    inside = x <= limit
    return _area(np.append(y[inside], np.interp(limit, x, y)), np.append(x[inside], limit))


def _quantiles(values: np.ndarray) -> np.ndarray:
    return np.quantile(values, np.linspace(0, 1, NUM_EDGES), method="lower")


def _area(y: np.ndarray, x: np.ndarray) -> float:
    """The area under straight lines through the points."""
    return float(np.diff(x) @ (y[1:] + y[:-1]) / 2)


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
