"""Read mask files: find which pixels are defect.

    two levels              the lower one is background, whatever the two are: 0 and 1, 0 and 255, 0 and 38
    labels                  more levels, whole numbers below 32: the lowest one is background, all others are defect
    shades                  any other levels, as JPEG and anti-aliasing make them: cut in the middle of their range
    one level               0 is no defect at all, any other value is defect everywhere
    alpha                   counts if it varies and the colours do not
    palettes                by brightness if the colours in use are different greys, as in an image; else by index,
                            as in a map of labels: the lowest index is background, or the only black one

A mask belongs to the stored pixels of its image. If EXIF data turn the image, the mask is turned in the same way,
unless it has an orientation of its own, or its size shows that it was drawn on the upright image.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dbad.data.pictures import open_picture, orientation, orientation_of
from dbad.data.splits import mask_files
from dbad.errors import UserError

MAX_LABEL = 31      # VisA numbers the kinds of defect of an image; shades of grey have higher values
_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
          5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_90}


class Mask(NamedTuple):
    """The ground truth of an image.

        image   8-bit, 255 on the defect and 0 elsewhere, upright
        cut     True if the file has shades, which were cut in the middle of their range
    """

    image: Image.Image
    cut: bool


def read_mask(path: Path, image_size: tuple[int, int], image_path: Path) -> Mask:
    """Read the mask of an upright image of `image_size`; masks in a folder are united.

    A mask with another size than its image, or with pixels that are not numbers, is a `UserError`.
    """
    masks = [_read_one(file, image_size, image_path) for file in mask_files(path)]
    if not masks:
        raise UserError(f"{path}: no masks in it for {image_path}")
    marked = np.any([np.asarray(mask.image) for mask in masks], axis=0)
    return Mask(_picture(marked), any(mask.cut for mask in masks))


def marks(path: Path) -> bool:
    """True if the mask in a file marks any pixel."""
    return bool(binary(open_picture(path), path)[0].any())


def binary(picture: Image.Image, path: Path) -> tuple[np.ndarray, bool]:
    """The defect pixels of a mask as stored, (H, W) bool, and True if its shades were cut, see `Mask`."""
    levels = _levels(picture, path)
    if levels.dtype.kind == "f" and not np.isfinite(levels).all():
        raise UserError(f"{path}: a mask with pixels that are infinite or not a number (NaN); expected finite ones")
    low, high = float(levels.min()), float(levels.max())
    if low == high:
        return np.full(levels.shape, high > 0), False
    if ((levels == low) | (levels == high)).all() or _is_labels(levels, picture):
        return levels > low, False
    return levels > (low + high) / 2, True


def _is_labels(levels: np.ndarray, picture: Image.Image) -> bool:
    """True if the levels are numbers of defect kinds, not shades; JPEG does not keep numbers."""
    small = levels.min() >= 0 and levels.max() <= MAX_LABEL
    return bool(small and picture.format != "JPEG" and (levels == np.floor(levels)).all())


def _read_one(path: Path, image_size: tuple[int, int], image_path: Path) -> Mask:
    own, picture = orientation(path), open_picture(path)
    marked, cut = binary(picture, path)
    stored = _picture(marked)
    turn = orientation(image_path) if own is None else orientation_of(picture)      # TIFF files are turned already
    mask = stored.transpose(_TURNS[turn]) if turn in _TURNS else stored
    if own is None and mask.size != image_size == stored.size:      # drawn on the upright image
        mask = stored
    if mask.size != image_size:
        raise UserError(f"{path}: mask of {mask.width}x{mask.height} px for {image_path} of "
                        f"{image_size[0]}x{image_size[1]} px; expected the same size")
    return Mask(mask, cut)


def _picture(marked: np.ndarray) -> Image.Image:
    return Image.fromarray((marked * 255).astype(np.uint8))


def _levels(picture: Image.Image, path: Path) -> np.ndarray:
    """The levels (H, W) of a mask, which rise from background to defect."""
    if picture.mode == "P":
        return _palette_levels(picture)
    if len(picture.getbands()) == 1:
        return np.asarray(picture)
    transparent = "A" in picture.getbands()
    bands = np.asarray(picture.convert("RGBA" if transparent else "RGB"))
    colours, brightest = bands[..., :3], bands[..., :3].max(axis=2)
    if np.ptp(brightest):
        return brightest
    if transparent and np.ptp(bands[..., 3]):
        return bands[..., 3]
    if np.ptp(colours, axis=(0, 1)).any():
        raise UserError(f"{path}: a mask of colours that are equally bright; expected a dark background")
    return np.minimum(brightest, bands[..., 3]) if transparent else brightest       # invisible pixels mark nothing


def _palette_levels(picture: Image.Image) -> np.ndarray:
    index = np.asarray(picture)
    used = np.unique(index)
    known = np.array(picture.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    palette = np.zeros((256, 3), np.uint8)
    palette[:len(known)] = known
    brightness = palette[used].max(axis=1)
    if (palette[used] == brightness[:, None]).all() and len(np.unique(brightness)) == len(used):
        return palette.max(axis=1)[index]
    black = used[brightness == 0]
    return index > 0 if len(used) == 1 else index != (black if len(black) == 1 else used)[0]
