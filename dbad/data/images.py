"""Read image files into memory: decode, resize, convert to 8 bits and, with their masks, to items.

Images are decoded and resized once and kept as uint8; everything after that is float32 in [-1, 1].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dbad.data.intensity import UNKNOWN, Intensity
from dbad.data.masks import Mask, read_mask
from dbad.records import Item, Sample


def read_image(path: Path, intensity: Intensity = UNKNOWN) -> Image.Image:
    """Read an image of any size and mode as 8-bit RGB, turned upright by its EXIF data.

    `intensity` converts more than 8 bits per channel; transparency is dropped. A file that is not an image, is
    truncated, or is not covered by `intensity` is a `UserError` that names it.
    """
    return intensity.read(path)


def read_images(samples: Sequence[Sample], size: int | None, num_workers: int = 0,
                intensity: Intensity = UNKNOWN) -> list[Tensor]:
    """Decode every image, resize it to (3, size, size) (None: keep its size), and return uint8 tensors."""
    def one(sample: Sample) -> Tensor:
        return to_uint8(_resized(read_image(sample.path, intensity), size, Image.Resampling.BILINEAR))
    return _map(one, samples, num_workers)


def read_items(samples: Sequence[Sample], size: int | None, num_workers: int = 0,
               intensity: Intensity = UNKNOWN) -> list[Item]:
    """Decode images with their masks; masks are resized with nearest neighbour and stay binary."""
    def one(sample: Sample) -> Item:
        return to_item(sample, *read_sample(sample, intensity), size)
    return _map(one, samples, num_workers)


def read_sample(sample: Sample, intensity: Intensity = UNKNOWN) -> tuple[Image.Image, Mask]:
    """The image of a sample, as `read_image` gives it, and its mask of the same size, empty where it has none."""
    image = read_image(sample.path, intensity)
    if sample.mask is None:
        return image, Mask(Image.new("L", image.size), False)
    return image, read_mask(sample.mask, image.size, sample.path)


def to_item(sample: Sample, image: Image.Image, mask: Mask, size: int | None) -> Item:
    """The item of (size, size) px for an image and mask from `read_sample`; a size of None keeps theirs."""
    marked = np.array(_resized(mask.image, size, Image.Resampling.NEAREST))
    pixels = to_uint8(_resized(image, size, Image.Resampling.BILINEAR))
    return Item(to_float(pixels), torch.from_numpy(marked > 0).float()[None], sample.label, sample.category,
                sample.defect, sample.path, mask.cut)


def check_readable(samples: Sequence[Sample], num_workers: int = 0, intensity: Intensity = UNKNOWN) -> None:
    """Read every image and mask once, so that a broken one is found before the long work."""
    def one(sample: Sample) -> None:
        read_sample(sample, intensity)
    _map(one, samples, num_workers)


def fingerprint(images: Iterable[Tensor]) -> str:
    """A short text that identifies a set of images by their pixels, whatever the names of their files."""
    digest = hashlib.blake2b(digest_size=8)
    for image in images:
        digest.update(repr(tuple(image.shape)).encode())
        digest.update(image.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _resized(image: Image.Image, size: int | None, how: Image.Resampling) -> Image.Image:
    return image if size is None or image.size == (size, size) else image.resize((size, size), how)


def _map(function: Callable, samples: Sequence[Sample], num_workers: int) -> list:
    if num_workers == 0:
        return [function(sample) for sample in samples]
    with ThreadPoolExecutor(num_workers) as pool:       # decoding releases the interpreter's lock
        return list(pool.map(function, samples))


def to_uint8(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_float(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(images: Tensor) -> np.ndarray:
    """(..., 3, H, W) float in [-1, 1] -> (..., H, W, 3) uint8 array."""
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.movedim(-3, -1).cpu().numpy()
