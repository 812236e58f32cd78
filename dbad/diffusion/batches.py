"""The training of a denoiser: batches of good images and noise, the loss, the validation loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from dbad.data.augment import augment, random_crops
from dbad.data.images import to_float
from dbad.diffusion import noise
from dbad.runtime.device import autocast

MAX_SNR = 5.0           # of a step, in the weight of its loss

@dataclass(frozen=True)
class NoisedImages(Dataset):
    """Good images with the noise and the timestep of a training step.

    Items are requested as lists of (step, slot, index), see `training.loop.StepBatches`; all randomness follows from
    the seed, the purpose, the step and the slot. A batch is
    {"image": (N, 3, S, S) in [-1, 1], "noise": likewise, "timestep": (N,) int64}; with damage also
    {"damaged": likewise}, the images that are noised in place of the good ones.

        images          uint8 (3, H, W) each
        purpose         "train" or "validation", so that the two never share their noise
        num_timesteps   timesteps are drawn from 0 to num_timesteps - 1
        crop_px         side of the squares that are cut at random places; None for whole images, all of one size
        flip, rotate, color_jitter   see `data.augment`
        damage          index, good image (3, S, S) in [-1, 1], random stream -> the image with a damage; None for none
        damage_share    probability that an image is damaged
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
    damage: Callable[[int, Tensor, Generator], Tensor] | None = None
    damage_share: float = 0.0

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, wanted: list[tuple[int, int, int]]) -> dict[str, Tensor]:
        streams = [noise.stream(self.seed, self.purpose, step, slot) for step, slot, _ in wanted]
        pixels = [self.images[index] for _, _, index in wanted]
        images = to_float(random_crops(pixels, self.crop_px, streams) if self.crop_px else torch.stack(pixels))
        batch = {}
        if self.damage:         # varied as the good images are
            again = [Generator().set_state(stream.get_state()) for stream in streams]
            batch["damaged"] = augment(self._damaged(images, wanted), again, self.flip, self.rotate, self.color_jitter)
        images = augment(images, streams, self.flip, self.rotate, self.color_jitter)
        timestep = spread_timesteps([slot for _, slot, _ in wanted], self.batch_size, self.num_timesteps, streams)
        return batch | {"image": images, "noise": noise.draw(self.noise_kind, images.shape[1:], streams),
                        "timestep": timestep}

    def _damaged(self, images: Tensor, wanted: list[tuple[int, int, int]]) -> Tensor:
        """The images (N, 3, S, S) with damage on a random share of them."""
        assert self.damage is not None
        found = []
        for image, (step, slot, index) in zip(images, wanted, strict=True):
            stream = noise.stream(self.seed, self.purpose, "damage", step, slot)
            damaged = float(torch.rand((), generator=stream)) < self.damage_share
            found.append(self.damage(index, image, stream) if damaged else image)
        return torch.stack(found)


def spread_timesteps(numbers: Sequence[int], count: int, num_timesteps: int, streams: Sequence[Generator]) -> Tensor:
    """A random timestep from 0 to num_timesteps - 1 for each of `numbers`, (N,) int64.

    The timesteps are divided into `count` equal ranges, and `count` consecutive numbers get one timestep from each
    (stratified sampling): every training step sees light and heavy noise alike.
    """
    place = torch.stack([(number % count + torch.rand((), generator=stream)) / count
                         for number, stream in zip(numbers, streams, strict=True)])
    return (place * num_timesteps).long().clamp_max(num_timesteps - 1)


def take_turns(index: int, counts: Sequence[int]) -> tuple[int, int]:
    """The category and the image in it at place `index` of a pass over all categories.

    `counts` are the numbers of images per category. A pass has len(counts) * max(counts) places. Categories take turns,
    and one with fewer images starts again sooner, so that all categories are seen equally often.
    """
    place, category = divmod(index, len(counts))
    return category, place % counts[category]


def denoising_loss(model: nn.Module, batch: dict[str, Tensor], abar: Tensor, precision: str,
                   prediction: str = "epsilon") -> Tensor:
    """Mean squared error of the network's output: DDPM's simple loss (arXiv:2006.11239, Eq. 14) for good images.

        batch        that of `NoisedImages`
        abar         (T,), the cumulative alphas
        prediction   kind of the output, see `ddim.noise_of`
    A damaged image y' is noised in place of the good image x: x_t = sqrt(abar) y' + sqrt(1 - abar) z. The target is the
    output whose estimate of x_0 is x (GLAD, arXiv:2406.07487). As noise, this is z + sqrt(abar / (1 - abar)) (y' - x),
    which grows without bound as t falls; so the error of x_0 has the weight min(SNR, `MAX_SNR`) (arXiv:2303.09556). For
    "v" and "x0" good images have it too.
    """
    x, z, t = batch["image"], batch["noise"], batch["timestep"]
    level = abar.to(x.device, torch.float32)[t].view(-1, 1, 1, 1)
    x_t = level.sqrt() * batch.get("damaged", x) + (1 - level).sqrt() * z
    with autocast(x.device, precision):
        found = model(x_t, t).sample
    if prediction == "epsilon" and "damaged" not in batch:
        return F.mse_loss(found.float(), z)
    snr = level / (1 - level)
    if prediction == "epsilon":
        damaged = (batch["damaged"] != x).flatten(1).any(dim=1).view(-1, 1, 1, 1)
        target = torch.where(damaged, (x_t - level.sqrt() * x) / (1 - level).sqrt(), z)
        weight = torch.where(damaged, (MAX_SNR / snr).clamp_max(1), 1)
    elif prediction == "v":
        target, weight = (level.sqrt() * x_t - x) / (1 - level).sqrt(), snr.clamp_max(MAX_SNR) / (snr + 1)
    else:
        target, weight = x, snr.clamp_max(MAX_SNR)
    return (weight * (found.float() - target).square()).mean()


@torch.no_grad()
def validation_loss(data: Any, loss_of: Callable[[dict[str, Tensor]], Tensor], device: torch.device) -> float:
    """The mean loss on held-out images, each used at least once, with the same noise and timesteps at every call.

        data      a data set such as `NoisedImages`, with a length, a batch_size, and batches by (step, slot, index)
        loss_of   batch on `device` -> scalar
    """
    count, total = -(-len(data) // data.batch_size), 0.0
    for number in range(count):
        slots = range(number * data.batch_size, (number + 1) * data.batch_size)
        batch = data.__getitems__([(0, slot, slot % len(data)) for slot in slots])
        total += float(loss_of({key: value.to(device) for key, value in batch.items()}))
    return total / count
