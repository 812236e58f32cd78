"""Cut a large image into overlapping tiles, and blend the tiles into one map again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Place = tuple[int, int]     # top and left of a tile, in px


def tile_starts(length: int, tile: int, overlap: float) -> list[int]:
    """The starts of tiles of `tile` px along a side of `length` px: even, overlapping by at least the share `overlap`.

    A side shorter than the tile gets one tile at 0 (the image is padded to the tile).
    """
    if length <= tile:
        return [0]
    step = max(1, int(tile * (1 - overlap)))
    count = -(-(length - tile) // step) + 1
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def tile_places(height: int, width: int, tile: int, overlap: float) -> list[Place]:
    """Top-left corners of the tiles of an image, row by row."""
    return [(top, left) for top in tile_starts(height, tile, overlap) for left in tile_starts(width, tile, overlap)]


def tile_batches(image: Tensor, tile: int, batch_size: int, overlap: float) -> Iterator[tuple[list[Place], Tensor]]:
    """Cut (3, H, W) into batches of tiles (n, 3, tile, tile) with their places; n is at most `batch_size`."""
    image = pad_to(image, tile)
    places = tile_places(*image.shape[-2:], tile, overlap)
    for first in range(0, len(places), batch_size):
        chosen = places[first:first + batch_size]
        yield chosen, torch.stack([image[:, top:top + tile, left:left + tile] for top, left in chosen])


def stitch(tiles: Iterable[tuple[list[Place], Tensor]], height: int, width: int, tile: int) -> Tensor:
    """Blend batches of tiles (n, C, tile, tile) into one (C, height, width).

    Each tile counts most at its centre and little at its border (a raised cosine window). The sum is divided by the
    weights. So there is no seam, and unchanged tiles give back the image they were cut from.
    """
    window = _window(tile)
    total: Tensor | None = None
    padded_height, padded_width = max(height, tile), max(width, tile)
    weight = torch.zeros(1, padded_height, padded_width)
    for places, batch in tiles:
        if total is None:
            total = torch.zeros(batch.shape[1], padded_height, padded_width)
        for (top, left), values in zip(places, batch.float().cpu(), strict=True):
            total[:, top:top + tile, left:left + tile] += values * window
            weight[:, top:top + tile, left:left + tile] += window
    assert total is not None        # there is a tile
    return total.div_(weight)[:, :height, :width]


def pad_to(image: Tensor, tile: int) -> Tensor:
    """Extend (3, H, W) at its right and bottom by its edge pixels, to at least `tile` px each way."""
    height, width = image.shape[-2:]
    rows = torch.arange(max(height, tile)).clamp_max(height - 1)
    columns = torch.arange(max(width, tile)).clamp_max(width - 1)
    return image[:, rows][:, :, columns] if tile > min(height, width) else image


def _window(tile: int) -> Tensor:
    """(tile, tile) raised-cosine window, above 0 everywhere."""
    ramp = torch.sin(torch.pi * (torch.arange(tile, dtype=torch.float32) + 0.5) / tile).square().clamp_min(1e-3)
    return ramp[:, None] * ramp[None, :]
