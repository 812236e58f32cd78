"""The metrics and their curves as formulas on a Ranking.

A lower threshold that adds only good items moves every curve horizontally, lowers F1 and leaves recall unchanged. So
the distinct scores of defective items are enough as thresholds.
"""

import numpy as np

AUPRO_LIMITS = (0.3, 0.05)


def auroc(ranking):
    """The share of pairs of a good and a defective item in which the defective one scores higher; ties count half."""
    pairs_twice = 2 * ranking.num_good - ranking.good_above - ranking.good_from         # good below, twice, + good tied
    won_twice = int(np.dot(ranking.defective, pairs_twice))                             # integers: no rounding
    return won_twice / (2 * ranking.num_good * ranking.num_defective)


def average_precision(ranking):
    """The precision at each score of a defective item, weighted by how much recall grows there."""
    true = np.cumsum(ranking.defective)
    precision = true / (true + ranking.good_from)
    return float(np.dot(ranking.defective, precision) / ranking.num_defective)


def f1_max(ranking):
    """The highest F1 of any threshold, and the highest threshold that reaches it."""
    true = np.cumsum(ranking.defective)
    f1 = 2 * true / (ranking.num_defective + true + ranking.good_from)
    best = np.argmax(f1)                                            # the first: the highest threshold
    return float(f1[best]), float(ranking.score[best])


def aupro(ranking, limit):
    """The area under the per-region-overlap curve up to the false-positive rate `limit`, divided by `limit`.

    It is a sum over the scores of defects. Each raises the curve by its overlap, linearly on a ramp of width w from
    good_above to good_from. Up to the false-positive count x, the area of the ramp is t^2 / 2w times the overlap, where
    t <= w is the part of the ramp before x. After the ramp the rise is constant.
    """
    x = limit * ranking.num_good
    width = ranking.good_from - ranking.good_above
    t = np.clip(x - ranking.good_above, 0, width)
    area = t * t / (2 * np.maximum(width, 1)) + np.maximum(x - ranking.good_from, 0)
    return min(1.0, float(np.dot(ranking.overlap, area / x)))       # 1 + 1e-16 is rounding


def check_limit(limit):
    """Raise ValueError for a `limit` of `aupro` outside (0, 1]."""
    if not 0 < limit <= 1:
        raise ValueError(f"limit must be a false-positive rate in (0, 1], found {limit}")


def classification_metrics(ranking):
    """AUROC, AP and the highest F1 with its threshold, by name."""
    best_f1, threshold = f1_max(ranking)
    return {
        "auroc": auroc(ranking),
        "ap": average_precision(ranking),
        "f1_max": best_f1,
        "f1_max_threshold": threshold,
    }


def pixel_metrics(ranking, method):
    """The dict of `dbad.metrics.pixel_metrics` for a Ranking that `method` found."""
    regions = {f"aupro_{limit}": aupro(ranking, limit) for limit in AUPRO_LIMITS}
    num_pixels = ranking.num_good + ranking.num_defective
    return classification_metrics(ranking) | regions | {"method": method, "num_pixels": num_pixels}


def roc_curve(ranking, max_points):
    """The corners of the ROC curve, see `dbad.metrics.roc_curve`."""
    return _curve(ranking, np.cumsum(ranking.defective) / ranking.num_defective, max_points)


def pro_curve(ranking, max_points):
    """The corners of the per-region-overlap curve, in the form of `roc_curve`."""
    return _curve(ranking, np.append(np.cumsum(ranking.overlap[:-1]).clip(max=1), 1.0), max_points)


def _curve(ranking, found, max_points):
    """The corners of the curve with the values `found` (K,) at the scores of a Ranking, thinned out to `max_points`."""
    if max_points is not None and max_points < 2:
        raise ValueError(f"max_points must be at least 2, the two ends of the curve, found {max_points}")
    score = ranking.score.astype(np.float64)
    # Two points for each score, just above it and at it, between the two ends.
    false = _between(0, _alternating(ranking.good_above, ranking.good_from), ranking.num_good)
    found = _between(0, _alternating(np.append(0, found[:-1]), found), 1)
    threshold = _between(np.inf, _alternating(np.nextafter(score, np.inf), score), ranking.lowest)
    # The first point of a pair is a corner only if good items were added before it; so is the end of the curve.
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
