"""Pixel metrics of images that come one by one, in bounded memory; they say how exact they are.

    pixels                      what is kept                                        method
    up to MAX_FLOAT32_PIXELS    maps as float32, and masks: 5 bytes per pixel       exact
    up to MAX_EXACT_PIXELS      how often each float16 occurs: 1.5 MB in all        exact, maps rounded to float16
    more                        `PixelHistogram`                                    histogram

A float16 has three and a half digits, and there are 65536 of them. Counting how many good pixels have each, and how
many pixels of defects, is as exact as sorting the rounded maps and takes no memory to speak of.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from dbad import metrics
from dbad.metrics.histogram import PixelHistogram
from dbad.metrics.pairs import image_pairs
from dbad.metrics.ranking import Points, check_both_kinds, ranking_of, region_shares
from dbad.metrics.verdicts import MAX_CURVE_POINTS, Curve

MAX_FLOAT32_PIXELS = 1 << 24        # 256 images of 256 px: 84 MB, and as much again while they are sorted


class PixelMetrics:
    """Metrics, rates at a threshold and PRO curve of pairs of mask and map; see the module for what is kept of them."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.rates = metrics.Rates.of(0, 0, 0, 0)
        self.num_pixels = 0
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []
        self._condensed: PixelCounts | PixelHistogram | None = None

    def add(self, mask: np.ndarray, values: np.ndarray) -> None:
        """Take in a whole image: its mask, (H, W) bool, and its map, (H, W) float32."""
        self.rates += metrics.rates(mask, values, self.threshold)
        self.num_pixels += mask.size
        if self.num_pixels <= min(MAX_FLOAT32_PIXELS, metrics.MAX_EXACT_PIXELS):
            self._kept.append((mask.copy(), values.copy()))     # views would keep what they are views of
            return
        if self._condensed is None:
            self._condensed = PixelCounts() if self.num_pixels <= metrics.MAX_EXACT_PIXELS else PixelHistogram()
            while self._kept:
                self._condensed.update(*([thing] for thing in self._kept.pop(0)))
        if isinstance(self._condensed, PixelCounts) and self.num_pixels > metrics.MAX_EXACT_PIXELS:
            self._condensed = self._condensed.as_histogram()
        self._condensed.update([mask], [values])

    def result(self) -> tuple[dict[str, Any] | None, Curve | None]:
        """The metrics, as `dbad.metrics.pixel_metrics` gives them, and the PRO curve; None where a class is missing."""
        if not self.rates.tp + self.rates.fn or not self.rates.fp + self.rates.tn:
            return None, None
        if self._condensed is not None:
            return self._condensed.metrics(), self._condensed.pro_curve(MAX_CURVE_POINTS)
        masks, maps = zip(*self._kept, strict=True)
        return metrics.pixel_metrics(masks, maps, "exact"), metrics.pro_curve(masks, maps, MAX_CURVE_POINTS)


class PixelCounts(PixelHistogram):
    """The exact metrics of maps that are rounded to float16, for images that arrive one by one.

    Maps beyond the largest float16, 65504, count as that.
    """

    METHOD = "exact, maps rounded to float16"

    def __init__(self):
        super().__init__()
        self.good_counts, self.defect_counts = np.zeros((2, 1 << 16), np.int64)
        self.defect_shares = np.zeros(1 << 16)

    def update(self, masks: Iterable[np.ndarray], maps: Iterable[np.ndarray]) -> None:
        """See `PixelHistogram.update`."""
        for mask, score_map in image_pairs(masks, maps):
            places = _places(score_map)
            share, num_regions = region_shares(mask)
            num_defective = int(np.count_nonzero(mask))
            self.good_counts += np.bincount(places[~mask], minlength=1 << 16)
            if num_defective:
                self.defect_counts += np.bincount(places[mask], minlength=1 << 16)
                self.defect_shares += np.bincount(places[mask], share, minlength=1 << 16)
            self.num_good += mask.size - num_defective
            self.num_defective += num_defective
            self.num_regions += num_regions
            self.lowest = min(self.lowest, _scores(places.min()[None])[0])

    def as_histogram(self) -> PixelHistogram:
        """A histogram of all images so far, that takes in more."""
        histogram, (good, defects) = PixelHistogram(), self._points()
        histogram.good.add(good.score, count=good.count)
        histogram.defects.add(defects.score, defects.share, defects.count)
        for name in ("num_good", "num_defective", "num_regions", "lowest"):
            setattr(histogram, name, getattr(self, name))
        return histogram

    def _ranking(self):
        check_both_kinds(self.num_good, self.num_defective)
        return ranking_of(*self._points(), self.num_regions, self.num_good, self.lowest)

    def _points(self) -> tuple[Points, Points]:
        good, defects = np.flatnonzero(self.good_counts), np.flatnonzero(self.defect_counts)
        return (Points(_scores(good), self.good_counts[good], None),
                Points(_scores(defects), self.defect_counts[defects], self.defect_shares[defects]))


def _places(score_map: np.ndarray) -> np.ndarray:
    """The place of every score among all float16, from the lowest at 0 to the highest at 65535."""
    limit = np.finfo(np.float16).max
    bits = (score_map.clip(-limit, limit).astype(np.float16) + np.float16(0)).view(np.uint16)       # -0 becomes 0
    return np.where(bits >> 15, ~bits, bits | 0x8000)


def _scores(places: np.ndarray) -> np.ndarray:
    """The scores at these places, float32."""
    places = places.astype(np.uint16)
    return np.where(places >> 15, places & 0x7FFF, ~places).astype(np.uint16).view(np.float16).astype(np.float32)
