"""Training the guided U-Net of DiAD: latents of good images, encoded once and kept in memory, and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from dbad.data.images import to_float
from dbad.diffusion import noise
from dbad.diffusion.batches import spread_timesteps, take_turns
from dbad.families.diad.model import Diad
from dbad.runtime.device import autocast


class Encoded(NamedTuple):
    """Good images of one category: uint8 (3, S, S) each, and mean and deviation of their latents, (N, 2, 4, h, w)."""

    images: Sequence[Tensor]
    posterior: Tensor


@torch.no_grad()
def encode_all(model: Diad, images: Sequence[Tensor], batch_size: int, device: torch.device,
               precision: str) -> Encoded:
    """Encode uint8 images (3, S, S) with a `model` on `device`; the latents are kept as float16 on the CPU."""
    found = []
    for first in range(0, len(images), batch_size):
        batch = to_float(torch.stack(list(images[first:first + batch_size]))).to(device)
        with autocast(device, precision):
            found.append(torch.stack(model.posterior(batch), dim=1).half().cpu())
    return Encoded(images, torch.cat(found))


@dataclass(frozen=True)
class LatentImages(Dataset):
    """Images with their latents, and the noise and the timestep that a training step gives them.

    Items are asked for as lists of (batch, slot, index), see `training.StepBatches`. All randomness follows from the
    seed, the purpose and the image's number in the training, however a step is divided into batches. Every category
    is asked for equally often, whatever its number of images. A batch is {"image": (N, 3, S, S) in [-1, 1], "latent":
    (N, 4, h, w), a sample of their distribution, "noise": likewise, "timestep": (N,) int64}.

        purpose         "train" or "validation", so that the two never share their noise
        batch_size      images in a batch, over all processes
        accumulate      batches in a step
        num_timesteps   timesteps are drawn from 0 to num_timesteps - 1
    """

    categories: Sequence[Encoded]
    seed: int
    purpose: str
    batch_size: int
    accumulate: int
    num_timesteps: int

    def __len__(self) -> int:
        return len(self.categories) * max(len(category.images) for category in self.categories)

    def __getitems__(self, wanted: list[tuple[int, int, int]]) -> dict[str, Tensor]:
        numbers = [batch * self.batch_size + slot for batch, slot, _ in wanted]
        streams = [noise.stream(self.seed, "latents", self.purpose, number) for number in numbers]
        counts = [len(category.images) for category in self.categories]
        places = [take_turns(index, counts) for _, _, index in wanted]
        images = [self.categories[category].images[place] for category, place in places]
        posterior = [self.categories[category].posterior[place] for category, place in places]
        mean, std = torch.stack(posterior).float().unbind(dim=1)
        latent = mean + std * noise.draw("gaussian", mean.shape[1:], streams)
        timestep = spread_timesteps(numbers, self.batch_size * self.accumulate, self.num_timesteps, streams)
        return {"image": to_float(torch.stack(images)), "latent": latent,
                "noise": noise.draw("gaussian", mean.shape[1:], streams), "timestep": timestep}


def latent_loss(model: nn.Module, batch: dict[str, Tensor], abar: Tensor, precision: str) -> Tensor:
    """Mean squared error of the predicted noise; `abar` (1000,) are the model's cumulative alphas."""
    z_0, eps, t = batch["latent"], batch["noise"], batch["timestep"]
    level = abar.to(z_0.device, torch.float32)[t].view(-1, 1, 1, 1)
    with autocast(z_0.device, precision):
        predicted = model(level.sqrt() * z_0 + (1 - level).sqrt() * eps, t, batch["image"])
    return F.mse_loss(predicted.float(), eps)
