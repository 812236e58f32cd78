"""Maps as colours: blue is low, green is where a defect begins, red is high; the same in all pictures of a run."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from dbad.calibration.thresholds import Calibration
from dbad.records import Pictures


@lru_cache(maxsize=1)
def _colours() -> np.ndarray:
    """The "turbo" colour map, (256, 3) uint8: blue is low, green the middle, red high."""
    from matplotlib import colormaps

    return (colormaps["turbo"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def _strength(values: np.ndarray, scale: float) -> np.ndarray:
    """`values` / `scale`, limited to [0, 1], float32."""
    return np.clip(values / np.float32(scale), 0, 1) if scale > 0 else np.zeros(values.shape, np.float32)


def heat(values: np.ndarray, scale: float) -> np.ndarray:
    """A map (H, W) >= 0 as colours, (H, W, 3) uint8; `scale` is the value shown in the highest colour."""
    return _colours()[(_strength(values, scale) * 255).astype(np.uint8)]


def overlay(image: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """The image, (H, W, 3) uint8, covered by the colours of the map (H, W); high values cover more than low ones."""
    cover = 0.85 * _strength(values, scale)[..., None]
    return (image + cover * (heat(values, scale).astype(np.float32) - image)).astype(np.uint8)


def map_scales(calibration: Calibration) -> dict[str, float]:
    """The value shown in the highest colour, for each kind of map.

    For the anomaly map it is twice the pixel threshold, so that a defect begins at green. For a part it is twice its
    scale, so that green means "as different as good images get". Both are fixed before the first image: a colour means
    the same in all pictures of a run.
    """
    scales = {f"{name} map": 2 * scale for name, scale in calibration.scales.items()}
    return scales | {"anomaly map": 2 * calibration.pixel_threshold}


def maps_of(pictures: Pictures) -> dict[str, np.ndarray]:
    """All maps of an image by their titles, the parts first."""
    return {f"{name} map": part for name, part in pictures.parts.items()} | {"anomaly map": pictures.anomaly_map}
