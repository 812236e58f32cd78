"""The ranking of defective among good items by their scores: the one sort behind every ranking metric.

An item is an image or a pixel. AUROC, AP, F1-max and AUPRO depend on the scores only through two counts for each
distinct score of a defective item: the good items that score higher, and those that score at least as high. `rank`
finds them exactly, by sorting the good scores once in their own type. `histogram.Pool` condenses a stream of scores to
estimate the same counts in bounded memory. Both use only the order of the scores: a strictly increasing transform of
them, or one huge outlier, changes no result. Only numpy and scipy are needed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage

EIGHT_CONNECTED = np.ones((3, 3), dtype=int)


@dataclass(frozen=True)
class Ranking:
    """The counts from which the ranking metrics follow, at the K distinct scores of defective items.

    score        (K,) distinct scores of defective items, descending
    defective    (K,) int64, defective items with exactly this score
    overlap      (K,) float64, part of a region that these pixels cover, averaged over the regions; sums to 1.
                 None if items are not pixels of regions
    good_above   (K,) int64, good items that score higher
    good_from    (K,) int64, good items that score as high or higher
    num_good     all good items
    lowest       the lowest score of all items
    """

    score: np.ndarray
    defective: np.ndarray
    overlap: np.ndarray | None
    good_above: np.ndarray
    good_from: np.ndarray
    num_good: int
    lowest: float

    @property
    def num_defective(self):
        return int(self.defective.sum())


class Points(NamedTuple):
    """Scores (n,) with weights: `count` items at each, and their summed `share` of a region."""

    score: np.ndarray
    count: np.ndarray | None    # None: one item each
    share: np.ndarray | None    # None: items are not pixels of regions


def rank(pairs, regions=False, limit=1.0):
    """The exact Ranking of (labels, scores) pairs from `flat_pairs`, or from `image_pairs` if `regions` is True.

    With `limit` < 1, scores below the one at which the false-positive rate passes `limit` are left out of the sort and
    of the result: this is enough for a curve up to `limit`, and faster. Memory needed beyond the input: one copy of the
    good scores, half as much again with a `limit`, and about 80 bytes per defective item.
    """
    good, defects, num_regions = _split(pairs, regions)
    check_both_kinds(len(good), len(defects.score))
    num_good, lowest = len(good), min(good.min(), defects.score.min())
    if limit < 1:
        cut = num_good - 1 - int(limit * num_good)
        good.partition(cut)
        cut_score = good[cut]
        good = good[good >= cut_score]                              # including items tied with it, wherever they lie
        kept = defects.score >= cut_score
        defects = Points(*(column if column is None else column[kept] for column in defects))
    good.sort()
    return ranking_of(Points(good, None, None), defects, num_regions, num_good, lowest)


def _split(pairs, regions):
    """The good scores, the defects as Points, and the number of regions."""
    scores = np.empty(sum(score.size for _, score in pairs), _common_dtype([score for _, score in pairs]))
    found, shares, num_good, num_regions = [], [], 0, 0
    for label, score in pairs:
        good = score[~label] if label.any() else score.ravel()
        scores[num_good:num_good + len(good)] = good
        num_good += len(good)
        found.append(score[label])
        if regions:
            share, count = region_shares(label)
            shares.append(share)
            num_regions += count
    defects = Points(np.concatenate(found), None, np.concatenate(shares) if regions else None)
    return scores[:num_good], defects, num_regions


def _common_dtype(scores):
    """The type in which to sort. Integers mixed with floats raise ValueError: as floats, large ones could merge."""
    dtypes = {score.dtype for score in scores}
    common = np.result_type(*dtypes)
    if any((dtype.kind == "f") != (common.kind == "f") for dtype in dtypes):
        found = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"scores of different types ({found}) cannot be ranked together, convert them to one")
    return common


def region_shares(mask):
    """1 / area of the 8-connected region of each marked pixel of a (H, W) mask, in row order; the number of regions.

    Returns ((number of marked pixels,) float64, int).
    """
    if not mask.any():
        return np.empty(0), 0
    regions, num_regions = ndimage.label(mask, structure=EIGHT_CONNECTED)
    region = regions[mask]
    return (1 / np.bincount(region, minlength=1).clip(1))[region], num_regions


def check_both_kinds(num_good, num_defective):
    """Raise ValueError unless there are both good and defective items: every ranking metric needs both."""
    if not num_defective:
        raise ValueError(f"none of {num_good} images or pixels is marked defective: both kinds are needed")
    if not num_good:
        raise ValueError(f"all of {num_defective} images or pixels are marked defective: both kinds are needed")


def ranking_of(good, defects, num_regions, num_good, lowest):
    """The Ranking of two sets of Points, `good` sorted by score and `defects` in any order; no count means 1 each."""
    order = np.argsort(defects.score)
    score = defects.score[order]
    first = np.flatnonzero(np.concatenate([np.ones(min(1, len(score)), bool), score[1:] != score[:-1]]))
    score = score[first]

    def per_score(column):
        return np.add.reduceat(column[order], first)[::-1]

    below, up_to = np.searchsorted(good.score, score, "left"), np.searchsorted(good.score, score, "right")
    total = len(good.score)
    if good.count is not None:
        cumulative = np.concatenate([[0], np.cumsum(good.count)])
        below, up_to, total = cumulative[below], cumulative[up_to], cumulative[-1]
    return Ranking(
        score=score[::-1],
        defective=per_score(counts_of(defects)),
        overlap=None if defects.share is None else per_score(defects.share) / num_regions,
        good_above=(total - up_to)[::-1],
        good_from=(total - below)[::-1],
        num_good=int(num_good),
        lowest=float(lowest),
    )


def counts_of(points):
    """The number of items at each of the Points, (n,) int64."""
    return np.ones(len(points.score), np.int64) if points.count is None else points.count
