"""Walk a data set with a detector: inspections, then metrics."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dbad import metrics
from dbad.calibration.thresholds import Calibration
from dbad.data.images import read_items, to_pixels
from dbad.errors import printable
from dbad.families.detector import Detector
from dbad.finite import naming
from dbad.metrics import verdicts
from dbad.metrics.protocol import Protocol
from dbad.metrics.verdicts import MAX_CURVE_POINTS, Curve, Curves
from dbad.records import Inspection, Item, Sample


def walk(detector: Detector, samples: Sequence[Sample], num_workers: int, description: str
         ) -> Iterator[tuple[Item, dict[str, Tensor], Tensor | None]]:
    """Yield each sample as (item, its parts by name, each (1, 1, H, W), its reconstruction (3, H, W) or None).

    Images are read at the network's size; at their own size where the detector works in tiles.
    """
    size = None if detector.patching else detector.size
    step = 1 if detector.patching else detector.machine.batch_size
    for first in tqdm(range(0, len(samples), step), desc=description, unit="batch"):
        items = read_items(samples[first:first + step], size, num_workers, detector.intensity)
        parts, reconstructions = detector.parts(torch.stack([item.image for item in items]))
        for i, item in enumerate(items):
            yield item, {name: part[i:i + 1] for name, part in parts.items()}, (
                None if reconstructions is None else reconstructions[i])


def inspect(detector: Detector, calibration: Calibration, samples: Sequence[Sample], root: Path,
            num_workers: int = 0) -> tuple[list[Inspection], float]:
    """Inspect every sample; returns the inspections in the samples' order and the seconds per image.

    Paths are given relative to `root`.
    """
    begun, result = time.monotonic(), []
    for item, parts, reconstruction in walk(detector, samples, num_workers, "inspecting"):
        with naming([item.path]):
            anomaly_map, score = detector.combine(parts, calibration.scales)
            value = float(score[0])
            decision = calibration.decide(value)
        truth = samples[len(result)].mask is not None or item.label == 0
        result.append(Inspection(
            path=printable(item.path.relative_to(root).as_posix()), category=item.category, defect=item.defect,
            label=item.label, score=value, p_value=calibration.p_value(value), normalised=calibration.normalised(value),
            decision=decision, image=to_pixels(item.image),
            reconstruction=None if reconstruction is None else to_pixels(reconstruction),
            anomaly_map=anomaly_map[0, 0].numpy(), parts={name: part[0, 0].numpy() for name, part in parts.items()},
            mask=item.mask[0].bool().numpy() if truth else None, cut=item.cut, counterpart=detector.counterpart))
    return result, (time.monotonic() - begun) / max(1, len(result))


def measure(inspections: Sequence[Inspection], calibration: Calibration, samples: Sequence[Sample],
            protocol: Protocol) -> tuple[dict[str, Any], Curves]:
    """All metrics of one category, with the curves they belong to.

    A group of metrics is None, with the reason beside it, where the test has nothing to measure. Pixel metrics are
    those of the good images and of the defective ones that have a mask.

    image, pixel               threshold-free (AUROC, AP, F1-max, AUPRO)
    image_rates, pixel_rates   at the saved thresholds
    masks                      of the defective images, see `found_masks`
    protocol                   how the pixel metrics were measured
    """
    labels = np.array([i.label for i in inspections])
    scores = np.array([i.score for i in inspections])
    masks = found_masks(inspections)
    num_masked = len(inspections) - masks["num_missing"] if masks["num_found"] else 0
    result: dict[str, Any] = {"num_images": len(inspections), "masks": masks,
                              "protocol": protocol.describe(num_masked, len(inspections))}
    if len(set(labels.tolist())) < 2:
        kind = "good" if len(labels) == 0 or labels[0] else "defective"
        result |= {"image": None, "pixel": None, "reason": f"the test has no {kind} images"}
        return result, verdicts.curves(inspections)
    result["image"] = metrics.image_metrics(labels, scores)
    result["image_rates"] = metrics.rates(labels, scores, calibration.image_threshold).as_dict()
    if not masks["num_found"]:
        result |= {"pixel": None, "reason": "no pixel metrics: no mask of a defective test image"}
        return result, verdicts.curves(inspections)
    result["pixel"], rates, pro = measure_pixels(protocol.pairs(inspections, samples), calibration.pixel_threshold)
    result["pixel_rates"] = rates.as_dict()
    if result["pixel"] is None:
        result["reason"] = "no pixel metrics: the masks show no defect, or nothing else"
    return result, verdicts.curves(inspections, pro)


def found_masks(inspections: Sequence[Inspection]) -> dict[str, Any]:
    """The masks of the defective images: how many there are, and of which images they are missing or unusual.

        missing     there is no mask: pixel metrics leave the image out
        empty       the mask marks nothing, at the detector's resolution: all of the image counts as good
        cut         the mask has shades and was cut in the middle of their range, see dbad.data.masks
    """
    defective = [i for i in inspections if i.label == 1]
    paths = {"missing": [i.path for i in defective if i.mask is None],
             "empty": [i.path for i in defective if i.mask is not None and not i.mask.any()],
             "cut": [i.path for i in defective if i.cut]}
    return {"num_found": len(defective) - len(paths["missing"]),
            **{f"num_{name}": len(found) for name, found in paths.items()}, **paths}


def measure_pixels(pairs: Iterable[tuple[np.ndarray, np.ndarray]], threshold: float
                   ) -> tuple[dict[str, Any] | None, metrics.Rates, Curve | None]:
    """Metrics, rates at the threshold and PRO curve of pairs of mask and map; None where one of the classes is missing.

    Exact as long as the pixels fit into memory, metrics.MAX_EXACT_PIXELS; beyond that from a histogram, and the metrics
    say so.
    """
    rates, kept, histogram = metrics.Rates.of(0, 0, 0, 0), [], None
    for mask, values in pairs:
        rates += metrics.rates(mask, values, threshold)
        kept.append((mask, values))
        if histogram is None and sum(mask.size for mask, _ in kept) > metrics.MAX_EXACT_PIXELS:
            histogram = metrics.PixelHistogram()
        if histogram is not None:
            histogram.update(*zip(*kept, strict=True))
            kept.clear()
    if not rates.tp + rates.fn or not rates.fp + rates.tn:
        return None, rates, None
    if histogram is not None:
        return histogram.metrics(), rates, histogram.pro_curve(MAX_CURVE_POINTS)
    masks, maps = zip(*kept, strict=True)
    return metrics.pixel_metrics(masks, maps, "exact"), rates, metrics.pro_curve(masks, maps, MAX_CURVE_POINTS)
