"""Reading images for the loop: each file is decoded only once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from dbad.data.images import read_image, read_sample, to_float, to_item, to_uint8
from dbad.data.intensity import Intensity
from dbad.errors import printable
from dbad.records import Sample

PICTURED = 1600     # px: longer sides of test images are reduced to this for pictures, since a batch of them is kept


class Decoded(NamedTuple):
    """One image on its way to the detector.

        path        the file it came from
        pixels      (3, H, W) float32 in [-1, 1], as the detector takes it
        size        (height, width) of the upright image in its file
        mask        ground truth at the size of `pixels`, (H, W) bool; None where there is none
        own_mask    ground truth at the size of the file; None where there is none, or it is not needed
        cut         the file of the mask has shades, see dbad.data.masks
        original    the image as it is in its file, upright and in RGB, for pictures; of a test image reduced to
                    `PICTURED` px at most; None where it is not needed
    """

    path: Path
    pixels: Tensor
    size: tuple[int, int]
    mask: np.ndarray | None = None
    own_mask: np.ndarray | None = None
    cut: bool = False
    original: Image.Image | None = None


class Unreadable(NamedTuple):
    """A file that could not be read, and the reason: it is no image, or it is broken."""

    path: Path
    reason: str


def read_test(sample: Sample, size: int | None, intensity: Intensity, own_mask: bool = False,
              pictured: bool = False) -> Decoded:
    """A test image and its ground truth, resized to `size` (None: their own); a broken file is a `UserError`.

    A good image has an empty mask. `own_mask` asks for the mask at the size of the file as well, `pictured` for the
    image that pictures show.
    """
    image, mask = read_sample(sample, intensity)
    item, known = to_item(sample, image, mask, size), sample.mask is not None or sample.label == 0
    shape = image.height, image.width
    if pictured and max(shape) > PICTURED:
        image.thumbnail((PICTURED, PICTURED), Image.Resampling.LANCZOS)
    return Decoded(sample.path, item.image, shape, item.mask[0].bool().numpy() if known else None,
                   np.asarray(mask.image) > 0 if known and own_mask else None, item.cut, image if pictured else None)


def read_new(path: Path, size: int | None, intensity: Intensity) -> Decoded | Unreadable:
    """An image without ground truth, resized to `size` (None: its own), and as it is in its file."""
    try:
        original = read_image(path, intensity)
    except Exception as error:      # decoders fail in many ways on broken files, and one file must not end the run
        reason = " ".join(str(error).removeprefix(printable(f"{path}: ")).split())
        return Unreadable(path, reason or type(error).__name__)
    seen = original if size is None else original.resize((size, size), Image.Resampling.BILINEAR)
    return Decoded(path, to_float(to_uint8(seen)), (original.height, original.width), original=original)
