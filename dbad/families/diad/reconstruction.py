"""Inspection by DiAD: the reconstruction of an image, the anomaly map between the two, and the image's score."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from dbad import maps as diffmaps
from dbad.diffusion import noise
from dbad.diffusion.ddim import conditioned_step, visited_timesteps
from dbad.families.diad.model import TRAIN_STEPS, Diad
from dbad.networks.extractors import Extractor
from dbad.runtime.device import autocast


@torch.no_grad()
def reconstruct(model: Diad, images: Tensor, streams: Sequence[Generator], start: int = TRAIN_STEPS,
                num_steps: int = 10, paper_exact: bool = False, precision: str = "fp32") -> Tensor:
    """The defect-free version of each image: its latents noised at timestep start - 1, and denoised by DDIM, eta 0.

        images    (N, 3, H, W) in [-1, 1], on the model's device
        streams   one random stream per image

    The published code guides with scale 9 between two predictions that are equal; one of them is enough. It also visits
    901, 801, ..., 1 for latents noised at 999, and ends at abar_0 instead of 1; `paper_exact` does so too.
    Returns (N, 3, H, W) float32 in [-1, 1].
    """
    if paper_exact:
        visited = list(range(0, start, start // num_steps))[:num_steps]
        visited = [t + 1 for t in reversed(visited)]
    else:
        visited = visited_timesteps(start, num_steps)
    alphas = [*(float(model.abar[t]) for t in visited), float(model.abar[0]) if paper_exact else 1.0]
    with autocast(images.device, precision):
        z_0, hint = model.encode(images), model.hint(images)
    abar = float(model.abar[start - 1])
    z = abar ** 0.5 * z_0 + (1 - abar) ** 0.5 * noise.draw("gaussian", z_0.shape[1:], streams).to(z_0.device)
    for i, t in enumerate(visited):
        with autocast(images.device, precision):
            eps = model.predict_noise(z, t, hint)
        z, _ = conditioned_step(z, eps, z_0, alphas[i], alphas[i + 1])
    with autocast(images.device, precision):
        return model.decode(z)


@torch.no_grad()
def anomaly_map(extractor: Extractor, images: Tensor, reconstructions: Tensor, sigma: float = 5.0,
                precision: str = "fp32") -> Tensor:
    """Sum over the extractor's layers of 1 - cosine, blurred; (N, 3, S, S) in [-1, 1] twice -> (N, 1, S, S) >= 0.

    The published layers are stages 1 to 3 of a ResNet-50. `sigma` is in px of a 256 px image, and scales with the side.
    """
    size = tuple(images.shape[-2:])
    with autocast(images.device, precision):
        features, others = extractor(images), extractor(reconstructions)
    layers = diffmaps.feature_maps(features, others, size, kernel=1)
    return diffmaps.blur(layers.sum(dim=1, keepdim=True), sigma * size[0] / 256)


def image_score(maps: Tensor) -> Tensor:
    """The maximum of maps (N, 1, S, S) after eight mean poolings of stride 1, of 8x8 at 256 px: scores (N,).

    The side of the pooling window is in proportion to that of the maps.
    """
    kernel = max(1, round(8 * maps.shape[-1] / 256))
    for _ in range(8):
        maps = F.avg_pool2d(maps, kernel, stride=1)
    return maps.flatten(1).amax(dim=1)
