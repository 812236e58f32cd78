"""Convert images in any form that a user may have to the tensor that a detector works on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dbad.data.full_depth import Deep
from dbad.data.images import read_image, to_float, to_pixels, to_uint8
from dbad.data.intensity import UNKNOWN, Intensity
from dbad.errors import UserError

ImageLike = str | Path | Image.Image | np.ndarray | Tensor


def to_batch(images: ImageLike | Sequence[ImageLike], size: int | None, intensity: Intensity = UNKNOWN) -> Tensor:
    """Files, PIL images, (H, W[, 3]) uint8 or uint16 arrays or tensors, one or several -> (N, 3, H, W) in [-1, 1].

    Tensors must be in [-1, 1] already; `intensity` converts images of more than 8 bits per channel. Images are resized
    to `size` px each way. With None they keep their size, which must be the same for all.
    """
    tensors = [to_tensor(image, size, intensity) for image in several(images)]
    if len({tensor.shape for tensor in tensors}) > 1:
        raise UserError("images of several sizes cannot be tiled together; give them one at a time")
    return torch.stack(tensors)


def several(images: ImageLike | Sequence[ImageLike]) -> Sequence[ImageLike]:
    """The images as a sequence: several images as they are, a single one in a sequence of one."""
    batch = isinstance(images, (list, tuple)) or (isinstance(images, Tensor) and images.ndim == 4)
    return cast(Sequence[ImageLike], images if batch else [images])


def to_tensor(image: ImageLike | Deep, size: int | None, intensity: Intensity = UNKNOWN) -> Tensor:
    """One image as (3, H, W) float32 in [-1, 1] on the CPU, see `to_batch`."""
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise UserError(f"tensor of {image.dtype} and shape {tuple(image.shape)}: expected floating-point "
                            "(3, H, W) or (N, 3, H, W) in [-1, 1]")
        if size is None or image.shape[1:] == (size, size):
            return image.float().cpu()
        image = to_pixels(image)
    if isinstance(image, np.ndarray):
        image = image.astype(image.dtype.newbyteorder("="), copy=False)
        if image.dtype not in (np.uint8, np.uint16) or not image.size or not (
                image.ndim == 2 or image.ndim == 3 and image.shape[2] == 3):
            raise UserError(f"array of {image.dtype} and shape {image.shape}: expected uint8 or uint16 pixels (H, W) "
                            "or (H, W, 3)")
        image = Image.fromarray(image) if image.dtype == np.uint8 else Deep(image, 65535.0)
    image = intensity.to_rgb(image, "the image") if isinstance(image, (Image.Image, Deep)) else (
        read_image(Path(image), intensity))
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return to_float(to_uint8(image))
