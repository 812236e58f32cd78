"""Convert images in any form that a user may have to the tensor that a detector works on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from dbad.data.finding import list_images
from dbad.data.full_depth import Deep
from dbad.data.images import read_image, to_float, to_pixels, to_uint8
from dbad.data.intensity import UNKNOWN, Intensity
from dbad.errors import UserError

ImageLike: TypeAlias = str | Path | Image.Image | np.ndarray | Tensor


class Input(NamedTuple):
    """One image for a detector."""

    pixels: Tensor                  # (3, h, w) float32 in [-1, 1] on the CPU
    own_size: tuple[int, int]       # (H, W) of the image as it was given, upright
    name: object                    # its file; None for an image in memory


def to_input(image: ImageLike, size: int | None, intensity: Intensity = UNKNOWN) -> Input:
    """One image for a detector: a file, a PIL image, an (H, W[, 3]) uint8 or uint16 array or a (3, H, W) tensor.

    Tensors must be in [-1, 1] already; `intensity` converts images of more than 8 bits per channel. The image is
    resized to `size` px each way; with None it keeps its size.
    """
    name = image if isinstance(image, (str, Path)) else None
    if isinstance(image, Tensor):
        check_tensor(image)
        own_size = image.shape[1], image.shape[2]
        if size is None or own_size == (size, size):
            return Input(image.float().cpu(), own_size, name)
        image = to_pixels(image)
    picture = _picture(image, intensity)
    own_size = picture.height, picture.width
    if size is not None and own_size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    return Input(to_float(to_uint8(picture)), own_size, name)


def check_tensor(image: Tensor) -> None:
    """Raise `UserError` for a tensor that is no image."""
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise UserError(f"tensor of {image.dtype} and shape {tuple(image.shape)}: expected floating-point "
                        "(3, H, W) or (N, 3, H, W) in [-1, 1]")


def check_file(path: Path) -> None:
    """Raise `UserError`, with what to give instead, for a folder, for a pattern and for a file that is missing."""
    if path.is_dir():
        suffix = next((found.suffix for found in list_images(path)), ".png")
        raise UserError(f"{path}: a folder; expected a file; list its images, for instance "
                        f"sorted(Path('{path}').glob('*{suffix}'))")
    if not path.exists() and set("*?[") & set(str(path)):
        raise UserError(f"{path}: no such file; for a pattern, list the files: sorted(glob.glob('{path}'))")
    if not path.exists():
        raise UserError(f"{path}: no such file; expected an image file; relative names start from {Path.cwd()}")


def _picture(image: Any, intensity: Intensity) -> Image.Image:
    """The image as 8-bit RGB, upright."""
    if isinstance(image, (str, Path)):
        check_file(Path(image))
        return read_image(Path(image), intensity)
    if isinstance(image, np.ndarray):
        image = image.astype(image.dtype.newbyteorder("="), copy=False)
        if image.dtype not in (np.uint8, np.uint16) or not image.size or not (
                image.ndim == 2 or image.ndim == 3 and image.shape[2] == 3):
            raise UserError(f"array of {image.dtype} and shape {image.shape}: expected uint8 or uint16 pixels (H, W) "
                            "or (H, W, 3)")
        image = Image.fromarray(image) if image.dtype == np.uint8 else Deep(image, 65535.0)
    if not isinstance(image, (Image.Image, Deep)):
        raise UserError(f"{type(image).__name__}: not an image; expected a file name, a PIL image, an array or a "
                        "tensor, or a list of them")
    return intensity.to_rgb(image, "the image")
