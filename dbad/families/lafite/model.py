"""Diffusion in feature space (LafitE, arXiv:2307.08059): features of good images are learnt, edited and denoised.

An image becomes standardised features on a grid of patches. Each patch is replaced by a mean of its nearest good ones
("feature editing"). All are noised and denoised again, and the result is compared with the features. Three further maps
are the distance to the nearest good patch (PatchCore, CVPR 2022), the distance to the edited patch, and the
unlikelihood of the noise that the features lead to when the diffusion is run forwards ("inversion", InvAD,
arXiv:2504.05662).

The network has one input and one output channel more than the paper's. The input tells which patches are noised; the
others are left as they are. The output is the expected squared error at each patch. So the network can predict a
patch from its surroundings, and how certain the prediction is (`surroundings`): a distance means more where the
surroundings leave little room. This is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.schedulers import DDIMScheduler
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from dbad.diffusion import noise
from dbad.diffusion.batches import spread_timesteps, take_turns
from dbad.diffusion.ddim import ddim_towards, visited_timesteps
from dbad.networks.features import Standardisation
from dbad.runtime.device import autocast

INVERSION_STEPS = (333, 666, 999)
MIN_SNR = 5.0           # gamma of min-SNR weighting (arXiv:2303.09556)
WHOLE_SHARE = 0.1       # share of the images that is noised everywhere; in the rest, blocks
BLOCKS, NOISED_SHARES = (2, 4, 8), (0.25, 0.5)      # sides of the blocks, in patches, and shares of their number
ERROR_WEIGHT = 0.1      # weight of the expected error in the loss
LARGEST_ERROR = 100.0   # upper bound of the expected error; the components have a mean square of 1
HIDDEN = (2, 8)         # sides of the blocks, in patches, that `surroundings` hides


def feature_schedule() -> Tensor:
    """abar_t, the cumulative alphas (1000,) float64, of the cosine schedule."""
    return DDIMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()


# ------------------------------------------------------------------------------------------ what is diffused

@dataclass(frozen=True)
class Components:
    """Principal components of standardised features; the diffusion model works on them.

        basis   (C, D) float32, orthonormal columns, the direction of the largest variance first
        scale   root mean square of the D components in training; they are divided by it
        kept    share of the variance that they hold
    """

    basis: Tensor
    scale: float
    kept: float

    @classmethod
    def fit(cls, features: Mapping[str, np.ndarray], standardisation: Standardisation, count: int) -> Components:
        """The first `count` components of training features, one (N, C, G, G) per category, all of equal weight."""
        covariance = 0.0
        for part in features.values():
            total = sum(map(_second_moment, standardisation.batches(part)))
            covariance = covariance + total / (part.size / part.shape[1]) / len(features)
        values, vectors = torch.linalg.eigh(covariance)         # in ascending order
        values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
        vectors = vectors * torch.where(vectors.sum(dim=0) < 0, -1.0, 1.0)      # fixes the sign of every vector
        return cls(vectors.float().contiguous(), float(values.mean().sqrt()), float(values.sum() / covariance.trace()))

    def project(self, features: Tensor) -> Tensor:
        """The components of features: (N, C, G, G) -> (N, D, G, G)."""
        return torch.einsum("nchw,cd->ndhw", features, self.basis.to(features.device)) / self.scale

    def state(self) -> dict[str, Any]:
        """The contents as plain values and a tensor, for a file that opens with `weights_only=True`."""
        return {"basis": self.basis.cpu(), "scale": self.scale, "kept": self.kept}


def _second_moment(features: Tensor) -> Tensor:
    patches = features.movedim(1, -1).flatten(0, -2).double()
    return patches.T @ patches


# ------------------------------------------------------------------------------------------ training

class FeatureImages(Dataset):
    """Components of good images with the noise and the timestep that a training step gives them.

    Items are requested as lists of (step, slot, index), see `training.StepBatches`. All randomness follows from the
    seed, the purpose, the step and the slot. Every category comes equally often, whatever its number of images.
    A batch is {"features": (N, D, G, G) float32, "noise": likewise, "timestep": (N,) int64, "noised": (N, 1, G, G)
    float32, 1 where a patch is noised: everywhere in a share of the images, in random blocks in the rest}.

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
                "timestep": timestep, "noised": torch.stack([noised_patches(features.shape[-1], stream)
                                                             for stream in streams])}


def noised_patches(grid: int, stream: Generator) -> Tensor:
    """The mask of an image's noised patches, (1, grid, grid) of 0 and 1: all, or blocks of random side and place."""
    if torch.rand((), generator=stream) < WHOLE_SHARE:
        return torch.ones(1, grid, grid)

    def one_of(values: Sequence):
        return values[int(torch.randint(len(values), (), generator=stream))]
    side, share = one_of([side for side in BLOCKS if side < grid]), one_of(NOISED_SHARES)
    blocks = torch.rand(2 * [grid // side + 2], generator=stream) < share
    top, left = torch.randint(side, (2,), generator=stream).tolist()
    patches = blocks.float().repeat_interleave(side, 0).repeat_interleave(side, 1)[top:top + grid, left:left + grid]
    return (patches if patches.any() else torch.ones(grid, grid))[None]


class Estimate(NamedTuple):
    """The network's clean features (N, D, G, G) and the log of their expected mean squared error (N, 1, G, G)."""

    clean: Tensor
    log_error: Tensor


def estimate(net: nn.Module, z_t: Tensor, t: Tensor, abar: Tensor, prediction: str, precision: str,
             noised: Tensor | None = None) -> Estimate:
    """The network's estimate of the clean features x_0, from z_t (N, D, G, G) at the timesteps t (N,).

        prediction   kind of the network's output: "x0"; "v" = sqrt(abar) eps - sqrt(1 - abar) x_0 (arXiv:2202.00512);
                     "epsilon", the noise
        noised       (N, 1, G, G), 1 where z_t is noised and 0 where it is clean; None for noised everywhere
    """
    noised = torch.ones_like(z_t[:, :1]) if noised is None else noised
    with autocast(z_t.device, precision):
        out, log_error = net(torch.cat([z_t, noised], dim=1), t).sample.float().split([z_t.shape[1], 1], dim=1)
    level = _level(abar, t, noised)
    if prediction == "v":
        out = level.sqrt() * z_t - (1 - level).sqrt() * out
    elif prediction == "epsilon":
        out = (z_t - (1 - level).sqrt() * out) / level.sqrt()
    return Estimate(out, log_error.clamp(-10, 10))


def _level(abar: Tensor, t: Tensor, noised: Tensor) -> Tensor:
    """The abar of every patch, (N, 1, G, G); 1 where it is not noised."""
    level = abar.to(noised.device, torch.float32)[t].view(-1, 1, 1, 1)
    return torch.where(noised.bool(), level, 1.0)


def feature_loss(net: nn.Module, batch: dict[str, Tensor], abar: Tensor, prediction: str,
                 precision: str) -> dict[str, Tensor]:
    """The terms of the loss, as means over the noised patches, and their sum, "loss".

        squared_error   of the estimated x_0, weighted by the signal-to-noise ratio, at most `MIN_SNR`. With "epsilon"
                        this is the error of the noise with min-SNR weighting; "x0" has the weight 1, "v" has 1 + SNR
        error_nll       negative log-likelihood e / E + log E of a patch's mean squared error e, where E is the expected
                        one; e has no gradient here, so that a larger error never pays
    """
    x, z, t, noised = batch["features"], batch["noise"], batch["timestep"], batch["noised"]
    level = _level(abar, t, noised)
    found = estimate(net, level.sqrt() * x + (1 - level).sqrt() * z, t, abar, prediction, precision, noised)
    at_t = _level(abar, t, torch.ones_like(noised))
    snr = at_t / (1 - at_t)
    weight = {"x0": torch.ones_like(snr), "v": 1 + snr, "epsilon": snr.clamp_max(MIN_SNR)}[prediction]
    error = (found.clean - x).square().mean(dim=1, keepdim=True)
    nll = error.detach().clamp_max(LARGEST_ERROR) / found.log_error.exp() + found.log_error
    squared_error, error_nll = ((noised * each).sum() / noised.sum() for each in (weight * error, nll))
    return {"loss": squared_error + ERROR_WEIGHT * error_nll, "squared_error": squared_error, "error_nll": error_nll}


# ------------------------------------------------------------------------------------------ inspection

@torch.no_grad()
def denoise(net: nn.Module, x: Tensor, streams: Sequence[Generator], abar: Tensor, start: int, num_steps: int,
            prediction: str, precision: str) -> Tensor:
    """Noise features (N, D, G, G) up to timestep `start`, 1 to 1000, and denoise them in `num_steps` steps of DDIM.

    `streams` has one random stream per image. Returns (N, D, G, G) float32.
    """
    visited = visited_timesteps(start, num_steps)
    levels = [float(abar[t]) for t in visited] + [1.0]
    fresh = noise.draw("gaussian", x.shape[1:], streams).to(x.device)
    z = levels[0] ** 0.5 * x + (1 - levels[0]) ** 0.5 * fresh
    for t, level, then in zip(visited, levels[:-1], levels[1:], strict=True):
        timesteps = torch.full((len(x),), t, device=x.device)
        z = ddim_towards(z, estimate(net, z, timesteps, abar, prediction, precision).clean, level, then)
    return z


@torch.no_grad()
def invert(net: nn.Module, x: Tensor, abar: Tensor, prediction: str, precision: str) -> Tensor:
    """Run DDIM forwards from features (N, D, G, G) to the noise that they would come from, (N, D, G, G) float32.

    It takes three steps, to `INVERSION_STEPS`. Each uses the estimate at its beginning, as there is no noise at 0.
    """
    z, begin = x, 0
    for end in INVERSION_STEPS:
        level, then = float(abar[begin]), float(abar[end])
        estimated = estimate(net, z, torch.full((len(x),), begin, device=x.device), abar, prediction, precision)
        z = ddim_towards(z, estimated.clean, level, then)
        begin = end
    return z


class Context(NamedTuple):
    """Mean squared errors, expected and found, of patches that are predicted from their surroundings.

    (N, B, G, G) each, for B sides of blocks, the smallest first.
    """

    expected: Tensor
    found: Tensor


@torch.no_grad()
def surroundings(net: nn.Module, x: Tensor, streams: Sequence[Generator], abar: Tensor, prediction: str,
                 precision: str, sides: Sequence[int] = HIDDEN) -> Context:
    """The errors of the network where it predicts the patches of x (N, D, G, G) without seeing them.

    Square blocks of patches are replaced by noise, every other block at a time as on a chessboard. In a small block a
    patch is predicted from its neighbours, which may lie in the same large defect; in a large block, from patches
    farther away.

        streams   one random stream per image
        sides     of the blocks, in patches; at most half the grid's
    """
    t = torch.full((len(x),), len(abar) - 1, device=x.device)
    fresh = noise.draw("gaussian", x.shape[1:], streams).to(x.device)
    expected, found = (x.new_zeros(len(x), len(sides), *x.shape[2:]) for _ in range(2))
    for plane, side in enumerate(sides):
        block = torch.arange(x.shape[-1], device=x.device) // max(1, min(side, x.shape[-1] // 2))
        colour = (block[:, None] + block) % 2
        for hidden in (0, 1):
            noised = (colour == hidden).float().expand(len(x), 1, -1, -1)
            level = _level(abar, t, noised)
            z = level.sqrt() * x + (1 - level).sqrt() * fresh
            guess = estimate(net, z, t, abar, prediction, precision, noised)
            expected[:, plane] += (noised * guess.log_error.exp())[:, 0]
            found[:, plane] += noised[:, 0] * (guess.clean - x).square().mean(dim=1)
    return Context(expected, found)


def unlikelihood(z: Tensor) -> Tensor:
    """Negative log-likelihood per component of a standard normal z (N, D, G, G), less its constant: (N, 1, G, G)."""
    return z.square().mean(dim=1, keepdim=True) / 2


def patch_differences(a: Tensor, b: Tensor) -> Tensor:
    """The squared distances of patches, (N, C, G, G) twice -> (N, 1, G, G)."""
    return (a - b).square().sum(dim=1, keepdim=True)


def upsampled(maps: Tensor, side: int) -> Tensor:
    """The maps at another size, bilinearly: (N, 1, G, G) -> (N, 1, side, side)."""
    return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
