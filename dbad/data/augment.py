"""Random variations of images: mirror, turn, recolour, crop, each image by its own random stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dbad.data.tiling import pad_to


def augment(images: Tensor, streams: Sequence[torch.Generator], flip: bool, rotate: float,
            color_jitter: float) -> Tensor:
    """Vary a batch (N, 3, S, S) float32 in [-1, 1], each image by its own random stream.

        flip           mirror left to right with probability 1/2
        rotate         turn by up to this many degrees either way; corners are filled by reflection
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

    A smaller image is first extended by its edge pixels.
    """
    crops = []
    for image, stream in zip(images, streams, strict=True):
        image = pad_to(image, size)
        top, left = (int(torch.randint(0, extent - size + 1, (), generator=stream)) for extent in image.shape[-2:])
        crops.append(image[:, top:top + size, left:left + size])
    return torch.stack(crops)
