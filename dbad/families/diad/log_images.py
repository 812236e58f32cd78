"""The five pictures of every test image that DiAD's published code writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dbad.data.images import to_float, to_pixels
from dbad.families.diad.detector import DiadDetector
from dbad.files.atomic import atomic_write
from dbad.files.names import LOG_IMAGE
from dbad.records import Pictures
from dbad.report.colours import heat, overlay

JPEG_QUALITY = 95


def write_log_images(detector: DiadDetector, scale: float, folder: Path, name: str, found: Pictures) -> None:
    """Write five pictures of an image, see inference_diad.py; `scale` is that of the colours in all of them."""
    image = to_float(torch.from_numpy(found.image.copy()).movedim(-1, 0))
    assert found.reconstruction is not None
    pictures = {
        "input.jpg": found.image, "samples.jpg": found.reconstruction,
        "reconstruction.jpg": to_pixels(detector.autoencoded(image[None]))[0],
        "features.jpg": heat(found.anomaly_map, scale),
        "heatmap.png": overlay(found.image, found.anomaly_map, scale)}
    for ending, pixels in pictures.items():
        with atomic_write(folder / LOG_IMAGE / f"{name.removesuffix('.png')}-{ending}") as temporary:
            how: dict[str, Any] = {"quality": JPEG_QUALITY} if ending.endswith("jpg") else {}
            Image.fromarray(pixels).save(temporary, **how)
