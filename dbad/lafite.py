"""Diffusion in feature space (LafitE, arXiv:2307.08059): features of good images are learnt, edited and denoised.

An image becomes standardised features on a grid of patches. Each patch is replaced by a mean of its nearest good ones
("feature editing"), the whole is noised and denoised again, and what comes back is compared with what was there. Beside
it stand the distance to the nearest good patch (PatchCore, CVPR 2022), to the edited one, and how unlikely the noise is
that the features lead to when the diffusion is run forwards ("inversion", InvAD, arXiv:2504.05662).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from dbad import noise
from dbad.denoising import ddim_towards, visited_timesteps
from dbad.diffusion import spread_timesteps, take_turns
from dbad.features import Standardisation
from dbad.runtime import autocast

INVERSION_STEPS = (333, 666, 999)
MIN_SNR = 5.0           # gamma of min-SNR weighting (arXiv:2303.09556)


def feature_schedule() -> Tensor:
    """abar_t, the cumulative alphas (1000,) float64, of the cosine schedule."""
    return DDIMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()


# ------------------------------------------------------------------------------------------ what is diffused

@dataclass(frozen=True)
class Components:
    """Principal components of standardised features: what the diffusion model works on.

        basis   (C, D) float32, orthonormal columns, the direction of the largest variance first
        scale   root mean square of the D components in training; they are divided by it
        kept    share of the variance that they hold
    """

    basis: Tensor
    scale: float
    kept: float

    @classmethod
    def fit(cls, features: Mapping[str, np.ndarray], standardisation: Standardisation, count: int) -> Components:
        """The first `count` of training features, one (N, C, G, G) per category; all categories count alike."""
        covariance = 0.0
        for part in features.values():
            total = sum(map(_second_moment, standardisation.batches(part)))
            covariance = covariance + total / (part.size / part.shape[1]) / len(features)
        values, vectors = torch.linalg.eigh(covariance)         # in ascending order
        values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
        vectors = vectors * torch.where(vectors.sum(dim=0) < 0, -1.0, 1.0)      # a sign of its own for every one
        return cls(vectors.float().contiguous(), float(values.mean().sqrt()), float(values.sum() / covariance.trace()))

    def project(self, features: Tensor) -> Tensor:
        """(N, C, G, G) -> (N, D, G, G)."""
        return torch.einsum("nchw,cd->ndhw", features, self.basis.to(features.device)) / self.scale

    def state(self) -> dict[str, Any]:
        """Plain values and a tensor, for a file that opens with `weights_only=True`."""
        return {"basis": self.basis.cpu(), "scale": self.scale, "kept": self.kept}


def _second_moment(features: Tensor) -> Tensor:
    patches = features.movedim(1, -1).flatten(0, -2).double()
    return patches.T @ patches


# ------------------------------------------------------------------------------------------ training

class FeatureImages(Dataset):
    """Components of good images with the noise and the timestep that a training step gives them.

    Items are asked for as lists of (step, slot, index), see `training.StepBatches`; all randomness follows from the
    seed, the purpose, the step and the slot. Every category is asked for equally often, whatever its number of images.
    A batch is {"features": (N, D, G, G) float32, "noise": likewise, "timestep": (N,) int64}.

        components      by category, each (N, D, G, G) float16
        purpose         "train" or "validation", so that the two never share their noise
    """

    def __init__(self, components: Mapping[str, Tensor], seed: int, purpose: str, batch_size: int,
                 num_timesteps: int = 1000):
        self.parts, self.seed, self.purpose = list(components.values()), seed, purpose
        self.batch_size, self.num_timesteps = batch_size, num_timesteps

    def __len__(self) -> int:
        return len(self.parts) * max(map(len, self.parts))

    def __getitems__(self, wanted: list[tuple[int, int, int]]) -> dict[str, Tensor]:
        streams = [noise.stream(self.seed, "features", self.purpose, step, slot) for step, slot, _ in wanted]
        counts = [len(part) for part in self.parts]
        places = [take_turns(index, counts) for _, _, index in wanted]
        features = torch.stack([self.parts[category][place] for category, place in places]).float()
        timestep = spread_timesteps([slot for _, slot, _ in wanted], self.batch_size, self.num_timesteps, streams)
        return {"features": features, "noise": noise.draw("gaussian", features.shape[1:], streams),
                "timestep": timestep}


def estimate(net: nn.Module, z_t: Tensor, t: Tensor, abar: Tensor, prediction: str, precision: str) -> Tensor:
    """The network's estimate of the clean features x_0 (N, D, G, G), from z_t at the timesteps t (N,).

        prediction   what the network gives: "x0"; "v" = sqrt(abar) eps - sqrt(1 - abar) x_0 (arXiv:2202.00512);
                     "epsilon", the noise
    """
    with autocast(z_t.device, precision):
        out = net(z_t, t).sample
    out, level = out.float(), abar.to(z_t.device, torch.float32)[t].view(-1, 1, 1, 1)
    if prediction == "v":
        return level.sqrt() * z_t - (1 - level).sqrt() * out
    return (z_t - (1 - level).sqrt() * out) / level.sqrt() if prediction == "epsilon" else out


def feature_loss(net: nn.Module, batch: dict[str, Tensor], abar: Tensor, prediction: str, precision: str) -> Tensor:
    """Squared error of the estimated x_0, weighted by the signal-to-noise ratio, at most `MIN_SNR`.

    With "epsilon" that is the error of the noise under min-SNR weighting; "x0" has the weight 1, "v" its own, 1 + SNR.
    """
    x, z, t = batch["features"], batch["noise"], batch["timestep"]
    level = abar.to(x.device, torch.float32)[t].view(-1, 1, 1, 1)
    estimated = estimate(net, level.sqrt() * x + (1 - level).sqrt() * z, t, abar, prediction, precision)
    snr = level / (1 - level)
    weight = {"x0": torch.ones_like(snr), "v": 1 + snr, "epsilon": snr.clamp_max(MIN_SNR)}[prediction]
    return (weight * (estimated - x).square()).mean()


# ------------------------------------------------------------------------------------------ inspection

@torch.no_grad()
def denoise(net: nn.Module, x: Tensor, streams: Sequence[Generator], abar: Tensor, start: int, num_steps: int,
            prediction: str, precision: str) -> Tensor:
    """Noise features (N, D, G, G) up to timestep `start`, 1 to 1000, and denoise them in `num_steps` of DDIM.

    `streams` has one random stream per image. Returns (N, D, G, G) float32.
    """
    visited = visited_timesteps(start, num_steps)
    levels = [float(abar[t]) for t in visited] + [1.0]
    fresh = noise.draw("gaussian", x.shape[1:], streams).to(x.device)
    z = levels[0] ** 0.5 * x + (1 - levels[0]) ** 0.5 * fresh
    for t, level, then in zip(visited, levels[:-1], levels[1:], strict=True):
        timesteps = torch.full((len(x),), t, device=x.device)
        z = ddim_towards(z, estimate(net, z, timesteps, abar, prediction, precision), level, then)
    return z


@torch.no_grad()
def invert(net: nn.Module, x: Tensor, abar: Tensor, prediction: str, precision: str) -> Tensor:
    """Run DDIM forwards from features (N, D, G, G) to the noise that they would come from, (N, D, G, G) float32.

    Three steps, to `INVERSION_STEPS`; as there is no noise at 0, each takes the estimate at its beginning.
    """
    z, begin = x, 0
    for end in INVERSION_STEPS:
        level, then = float(abar[begin]), float(abar[end])
        estimated = estimate(net, z, torch.full((len(x),), begin, device=x.device), abar, prediction, precision)
        z = ddim_towards(z, estimated, level, then)
        begin = end
    return z


def unlikelihood(z: Tensor) -> Tensor:
    """Negative log-likelihood per component of a standard normal z (N, D, G, G), less its constant: (N, 1, G, G)."""
    return z.square().mean(dim=1, keepdim=True) / 2


def patch_differences(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances of patches, (N, C, G, G) twice -> (N, 1, G, G)."""
    return (a - b).square().sum(dim=1, keepdim=True)


def upsampled(maps: Tensor, side: int) -> Tensor:
    """(N, 1, G, G) -> (N, 1, side, side), bilinearly."""
    return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
