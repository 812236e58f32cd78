"""Decisions about inspected images, their outcomes, and the curves over all thresholds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dbad import metrics
from dbad.records import Origin, ScoreRow

MAX_CURVE_POINTS = 400      # a picture cannot show more

Curve = tuple[np.ndarray, np.ndarray, np.ndarray]       # x, y, thresholds


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of the image score (`image`) and of the anomaly map (`pixel`): values at or above are defective."""

    image: float | None = None
    pixel: float | None = None


@dataclass(frozen=True)
class Curves:
    """ROC over images and PRO over pixels, each as (x, y, thresholds) for drawing; None if missing, see `notes`."""

    roc: Curve | None
    pro: Curve | None
    notes: tuple[str, ...]


def decide(row: ScoreRow, image_threshold: float | None) -> int | None:
    """1 if the score reaches the threshold, else 0; without a threshold the decision in the row."""
    return row.decision if image_threshold is None else int(row.score >= image_threshold)


def outcome(label: int | None, decision: int | None) -> str | None:
    """The outcome of a decision: "correct", "false alarm" or "miss"; None if label or decision is unknown."""
    if label is None or decision is None:
        return None
    return "correct" if label == decision else ("false alarm" if decision else "miss")


def kinds(origins: Iterable[Origin | ScoreRow]) -> list[str]:
    """The kind of every image: its defect, or "unknown"; preceded by the category if there are several."""
    origins = list(origins)
    several = len({origin.category for origin in origins}) > 1
    return [(f"{o.category} / " if several else "") + (o.defect or "unknown") for o in origins]


def spans_decades(scores: Sequence[float] | np.ndarray) -> bool:
    """True if all scores are positive and spread so widely that they need a logarithmic axis."""
    low, middle, high = np.quantile(scores, [0, 0.5, 1])
    return bool(low > 0 and high > 20 * middle)


def curves(rows: Sequence[ScoreRow], pro: Curve | None = None, max_points: int = MAX_CURVE_POINTS) -> Curves:
    """The ROC curve of a run, with at most `max_points` points, and the given PRO curve; notes for a missing one."""
    roc, notes = None, []
    labelled = [row for row in rows if row.label is not None]
    if len({row.label for row in labelled}) == 2:
        roc = metrics.roc_curve([row.label for row in labelled], [row.score for row in labelled], max_points)
    else:
        notes.append("no ROC curve: it needs good and defective images with ground truth")
    if pro is None:
        notes.append("no PRO curve: it needs ground-truth masks that show where the defects are")
    return Curves(roc, pro, tuple(notes))


def point_at(curve: Curve | None, threshold: float | None) -> list[float] | None:
    """The point (x, y) of a curve at a threshold; None if there is no curve or no threshold."""
    if curve is None or threshold is None:
        return None
    index = np.searchsorted(-curve[2], -threshold, side="right") - 1  # the thresholds fall, from infinity
    return [float(curve[0][index]), float(curve[1][index])]
