"""Walk a data set with a detector: inspections, then metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dbad import metrics
from dbad.calibration import Calibration
from dbad.data import Item, Sample, read_items, to_pixels
from dbad.detectors import Detector
from dbad.inspection import Inspection


def walk(detector: Detector, samples: Sequence[Sample], num_workers: int, description: str
         ) -> Iterator[tuple[Item, dict[str, Tensor], Tensor | None]]:
    """Yield each sample as (item, its parts by name, each (1, 1, H, W), its reconstruction (3, H, W) or None).

    Images are read at the network's size; at their own size where the detector works in tiles.
    """
    size = None if detector.patching else detector.size
    step = 1 if detector.patching else detector.batch_size
    for first in tqdm(range(0, len(samples), step), desc=description, unit="batch"):
        items = read_items(samples[first:first + step], size, num_workers)
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
        anomaly_map, score = detector.combine(parts, calibration.scales)
        value = float(score[0])
        truth = samples[len(result)].mask is not None or item.label == 0
        result.append(Inspection(
            path=item.path.relative_to(root).as_posix(), category=item.category, defect=item.defect, label=item.label,
            score=value, p_value=calibration.p_value(value), normalised=calibration.normalised(value),
            decision=calibration.decide(value), image=to_pixels(item.image),
            reconstruction=None if reconstruction is None else to_pixels(reconstruction),
            anomaly_map=anomaly_map[0, 0].numpy(), parts={name: part[0, 0].numpy() for name, part in parts.items()},
            mask=item.mask[0].bool().numpy() if truth else None))
    return result, (time.monotonic() - begun) / max(1, len(result))


def measure(inspections: Sequence[Inspection], calibration: Calibration) -> dict[str, Any]:
    """All metrics of one category; a group is None, with the reason beside it, where the test has nothing to measure.

    image, pixel               threshold-free (AUROC, AP, F1-max, AUPRO)
    image_rates, pixel_rates   at the saved thresholds
    """
    labels = np.array([i.label for i in inspections])
    scores = np.array([i.score for i in inspections])
    result: dict[str, Any] = {"num_images": len(inspections)}
    if len(set(labels.tolist())) < 2:
        kind = "good" if len(labels) == 0 or labels[0] else "defective"
        return result | {"image": None, "pixel": None, "reason": f"the test has no {kind} images"}
    result["image"] = metrics.image_metrics(labels, scores)
    result["image_rates"] = metrics.rates(labels, scores, calibration.image_threshold).as_dict()
    if any(i.mask is None for i in inspections):
        return result | {"pixel": None, "reason": "some defective test images have no mask"}
    masks, maps = [i.mask for i in inspections], [i.anomaly_map for i in inspections]
    result["pixel"] = metrics.pixel_metrics(masks, maps)
    pixels, values = (np.concatenate([np.ravel(a) for a in arrays]) for arrays in (masks, maps))
    result["pixel_rates"] = metrics.rates(pixels, values, calibration.pixel_threshold).as_dict()
    return result | {"protocol": "full frame, maps and masks at the detector's resolution, masks nearest neighbour"}
