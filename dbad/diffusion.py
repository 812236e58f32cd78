"""Training a denoiser: batches of noised good images, the loss, its validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from dbad import noise
from dbad.data import augment, random_crops, to_float
from dbad.runtime import autocast


@dataclass(frozen=True)
class NoisedImages(Dataset):
    """Good images with the noise and the timestep that a training step gives them.

    Items are asked for as lists of (step, slot, index), see `training.StepBatches`; all randomness follows from the
    seed, the purpose, the step and the slot. A batch is
    {"image": (N, 3, S, S) in [-1, 1], "noise": likewise, "timestep": (N,) int64}.

        images          uint8 (3, H, W) each
        purpose         "train" or "validation", so that the two never share their noise
        num_timesteps   timesteps are drawn from 0 to num_timesteps - 1
        crop_px         cut squares of this side at random places; None takes whole images, which are then of one size
        flip, rotate, color_jitter   see `data.augment`
    """

    images: Sequence[Tensor]
    seed: int
    purpose: str
    batch_size: int
    noise_kind: str
    num_timesteps: int
    crop_px: int | None = None
    flip: bool = False
    rotate: float = 0.0
    color_jitter: float = 0.0

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, wanted: list[tuple[int, int, int]]) -> dict[str, Tensor]:
        streams = [noise.stream(self.seed, self.purpose, step, slot) for step, slot, _ in wanted]
        pixels = [self.images[index] for _, _, index in wanted]
        images = to_float(random_crops(pixels, self.crop_px, streams) if self.crop_px else torch.stack(pixels))
        images = augment(images, streams, self.flip, self.rotate, self.color_jitter)
        # One timestep out of each of batch_size equal ranges: every step sees light and heavy noise alike.
        place = torch.stack([(slot % self.batch_size + torch.rand((), generator=stream)) / self.batch_size
                             for (_, slot, _), stream in zip(wanted, streams, strict=True)])
        timestep = (place * self.num_timesteps).long().clamp_max(self.num_timesteps - 1)
        return {"image": images, "noise": noise.draw(self.noise_kind, images.shape[1:], streams), "timestep": timestep}


def denoising_loss(model: nn.Module, batch: dict[str, Tensor], abar: Tensor, precision: str) -> Tensor:
    """Mean squared error of the predicted noise: DDPM's simple loss (arXiv:2006.11239, Eq. 14).

    The batch is that of `NoisedImages`, `abar` (T,) the cumulative alphas.
    """
    image, z, t = batch["image"], batch["noise"], batch["timestep"]
    level = abar.to(image.device, torch.float32)[t].view(-1, 1, 1, 1)
    x_t = level.sqrt() * image + (1 - level).sqrt() * z
    with autocast(image.device, precision):
        eps = model(x_t, t).sample
    return F.mse_loss(eps.float(), z)


@torch.no_grad()
def validation_loss(model: nn.Module, data: NoisedImages, abar: Tensor, device: torch.device, precision: str) -> float:
    """The loss on held-out images, each at least once, with the same noise and timesteps every time."""
    count = -(-len(data) // data.batch_size) * data.batch_size
    total = 0.0
    for first in range(0, count, data.batch_size):
        batch = data.__getitems__([(0, slot, slot % len(data)) for slot in range(first, first + data.batch_size)])
        total += float(denoising_loss(model, {k: v.to(device) for k, v in batch.items()}, abar, precision))
    return total / (count // data.batch_size)
