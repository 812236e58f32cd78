"""Categories on disk -> images in memory.

    ROOT/hazelnut/train/good/000.png
    ROOT/hazelnut/test/good/000.png
    ROOT/hazelnut/test/crack/000.png
    ROOT/hazelnut/ground_truth/crack/000_mask.png     (or 000.png)

Files are listed in sorted order and masks are found by name. Images are decoded and resized once and kept as uint8;
everything after that is float32 in [-1, 1].
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from dbad import demo
from dbad.config import RunOptions
from dbad.errors import UserError
from dbad.tiling import pad_to

SUFFIXES = tuple(sorted(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN))


class Item(NamedTuple):
    """One image. Train and test items have the same fields."""

    image: Tensor           # (3, H, W) float32 in [-1, 1]
    mask: Tensor            # (1, H, W) float32 in {0, 1}, 1 on the defect; all 0 for a good image
    label: int              # 0 good, 1 defective
    category: str
    defect: str             # name of the defect's folder, or "good"
    path: Path              # the file the image came from


@dataclass(frozen=True)
class Sample:
    """One image file of a category, not read yet; `mask` is None for good images and where no ground truth exists."""

    path: Path
    category: str
    defect: str
    mask: Path | None = None

    @property
    def label(self) -> int:
        return int(self.defect != "good")


@dataclass(frozen=True)
class Category:
    """The files of one category: good ones to train on, and those of the test."""

    name: str
    root: Path
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]


def open_category(options: RunOptions, states: Sequence[str] = ("all",)) -> Category:
    """The category that the options name: of `--dataset_path`, or of the built-in demo data, drawn on first use."""
    if options.dataset_path is not None:
        return find_category(options.dataset_path, options.item, states)
    if options.item not in demo.CATEGORIES:
        near = difflib.get_close_matches(options.item, demo.CATEGORIES, 1)
        raise UserError(f"--item {options.item}: the built-in demo data has {', '.join(demo.CATEGORIES)}"
                        + (f"; did you mean {near[0]}?" if near else "; real data need --dataset_path"))
    root = demo.write_demo(demo.demo_root(), (options.item,))
    return find_category(root, options.item, states)


def find_category(dataset_path: Path, item: str, states: Sequence[str] = ("all",)) -> Category:
    """List the files of category `item`; `states` limits the test to some defect folders ("good" is one of them)."""
    dataset_path = Path(dataset_path)
    if not dataset_path.is_dir():
        found = "a file" if dataset_path.exists() else "nothing"
        raise UserError(f"--dataset_path {dataset_path}: expected a folder, found {found}")
    root = dataset_path / item
    if not root.is_dir():
        names = sorted(p.name for p in dataset_path.iterdir() if (p / "train").is_dir())
        if (dataset_path / "train").is_dir():
            hint = f"; this is a category itself: give --dataset_path {dataset_path.parent} --item {dataset_path.name}"
        else:
            near = difflib.get_close_matches(item, names, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(names) or 'none'}"
        raise UserError(f"--item {item}: no such category in {dataset_path}{hint}")
    good = root / "train" / "good"
    if not good.is_dir():
        raise UserError(f"{good}: no such folder; expected the good images to train on")
    train = tuple(Sample(path, item, "good") for path in list_images(good))
    if not train:
        raise UserError(f"{good}: no images; expected files such as 000.png")
    return Category(item, root, train, tuple(_find_test(root, item, states)))


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by name."""
    return sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def _find_test(root: Path, item: str, states: Sequence[str]) -> Iterable[Sample]:
    test = root / "test"
    there = sorted(p.name for p in test.iterdir() if p.is_dir()) if test.is_dir() else []
    unknown = [state for state in states if state not in ("all", *there)]
    if unknown:
        raise UserError(f"--item_states {' '.join(unknown)}: not in {test}; there are: all {' '.join(there)}")
    if "all" not in states:
        there = [state for state in there if state in states]
    for defect in there:
        truth = root / "ground_truth"
        masks = {p.stem: p for p in list_images(truth / defect)} if (truth / defect).is_dir() else {}
        for path in list_images(test / defect):
            mask = masks.get(f"{path.stem}_mask", masks.get(path.stem))
            if defect != "good" and mask is None and truth.is_dir():
                raise UserError(f"{path} shows a defect, but there is no mask {truth / defect / path.stem}_mask.png")
            yield Sample(path, item, defect, mask if defect != "good" else None)


def split_holdout(samples: Sequence[Sample], share: float) -> tuple[list[Sample], list[Sample]]:
    """Part good images into those to train on and those held out for calibration, (train, held out).

    The `share` of files whose names hash lowest is held out, at least one: the same files in every script, wherever
    the data lie, and adding files moves few others.
    """
    if len(samples) < 2:
        raise UserError(f"{samples[0].path.parent}: {len(samples)} image; expected at least 2, one of them to hold out")
    by_hash = sorted(samples, key=lambda s: hashlib.blake2b(s.path.name.encode()).digest())
    count = min(max(1, round(share * len(samples))), len(samples) - 1)
    held_out = set(by_hash[:count])
    return [s for s in samples if s not in held_out], [s for s in samples if s in held_out]


# ------------------------------------------------------------------------------------------ reading files

def read_image(path: Path) -> Image.Image:
    """Read an image of any size and mode as 8-bit RGB, turned upright as its EXIF data say.

    16-bit images are scaled to 8 bits by their full range; transparency is dropped. A file that is not an image or is
    truncated is a `UserError` that names it.
    """
    return to_rgb(_open(path), path)


def to_rgb(image: Image.Image, name: object) -> Image.Image:
    """An opened image as `read_image` gives it; `name` is what errors call it."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if image.mode == "F" and not (values.min() >= 0 and values.max() <= 1):
            raise UserError(f"{name}: floating-point pixels from {values.min():g} to {values.max():g}; expected 0 to 1")
        scale = 255 if image.mode == "F" else 255 / 65535
        image = Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def read_mask(path: Path, image_size: tuple[int, int], image_path: Path) -> Image.Image:
    """Read a mask as an 8-bit image of 0 and 255; every value above 0 is defect. Its size must be the image's."""
    mask = ImageOps.exif_transpose(_open(path))
    if mask.size != image_size:
        raise UserError(f"{path}: mask of {mask.width}x{mask.height} px for {image_path} of "
                        f"{image_size[0]}x{image_size[1]} px; expected the same size")
    values = np.asarray(mask.convert("RGB") if mask.mode in ("P", "RGBA", "LA") else mask)
    values = values.max(axis=2) if values.ndim == 3 else values
    return Image.fromarray(((values > 0) * 255).astype(np.uint8))


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image that can be read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: truncated or broken image ({error})") from None


def read_images(samples: Sequence[Sample], size: int | None, num_workers: int = 0) -> list[Tensor]:
    """Decode every image, resize it to (3, size, size) (None: keep its size), and return uint8 tensors."""
    def one(sample: Sample) -> Tensor:
        return to_uint8(_resized(read_image(sample.path), size, Image.Resampling.BILINEAR))
    return _map(one, samples, num_workers)


def read_items(samples: Sequence[Sample], size: int | None, num_workers: int = 0) -> list[Item]:
    """Decode images with their masks; masks are resized with nearest neighbour and stay binary."""
    def one(sample: Sample) -> Item:
        image = read_image(sample.path)
        mask = Image.new("L", image.size)
        if sample.mask is not None:
            mask = read_mask(sample.mask, image.size, sample.path)
        mask = np.array(_resized(mask, size, Image.Resampling.NEAREST))
        pixels = to_uint8(_resized(image, size, Image.Resampling.BILINEAR))
        return Item(to_float(pixels), torch.from_numpy(mask > 0).float()[None], sample.label, sample.category,
                    sample.defect, sample.path)
    return _map(one, samples, num_workers)


def check_readable(samples: Sequence[Sample], num_workers: int = 0) -> None:
    """Read every image and mask once, so that a broken one is found before the long work and not after it."""
    def one(sample: Sample) -> None:
        image = read_image(sample.path)
        if sample.mask is not None:
            read_mask(sample.mask, image.size, sample.path)
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
