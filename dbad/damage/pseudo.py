"""Pseudo-anomalies: good images with damage drawn on them, used to choose settings without any test image.

`dbad.damage.kinds` holds the kinds of damage; `dbad.report.damage_sheet` draws a sheet of them to look at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from dbad.damage import kinds
from dbad.damage.foreground import as_picture
from dbad.damage.site import Picture, Site
from dbad.data.images import to_float
from dbad.diffusion.noise import image_stream, stream
from dbad.errors import UserError

KINDS: tuple[str, ...] = tuple(kinds.KINDS)

AREA = 0.001, 0.05              # shares of the image's area to change, log-uniform; lines and spots have own widths
CONTRAST = 0.06, 0.5            # drawn change in units of the full range, log-uniform
CHANGED = 4                     # 8-bit levels: a pixel belongs to the mask if its smoothed change is larger
VISIBLE = 12                    # 8-bit levels of mean change on the mask that are visible on a smooth surface
MIN_PIXELS = 4                  # smaller masks are drawn again
MAX_DRAWS = 20


@dataclass(frozen=True)
class PseudoAnomaly:
    """A good image with one drawn anomaly, and the changed region.

        image       (3, H, W) float32 in [-1, 1]; the good image where the mask is 0, on 8-bit levels where it is 1
        mask        (1, H, W) float32 in {0, 1}, 1 where the anomaly is
        kind        one of KINDS
        area        share of the image that the mask covers
        contrast    mean change of a masked pixel's most changed channel, 1 for the full range
    """

    image: Tensor
    mask: Tensor
    kind: str
    area: float
    contrast: float


def make(image: Tensor, kind: str, rng: np.random.Generator, sources: Sequence[Tensor] = ()) -> PseudoAnomaly:
    """Damage one good image (3, H, W) in [-1, 1]; `sources` are good images to cut from, by default the image itself.

    Raises `UserError` for a kind that cannot be seen on this image, as a blur cannot on an even surface.
    """
    if kind not in kinds.KINDS:
        raise ValueError(f"pseudo-anomaly {kind!r}: expected one of {', '.join(KINDS)}")
    picture = as_picture(image)
    return draw_on(image, picture, kind, rng, [as_picture(source) for source in sources] or [picture])


def make_all(images: Sequence[Tensor] | Tensor, names: Sequence[str] | None = None, seed: int = 0,
             per_image: int = len(KINDS)) -> list[PseudoAnomaly]:
    """`per_image` pseudo-anomalies for each good image (3, H, W) in [-1, 1], image by image.

    The kinds take turns over the images. An anomaly follows from the seed, its kind and the image's name (without
    `names`, its content), and not from the order of the images. Pieces are cut out of these images, ordered by name. If
    a kind cannot be seen on an image, the next kind takes its place.
    """
    keys = list(names) if names is not None else [
        f"{tuple(image.shape)} {image_stream(0, image).initial_seed()}" for image in images]
    if len(keys) != len(images):
        raise ValueError(f"{len(keys)} names for {len(images)} images")
    if names is not None and len(set(keys)) < len(keys):
        raise ValueError(f"names: {next(key for key in keys if keys.count(key) > 1)} occurs twice")
    pictures = {key: as_picture(image) for key, image in zip(keys, images, strict=True)}
    ranks = {key: rank for rank, key in enumerate(sorted(pictures))}
    sources = [pictures[key] for key in ranks]
    return [_make_one_of(image, pictures[key], ranks[key] * per_image + number, (seed, key, number), sources)
            for key, image in zip(keys, images, strict=True) for number in range(per_image)]


def _make_one_of(image: Tensor, picture: Picture, turn: int, key: tuple, sources: Sequence[Picture]) -> PseudoAnomaly:
    """An anomaly of the kind whose turn it is, or of the next kind that can be seen on the image."""
    for kind in (KINDS[(turn + skipped) % len(KINDS)] for skipped in range(len(KINDS))):
        try:
            return draw_on(image, picture, kind, generator(*key, kind), sources)
        except UserError as error:
            failure = error
    raise failure


def generator(seed: int, *keys: int | str) -> np.random.Generator:
    """The random stream of one anomaly, which follows from `seed` and `keys` alone."""
    return np.random.default_rng(stream(seed, "pseudo", *keys).initial_seed())


def draw_on(image: Tensor, picture: Picture, kind: str, rng: np.random.Generator,
            sources: Sequence[Picture]) -> PseudoAnomaly:
    """Damage an image as `make` does, with the pictures of the image and of the sources given."""
    largest = min(AREA[1], max(2 * AREA[0], 0.15 * len(picture.places) / picture.cover.size))   # of a small object
    for failed in range(MAX_DRAWS):
        area = max(MIN_PIXELS, picture.cover.size * log_uniform(rng, AREA[0], largest))
        # A blur or a warp needs structure to show: the more draws failed, the rougher the place.
        candidates = [picture.pick(picture.places, rng) for _ in range(1 + failed)]
        rough, number = max((roughness(picture, at), i) for i, at in enumerate(candidates))
        contrast = log_uniform(rng, *CONTRAST) + rough
        here, pixels = kinds.KINDS[kind](Site(picture, sources, candidates[number], area, contrast, rng))
        if picture.gray:    # a gray camera sees no colour, and channels that differ by rounding errors are equal
            pixels = np.broadcast_to(pixels.mean(axis=2, keepdims=True), pixels.shape)
        before, after = (np.round(values.clip(0, 1) * 255).astype(np.uint8) for values in (here.pixels, pixels))
        found = changed_region(before, after, picture.side)
        if found is None:
            continue
        region, contrast = found
        mask = torch.zeros(1, *image.shape[1:])
        mask[0][here.box] = torch.from_numpy(region).float()
        damaged = image.clone().float()
        inside = damaged[(slice(None), *here.box)]
        damaged[(slice(None), *here.box)] = torch.where(
            torch.from_numpy(region), to_float(torch.from_numpy(after).permute(2, 0, 1)), inside)
        return PseudoAnomaly(damaged, mask, kind, float(region.sum() / picture.cover.size), contrast)
    raise UserError(f"pseudo-anomaly {kind}: not visible on this image of {image.shape[2]}x{image.shape[1]} px in "
                    f"{MAX_DRAWS} draws; expected an image with more structure")


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A random number between `low` and `high` whose logarithm is uniform."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def changed_region(before: np.ndarray, after: np.ndarray, side: float) -> tuple[np.ndarray, float] | None:
    """The region (h, w) bool in which two windows (h, w, 3) uint8 differ, and the mean difference there, in [0, 1].

    None if the change is too small to be seen; a rough surface hides a change that does not alter its roughness. Parts
    below a twentieth of the largest are left out. A gap inside belongs to the region if it was changed, or if it is a
    pinhole, where the new pixel happens to equal the old one.
    """
    difference = np.abs(after.astype(np.float32) - before).max(axis=2)
    touched = difference > 0
    region = ndimage.gaussian_filter(difference, max(0.5, side / 256)) > CHANGED
    region &= touched
    region |= ndimage.binary_fill_holes(region) & (touched | ndimage.binary_closing(region, np.ones((3, 3))))
    labels, count = ndimage.label(region, np.ones((3, 3)))
    if count == 0:
        return None
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    region = (20 * sizes >= sizes.max())[labels]
    contrast = difference[region].mean()
    around = ndimage.binary_dilation(region, iterations=3)
    was, now = (detail(values, side)[around].mean() for values in (before, after))
    seen = contrast >= 0.8 * VISIBLE and contrast + abs(now - was) >= VISIBLE + 0.6 * min(was, now)
    if not seen or region.sum() < MIN_PIXELS:
        return None
    return region, float(contrast / 255)


def detail(pixels: np.ndarray, side: float) -> np.ndarray:
    """The difference in brightness of each pixel (h, w, 3) from its surroundings, (h, w); `side` as of `Picture`."""
    surface = pixels.mean(axis=2, dtype=np.float32)
    return np.abs(surface - ndimage.gaussian_filter(surface, max(1.0, side / 128)))


def roughness(picture: Picture, at: np.ndarray) -> float:
    """The mean `detail` of the surface around a place; a smaller change is hard to see there."""
    reach = max(3, round(0.04 * picture.side))
    box = tuple(slice(max(0, middle - reach), middle + reach + 1) for middle in at)
    return float(detail(picture.pixels[box], picture.side).mean())
