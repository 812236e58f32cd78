"""Decisions at a threshold: counts of right and wrong ones, and the rates that follow from the counts."""

from dataclasses import asdict, dataclass

import numpy as np

from dbad.metrics.pairs import flat_pairs


@dataclass(frozen=True)
class Rates:
    """The decisions at a threshold, as counts of items and as rates in [0, 1]; a rate of nothing (0 / 0) is None."""

    tp: int
    fp: int
    tn: int
    fn: int
    true_positive_rate: float | None
    true_negative_rate: float | None
    false_positive_rate: float | None
    false_negative_rate: float | None
    accuracy: float | None
    precision: float | None
    f1: float | None

    @classmethod
    def of(cls, tp, fp, tn, fn):
        """The Rates that follow from counts."""
        return cls(
            tp=tp, fp=fp, tn=tn, fn=fn,
            true_positive_rate=_ratio(tp, tp + fn),
            true_negative_rate=_ratio(tn, tn + fp),
            false_positive_rate=_ratio(fp, tn + fp),
            false_negative_rate=_ratio(fn, tp + fn),
            accuracy=_ratio(tp + tn, tp + fp + tn + fn),
            precision=_ratio(tp, tp + fp),
            f1=_ratio(2 * tp, 2 * tp + fp + fn),
        )  # fmt: skip

    def __add__(self, other):
        """The Rates of both sets of items together."""
        return Rates.of(self.tp + other.tp, self.fp + other.fp, self.tn + other.tn, self.fn + other.fn)

    def as_dict(self):
        """All counts and rates by name."""
        return asdict(self)


def rates(labels, scores, threshold):
    """The Rates when every item whose score is `threshold` or higher is called anomalous.

    labels, scores: images (N,) or pixels, as arrays of one shape or sequences of such arrays. Unlike a ranking metric,
    it is defined even if all items are good or all are defective. Raises ValueError for a threshold that is NaN.
    """
    threshold = np.array([threshold], np.float64)       # numpy would round a single number to the scores' type
    if np.isnan(threshold).any():
        raise ValueError("threshold must be a number, found nan")
    tp = fp = tn = fn = 0
    for label, score in flat_pairs(labels, scores):
        called = score >= threshold
        hits, calls, defective = (int(np.count_nonzero(x)) for x in (called & label, called, label))
        tp, fp, fn = tp + hits, fp + calls - hits, fn + defective - hits
        tn += label.size - defective - (calls - hits)
    return Rates.of(tp, fp, tn, fn)


def _ratio(part, whole):
    return part / whole if whole else None
