"""The five pictures of every test image that DiAD's published code writes."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dbad.data.images import to_float, to_pixels
from dbad.families.diad.detector import DiadDetector
from dbad.files.atomic import atomic_write
from dbad.files.names import LOG_IMAGE
from dbad.records import Pictures

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


@lru_cache(maxsize=1)
def _colours() -> np.ndarray:
    """The "turbo" colour map, (256, 3) uint8: blue is low, green the middle, red high."""
    from matplotlib import colormaps

    return (colormaps["turbo"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def heat(values: np.ndarray, scale: float) -> np.ndarray:
    """A map (H, W) >= 0 in the colours of the paper's pictures, (H, W, 3) uint8; `scale` gets the highest colour."""
    return _colours()[(_strength(values, scale) * 255).astype(np.uint8)]


def overlay(image: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """The image, (H, W, 3) uint8, covered by the colours of the map (H, W) the more, the higher the map."""
    cover = 0.85 * _strength(values, scale)[..., None]
    return (image + cover * (heat(values, scale).astype(np.float32) - image)).astype(np.uint8)


def _strength(values: np.ndarray, scale: float) -> np.ndarray:
    """`values` / `scale`, limited to [0, 1], float32."""
    return np.clip(values / np.float32(scale), 0, 1) if scale > 0 else np.zeros(values.shape, np.float32)
