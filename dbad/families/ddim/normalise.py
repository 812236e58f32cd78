"""Normalised difference maps: in units of the differences of good images at the same place or contrast.

Bright edges and grain are reconstructed less exactly than flat ground, so a plain difference map shows them first. A
normalised map is (D - mean) / std, where mean and std are those of D on good images

    location   at the same pixel: for parts that always lie in the same pose
    contrast   where the reconstruction has the same local contrast: for textures and parts in any pose
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dbad.errors import UserError
from dbad.files.checksums import read_tensors, write_tensors
from dbad.maps import blur

NUM_BINS = 16


@dataclass(frozen=True)
class Normalisation:
    """Statistics of good images' difference maps, P parts by name.

        kind    "location" or "contrast"
        mean    location: (P, H, W); contrast: (P, B), at the B contrasts of `levels`
        std     likewise, above 0
        levels  (B,) rising log contrasts; (0,) for location
        side    side of the measured images, in px; contrast is always taken over neighbourhoods of the same size
    """

    kind: str
    names: tuple[str, ...]
    mean: Tensor
    std: Tensor
    levels: Tensor
    side: int

    def __call__(self, parts: dict[str, Tensor], reconstruction: Tensor) -> dict[str, Tensor]:
        """Parts, each (N, 1, H, W) >= 0, in standard deviations above the mean; 0 below it."""
        where = None if self.kind == "location" else log_contrast(reconstruction, self.side)
        result = {}
        for index, name in enumerate(self.names):
            mean, std = ((table[index] if where is None else interpolate(where, self.levels, table[index]))
                         for table in (self.mean, self.std))
            if where is None and mean.shape != parts[name].shape[-2:]:
                raise UserError(f"maps of {tuple(parts[name].shape[-2:])} px: normalised by location for "
                                f"{tuple(mean.shape)} px")
            result[name] = ((parts[name] - mean) / std).clamp_min(0)
        return result


def fit(kind: str, parts: dict[str, Tensor], reconstructions: Tensor) -> Normalisation:
    """The statistics of good images: parts (N, 1, H, W) each, reconstructions (N, 3, H, W)."""
    names = tuple(parts)
    maps = torch.stack([parts[name][:, 0] for name in names])                   # (P, N, H, W)
    if kind == "location":
        # A few images say little about a single pixel: average with its neighbours, Gaussian of 2 % of the side.
        sigma = 0.02 * maps.shape[-1]
        mean = blur(maps.mean(dim=1)[:, None], sigma)[:, 0]
        variance = blur((maps - mean[:, None]).square().mean(dim=1)[:, None], sigma)[:, 0]
        levels = torch.zeros(0)
    else:
        where = log_contrast(reconstructions, max(maps.shape[-2:])).flatten()
        levels = torch.quantile(where[:: max(1, where.numel() // 1_000_000)],
                                (torch.arange(NUM_BINS) + 0.5) / NUM_BINS)
        edges = (levels[1:] + levels[:-1]) / 2
        bins = torch.bucketize(where, edges)
        count = torch.bincount(bins, minlength=NUM_BINS).clamp_min(1)
        flat = maps.flatten(1).double()
        mean = torch.stack([torch.bincount(bins, m, NUM_BINS) / count for m in flat]).float()
        variance = torch.stack([torch.bincount(bins, (m - mu[bins]).square(), NUM_BINS) / count
                                for m, mu in zip(flat, mean, strict=True)]).float()
    floor = 0.02 * variance.flatten(1).mean(dim=1).view(-1, *[1] * (variance.ndim - 1))  # no pixel is ever certain
    return Normalisation(kind, names, mean, (variance + floor).sqrt().clamp_min(1e-12), levels,
                         max(maps.shape[-2:]))


def interpolate(where: Tensor, levels: Tensor, values: Tensor) -> Tensor:
    """The piecewise linear function through (levels, values), constant beyond its ends, at every entry of `where`."""
    return torch.from_numpy(np.interp(where.numpy(), levels.numpy(), values.numpy())).float()


def log_contrast(images: Tensor, side: int) -> Tensor:
    """Log of the local standard deviation of the brightness, (N, 3, H, W) in [-1, 1] -> (N, 1, H, W).

    The neighbourhood is a Gaussian of 1.5 % of `side`, at least one pixel; a two-hundredth of the range is
    added, so that flat ground has a contrast of its own and not minus infinity.
    """
    grey = images.float().mean(dim=1, keepdim=True)
    sigma = max(1.0, 0.015 * side)
    mean = blur(grey, sigma)
    return (blur((grey - mean).square(), sigma).sqrt() + 0.01).log()


def save_normalisation(normalisation: Normalisation, path: Path) -> None:
    """Write the statistics as a .safetensors file."""
    about = {"kind": normalisation.kind, "names": " ".join(normalisation.names), "side": str(normalisation.side)}
    write_tensors({name: getattr(normalisation, name) for name in ("mean", "std", "levels")}, path, about)


def load_normalisation(path: Path) -> Normalisation:
    """Read what `save_normalisation` wrote; anything else is a `UserError` that names the file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file, but --map_norm needs it; run evaluation.py first")
    try:
        tensors, about = read_tensors(path)
        return Normalisation(about["kind"], tuple(about["names"].split()),
                             *(tensors[name] for name in ("mean", "std", "levels")), int(about["side"]))
    except (UserError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not the statistics of good images by evaluation.py ({error}); run it again") from None
