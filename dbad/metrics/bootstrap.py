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
MOST_PIXELS = 500_000       # that are sorted; larger maps are thinned out
PRO_LIMIT = max(metrics.AUPRO_LIMITS)

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
    """The pixels of a run's maps, sorted once, so that the metrics of every draw of images cost a few sums."""

    def __init__(self, masks: Sequence[np.ndarray | None], maps: Sequence[np.ndarray]):
        """`masks` (H, W) bool and `maps` (H, W) float of equal shapes, one of each for every image; None: left out."""
        total = sum(mask.size for mask in masks if mask is not None)
        step = max(1, int(np.ceil((total / MOST_PIXELS) ** 0.5)))
        values, shares, images = [np.zeros(0)], [np.zeros(0)], [np.zeros(0, int)]
        regions: list[int] = []
        for number, (mask, values_of) in enumerate(zip(masks, maps, strict=True)):
            if mask is None:
                regions.append(0)
                continue
            thin = mask[::step, ::step]
            marked, count = ndimage.label(thin, np.ones((3, 3)))
            sizes = np.bincount(marked.ravel(), minlength=count + 1).astype(np.float64)
            share = np.where(marked > 0, 1 / np.maximum(sizes[marked], 1), 0)       # of its region, for every pixel
            values.append(values_of[::step, ::step].ravel())
            shares.append(share.ravel())
            images.append(np.full(thin.size, number))
            regions.append(count)
        order = np.argsort(-np.concatenate(values), kind="stable")
        self.share, self.image = np.concatenate(shares)[order], np.concatenate(images)[order]
        self.defective, self.regions = self.share > 0, np.array(regions, np.float64)
        self.ends = np.append(np.flatnonzero(np.diff(np.concatenate(values)[order])), len(order) - 1)  # of equal values

    def numbers(self, chosen: np.ndarray) -> Numbers:
        """The metrics of the chosen images, which may occur several times."""
        counts = np.bincount(chosen, minlength=len(self.regions)).astype(np.float64)
        weight = counts[self.image]
        hits, alarms, found = (np.concatenate([[0.0], np.cumsum(part)[self.ends]]) for part in (
            weight * self.defective, weight * ~self.defective, weight * self.share))
        num_regions = float(counts @ self.regions)
        if not hits[-1] or not alarms[-1]:
            return {}
        recall, false, overlap = hits / hits[-1], alarms / alarms[-1], found / num_regions
        precision = hits / np.maximum(hits + alarms, 1)
        inside = false <= PRO_LIMIT
        edge = np.interp(PRO_LIMIT, false, overlap)
        area = _area(np.append(overlap[inside], edge), np.append(false[inside], PRO_LIMIT))
        return {"pixel.auroc": _area(recall, false), "pixel.ap": float(np.diff(recall) @ precision[1:]),
                f"pixel.aupro_{PRO_LIMIT}": area / PRO_LIMIT}


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
