"""The five pictures of every test image that DiAD's published code writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from dbad.calibration.thresholds import Calibration
from dbad.data.images import to_float, to_pixels
from dbad.families.diad.detector import DiadDetector
from dbad.files.atomic import atomic_write
from dbad.files.names import LOG_IMAGE
from dbad.records import Inspection
from dbad.report import figures

JPEG_QUALITY = 95


def write_log_images(detector: DiadDetector, calibration: Calibration, folder: Path,
                     inspections: Sequence[Inspection]) -> None:
    """Write five pictures of every image, see above; colours mean the same in all of them."""
    scale = figures.map_scales(inspections, calibration.pixel_threshold).get("anomaly map", 0.0)
    for name, found in zip(figures.panel_names(inspections), inspections, strict=True):
        image = to_float(torch.from_numpy(found.image.copy()).movedim(-1, 0))
        pictures = {
            "input.jpg": found.image, "samples.jpg": found.reconstruction,
            "reconstruction.jpg": to_pixels(detector.autoencoded(image[None]))[0],
            "features.jpg": figures.heat(found.anomaly_map, scale),
            "heatmap.png": figures.overlay(found.image, found.anomaly_map, scale)}
        for ending, pixels in pictures.items():
            with atomic_write(folder / LOG_IMAGE / f"{name.removesuffix('.png')}-{ending}") as temporary:
                Image.fromarray(pixels).save(temporary, **{"quality": JPEG_QUALITY} if ending.endswith("jpg") else {})
