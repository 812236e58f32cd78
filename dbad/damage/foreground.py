"""The segmentation of the object in a good image, so that damage is drawn on it and not on the background."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from dbad.damage.site import Picture
from dbad.data.images import to_pixels


def as_picture(image: Tensor) -> Picture:
    """A good image (3, H, W) in [-1, 1] with its foreground, the input of the kinds of damage."""
    pixels = to_pixels(image).astype(np.float32) / 255
    ground = foreground(image)[0].numpy()
    margin = max(1.0, 0.008 * ground.size ** 0.5)
    cover, depth = np.ones(ground.shape, np.float32), np.full(ground.shape, np.inf)
    if not ground.all():
        cover = np.clip((margin + 1 - ndimage.distance_transform_edt(~ground)) / margin, 0, 1).astype(np.float32)
        depth = ndimage.distance_transform_edt(ground)
    places, rim = (np.flatnonzero(region).astype(np.int32) for region in (ground, depth == 1))
    gray = (pixels == pixels[..., :1]).all()
    return Picture(pixels, cover, depth > margin + 1, places, rim, bool(gray))


def foreground(image: Tensor) -> Tensor:
    """The pixels of the object in a good image (3, H, W) in [-1, 1], as (1, H, W) bool; all if it fills the frame.

    The background is a quadratic surface in each channel, fitted to the border; the object is what differs from it. Of
    several thresholds on the difference, the one is chosen whose outline has the steepest relative slope: a shadow
    fades slowly, an object ends at an edge. If the border is uneven or the object hardly differs, all is foreground.
    """
    height, width = image.shape[-2:]
    scale = min(1.0, 128 / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    pixels = ((F.interpolate(image[None].float(), size, mode="area")[0] + 1) / 2).permute(1, 2, 0).numpy()
    everything = torch.ones(1, height, width, dtype=torch.bool)
    border = np.ones(size, bool)
    depth = max(1, min(size) // 40)
    border[depth:-depth, depth:-depth] = False
    if border.all():
        return everything
    difference, spread = _background_difference(pixels, border)
    best, chosen = 0.0, None
    slope = np.log(difference + spread)
    slope = np.hypot(ndimage.sobel(slope, 0), ndimage.sobel(slope, 1)) / 8
    for threshold in np.geomspace(3 * spread, max(0.3, 6 * spread), 12):
        solid = _solid(difference > threshold)
        outline = ndimage.binary_dilation(solid) ^ ndimage.binary_erosion(solid, border_value=1)
        if solid.mean() > 0.02 and outline.any() and slope[outline].mean() > best:
            best, chosen = slope[outline].mean(), solid
    if chosen is None or spread > 0.06:
        return everything
    inside, outside = np.median(difference[chosen]), difference[~ndimage.binary_dilation(chosen)]
    if inside < 5 * spread or outside.size == 0 or inside < 3 * np.quantile(outside, 0.9):
        return everything
    return F.interpolate(torch.from_numpy(chosen)[None, None].float(), (height, width), mode="nearest")[0] > 0


def _background_difference(pixels: np.ndarray, border: np.ndarray) -> tuple[np.ndarray, float]:
    """The distance of each pixel (h, w, 3) from the background, (h, w), and 1.5 times the border's median distance."""
    y, x = (2 * axis / length - 1 for axis, length in zip(np.mgrid[:border.shape[0], :border.shape[1]] + 0.5,
                                                          border.shape, strict=True))
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=2)
    weights = np.ones(border.sum())
    for _ in range(10):         # Cauchy's weights: a large difference, as of an object at the border, hardly counts
        fit = np.linalg.lstsq(terms[border] * weights[:, None], pixels[border] * weights[:, None], rcond=None)[0]
        difference = np.abs(pixels - terms @ fit).max(axis=2)
        spread = 1.5 * float(np.median(difference[border])) + 1 / 255
        weights = 1 / np.hypot(difference[border], spread)
    return difference, spread


def _solid(region: np.ndarray) -> np.ndarray:
    """The large parts of a region (h, w) bool, with gaps and holes filled; small parts are left out."""
    region = ndimage.binary_opening(region)
    labels, count = ndimage.label(ndimage.binary_closing(region, iterations=max(1, max(region.shape) // 64)) | region)
    if count == 0:
        return region
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return ndimage.binary_fill_holes((10 * sizes >= sizes.max())[labels])
