"""Pixel metrics of images that arrive one by one, in bounded memory; the result names the method.

    pixels                      what is kept                                        method
    up to MAX_FLOAT32_PIXELS    every score: 4 bytes, on a defect 12                exact
    up to MAX_EXACT_PIXELS      how often each float16 occurs: 1.5 MB in all        exact, maps rounded to float16
    more                        `PixelHistogram`                                    histogram

A float16 has about three and a half digits and 65536 values. Counting the good pixels and the pixels of defects at each
value is as exact as sorting the rounded maps, and takes little memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dbad import metrics
from dbad.metrics.histogram import PixelHistogram
from dbad.metrics.ranking import Points, check_both_kinds, ranking_of
from dbad.metrics.verdicts import MAX_CURVE_POINTS, Curve

MAX_FLOAT32_PIXELS = 1 << 24        # 256 images of 256 px
PIECE = 1 << 23                     # scores in one array: arrays of 32 MB and more return to the system when freed


class PixelMetrics:
    """Metrics, rates at a threshold and PRO curve of pairs of mask and map; the module says what is kept of them."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.rates = metrics.Rates.of(0, 0, 0, 0)
        self.found: PixelScores | PixelCounts | PixelHistogram = PixelScores()

    def add(self, mask: np.ndarray, values: np.ndarray) -> None:
        """Add a whole image: its mask, (H, W) bool, and its map, (H, W) float32."""
        self.rates += metrics.rates(mask, values, self.threshold)
        num_pixels = self.found.num_good + self.found.num_defective + mask.size
        if num_pixels > metrics.MAX_EXACT_PIXELS and isinstance(self.found, _Handed):
            self.found = self.found.handed_to(PixelHistogram())
        elif num_pixels > MAX_FLOAT32_PIXELS and isinstance(self.found, PixelScores):
            self.found = self.found.handed_to(PixelCounts())
        self.found.update([mask], [values])

    def result(self) -> tuple[dict[str, Any] | None, Curve | None]:
        """The metrics, as of `dbad.metrics.pixel_metrics`, and the PRO curve; both None if a class is missing."""
        if not self.found.num_good or not self.found.num_defective:
            return None, None
        return self.found.metrics(), self.found.pro_curve(MAX_CURVE_POINTS)


class _Handed(PixelHistogram):
    """A `PixelHistogram` with another store of scores, whose images can be moved to a further one."""

    good: _AllScores | _Counts
    defects: _AllScores | _Counts

    def handed_to(self, other: PixelHistogram) -> PixelHistogram:
        """Move all images so far to `other` and return it; this object must not be used afterwards."""
        for ours, theirs in ((self.good, other.good), (self.defects, other.defects)):
            for points in ours.pieces():
                theirs.add(points.score, points.share, points.count)
        for name in ("num_good", "num_defective", "num_regions", "lowest"):
            setattr(other, name, getattr(self, name))
        return other

    def _ranking(self):
        check_both_kinds(self.num_good, self.num_defective)
        return ranking_of(self.good.points(), self.defects.points(), self.num_regions, self.num_good, self.lowest)


class PixelScores(_Handed):
    """Exact metrics by sorting; every score is kept."""

    METHOD = "exact"

    def __init__(self):
        super().__init__()
        self.good, self.defects = _AllScores(in_order=False), _AllScores(in_order=True)


class PixelCounts(_Handed):
    """Exact metrics of maps rounded to float16; scores beyond its largest value, 65504, count as 65504."""

    METHOD = "exact, maps rounded to float16"

    def __init__(self):
        super().__init__()
        self.good, self.defects = _Counts(), _Counts()


class _AllScores:
    """Every score, and its share of a region; see `histogram.Pool` for the methods.

    With `in_order` scores keep the order in which they were added, else they are sorted.
    """

    def __init__(self, in_order: bool):
        self.in_order = in_order
        self.score, self.share = _Column(np.float32), _Column(np.float64)

    def add(self, score: np.ndarray, share: np.ndarray | None = None) -> None:
        self.score.extend(score)
        if share is not None:
            self.share.extend(share)

    def pieces(self) -> Iterator[Points]:
        """Yield all scores, one array at a time."""
        shares = self.share.pieces()
        for score in self.score.pieces():
            yield Points(score, None, next(shares, None))

    def points(self) -> Points:
        score, share = self.score.whole(), self.share.whole()
        if not self.in_order:
            score.sort()
        return Points(score, None, share if len(share) else None)


class _Column:
    """A growing column of numbers of one type, in arrays of `PIECE` numbers."""

    def __init__(self, kind: type):
        self.kind = kind
        self.arrays: list[np.ndarray] = []
        self.room = 0           # free places in the last array

    def extend(self, values: np.ndarray) -> None:
        """Append a copy of the numbers."""
        while len(values):
            if not self.room:
                self.arrays.append(np.empty(PIECE, self.kind))
                self.room = PIECE
            part = values[:self.room]
            self.arrays[-1][PIECE - self.room:][:len(part)] = part
            self.room -= len(part)
            values = values[len(part):]

    def pieces(self) -> Iterator[np.ndarray]:
        """Yield the filled part of each array; the column drops an array when it yields it."""
        while self.arrays:
            array = self.arrays.pop(0)
            yield array if self.arrays or not self.room else array[:-self.room]
        self.room = 0

    def whole(self) -> np.ndarray:
        """All numbers in one array, which replaces the others."""
        if len(self.arrays) != 1 or self.room:
            whole, filled = np.empty(sum(map(len, self.arrays)) - self.room, self.kind), 0
            for array in self.pieces():
                whole[filled:filled + len(array)] = array
                filled += len(array)
            self.arrays = [whole]
        return self.arrays[0]


class _Counts:
    """The number of scores at each float16, and the sum of their shares of a region; methods as in `histogram.Pool`."""

    def __init__(self):
        self.count, self.share = np.zeros(1 << 16, np.int64), np.zeros(1 << 16)
        self.has_shares = False

    def add(self, score: np.ndarray, share: np.ndarray | None = None, count: None = None) -> None:
        self.has_shares |= share is not None
        for start in range(0, len(score), 1 << 18):         # in portions: counting takes 20 bytes per score
            part = slice(start, start + (1 << 18))
            places = _places(score[part])
            self.count += np.bincount(places, minlength=1 << 16)
            if share is not None:
                self.share += np.bincount(places, share[part], minlength=1 << 16)

    def points(self) -> Points:
        there = np.flatnonzero(self.count)
        return Points(_scores(there), self.count[there], self.share[there] if self.has_shares else None)

    def pieces(self) -> Iterator[Points]:
        """All points in one piece: they are few."""
        yield self.points()


def _places(score_map: np.ndarray) -> np.ndarray:
    """The place of every score among all float16, from the lowest at 0 to the highest at 65535."""
    limit = np.finfo(np.float16).max
    bits = (score_map.clip(-limit, limit).astype(np.float16) + np.float16(0)).view(np.uint16)       # -0 becomes 0
    return np.where(bits >> 15, ~bits, bits | 0x8000)


def _scores(places: np.ndarray) -> np.ndarray:
    """The scores at these places, float32."""
    places = places.astype(np.uint16)
    return np.where(places >> 15, places & 0x7FFF, ~places).astype(np.uint16).view(np.float16).astype(np.float32)
