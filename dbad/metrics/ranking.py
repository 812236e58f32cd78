"""How the scores of defective and of good items lie among each other: the one sort behind every ranking metric.

An item is an image or a pixel. AUROC, AP, F1-max and AUPRO depend on the scores only through this: for each distinct
score of a defective item, how many good items score higher and how many at least as high. `rank` finds that exactly,
by sorting the good scores once in their own type; `Pool` condenses a stream of scores so that the same counts can be
estimated in bounded memory. Neither looks at the size of a score, only at the order, so any strictly increasing
change of the scores, or one huge outlier, leaves every result as it was. Only numpy and scipy are needed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage

EIGHT_CONNECTED = np.ones((3, 3), dtype=int)


# Reading and checking the input


def flat_pairs(labels, scores):
    """Labels and scores as a list of (bool, number) array pairs of equal shape, after checking them.

    Both are arrays (or nested lists) of one shape, or two sequences of arrays, such as images of different sizes.
    Raises ValueError for shapes that differ, labels other than 0 and 1, and scores that are not finite real numbers.
    """
    if not (_holds_arrays(scores) or _holds_arrays(labels)):
        labels, scores = [labels], [scores]
    return _checked_pairs(labels, scores, "labels", "scores", np.asarray)


def image_pairs(masks, maps):
    """Masks and maps as a list of ((H, W) bool, (H, W) number) array pairs, after checking them.

    Both are arrays (N, H, W) or (N, 1, H, W), or sequences of (H, W) or (1, H, W) arrays, whose sizes may differ from
    image to image. Raises ValueError as `flat_pairs` does, and for images that are not two-dimensional.
    """
    return _checked_pairs(masks, maps, "mask", "map", _plane)


def _holds_arrays(value):
    return isinstance(value, (list, tuple)) and len(value) > 0 and np.ndim(value[0]) > 0


def _plane(image):
    image = np.asarray(image)
    plane = image[0] if image.ndim == 3 and len(image) == 1 else image
    if plane.ndim != 2:
        raise ValueError(f"masks and maps must be (H, W) or (1, H, W) for each image, found {image.shape}")
    return plane


def _checked_pairs(labels, scores, label_name, score_name, as_array):
    """The pairs; masks that already are bool or uint8, and scores of a type that can be sorted, are not copied."""
    if len(labels) != len(scores):
        raise ValueError(f"{len(labels)} images have a {label_name}, {len(scores)} a {score_name}: each needs both")
    if len(labels) == 0:
        raise ValueError(f"there is no image: neither {label_name} nor {score_name}")
    pairs = []
    for index in range(len(labels)):
        label, score = as_array(labels[index]), as_array(scores[index])
        place = f" of image {index}" if len(labels) > 1 else ""
        if label.shape != score.shape or not label.size:
            found = f"{label_name} {label.shape}, {score_name} {score.shape}"
            raise ValueError(f"shapes must be equal and not empty, found{place}: {found}")
        pairs.append((_as_bool(label, label_name + place), _as_finite(score, score_name + place)))
    return pairs


def _as_bool(label, name):
    if label.dtype.kind == "b":
        return label
    if label.dtype.kind not in "iuf":
        raise ValueError(f"{name} must be bool or 0 and 1, found type {label.dtype}")
    wrong = (label != 0) & (label != 1)
    if wrong.any():
        raise ValueError(f"{name} must be binary, 0 or 1 only, found {label[wrong][0]}")
    return label.view(bool) if label.dtype == np.uint8 else label.astype(bool)


def _as_finite(score, name):
    if score.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be real numbers, found type {score.dtype}")
    if score.dtype.kind == "f":
        lowest, highest = score.min(), score.max()                  # both are NaN as soon as one score is
        if not (np.isfinite(lowest) and np.isfinite(highest)):
            raise ValueError(f"{name} must be finite, found {highest if np.isfinite(lowest) else lowest}")
    return score.astype({"bool": np.uint8, "float16": np.float32}.get(score.dtype.name, score.dtype), copy=False)


def _common_dtype(scores):
    """The type in which to sort; where numpy would turn integers into floats, large ones would merge: refused."""
    dtypes = {score.dtype for score in scores}
    common = np.result_type(*dtypes)
    if any((dtype.kind == "f") != (common.kind == "f") for dtype in dtypes):
        found = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"scores of different types ({found}) cannot be ranked together, convert them to one")
    return common


# Ranking


@dataclass(frozen=True)
class Ranking:
    """What the ranking metrics need to know of the scores, at the K distinct scores of defective items.

    score        (K,) distinct scores of defective items, descending
    defective    (K,) int64, defective items with exactly this score
    overlap      (K,) float64, what these pixels add to the mean share of a region that is found; sums to 1.
                 None when items are not pixels of regions
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
    """The exact Ranking of (labels, scores) pairs from `flat_pairs`, or from `image_pairs` when `regions` are wanted.

    With `limit` < 1, scores below the one at which the false-positive rate passes `limit` are left out of the sort
    and of the result: enough for a curve up to `limit`, and faster. Memory needed beyond the input: one copy of
    the good scores, half as much again with a `limit`, and about 80 bytes per defective item.
    """
    good, defects, num_regions = _split(pairs, regions)
    check_both_kinds(len(good), len(defects.score))
    num_good, lowest = len(good), min(good.min(), defects.score.min())
    if limit < 1:
        cut = num_good - 1 - int(limit * num_good)
        good.partition(cut)
        cut_score = good[cut]
        good = good[good >= cut_score]                              # items tied with it included, wherever they lie
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


def region_shares(mask):
    """For each marked pixel of a (H, W) mask, in row order, 1 / area of its 8-connected region; and how many regions.

    Returns ((number of marked pixels,) float64, int).
    """
    if not mask.any():
        return np.empty(0), 0
    regions, num_regions = ndimage.label(mask, structure=EIGHT_CONNECTED)
    region = regions[mask]
    return (1 / np.bincount(region, minlength=1).clip(1))[region], num_regions


def check_both_kinds(num_good, num_defective):
    """Raise ValueError unless there are both good and defective items: no ranking metric is defined otherwise."""
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
        defective=per_score(_count(defects)),
        overlap=None if defects.share is None else per_score(defects.share) / num_regions,
        good_above=(total - up_to)[::-1],
        good_from=(total - below)[::-1],
        num_good=int(num_good),
        lowest=float(lowest),
    )


# Streams of scores


class Pool:
    """A stream of scores, condensed: at most `len(edges)` points for each of a few summaries stand for any number.

    This is a histogram whose bins hold given shares of the items rather than given ranges of scores: `edges`, from 0
    up to below 1, cut the items, in descending order of score, and each piece is replaced by one point at the score
    in its middle. So no range needs to be known, and order alone matters. Every `buffer` items make a summary, and
    summaries of equally many items are merged in pairs and condensed again. So an item is condensed at most
    1 + log2(items / buffer) times, and each time ranks change by less than a bin.
    """

    def __init__(self, edges, buffer):
        self.edges, self.buffer = edges, buffer
        self.waiting, self.num_waiting = [], 0
        self.summaries = []                                         # (level, Points), each of 2**level buffers

    def add(self, score, share=None, count=None):
        """Take in the columns of `Points`, each (n,) in any order, which must not change later."""
        self.waiting.append(Points(score, count, share))
        self.num_waiting += len(score)
        if self.num_waiting >= self.buffer:
            level, points = 0, _condensed(_joined(self.waiting), self.edges)
            while self.summaries and self.summaries[-1][0] == level:
                points = _condensed(_joined([self.summaries.pop()[1], points]), self.edges)
                level += 1
            self.summaries.append((level, points))
            self.waiting, self.num_waiting = [], 0

    def points(self):
        """All items so far as Points in ascending order of score; those still waiting for their summary are exact."""
        return _joined([points for _, points in self.summaries] + self.waiting)


def _joined(parts):
    """Several Points as one, in ascending order of score."""
    score = np.concatenate([part.score for part in parts])
    if all(part.count is None and part.share is None for part in parts):
        score.sort()                                                # three times faster than the argsort below
        return Points(score, None, None)
    order = np.argsort(score)
    count = np.concatenate([_count(part) for part in parts])[order]
    share = None if parts[0].share is None else np.concatenate([part.share for part in parts])[order]
    return Points(score[order], count, share)


def _count(points):
    return np.ones(len(points.score), np.int64) if points.count is None else points.count


def _condensed(points, edges):
    """At most len(edges) points in place of many, both in ascending order of score; see Pool.

    A point belongs to the bin in which the middle of its mass lies. For pixels of defects a bin is a share of pixels
    and of regions alike: mass is the mean of the two.
    """
    num_points = len(points.score)
    if num_points <= len(edges):
        return points
    score, count, share = (column if column is None else column[::-1] for column in points)     # descending
    if count is None and share is None:                             # as below, with all masses equal
        first = np.ceil(edges * num_points - 0.5).astype(np.int64)
        first, last = _occupied(first, num_points)
        return Points(score[(first + last) // 2][::-1], (last + 1 - first)[::-1], None)
    count = _count(points)[::-1]
    mass = count / count.sum() if share is None else (count / count.sum() + share / share.sum()) / 2
    after = np.cumsum(mass)
    first, last = _occupied(np.searchsorted(after - mass / 2, edges * after[-1]), num_points)
    middle = np.searchsorted(after, (after[first] - mass[first] + after[last]) / 2).clip(first, last)
    summed = (None if column is None else np.add.reduceat(column, first)[::-1] for column in (count, share))
    return Points(score[middle][::-1], *summed)


def _occupied(first, num_points):
    """First and last point of every bin that holds one, from the ascending positions at which bins begin."""
    first = first[np.diff(first, append=num_points) > 0]
    return first, np.append(first[1:], num_points) - 1
