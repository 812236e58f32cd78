"""How well scores find defects: AUROC, AP, F1-max, AUPRO, their curves, and the rates at a threshold.

    from dbad.metrics import aupro, image_metrics, pixel_metrics
    pixel_metrics(masks, maps)      # {'auroc': 0.98, 'ap': 0.61, ..., 'aupro_0.3': 0.94, 'method': 'exact', ...}

Plain functions of numpy arrays. A higher score means more anomalous; labels and masks are bool, or 0 and 1, where 1 is
defective. Scores are ranked in their own type, so they may have any scale. What has no answer (no defect, no good
item, NaN, shapes that differ, masks that are not binary) raises ValueError and never gives a number.
"""

import math
from dataclasses import asdict, dataclass

import numpy as np

from dbad.metrics.ranking import (
    Pool,
    check_both_kinds,
    flat_pairs,
    image_pairs,
    rank,
    ranking_of,
    region_shares,
)

AUPRO_LIMITS = (0.3, 0.05)
MAX_EXACT_PIXELS = 200_000_000                                      # sorting copies the good scores: 0.8 GB as float32


# One number


def auroc(labels, scores):
    """Area under the ROC curve: how often a defective item scores higher than a good one, ties counting half.

    labels, scores: arrays of one shape, or sequences of such arrays; all are taken together. Returns a float in [0, 1].
    """
    return _auroc(rank(flat_pairs(labels, scores)))


def average_precision(labels, scores):
    """Average precision: the sum over distinct thresholds of (R_n - R_{n-1}) P_n, without interpolation.

    labels, scores: arrays of one shape, or sequences of such arrays; all are taken together. Returns a float in (0, 1].
    """
    return _average_precision(rank(flat_pairs(labels, scores)))


def f1_max(labels, scores):
    """The highest F1 that any threshold reaches, and that threshold; the highest one where several reach it.

    labels, scores: arrays of one shape, or sequences of such arrays; all are taken together. Returns (f1, threshold),
    floats; `score >= threshold` reaches f1.
    """
    return _f1_max(rank(flat_pairs(labels, scores)))


def aupro(masks, maps, limit=0.3):
    """Area under the per-region-overlap curve up to a false-positive rate of `limit`, divided by `limit`.

    The curve (Bergmann et al., IJCV 2021) has at every threshold the share found of a ground-truth region,
    averaged over the 8-connected regions of all masks, against the false-positive rate over the good pixels of all
    images. Every distinct score is a threshold, points are joined by straight lines, also at `limit`.
        masks, maps  (N, H, W) or (N, 1, H, W), or sequences of (H, W) arrays, also of different sizes
        limit        in (0, 1]
    Returns a float in [0, 1], exact up to rounding. Constant maps give limit / 2.
    """
    _check_limit(limit)
    return _aupro(rank(image_pairs(masks, maps), regions=True, limit=limit), limit)


# Several numbers from one sort


def image_metrics(labels, scores):
    """All metrics of image scores (N,): auroc, ap, f1_max, f1_max_threshold, num_good, num_defective, as a dict."""
    ranking = rank(flat_pairs(labels, scores))
    counts = {"num_good": ranking.num_good, "num_defective": ranking.num_defective}
    return _classification_metrics(ranking) | counts


def pixel_metrics(masks, maps, method="auto"):
    """All metrics of anomaly maps: auroc, ap, f1_max, f1_max_threshold, aupro_0.3, aupro_0.05, method, num_pixels.

        masks, maps  (N, H, W) or (N, 1, H, W), or sequences of (H, W) arrays, also of different sizes
        method       "exact" (one sort), "histogram" (PixelHistogram), or "auto": exact up to MAX_EXACT_PIXELS
    Returns a dict of floats, with the method that was used and the number of pixels.
    """
    if method not in ("auto", "exact", "histogram"):
        raise ValueError(f'method must be "auto", "exact" or "histogram", found {method!r}')
    if method == "auto":
        method = "exact" if sum(math.prod(np.shape(mask)) for mask in masks) <= MAX_EXACT_PIXELS else "histogram"
    if method == "exact":
        return _pixel_metrics(rank(image_pairs(masks, maps), regions=True), "exact")
    histogram = PixelHistogram()
    histogram.update(masks, maps)
    return histogram.metrics()


class PixelHistogram:
    """The metrics of `pixel_metrics` for maps that arrive batch by batch, in bounded memory.

    Each region's pixels are weighted when their image arrives, which must therefore arrive whole. The distribution of
    the scores is kept as a histogram with bins of given shares of the pixels (`ranking.Pool`), so neither the range
    nor the scale of the scores matters: 2^18 bins for good pixels, finest at low false-positive rates, and 2^17 for
    pixels of defects. Errors are below 1e-4 (`python -m benchmarks.metrics` measures them), and there are none before
    GOOD_BUFFER good or DEFECT_BUFFER defective pixels have come.
    """

    GOOD_EDGES, GOOD_BUFFER = np.linspace(0, 1, 1 << 18, endpoint=False) ** 4, 1 << 22
    DEFECT_EDGES, DEFECT_BUFFER = np.linspace(0, 1, 1 << 17, endpoint=False), 1 << 20
    METHOD = "histogram"

    def __init__(self):
        self.good = Pool(self.GOOD_EDGES, self.GOOD_BUFFER)
        self.defects = Pool(self.DEFECT_EDGES, self.DEFECT_BUFFER)
        self.num_good = self.num_defective = self.num_regions = 0
        self.lowest = np.inf

    def update(self, masks, maps):
        """Take in whole images: masks and maps as for `pixel_metrics`. Batches may hold good images only."""
        for mask, score_map in image_pairs(masks, maps):
            good, defects = score_map[~mask], score_map[mask]       # copies, so the caller may reuse the arrays
            share, num_regions = region_shares(mask)
            self.good.add(good)
            self.defects.add(defects, share)
            self.num_good += len(good)
            self.num_defective += len(defects)
            self.num_regions += num_regions
            self.lowest = min(self.lowest, score_map.min())

    def metrics(self):
        """The dict of `pixel_metrics` for all images so far; more may follow."""
        return _pixel_metrics(self._ranking(), self.METHOD)

    def roc_curve(self, max_points=None):
        """The curve of the function `roc_curve` for all images so far."""
        return _roc_curve(self._ranking(), max_points)

    def pro_curve(self, max_points=None):
        """The curve of the function `pro_curve` for all images so far."""
        return _pro_curve(self._ranking(), max_points)

    def _ranking(self):
        check_both_kinds(self.num_good, self.num_defective)
        return ranking_of(self.good.points(), self.defects.points(), self.num_regions, self.num_good, self.lowest)


# Curves


def roc_curve(labels, scores, max_points=None):
    """The ROC curve, from (0, 0) to (1, 1), as (fpr, tpr, thresholds), three float64 arrays of one length.

    At point i, `score >= thresholds[i]` gives a false-positive rate of fpr[i] and a true-positive rate of tpr[i]. Only
    corners of the curve are listed: the points between two of them, for thresholds that let in more good items and
    nothing else, lie on the straight line. The first threshold is infinite; one just above a score, at which the curve
    turns upwards, is the next float64. `max_points`, for plotting, keeps that many points or fewer, evenly spaced along
    the curve and among them both ends.
    """
    return _roc_curve(rank(flat_pairs(labels, scores)), max_points)


def pro_curve(masks, maps, max_points=None):
    """The per-region-overlap curve of `aupro` as (fpr, pro, thresholds), listed as `roc_curve` lists its points."""
    return _pro_curve(rank(image_pairs(masks, maps), regions=True), max_points)


# Rates at a threshold


@dataclass(frozen=True)
class Rates:
    """What a threshold decides, as counts of items and as rates in [0, 1]; a rate of nothing (0 / 0) is None."""

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
        """The Rates that belong to counts."""
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
    """The Rates of calling every item anomalous whose score is `threshold` or higher.

    labels, scores: images (N,) or pixels, as arrays of one shape or sequences of such arrays. Unlike a ranking metric
    this also has an answer when all items are good or all defective. Raises ValueError for a threshold that is NaN.
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


# The mathematics, on a Ranking. A threshold at which only good items come in never decides anything: it moves every
# curve horizontally, lowers F1 and leaves recall alone. So the distinct scores of defective items are enough.


def _auroc(ranking):
    pairs_twice = 2 * ranking.num_good - ranking.good_above - ranking.good_from         # good below, twice, + good tied
    won_twice = int(np.dot(ranking.defective, pairs_twice))                             # integers: no rounding
    return won_twice / (2 * ranking.num_good * ranking.num_defective)


def _average_precision(ranking):
    true = np.cumsum(ranking.defective)
    precision = true / (true + ranking.good_from)
    return float(np.dot(ranking.defective, precision) / ranking.num_defective)


def _f1_max(ranking):
    true = np.cumsum(ranking.defective)
    f1 = 2 * true / (ranking.num_defective + true + ranking.good_from)
    best = np.argmax(f1)                                            # the first: the highest threshold
    return float(f1[best]), float(ranking.score[best])


def _aupro(ranking, limit):
    """The area is a sum over defect scores: each lifts the curve, from good_above to good_from, by its overlap.

    Along the ramp between the two, of width w, the lift grows linearly, so that up to the false-positive count x it
    holds an area of t^2 / 2w, t <= w being the part of the ramp before x; after the ramp it is constant.
    """
    x = limit * ranking.num_good
    width = ranking.good_from - ranking.good_above
    t = np.clip(x - ranking.good_above, 0, width)
    area = t * t / (2 * np.maximum(width, 1)) + np.maximum(x - ranking.good_from, 0)
    return min(1.0, float(np.dot(ranking.overlap, area / x)))       # 1 + 1e-16 is rounding


def _check_limit(limit):
    if not 0 < limit <= 1:
        raise ValueError(f"limit must be a false-positive rate in (0, 1], found {limit}")


def _classification_metrics(ranking):
    best_f1, threshold = _f1_max(ranking)
    return {
        "auroc": _auroc(ranking),
        "ap": _average_precision(ranking),
        "f1_max": best_f1,
        "f1_max_threshold": threshold,
    }


def _pixel_metrics(ranking, method):
    regions = {f"aupro_{limit}": _aupro(ranking, limit) for limit in AUPRO_LIMITS}
    num_pixels = ranking.num_good + ranking.num_defective
    return _classification_metrics(ranking) | regions | {"method": method, "num_pixels": num_pixels}


def _roc_curve(ranking, max_points):
    return _curve(ranking, np.cumsum(ranking.defective) / ranking.num_defective, max_points)


def _pro_curve(ranking, max_points):
    return _curve(ranking, np.append(np.cumsum(ranking.overlap[:-1]).clip(max=1), 1.0), max_points)


def _curve(ranking, found, max_points):
    """The corners of the curve that reaches `found` (K,) at the scores of a Ranking; see roc_curve."""
    if max_points is not None and max_points < 2:
        raise ValueError(f"max_points must be at least 2, the two ends of the curve, found {max_points}")
    score = ranking.score.astype(np.float64)
    # Two points for each score, just above it and at it, between the two ends.
    false = _between(0, _alternating(ranking.good_above, ranking.good_from), ranking.num_good)
    found = _between(0, _alternating(np.append(0, found[:-1]), found), 1)
    threshold = _between(np.inf, _alternating(np.nextafter(score, np.inf), score), ranking.lowest)
    # The first of two is a corner only if good items came in before it, and the last is new only if some were left.
    corner = np.ones(len(false), bool)
    corner[1::2] = false[1::2] > false[:-1:2]
    fpr, found, threshold = false[corner] / ranking.num_good, found[corner], threshold[corner]
    if max_points is None or len(fpr) <= max_points:
        return fpr, found, threshold
    length = np.append(0, np.cumsum(np.abs(np.diff(fpr)) + np.abs(np.diff(found))))
    index = np.unique(np.searchsorted(length, np.linspace(0, length[-1], max_points)))
    return fpr[index], found[index], threshold[index]


def _alternating(first, second):
    return np.stack([first, second], axis=1).ravel()


def _between(start, middle, end):
    return np.concatenate([[start], middle, [end]])
