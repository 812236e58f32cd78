"""Maps as colours that colour-blind people can read: black is low, magenta is where a defect begins, yellow is high.

The colours are the same in all pictures of a run. Their brightness rises evenly with the value ("inferno").
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from dbad.calibration.thresholds import Calibration
from dbad.records import Pictures

TINTED_FROM, TINTED_UP_TO, MOST_TINT = 0.8, 1.2, 0.85      # the first two as shares of the pixel threshold


@lru_cache(maxsize=1)
def _colours() -> np.ndarray:
    """The "inferno" colour map, (256, 3) uint8."""
    from matplotlib import colormaps

    return (colormaps["inferno"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def _strength(values: np.ndarray, scale: float) -> np.ndarray:
    """`values` / `scale`, limited to [0, 1], float32."""
    return np.clip(values / np.float32(scale), 0, 1) if scale > 0 else np.zeros(values.shape, np.float32)


def heat(values: np.ndarray, scale: float) -> np.ndarray:
    """A map (H, W) >= 0 as colours, (H, W, 3) uint8; `scale` is the value shown in the highest colour."""
    return _colours()[(_strength(values, scale) * 255).astype(np.uint8)]


def overlay(image: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """The image, (H, W, 3) uint8, tinted by the colours of the map (H, W) near and above the threshold, scale / 2.

    Below `TINTED_FROM` of the threshold the image stays as it is.
    """
    cover = _cover(_strength(values, scale))[..., None]
    return (image + cover * (heat(values, scale).astype(np.float32) - image)).astype(np.uint8)


def tint(values: np.ndarray, scale: float, side: int) -> Image.Image:
    """The colours that `overlay` lays over an image, alone and transparent elsewhere, as a picture of 64 levels.

    Its longer side is at most `side` pixels; reduced maps keep their highest values.
    """
    reach = -(-max(values.shape) // side)       # pixels of the map in one of the picture
    height, width = (-(-length // reach) for length in values.shape)
    padded = np.pad(values, ((0, height * reach - values.shape[0]), (0, width * reach - values.shape[1])), mode="edge")
    highest = padded.reshape(height, reach, width, reach).max(axis=(1, 3))
    levels = np.linspace(0, 1, 64, dtype=np.float32)
    cover = (255 * _cover(levels)).round().astype(np.uint8)
    nearest = (_strength(highest, scale) * 63).round().astype(np.uint8)
    picture = Image.fromarray(np.where(cover[nearest] > 0, nearest, 0).astype(np.uint8), "P")
    picture.putpalette(heat(levels[None], 1.0).tobytes())
    picture.info["transparency"] = cover.tobytes()
    return picture


def _cover(strength: np.ndarray) -> np.ndarray:
    """How much of the image the colours cover, in [0, `MOST_TINT`], for a `_strength` with the threshold at 0.5."""
    return MOST_TINT * np.clip((2 * strength - TINTED_FROM) / (TINTED_UP_TO - TINTED_FROM), 0, 1)


def colour_bar(width: int, height: int) -> np.ndarray:
    """All colours from the lowest on the left to the highest on the right, (height, width, 3) uint8."""
    return np.repeat(heat(np.linspace(0, 1, width, dtype=np.float32)[None], 1.0), height, axis=0)


def colour_stops(count: int = 17) -> list[str]:
    """So many of the colours from low to high, evenly spaced, as #rrggbb."""
    return ["#{:02x}{:02x}{:02x}".format(*colour) for colour in colour_bar(count, 1)[0]]


def map_scales(calibration: Calibration) -> dict[str, float]:
    """The value shown in the highest colour, for each kind of map.

    For the anomaly map that is twice the pixel threshold, so that the middle is where a defect begins; for a part,
    twice its scale, so that the middle is as different as good images get. Both are known before the first image: a
    colour means the same in all pictures of a run, whatever else is inspected.
    """
    scales = {f"{name} map": 2 * scale for name, scale in calibration.scales.items()}
    return scales | {"anomaly map": 2 * calibration.pixel_threshold}


def maps_of(pictures: Pictures) -> dict[str, np.ndarray]:
    """All maps of an image by the title they are shown under, the parts first.

    Parts that, up to a factor, are the anomaly map or a part before them are left out.
    """
    found: dict[str, np.ndarray] = {}
    for name, part in pictures.parts.items():
        if not any(_proportional(part, other) for other in (pictures.anomaly_map, *found.values())):
            found[f"{name} map"] = part
    return found | {"anomaly map": pictures.anomaly_map}


def _proportional(one: np.ndarray, other: np.ndarray) -> bool:
    """True if the maps differ by a factor only, up to rounding."""
    if one.shape != other.shape or not one.max() > 0 or not other.max() > 0:
        return False
    return bool(np.allclose(one / one.max(), other / other.max(), atol=1e-3))
