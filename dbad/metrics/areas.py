"""Metrics of how well scores find defects: AUROC, AP, F1-max, AUPRO and their curves.

    from dbad.metrics import aupro, image_metrics, pixel_metrics
    pixel_metrics(masks, maps)      # {'auroc': 0.98, 'ap': 0.61, ..., 'aupro_0.3': 0.94, 'method': 'exact', ...}

Plain functions of numpy arrays. A higher score means more anomalous; labels and masks are bool, or 0 and 1, where 1 is
defective. Scores are ranked in their own type, so they may have any scale. Input for which a metric is not defined (no
defect, no good item, NaN, different shapes, masks that are not binary) raises ValueError.
"""

import math

import numpy as np

from dbad.metrics import formulas
from dbad.metrics.histogram import PixelHistogram
from dbad.metrics.pairs import flat_pairs, image_pairs
from dbad.metrics.ranking import rank

MAX_EXACT_PIXELS = 200_000_000                                      # sorting copies the good scores: 0.8 GB as float32


# One number


def auroc(labels, scores):
    """Area under the ROC curve: the share of pairs in which the defective item scores above the good one; ties half.

    labels, scores: arrays of one shape, or sequences of such arrays; all are taken together. Returns a float in [0, 1].
    """
    return formulas.auroc(rank(flat_pairs(labels, scores)))


def average_precision(labels, scores):
    """Average precision: the sum over distinct thresholds of (R_n - R_{n-1}) P_n, without interpolation.

    labels, scores: arrays of one shape, or sequences of such arrays; all are taken together. Returns a float in (0, 1].
    """
    return formulas.average_precision(rank(flat_pairs(labels, scores)))


def f1_max(labels, scores):
    """The highest F1 over all thresholds, and its threshold; the highest one if several reach it.

    labels, scores: arrays of one shape, or sequences of such arrays; all are taken together. Returns (f1, threshold),
    floats; `score >= threshold` reaches f1.
    """
    return formulas.f1_max(rank(flat_pairs(labels, scores)))


def aupro(masks, maps, limit=0.3):
    """Area under the per-region-overlap curve up to a false-positive rate of `limit`, divided by `limit`.

    The curve (Bergmann et al., IJCV 2021) plots, for every threshold, the share of a ground-truth region that is found,
    averaged over the 8-connected regions of all masks, against the false-positive rate over the good pixels of all
    images. Every distinct score is a threshold, and straight lines join the points, also at `limit`.

        masks, maps  (N, H, W) or (N, 1, H, W), or sequences of (H, W) arrays, also of different sizes
        limit        in (0, 1]
    Returns a float in [0, 1], exact up to rounding. Constant maps give limit / 2.
    """
    formulas.check_limit(limit)
    return formulas.aupro(rank(image_pairs(masks, maps), regions=True, limit=limit), limit)


# Several numbers from one sort


def image_metrics(labels, scores):
    """All metrics of image scores (N,): auroc, ap, f1_max, f1_max_threshold, num_good, num_defective, as a dict."""
    ranking = rank(flat_pairs(labels, scores))
    counts = {"num_good": ranking.num_good, "num_defective": ranking.num_defective}
    return formulas.classification_metrics(ranking) | counts


def pixel_metrics(masks, maps, method="auto"):
    """All metrics of anomaly maps: auroc, ap, f1_max, f1_max_threshold, aupro_0.3, aupro_0.05, method, num_pixels.

        masks, maps  (N, H, W) or (N, 1, H, W), or sequences of (H, W) arrays, also of different sizes
        method       "exact" (one sort), "histogram" (PixelHistogram), or "auto": exact up to MAX_EXACT_PIXELS
    Returns a dict of floats, with the method that was used and the number of pixels.
    """
    few = sum(math.prod(np.shape(mask)) for mask in masks) <= MAX_EXACT_PIXELS
    exact = {"auto": few, "exact": True, "histogram": False}.get(method)
    if exact is None:
        raise ValueError(f'method must be "auto", "exact" or "histogram", found {method!r}')
    if exact:
        return formulas.pixel_metrics(rank(image_pairs(masks, maps), regions=True), "exact")
    histogram = PixelHistogram()
    histogram.update(masks, maps)
    return histogram.metrics()


# Curves


def roc_curve(labels, scores, max_points=None):
    """The ROC curve, from (0, 0) to (1, 1), as (fpr, tpr, thresholds), three float64 arrays of one length.

    At point i, `score >= thresholds[i]` gives a false-positive rate of fpr[i] and a true-positive rate of tpr[i]. Only
    corners of the curve are listed: thresholds between two corners add good items only, so their points lie on a
    straight line. The first threshold is infinite. A threshold just above a score, at which the curve turns upwards, is
    the next float64. `max_points`, for plotting, keeps at most that many points, evenly spaced along the curve,
    including both ends.
    """
    return formulas.roc_curve(rank(flat_pairs(labels, scores)), max_points)


def pro_curve(masks, maps, max_points=None):
    """The per-region-overlap curve of `aupro` as (fpr, pro, thresholds), in the form of `roc_curve`."""
    return formulas.pro_curve(rank(image_pairs(masks, maps), regions=True), max_points)
