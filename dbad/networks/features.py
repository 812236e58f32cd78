"""Patch features: the stages of a backbone on one grid, extracted once per image and kept on the disk.

    FOLDER/efficientnet_lite0-0123456789abcdef.npy     (N, C, G, G) float16, one row per image
    FOLDER/efficientnet_lite0-0123456789abcdef.json    their origin and their digest

The digits are a hash of the images, the backbone with its weights, its layers, the input size, the grid and the
smoothing, so features of different origin have different files. The folder may be deleted at any time.

Features are computed in float32: on rough textures, where good patches lie far apart, the rounding of bfloat16 costs
accuracy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dbad.data.images import fingerprint, to_float
from dbad.errors import UserError
from dbad.files.atomic import atomic_write, read_json, write_json
from dbad.files.temporary import remove_abandoned
from dbad.networks.extractors import Extractor

FLOAT16_MAX = 65504
_ROWS = 16          # images whose features are in memory at once, as float64: 25 MB for 192 channels on 32x32


class PatchExtractor(nn.Module):
    """Images -> features of their patches: (N, 3, H, W) in [-1, 1] -> (N, C, G, G) float32.

        extractor    its layers are concatenated; C is the sum of their channels
        grid         side G of the grid of patches
        smoothing    side of the mean filter each layer passes through first, at its own resolution (PatchCore, CVPR
                     2022, section 3.1: 3); 1 for none
    """

    def __init__(self, extractor: Extractor, grid: int = 32, smoothing: int = 1):
        super().__init__()
        if grid < 1 or smoothing < 1 or smoothing % 2 == 0:
            raise ValueError(f"grid {grid}, smoothing {smoothing}: expected a positive and an odd positive number")
        self.extractor, self.grid, self.smoothing = extractor, grid, smoothing
        self.channels = sum(extractor.channels)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([on_grid(f, self.grid, self.smoothing) for f in self.extractor(images)], dim=1)

    def description(self) -> dict[str, Any]:
        """Everything besides the images that determines the features, as plain values; equal for equal features."""
        extractor = self.extractor
        return {"backbone": extractor.name, "weights": weights_digest(extractor), "layers": list(extractor.layers),
                "resolution": extractor.resolution, "grid": self.grid, "smoothing": self.smoothing}


def on_grid(features: Tensor, grid: int, smoothing: int = 1) -> Tensor:
    """Bring one layer (N, C, H, W) to (N, C, grid, grid) float32.

    First a mean filter of side `smoothing` is applied, which averages only over pixels inside the map. A finer layer is
    then averaged over the area of each patch, a coarser one interpolated bilinearly. A constant map stays constant.
    """
    features = features.float()
    if smoothing > 1:
        features = F.avg_pool2d(features, smoothing, stride=1, padding=smoothing // 2, count_include_pad=False)
    if features.shape[-1] > grid:
        return F.adaptive_avg_pool2d(features, grid)
    return F.interpolate(features, size=(grid, grid), mode="bilinear", align_corners=False)


def weights_digest(extractor: Extractor) -> str:
    """A hash of an extractor's weights and of the mean and std of its input.

    An adapted extractor has another hash than the pretrained one it came from.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, value in [*sorted(extractor.state_dict().items()), ("mean", extractor.mean), ("std", extractor.std)]:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def to_patches(features: Tensor) -> Tensor:
    """(N, C, G, G) -> (N * G * G, C), image by image and row by row."""
    return features.movedim(1, -1).flatten(0, -2)


def to_maps(patches: Tensor, grid: int) -> Tensor:
    """(N * G * G, C) -> (N, C, G, G), the inverse of `to_patches`."""
    return patches.unflatten(0, (-1, grid, grid)).movedim(-1, 1)


# ------------------------------------------------------------------------------------------ on the disk

def extract_features(model: PatchExtractor, images: Sequence[Tensor], folder: Path, *, batch_size: int,
                     device: torch.device) -> np.ndarray:
    """The features of `images`, uint8 (3, H, W) of one size each, as a read-only memory map (N, C, G, G) float16.

    They are read from `folder` if it holds them complete, else computed and written there. Features that float16 cannot
    hold are a `UserError`; its rounding, at most 2^-11 of the value, is far below the differences between good patches.
    """
    about = model.description() | {"images": fingerprint(images),
                                   "shape": [len(images), model.channels, model.grid, model.grid], "dtype": "float16"}
    key = hashlib.blake2b(repr(about).encode(), digest_size=8).hexdigest()
    path = Path(folder) / f"{model.extractor.name.replace('/', '_')}-{key}.npy"
    cached = _open_cached(path, about)
    if cached is not None:
        return cached
    remove_abandoned(path.parent, below=False)
    digest = hashlib.blake2b(digest_size=16)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        # Written, not mapped: a full disk then raises an error; with a memory map, a signal would end the program.
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f2", "fortran_order": False, "shape": tuple(about["shape"])})
        for values in _batches(model, images, batch_size, device):
            content = values.numpy().astype("<f2").tobytes()
            digest.update(content)
            file.write(content)
    write_json(path.with_suffix(".json"), about | {"digest": digest.hexdigest()})
    return np.load(path, mmap_mode="r")


def _open_cached(path: Path, about: Mapping[str, Any]) -> np.ndarray | None:
    """The features at `path`; None if they are missing, incomplete or not the ones that `about` describes."""
    try:
        found = read_json(path.with_suffix(".json"))
        features = np.load(path, mmap_mode="r", allow_pickle=False)
    except (UserError, OSError, ValueError, EOFError):
        return None
    if found != {**about, "digest": found.get("digest")} or features.dtype != "<f2" or list(
            features.shape) != about["shape"] or not features.flags.c_contiguous:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for row in features:
        digest.update(row)
    return features if digest.hexdigest() == found["digest"] else None


@torch.inference_mode()
def _batches(model: PatchExtractor, images: Sequence[Tensor], batch_size: int,
             device: torch.device) -> Iterator[Tensor]:
    """Yield the features of consecutive images, (n, C, G, G) float16 on the CPU."""
    model.to(device).to(memory_format=torch.channels_last).eval()
    with tqdm(total=len(images), desc="extracting features", unit="image") as bar:
        for first in range(0, len(images), batch_size):
            batch = torch.stack(list(images[first:first + batch_size]))
            features = model(to_float(batch.to(device)))
            largest = float(features.abs().amax())
            if not largest <= FLOAT16_MAX:          # `not <=` also finds not-a-number
                raise UserError(f"--extractor {model.extractor.name}: its features reach {largest:.3g}; expected at "
                                f"most {FLOAT16_MAX}, the largest float16 number; choose other layers or another "
                                "extractor")
            yield features.half().cpu()
            bar.update(len(batch))


# ------------------------------------------------------------------------------------------ standardisation

@dataclass(frozen=True)
class Standardisation:
    """Mean and standard deviation of every channel, both (C,) float32.

    A channel that is constant in training has std 1, so that it is only centred.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def fit(cls, features: Iterable[np.ndarray]) -> Standardisation:
        """The statistics of training features, one (N, C, G, G) per category; read in pieces and summed in float64."""
        count, total, squares = 0, 0.0, 0.0
        for part in features:
            for first in range(0, len(part), _ROWS):
                values = part[first:first + _ROWS].astype(np.float64)
                count += values.size // values.shape[1]
                total = total + values.sum(axis=(0, 2, 3))
                squares = squares + np.square(values, out=values).sum(axis=(0, 2, 3))
        mean = total / count
        variance = squares / count - mean ** 2
        constant = variance <= 1e-12 * squares / count          # a variance of 0, up to rounding
        std = np.sqrt(np.where(constant, 1.0, variance))
        return cls(torch.from_numpy(mean).float(), torch.from_numpy(std).float())

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Standardisation:
        """The standardisation whose `state` was saved."""
        return cls(state["mean"], state["std"])

    def state(self) -> dict[str, Tensor]:
        """The tensors by name, for a file that opens with `weights_only=True`."""
        return {"mean": self.mean.cpu(), "std": self.std.cpu()}

    def to(self, device: torch.device) -> Standardisation:
        """The same statistics on another device."""
        return Standardisation(self.mean.to(device), self.std.to(device))

    def apply(self, features: Tensor) -> Tensor:
        """(N, C, ...) -> float32 of the same shape with zero mean and unit variance per channel, as in training."""
        mean, std = self._beside(features)
        return (features.float() - mean) / std

    def batches(self, features: np.ndarray) -> Iterator[Tensor]:
        """Yield standardised features of an array (N, C, G, G), some images at a time, on the device of the mean."""
        for first in range(0, len(features), _ROWS):
            yield self.apply(torch.from_numpy(np.array(features[first:first + _ROWS])).to(self.mean.device))

    def invert(self, features: Tensor) -> Tensor:
        """The inverse of `apply`."""
        mean, std = self._beside(features)
        return features.float() * std + mean

    def _beside(self, features: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, -1, *[1] * (features.ndim - 2))
        return self.mean.view(shape), self.std.view(shape)
