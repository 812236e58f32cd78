"""The place of an anomaly: a good image, where its object lies, and the window around the pixels to change.

Pixels are (h, w, 3) float32 in [0, 1]; alpha, cover and distances are (h, w). Lengths are in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Picture:
    """A good image and where its object lies."""

    pixels: np.ndarray      # (H, W, 3)
    cover: np.ndarray       # (H, W) 1 on the object, falling to 0 within a few pixels around it
    inner: np.ndarray       # (H, W) bool, the object without what lies next to its outline
    places: np.ndarray      # (n,) flat indices of the object's pixels
    rim: np.ndarray         # (m,) those at the object's outline; m = 0 where it fills the frame
    gray: bool              # the three channels are equal

    @property
    def side(self) -> float:
        """The length to which sizes are relative: the side of a square of the same area."""
        return float(self.cover.size ** 0.5)

    def pick(self, places: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Row and column, (2,), of one of `places`."""
        return np.array(divmod(int(places[rng.integers(len(places))]), self.cover.shape[1]))


@dataclass(frozen=True)
class Site:
    """The place of a damage on a good image, its size and contrast, and the images to cut from."""

    picture: Picture
    sources: Sequence[Picture]      # good images to cut from, always in the same order
    at: np.ndarray                  # (2,) row and column of the centre
    area: float                     # pixels to change
    contrast: float                 # change of a changed pixel's most changed channel, if the kind can choose it
    rng: np.random.Generator


@dataclass(frozen=True)
class Window:
    """The part of a picture around a site's centre."""

    box: tuple[slice, slice]
    pixels: np.ndarray      # (h, w, 3), a view of the picture
    cover: np.ndarray       # (h, w), a view
    y: np.ndarray           # (h, w) rows from the centre
    x: np.ndarray           # (h, w) columns from the centre


def window(site: Site, reach: float | np.floating) -> Window:
    """The window of the pixels at most `reach` rows and columns from the centre; smaller at the picture's border."""
    reach = int(np.ceil(reach))
    low = np.maximum(site.at - reach, 0)
    high = np.minimum(site.at + reach + 1, site.picture.cover.shape)
    box = (slice(low[0], high[0]), slice(low[1], high[1]))
    y, x = np.mgrid[box].astype(np.float32)
    return Window(box, site.picture.pixels[box], site.picture.cover[box], y - site.at[0], x - site.at[1])


def trimmed(here: Window, alpha: np.ndarray) -> tuple[Window, np.ndarray]:
    """The part of a window where alpha (h, w) is above 0, with three pixels around it, and that part of alpha."""
    rows, columns = (slice(max(0, found.min() - 3), found.max() + 4) for found in np.nonzero(alpha > 0))
    box = rows, columns
    top, left = (slice(outer.start + inner.start, outer.start + min(inner.stop, length))
                 for outer, inner, length in zip(here.box, box, alpha.shape, strict=True))
    return Window((top, left), here.pixels[box], here.cover[box], here.y[box], here.x[box]), alpha[box]
