"""Gaussian and simplex noise, one random stream per image.

A stream follows from a seed and its purpose (an image, a training step). So the noise of an image does not depend on
its batch, its place in the batch, the number of processes or the device: it is always drawn on the CPU.
"""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Generator, Tensor

# Octaves of the simplex noise: feature size of the first in px, number, and factor of amplitude from one to the next
# (AnoDDPM, Wyatt et al., CVPRW 2022, as github.com/NilsB98/Diffusion-Based-AD sets them).
FIRST_FEATURE_PX, NUM_OCTAVES, PERSISTENCE = 32, 6, 0.6


def stream(seed: int, *keys: int | str | bytes) -> Generator:
    """A random stream that follows from `seed` and `keys` alone."""
    digest = hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def image_stream(seed: int, image: Tensor, sample: int = 0) -> Generator:
    """The random stream of one image (3, H, W) in [-1, 1]. It depends on the pixels, not on the file.

    Every `sample` of an image has its own stream.
    """
    pixels = ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    content = hashlib.blake2b(pixels.cpu().contiguous().numpy().tobytes()).digest()
    return stream(seed, "image", content, *[sample] * bool(sample))


def draw(kind: str, shape: Sequence[int], streams: Sequence[Generator]) -> Tensor:
    """Noise of `kind` ("gaussian" or "simplex") with zero mean and unit variance, one image of `shape` per stream.

    Returns (N, C, H, W) float32 on the CPU. Each call advances the streams.
    """
    if kind == "gaussian":
        return torch.stack([torch.randn(tuple(shape), generator=s) for s in streams])
    if kind == "simplex":
        return simplex(shape, streams)
    raise ValueError(f"noise kind {kind!r}: expected gaussian or simplex")


def simplex(shape: Sequence[int], streams: Sequence[Generator]) -> Tensor:
    """Multi-octave simplex noise in three dimensions (channel, height, width); (N, C, H, W) float32.

    Simplex noise (Perlin, 2001) is linear in the random gradients of its lattice points, and the grid of pixels is
    always the same; so the geometry is one sparse matrix, made once per shape, and the noise of an image is its product
    with random gradients. A product for several images at once would add in another order for another number of images.
    The rows are scaled so that the variance of every pixel is exactly 1 (gradients are Perlin's twelve, brought to unit
    length, so that their components are uncorrelated, each of variance 1/3).
    """
    matrix, num_points = _simplex_matrix(*shape)
    picks = [torch.randint(0, 12, (num_points,), generator=s, dtype=torch.uint8) for s in streams]
    return torch.stack([(matrix @ _GRADIENTS.index_select(1, pick.int()).flatten()).view(*shape) for pick in picks])


# The midpoints of a cube's edges, (3, 12), at unit length.
_GRADIENTS = torch.tensor([g for g in itertools.product((-1.0, 0.0, 1.0), repeat=3) if g.count(0.0) == 1]).T / 2 ** 0.5


@lru_cache(maxsize=4)
def _simplex_matrix(channels: int, height: int, width: int) -> tuple[Tensor, int]:
    """The sparse matrix (C * H * W, 3 * P) that maps gradients of P lattice points, by component, to noise; and P.

    Every pixel has the same number of entries: 4 corners times 3 components in each octave.
    """
    grid = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in (channels, height, width)))
    points, weights = [], []
    num_points = 0
    for octave in range(NUM_OCTAVES):
        # Every octave has its own offset: else all would be 0 together at the lattice point (0, 0, 0).
        shifted = grid * 2.0 ** octave / FIRST_FEATURE_PX + torch.tensor([0.137, 0.371, 0.619]) * (octave + 1)
        lattice, kernel = _simplex_corners(shifted)                             # (n, 4, 3) integers, (n, 4, 3)
        lattice = lattice - lattice.amin(dim=(0, 1))
        extent = (lattice.amax(dim=(0, 1)) + 1).tolist()
        unique, index = torch.unique(lattice @ torch.tensor([extent[1] * extent[2], extent[2], 1]), return_inverse=True)
        points.append(num_points + index)
        weights.append(kernel * PERSISTENCE ** octave)
        num_points += len(unique)
    columns = torch.stack(points, 1).unsqueeze(-1) + num_points * torch.arange(3)       # (n, octaves, 4, 3)
    values = torch.stack(weights, 1).flatten(1)
    values = values / (values.square().sum(1, keepdim=True) / 3).sqrt()
    rows = torch.arange(len(grid) + 1) * values.shape[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(rows.int(), columns.flatten().int(), values.flatten().float(),
                                       (len(grid), 3 * num_points), check_invariants=False), num_points


def _simplex_corners(points: Tensor) -> tuple[Tensor, Tensor]:
    """The four lattice corners around each of n points, and the factors of each corner's gradient.

        points   (n, 3) float64
    Returns integer lattice coordinates (n, 4, 3) and kernel * offset (n, 4, 3), kernel = max(0, 0.5 - |offset|^2)^4.
    The noise is the sum of factor times gradient over corners and components.
    """
    skew, unskew = 1 / 3, 1 / 6
    cell = (points + points.sum(1, keepdim=True) * skew).floor()
    inside = points - (cell - cell.sum(1, keepdim=True) * unskew)        # offset from the cell's first corner
    order = inside.argsort(dim=1, descending=True, stable=True)          # walk along the largest offset first
    rank = order.argsort(dim=1)
    step = (rank.unsqueeze(1) < torch.arange(4).view(1, 4, 1)).to(points.dtype)          # (n, 4, 3) in {0, 1}
    offset = inside.unsqueeze(1) - step + step.sum(2, keepdim=True) * unskew
    kernel = (0.5 - (offset ** 2).sum(2, keepdim=True)).clamp_min(0) ** 4
    return (cell.unsqueeze(1) + step).long(), kernel * offset
