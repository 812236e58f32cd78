"""All metrics of a test, from images that arrive one by one and are not kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dbad import metrics
from dbad.metrics import verdicts
from dbad.metrics.pixels import PixelMetrics
from dbad.metrics.protocol import Protocol
from dbad.metrics.verdicts import Curves, Thresholds
from dbad.records import ScoreRow


class Measurement:
    """The metrics of one category. `rows` has the `ScoreRow` of every image so far.

    A group of metrics is None, with the reason beside it, if the test has nothing to measure. Pixel metrics cover the
    good images and the defective ones that have a mask.
    """

    def __init__(self, thresholds: Thresholds, protocol: Protocol):
        assert thresholds.pixel is not None
        self.thresholds, self.protocol = thresholds, protocol
        self.rows: list[ScoreRow] = []
        self.pixels = PixelMetrics(thresholds.pixel)
        self.num_masked = 0
        self.unusual: dict[str, list[str]] = {"missing": [], "empty": [], "cut": []}

    def add(self, row: ScoreRow, anomaly_map: np.ndarray, mask: np.ndarray | None, own_mask: np.ndarray | None = None,
            cut: bool = False) -> None:
        """Add an image: its row, and its map and mask at the detector's resolution.

        See `Protocol.pair` for `own_mask`, and `dbad.data.masks` for `cut`.
        """
        self.rows.append(row)
        if row.label == 1:
            for name, applies in (("missing", mask is None), ("empty", mask is not None and not mask.any()),
                                  ("cut", cut)):
                self.unusual[name] += [row.path] * applies
        if mask is not None:
            self.num_masked += 1
            self.pixels.add(*self.protocol.pair(anomaly_map, mask, own_mask))

    def masks(self) -> dict[str, Any]:
        """The numbers of the defective images' masks, and the images whose mask is missing or unusual.

            missing     there is no mask: pixel metrics leave the image out
            empty       the mask marks nothing at the detector's resolution: the whole image counts as good
            cut         the mask has shades and was cut in the middle of their range, see dbad.data.masks
        """
        num_defective = sum(row.label == 1 for row in self.rows)
        return {"num_found": num_defective - len(self.unusual["missing"]),
                **{f"num_{name}": len(found) for name, found in self.unusual.items()}, **self.unusual}

    def result(self) -> tuple[dict[str, Any], Curves]:
        """All metrics as a dict, and the curves.

            image, pixel               threshold-free (AUROC, AP, F1-max, AUPRO)
            image_rates, pixel_rates   at the saved thresholds
            masks                      of the defective images
            protocol                   how the pixel metrics were measured
        """
        masks, num_images = self.masks(), len(self.rows)
        found: dict[str, Any] = {"num_images": num_images, "masks": masks, "protocol": self.protocol.describe(
            self.num_masked if masks["num_found"] else 0, num_images)}
        pixel, pro = self.pixels.result()
        curves = verdicts.curves(self.rows, pro)
        labels = np.array([row.label for row in self.rows])
        if len(set(labels.tolist())) < 2:
            kind = "good" if num_images == 0 or labels[0] else "defective"
            return found | {"image": None, "pixel": None, "reason": f"the test has no {kind} images"}, curves
        scores = np.array([row.score for row in self.rows])
        found["image"] = metrics.image_metrics(labels, scores)
        found["image_rates"] = metrics.rates(labels, scores, self.thresholds.image).as_dict()
        return found | self._pixel_metrics(masks, pixel), curves

    def _pixel_metrics(self, masks: Mapping[str, Any], pixel: dict[str, Any] | None) -> dict[str, Any]:
        if not masks["num_found"]:
            return {"pixel": None, "reason": "no pixel metrics: no mask of a defective test image"}
        found = {"pixel": pixel, "pixel_rates": self.pixels.rates.as_dict()}
        if pixel is None:
            found["reason"] = "no pixel metrics: the masks are all empty, or cover all pixels"
        return found
