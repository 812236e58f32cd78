"""Images in memory: read, resized, split, varied.

    python -m dbad.data data/mvtec

prints how a data set is laid out and what is in it. Images are decoded and resized once and kept as uint8; everything
after that is float32 in [-1, 1].
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dbad.data.demo import draw
from dbad.data.intensity import UNKNOWN, Intensity
from dbad.data.layouts.registry import open_dataset
from dbad.data.masks import Mask, read_mask
from dbad.data.splits import Category, Sample, split_by_hash
from dbad.data.tiling import pad_to
from dbad.errors import UserError
from dbad.options.command_line import RunOptions
from dbad.runtime.device import say_once

T = TypeVar("T")


class Item(NamedTuple):
    """One image. Train and test items have the same fields."""

    image: Tensor           # (3, H, W) float32 in [-1, 1]
    mask: Tensor            # (1, H, W) float32 in {0, 1}, 1 on the defect; all 0 for a good image, or without a mask
    label: int              # 0 good, 1 defective
    category: str
    defect: str             # name of the defect's folder, or "good"
    path: Path              # the file the image came from
    cut: bool = False       # the file of the mask has shades, see dbad.data.masks


def open_category(options: RunOptions, states: Sequence[str] = ("all",)) -> Category:
    """The category that the options name: of `--dataset_path`, or of the built-in demo data, drawn on first use.

    Its notes, such as what was left out, are printed the first time.
    """
    if options.dataset_path is not None:
        category = find_category(options.dataset_path, options.item, states, options.layout)
        for note in category.notes:
            say_once(f"{category.name}: {note}")
        return category
    if options.item not in draw.CATEGORIES:
        near = difflib.get_close_matches(options.item, draw.CATEGORIES, 1)
        raise UserError(f"--item {options.item}: the built-in demo data has {', '.join(draw.CATEGORIES)}"
                        + (f"; did you mean {near[0]}?" if near else "; real data need --dataset_path"))
    if options.layout not in ("auto", "mvtec"):
        raise UserError(f"--layout {options.layout}: the built-in demo data has layout mvtec; expected --dataset_path")
    root = draw.write_demo(draw.demo_root(), (options.item,))
    return find_category(root, options.item, states, "mvtec")


def category_names(options: RunOptions) -> tuple[str, ...]:
    """The categories there are: those of `--dataset_path`, or of the built-in demo data."""
    if options.dataset_path is None:
        return tuple(draw.CATEGORIES)
    return open_dataset(options.dataset_path, options.layout).names


def named_items(options: Any) -> tuple[str, ...]:
    """The categories that the option `item` names, each once, in that order: one, several, or all there are."""
    names = (options.item,) if isinstance(options.item, str) else options.item
    known = category_names(options)
    if "all" in names:
        return known
    for name in set(names) - set(known):
        open_category(replace(options, item=name))      # says what is wrong with it
    return tuple(dict.fromkeys(names))


def chosen_items(options: Any) -> tuple[str, ...]:
    """`named_items` for one model of them all, to which their order is nothing: sorted."""
    return tuple(sorted(named_items(options)))


def find_category(dataset_path: Path, item: str, states: Sequence[str] = ("all",), layout: str = "auto") -> Category:
    """List the files of category `item`; `states` limits the test to some defects ("good" is one of them)."""
    return open_dataset(dataset_path, layout).category(item, states)


def test_images(category: Category, masks: str = "where_there_are") -> tuple[Sample, ...]:
    """The images of the test; a category without any is a `UserError`.

    So is a defective image without mask, if `masks` is "required" and not "where_there_are".
    """
    if not category.test:
        raise UserError(f"{category.root}: no test images; expected folders such as {category.root / 'test' / 'good'}")
    if masks == "required" and category.unmasked:
        first, count = category.unmasked[0], sum(sample.label for sample in category.test)
        raise UserError(f"{first.path} shows a defect, but there is no mask{f' {first.mask}' if first.mask else ''}: "
                        f"{len(category.unmasked)} of {count} defective images have none; --masks where_there_are "
                        "measures the others")
    return category.test


def split_category(category: Category, share: float) -> tuple[list[Sample], list[Sample]]:
    """Part the good images of a category into those to train on and those held out for calibration, (train, held out).

    Held out are those that the data set itself keeps for validation; where it keeps none, a share, see `split_holdout`.
    """
    if category.held_out:
        return list(category.train), list(category.held_out)
    return split_holdout(category.train, share)


def split_holdout(samples: Sequence[Sample], share: float) -> tuple[list[Sample], list[Sample]]:
    """Part good images into those to train on and those held out for calibration, (train, held out).

    Held out is about the `share` of files, or of groups of files, whose names hash lowest, at least one: the same in
    every script. A group is never divided.
    """
    train, held_out = split_by_hash(samples, share)
    if not held_out:
        one = f"{len(samples)} images of one group" if len(samples) > 1 else "1 image"
        raise UserError(f"{samples[0].path.parent}: {one}; expected at least 2, one of them to hold out")
    return train, held_out


def some_of(things: Sequence[T], most: int = 40) -> Sequence[T]:
    """At most so many of the samples or images, evenly chosen."""
    return things[::-(-len(things) // most)]


# ------------------------------------------------------------------------------------------ reading files

def read_image(path: Path, intensity: Intensity = UNKNOWN) -> Image.Image:
    """Read an image of any size and mode as 8-bit RGB, turned upright as its EXIF data say.

    `intensity` says what becomes of more than 8 bits per channel; transparency is dropped. A file that is not an image,
    is truncated, or is not covered by `intensity` is a `UserError` that names it.
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
    """What `read_sample` gives as an item of (size, size) px; None keeps its size."""
    marked = np.array(_resized(mask.image, size, Image.Resampling.NEAREST))
    pixels = to_uint8(_resized(image, size, Image.Resampling.BILINEAR))
    return Item(to_float(pixels), torch.from_numpy(marked > 0).float()[None], sample.label, sample.category,
                sample.defect, sample.path, mask.cut)


def check_readable(samples: Sequence[Sample], num_workers: int = 0, intensity: Intensity = UNKNOWN) -> None:
    """Read every image and mask once, so that a broken one is found before the long work and not after it."""
    def one(sample: Sample) -> None:
        read_sample(sample, intensity)
    _map(one, samples, num_workers)


def fingerprint(images: Iterable[Tensor]) -> str:
    """A short text that tells one set of images from another, whatever their files are called."""
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


# ------------------------------------------------------------------------------------------ augmentation

def augment(images: Tensor, streams: Sequence[torch.Generator], flip: bool, rotate: float,
            color_jitter: float) -> Tensor:
    """Vary a batch (N, 3, S, S) float32 in [-1, 1], each image by its own random stream.

        flip           mirror left to right with probability 1/2
        rotate         turn by up to so many degrees either way; corners are filled by reflection
        color_jitter   change brightness, contrast and saturation by up to this factor, 0.1 for 10 %
    """
    draws = torch.stack([torch.rand(5, generator=stream) for stream in streams])
    if flip:
        images = torch.where((draws[:, 0] < 0.5).view(-1, 1, 1, 1), images.flip(3), images)
    if rotate:
        angle = (draws[:, 1] * 2 - 1) * torch.pi * rotate / 180
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        turn = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(turn, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    if color_jitter:
        brightness, contrast, saturation = (1 + (draws[:, 2:] * 2 - 1) * color_jitter).T.reshape(3, -1, 1, 1, 1)
        light = (images + 1) / 2 * brightness
        light = torch.lerp(light.mean(dim=(1, 2, 3), keepdim=True), light, contrast)
        light = torch.lerp(light.mean(dim=1, keepdim=True), light, saturation)
        images = (light * 2 - 1).clamp(-1, 1)
    return images


def random_crops(images: Sequence[Tensor], size: int, streams: Sequence[torch.Generator]) -> Tensor:
    """Cut one square of `size` px at a random place out of each (3, H, W); returns (N, 3, size, size).

    An image that is smaller is extended by its edge pixels first.
    """
    crops = []
    for image, stream in zip(images, streams, strict=True):
        image = pad_to(image, size)
        top, left = (int(torch.randint(0, extent - size + 1, (), generator=stream)) for extent in image.shape[-2:])
        crops.append(image[:, top:top + size, left:left + size])
    return torch.stack(crops)
