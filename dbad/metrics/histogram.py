"""Pixel metrics of maps that arrive batch by batch, from a histogram of bounded size."""

import numpy as np

from dbad.metrics import formulas
from dbad.metrics.pairs import image_pairs
from dbad.metrics.ranking import Points, check_both_kinds, counts_of, ranking_of, region_shares


class PixelHistogram:
    """The metrics of `pixel_metrics` for maps that arrive batch by batch, in bounded memory.

    The pixels of a region get their weights when the image arrives, so images must arrive whole. Scores are kept as a
    histogram whose bins hold given shares of the pixels (`Pool`), so neither the range nor the scale of the scores
    matters. It has 2^18 bins for good pixels, finest at low false-positive rates, and 2^17 for pixels of defects.
    Errors are below 1e-4 (`python -m benchmarks.metrics` measures them). Below GOOD_BUFFER good and DEFECT_BUFFER
    defective pixels the metrics are exact.
    """

    METHOD = "histogram"
    GOOD_EDGES, GOOD_BUFFER = np.linspace(0, 1, 1 << 18, endpoint=False) ** 4, 1 << 22
    DEFECT_EDGES, DEFECT_BUFFER = np.linspace(0, 1, 1 << 17, endpoint=False), 1 << 20

    def __init__(self):
        self.good = Pool(self.GOOD_EDGES, self.GOOD_BUFFER)
        self.defects = Pool(self.DEFECT_EDGES, self.DEFECT_BUFFER)
        self.num_good = self.num_defective = self.num_regions = 0
        self.lowest = np.inf

    def update(self, masks, maps):
        """Add whole images: masks and maps as for `pixel_metrics`. Batches may hold good images only."""
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
        return formulas.pixel_metrics(self._ranking(), self.METHOD)

    def roc_curve(self, max_points=None):
        """The curve of the function `roc_curve` for all images so far."""
        return formulas.roc_curve(self._ranking(), max_points)

    def pro_curve(self, max_points=None):
        """The curve of the function `pro_curve` for all images so far."""
        return formulas.pro_curve(self._ranking(), max_points)

    def _ranking(self):
        check_both_kinds(self.num_good, self.num_defective)
        return ranking_of(self.good.points(), self.defects.points(), self.num_regions, self.num_good, self.lowest)


class Pool:
    """A stream of scores, condensed to a few summaries of at most `len(edges)` points each.

    A summary is a histogram whose bins hold given shares of the items, not given ranges of scores. `edges`, from 0 to
    below 1, divide the items in descending order of score, and one point at the score in its middle replaces each bin.
    So the range need not be known, and only the order matters. Every `buffer` items make a summary, and summaries of
    equally many items are merged in pairs and condensed again. So an item is condensed at most
    1 + log2(items / buffer) times, and each time ranks change by less than a bin.
    """

    def __init__(self, edges, buffer):
        self.edges, self.buffer = edges, buffer
        self.waiting, self.num_waiting = [], 0
        self.summaries = []                                         # (level, Points), each of 2**level buffers

    def add(self, score, share=None, count=None):
        """Add items as the columns of `Points`, each (n,) in any order; the arrays must not change later."""
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
        """All items so far as Points in ascending order of score; items that are not in a summary yet are exact."""
        return _joined([points for _, points in self.summaries] + self.waiting)


def _joined(parts):
    """Several Points as one, in ascending order of score."""
    score = np.concatenate([part.score for part in parts])
    if all(part.count is None and part.share is None for part in parts):
        score.sort()                                                # three times faster than the argsort below
        return Points(score, None, None)
    order = np.argsort(score)
    count = np.concatenate([counts_of(part) for part in parts])[order]
    share = None if parts[0].share is None else np.concatenate([part.share for part in parts])[order]
    return Points(score[order], count, share)


def _condensed(points, edges):
    """The Points condensed to at most len(edges), both in ascending order of score; see Pool.

    A point belongs to the bin in which the middle of its mass lies. For pixels of defects, mass is the mean of the
    share of pixels and the share of regions.
    """
    num_points = len(points.score)
    if num_points <= len(edges):
        return points
    score, count, share = (column if column is None else column[::-1] for column in points)     # descending
    if count is None and share is None:                             # as below, with all masses equal
        first = np.ceil(edges * num_points - 0.5).astype(np.int64)
        first, last = _occupied(first, num_points)
        return Points(score[(first + last) // 2][::-1], (last + 1 - first)[::-1], None)
    count = counts_of(points)[::-1]
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
