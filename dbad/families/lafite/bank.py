"""A memory bank of good patches: chosen as a core-set within a budget of bytes, searched exactly.

PatchCore (CVPR 2022) scores a patch by its distance to the nearest one of the bank. LafitE (arXiv:2307.08059) replaces
a patch by a weighted mean of the nearest ones before it is denoised ("feature editing").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dbad.checkpoints.weights import load_pickle, save_pickle
from dbad.diffusion.noise import stream
from dbad.errors import UserError
from dbad.networks.features import Standardisation, to_patches

_CANDIDATES = 2048                  # for the core-set, examined between two passes over all vectors
_QUERIES, _VECTORS = 512, 8192      # sides of the block of distances in memory at once: 16 MB
_SEARCHED = {"cpu": (256, 1024)}    # queries and vectors of one product; on a CPU it must fit a core's cache
_GROUP = 16                         # vectors in a group; the nearest of each group is found first


@dataclass(frozen=True)
class Bank:
    """Standardised patch features of good images.

        vectors    (K, C) float16 or float32, category after category
        counts     number of vectors by category
        features   description of the extractor (`PatchExtractor.description`), as plain values
        pixels     the piece of image that each vector describes (K, 3, P, P) uint8; None where they are not kept
    """

    vectors: Tensor
    counts: Mapping[str, int]
    features: Mapping[str, Any]
    pixels: Tensor | None = None

    def to(self, device: torch.device) -> Bank:
        """The bank on another device, or itself if it is there already; the pixels stay where they are."""
        vectors = self.vectors.to(device)
        return self if vectors is self.vectors else replace(self, vectors=vectors)

    @cached_property
    def _prepared(self) -> tuple[Tensor, Tensor]:
        """The vectors in float32 and their squared norms; every product needs both."""
        vectors = self.vectors.float()
        return vectors, vectors.square().sum(dim=1)

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest vectors of every query, nearest first; of equally near ones the lower index first.

            queries   (Q, C), on the bank's device
        Returns Euclidean distances (Q, k) float32 and indices (Q, k) int64. The search is exhaustive, in
        float32: a neighbour can only be missed for another one that is as near within rounding errors.
        """
        self._check(queries, k)
        # Room for all results first: small results between large blocks keep the allocator from reusing the blocks.
        distances = queries.new_empty(len(queries), k, dtype=torch.float32)
        indices = queries.new_empty(len(queries), k, dtype=torch.int64)
        rows, columns = _SEARCHED.get(queries.device.type, (1024, _VECTORS))
        width = _GROUP * math.ceil(len(self.vectors) / _GROUP)
        proximity = queries.new_empty(min(rows, len(queries)), width, dtype=torch.float32)
        proximity[:, len(self.vectors):] = torch.inf
        for first in range(0, len(queries), rows):
            part = slice(first, first + rows)
            distances[part], indices[part] = self._nearest(queries[part].float(), k, proximity, columns)
        return distances, indices

    def edit(self, queries: Tensor, k: int, tau: float) -> Tensor:
        """Feature editing: every query becomes the mean of its k nearest vectors, weighted by softmax(-d^2 / tau).

            queries   (Q, C), on the bank's device
            tau       > 0, in units of a squared distance, see `temperature`; smaller: the nearest counts more
        Returns (Q, C) float32.
        """
        self._check(queries, k)
        return torch.cat([self.weighted(*self.nearest(part, k), tau) for part in queries.split(_QUERIES)])

    def weighted(self, distances: Tensor, indices: Tensor, tau: float) -> Tensor:
        """The result of `edit`, (Q, C) float32, from what `nearest` has returned for the queries."""
        if not tau > 0:
            raise ValueError(f"tau {tau}: expected a positive number")
        weights = torch.softmax(-distances.square() / tau, dim=1)
        edited = weights.new_empty(len(weights), self.vectors.shape[1])
        for first in range(0, len(weights), _QUERIES):
            part = slice(first, first + _QUERIES)
            edited[part] = (weights[part].unsqueeze(2) * self.vectors[indices[part]].float()).sum(dim=1)
        return edited

    def temperature(self, queries: Tensor) -> float:
        """The median squared distance of `queries`, held-out good patches (Q, C), to their nearest vector; > 0.

        The softmax takes squared distances too, so the edit does not depend on the scale of the features.
        """
        distances, _ = self.nearest(queries, 1)
        return max(float(distances.square().median()), torch.finfo(torch.float32).tiny)

    def _check(self, queries: Tensor, k: int) -> None:
        if queries.ndim != 2 or queries.shape[1] != self.vectors.shape[1]:
            raise UserError(f"features of shape {tuple(queries.shape)}: the memory bank has vectors of "
                            f"{self.vectors.shape[1]} channels; it belongs to another extractor or other layers")
        if not 1 <= k <= len(self.vectors):
            raise UserError(f"{k} neighbours of every patch: expected 1 to {len(self.vectors)}, the number of vectors "
                            "in the memory bank; try a larger --bank_mb")

    def _nearest(self, queries: Tensor, k: int, proximity: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """`nearest` of (q, C) float32, `columns` vectors at a time.

        `proximity` is a workspace of at least q rows, infinite beyond the vectors. Its columns form G groups, every
        G-th column in one group. The k nearest vectors lie in the k groups with the nearest members.
        """
        proximity, (vectors, norms) = proximity[:len(queries)], self._prepared
        for first in range(0, len(vectors), columns):
            block = slice(first, min(first + columns, len(vectors)))
            _proximity(queries, vectors[block], norms[block], out=proximity[:, block])
        nearest = proximity.unflatten(1, (_GROUP, -1)).amin(dim=1)
        groups = nearest.topk(min(k, nearest.shape[1]), dim=1, largest=False).indices
        members = groups.unsqueeze(2) + nearest.shape[1] * torch.arange(_GROUP, device=groups.device)
        members = members.flatten(1)
        order = proximity.gather(1, members).topk(k, dim=1, largest=False).indices
        indices = members.gather(1, order).sort(dim=1).values
        # Computed again from the differences: the product is inexact where a distance is small beside the norms.
        distances = (queries.unsqueeze(1) - vectors[indices]).square().sum(dim=2).sqrt()
        distances, order = distances.sort(dim=1, stable=True)
        return distances, indices.gather(1, order)


def save_bank(bank: Bank, path: Path) -> None:
    """Write a bank as tensors and plain values."""
    save_pickle({"vectors": bank.vectors.cpu(), "counts": dict(bank.counts), "features": dict(bank.features),
                 "pixels": bank.pixels}, path)


def load_bank(path: Path, features: Mapping[str, Any]) -> Bank:
    """Read what `save_bank` wrote; a bank of other features than `features` describes is a `UserError`."""
    state = load_pickle(path)
    if not isinstance(state, dict) or set(state) != {"vectors", "counts", "features", "pixels"}:
        raise UserError(f"{path}: not a memory bank of patch features")
    for name, expected in features.items():
        if state["features"].get(name) != expected:
            raise UserError(f"{path}: a bank of features with {name} {state['features'].get(name)}; expected "
                            f"{expected}, as the extractor in use has it")
    return Bank(**state)


# ------------------------------------------------------------------------------------------ making a bank

def build_bank(features: Mapping[str, np.ndarray], standardisation: Standardisation, bank_mb: float, seed: int,
               made_of: Mapping[str, Any], device: torch.device, show_progress: bool = True,
               images: Mapping[str, Sequence[Tensor]] | None = None) -> Bank:
    """The bank of several categories' core-sets, float16 on `device`, with equal shares of `bank_mb` (10^6 bytes).

        features   good training features by category, each (N, C, G, G), as `extract_features` gives them
        made_of    `PatchExtractor.description` of their extractor
        images     their images, uint8 (3, S, S) each, for the bank's `pixels`, which are not part of the budget
    A category with fewer patches than its share keeps all of them, and the others share the rest. One category is in
    memory at a time.
    """
    channels = next(iter(features.values())).shape[1]
    capacity = round(bank_mb * 1e6) // (2 * channels)
    if capacity < len(features):
        raise UserError(f"--bank_mb {bank_mb:g}: room for {capacity} vectors of {channels} channels; expected at least "
                        f"one for each of {len(features)} categories, {2 * channels * len(features) / 1e6:g} MB")
    counts = shares({name: part.size // channels for name, part in features.items()}, capacity)
    vectors, pixels = [], []
    for name, part in features.items():
        patches = standardised_patches(part, standardisation, device)
        progress = f"memory bank, {name}" if show_progress else None
        chosen = torch.arange(len(patches))
        if counts[name] < len(patches):
            chosen = coreset(patches, counts[name], seed, progress=progress)
        vectors.append(patches[chosen.to(device)])
        if images is not None:
            pixels.append(pieces(images[name], chosen, part.shape[-1]))
    return Bank(torch.cat(vectors), counts, dict(made_of), torch.cat(pixels) if pixels else None)


def pieces(images: Sequence[Tensor], patches: Tensor, grid: int) -> Tensor:
    """The squares of `images`, uint8 (3, S, S) each, at the indices `patches`, numbered as `to_patches` does.

    Returns (K, 3, P, P) uint8 with P = S // grid, at least 1.
    """
    side = images[0].shape[-1]
    piece = max(1, side // grid)
    number, row, column = patches // grid ** 2, patches // grid % grid, patches % grid
    top, left = ((axis * side // grid).clamp_max(side - piece) for axis in (row, column))
    return torch.stack([images[n][:, t:t + piece, x:x + piece] for n, t, x in zip(
        number.tolist(), top.tolist(), left.tolist(), strict=True)])


def standardised_patches(features: np.ndarray, standardisation: Standardisation, device: torch.device) -> Tensor:
    """Standardised patches: (N, C, G, G) float16 on the disk -> (N * G * G, C) float16 on `device`."""
    return torch.cat([to_patches(batch).half() for batch in standardisation.to(device).batches(features)])


def shares(available: Mapping[str, int], capacity: int) -> dict[str, int]:
    """The equal shares of `capacity` by category, for the numbers of `available` patches; the first get the remainder.

    No category gets more than it has. The whole capacity is used as long as there are patches.
    """
    counts, left = {}, capacity
    for rank, name in enumerate(sorted(available, key=available.__getitem__)):       # stable; the smallest first
        counts[name] = min(available[name], -(-left // (len(available) - rank)))
        left -= counts[name]
    return {name: counts[name] for name in available}


# ------------------------------------------------------------------------------------------ core-set

def coreset(features: Tensor, count: int, seed: int, projected_dim: int = 128, progress: str | None = None) -> Tensor:
    """Choose `count` of M vectors that cover the others: greedy k-centre (Gonzalez, 1985; PatchCore, section 3.2).

        features        (M, C)
        projected_dim   dimensions of a Gaussian random projection in which distances are measured; where C is no
                        larger, they are measured between the vectors themselves
        progress        title of a progress bar; None for none
    Returns indices (count,) int64 in the order chosen. The first follows from the seed. Each further one is the vector
    farthest from those before it, of equally far ones the lowest index. The covering radius is at most twice the best
    possible.

    Many choices share one pass over all vectors, a product of matrices, and are the same as in the plain algorithm.
    After a pass the farthest vectors are candidates, and their distances to new choices follow from the distances among
    candidates. Distances to the chosen set only shrink. So the farthest candidate is the farthest of all vectors while
    it is farther than every other vector was at the last pass.
    """
    if not 0 < count <= len(features):
        raise ValueError(f"count {count}: expected 1 to {len(features)}, the number of vectors")
    random = stream(seed, "coreset")
    points = _projected(features, projected_dim, random)
    points -= points.mean(dim=0)            # smaller norms, smaller rounding errors
    norms = points.square().sum(dim=1)
    chosen = [int(torch.randint(len(points), (), generator=random))]
    nearest = torch.full_like(norms, torch.inf)         # squared distance to the nearest chosen one; -1 for chosen ones
    new = chosen
    with tqdm(total=count, initial=1, desc=progress, unit="patch", disable=progress is None) as bar:
        while len(chosen) < count:
            _approach(nearest, points, norms, new)
            new = _farthest(nearest, points, norms, count - len(chosen))
            chosen += new
            bar.update(len(new))
    return torch.tensor(chosen)


def _projected(features: Tensor, dim: int, random: torch.Generator) -> Tensor:
    """A random projection, (M, C) -> (M, min(C, dim)) float32.

    It keeps distances in expectation (Johnson and Lindenstrauss, 1984)."""
    channels = features.shape[1]
    if channels <= dim:
        return features.to(torch.float32, copy=True)
    matrix = (torch.randn(channels, dim, generator=random) / dim ** 0.5).to(features.device)
    return torch.cat([part.float() @ matrix for part in features.split(_VECTORS)])


def _approach(nearest: Tensor, points: Tensor, norms: Tensor, new: list[int]) -> None:
    """Update `nearest` (M,) with the newly chosen points."""
    centres = points[new]
    size = max(256, _QUERIES * _VECTORS // len(new))
    for first in range(0, len(points), size):
        part = slice(first, first + size)
        distances = (_proximity(points[part], centres, norms[new]).amin(dim=1) + norms[part]).clamp_min_(0)
        nearest[part] = torch.minimum(nearest[part], distances)
    nearest[new] = -1


def _farthest(nearest: Tensor, points: Tensor, norms: Tensor, limit: int) -> list[int]:
    """The next choices that are certain without another pass, at least one and at most `limit`."""
    values, candidates = nearest.topk(min(_CANDIDATES, len(nearest)))
    others = float(values[-1]) if len(candidates) < len(nearest) else -1.0      # no other point is farther than this
    if values[0] == others:
        return [int(nearest.argmax())]          # more equally far points than candidates: the first of all
    candidates = candidates.sort().values
    between = _proximity(points[candidates], points[candidates], norms[candidates]) + norms[candidates, None]
    between, away = between.clamp_min_(0).cpu().numpy(), nearest[candidates].cpu().numpy()
    new = []
    while len(new) < limit and away[best := int(away.argmax())] > others:
        new.append(best)
        np.minimum(away, between[best], out=away)
        away[best] = -1
    return candidates[new].tolist()


def _proximity(a: Tensor, b: Tensor, norms: Tensor, out: Tensor | None = None) -> Tensor:
    """|b|^2 - 2 a b, squared distances less |a|^2: (N, C), (K, C), |b|^2 (K,) float32 -> (N, K).

    Every row has the order of the distances. Rounding errors are about 1e-6 of the squared norms; with autocast they
    would be 1e-2.
    """
    with torch.autocast(a.device.type, enabled=False):
        return torch.addmm(norms, a, b.T, alpha=-2, out=out)
