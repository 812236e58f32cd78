"""What is said about inspected images: decisions, whether they were right, and the curves over all thresholds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dbad import metrics
from dbad.records import Inspection

MAX_CURVE_POINTS = 400      # more than a picture can show

Curve = tuple[np.ndarray, np.ndarray, np.ndarray]       # x, y, thresholds


@dataclass(frozen=True)
class Thresholds:
    """From which score (`image`) and which value of the anomaly map (`pixel`) on something is called defective."""

    image: float | None = None
    pixel: float | None = None


@dataclass(frozen=True)
class Curves:
    """ROC over images and PRO over pixels, each as (x, y, thresholds) for drawing; None where `notes` say why not."""

    roc: Curve | None
    pro: Curve | None
    notes: tuple[str, ...]


def decide(inspection: Inspection, image_threshold: float | None) -> int | None:
    """1 where the score reaches the threshold, else 0; without a threshold whatever was decided before."""
    return inspection.decision if image_threshold is None else int(inspection.score >= image_threshold)


def outcome(label: int | None, decision: int | None) -> str | None:
    """Whether the decision was right: "correct", "false alarm" or "miss"; None if label or decision is unknown."""
    if label is None or decision is None:
        return None
    return "correct" if label == decision else ("false alarm" if decision else "miss")


def ground_truth(inspection: Inspection) -> np.ndarray | None:
    """The mask, (H, W) bool: empty for a good image that has none, None where there is no ground truth."""
    if inspection.mask is None and inspection.label == 0:
        return np.zeros(inspection.anomaly_map.shape, bool)
    return inspection.mask


def kinds(inspections: Iterable[Inspection]) -> list[str]:
    """A name for the kind of every image: its defect, "unknown" without one, with the category if there are several."""
    inspections = list(inspections)
    several = len({inspection.category for inspection in inspections}) > 1
    return [(f"{i.category} / " if several else "") + (i.defect or "unknown") for i in inspections]


def spans_decades(scores: Sequence[float]) -> bool:
    """True if the scores, all positive, are spread so widely that only a logarithmic axis shows them."""
    low, middle, high = np.quantile(scores, [0, 0.5, 1])
    return bool(low > 0 and high > 20 * middle)


def curves(inspections: Sequence[Inspection], pro: Curve | None = None,
           max_points: int = MAX_CURVE_POINTS) -> Curves:
    """ROC and PRO of a run, as far as labels and masks allow them, with at most `max_points` points each.

    `pro` is the PRO curve, if it is known; else it is measured on the maps as they are.
    """
    roc = None
    notes = []
    labelled = [i for i in inspections if i.label is not None]
    if len({i.label for i in labelled}) == 2:
        roc = metrics.roc_curve([i.label for i in labelled], [i.score for i in labelled], max_points)
    else:
        notes.append("no ROC curve: it needs good and defective images with ground truth")
    if pro is not None:
        return Curves(roc, pro, tuple(notes))
    masked = [(ground_truth(i), i.anomaly_map) for i in inspections if ground_truth(i) is not None]
    masks, maps = [mask for mask, _ in masked], [values for _, values in masked]
    if not any(mask.any() for mask in masks) or all(mask.all() for mask in masks):
        notes.append("no PRO curve: it needs ground-truth masks that show where the defects are")
    elif sum(mask.size for mask in masks) <= metrics.MAX_EXACT_PIXELS:
        pro = metrics.pro_curve(masks, maps, max_points)
    else:
        histogram = metrics.PixelHistogram()
        histogram.update(masks, maps)
        pro = histogram.pro_curve(max_points)
    return Curves(roc, pro, tuple(notes))


def point_at(curve: Curve | None, threshold: float | None) -> list[float] | None:
    """The point (x, y) of a drawn curve that belongs to a threshold; None if there is no curve or no threshold."""
    if curve is None or threshold is None:
        return None
    index = np.searchsorted(-curve[2], -threshold, side="right") - 1  # the thresholds fall, from infinity
    return [float(curve[0][index]), float(curve[1][index])]
