"""Difference maps of an image and its reconstruction, and their combination into one anomaly map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from dbad.errors import UserError

MATRIX_SIDE = 256       # px; maps up to this side are blurred by products of matrices


def pixel_map(image: Tensor, reconstruction: Tensor, kind: str = "max_square") -> Tensor:
    """The difference of two images per pixel, both scaled to [0, 1].

        kind   "max_square": the largest squared difference of the colour channels
               (github.com/NilsB98/Diffusion-Based-AD); "mean_abs": their mean absolute one (arXiv:2305.15956)
    (N, 3, H, W) in [-1, 1] twice -> (N, 1, H, W) in [0, 1].
    """
    difference = (image - reconstruction) / 2
    if kind == "max_square":
        return difference.square().amax(dim=1, keepdim=True)
    return difference.abs().mean(dim=1, keepdim=True)


def feature_maps(features: Sequence[Tensor], others: Sequence[Tensor], size: tuple[int, ...], kernel: int = 3
                 ) -> Tensor:
    """1 - cosine of two images' features, one map per layer, resized to `size`.

        features, others   one (N, C_l, H_l, W_l) per layer, of the image and of its reconstruction
        kernel             side of the mean filter that smooths the features first; 1 for none
    Returns (N, layers, H, W) in [0, 2].
    """
    maps = []
    for a, b in zip(features, others, strict=True):
        a, b = (F.avg_pool2d(f.float(), kernel, stride=1, padding=kernel // 2, count_include_pad=False) for f in (a, b))
        distance = (1 - F.cosine_similarity(a, b, dim=1)).clamp_min(0).unsqueeze(1)
        maps.append(F.interpolate(distance, size=size, mode="bilinear", align_corners=False))
    return torch.cat(maps, dim=1)


def blur(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (N, 1, H, W) with `sigma` in px; the kernel reaches 4 sigma, edges are reflected.

    A constant map stays as it is, and sigma 0 changes nothing.
    """
    if sigma <= 0:
        return maps
    height, width = maps.shape[-2:]
    radius = min(math.ceil(4 * sigma), height - 1, width - 1)
    if max(height, width) > MATRIX_SIDE:
        return _blur_by_taps(maps.float(), _gaussian(sigma, radius).tolist())
    # Two products of matrices: for one channel ten times faster on a CPU than two convolutions.
    rows, columns = (_blur_matrix(side, sigma, radius).to(maps.device) for side in (height, width))
    return rows @ maps.float() @ columns.T


@lru_cache(maxsize=32)
def _blur_matrix(side: int, sigma: float, radius: int) -> Tensor:
    """The weights (side, side) of every pixel of a line in each pixel of the blurred line."""
    each = F.pad(torch.eye(side)[:, None], (radius, radius), mode="reflect")        # a line per pixel
    return F.conv1d(each, _gaussian(sigma, radius).view(1, 1, -1))[:, 0].T.contiguous()


def _blur_by_taps(maps: Tensor, kernel: list[float]) -> Tensor:
    """Blur large maps tap by tap: a convolution of one channel is slower and takes 16 times the memory of its map."""
    maps = F.pad(maps, (len(kernel) // 2,) * 4, mode="reflect")
    for dim in (3, 2):
        taps = [maps.narrow(dim, first, maps.shape[dim] - len(kernel) + 1) for first in range(len(kernel))]
        maps = taps[0] * kernel[0]
        for tap, weight in zip(taps[1:], kernel[1:], strict=True):
            maps.add_(tap, alpha=weight)
    return maps


def _gaussian(sigma: float, radius: int) -> Tensor:
    """The Gaussian kernel (2 radius + 1,), of sum 1."""
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-offsets.square() / (2 * sigma ** 2))
    return kernel / kernel.sum()


def fuse(parts: dict[str, Tensor], scales: dict[str, float], weights: dict[str, float]) -> Tensor:
    """Sum of weight * part / scale over the named parts, each (N, 1, H, W) and already blurred.

    The scales are measured once on held-out good images (calibration.json). So a part of 1 means "as different as good
    images get", and the map of an image does not depend on the other images of its batch. A part that counts but has
    no scale is a `UserError`.
    """
    counting = {name: part for name, part in parts.items() if weights[name] > 0}
    if missing := sorted(counting.keys() - scales.keys()):
        raise UserError(f"the calibration has no scale for the {missing[0]} map, which its settings use; calibrate the "
                        "run again")
    return cast(Tensor, sum(weights[name] * part / scales[name] for name, part in counting.items()))


def central_window(shape: Sequence[int], center_crop: int) -> tuple[slice, slice]:
    """The central part of a map of `shape` = (H, W), as slices.

    `center_crop` is the side of that part in px of a 256 px image, 0 for the full frame. In a map of another size or
    shape, the part has the same share of each side.
    """
    def middle(length: int) -> slice:
        kept = max(1, round(length * center_crop / 256)) if center_crop else length
        first = (length - kept) // 2
        return slice(first, first + kept)
    return middle(shape[0]), middle(shape[1])


def cropped(maps: Tensor, center_crop: int) -> Tensor:
    """The maps (N, 1, H, W) with 0 outside the `central_window`."""
    if not center_crop:
        return maps
    window = (..., *central_window(maps.shape[-2:], center_crop))
    result = torch.zeros_like(maps)
    result[window] = maps[window]
    return result


def image_score(anomaly_map: Tensor, top_share: float = 0.0) -> Tensor:
    """Mean of the highest `top_share` of each map's pixels, at least one: (N, 1, H, W) -> (N,). 0 gives the maximum."""
    values = anomaly_map.flatten(1)
    count = round(top_share * values.shape[1])
    return values.amax(dim=1) if count <= 1 else values.topk(count, dim=1).values.mean(dim=1)
