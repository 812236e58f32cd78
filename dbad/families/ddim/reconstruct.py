"""From the image under inspection to its defect-free version, by conditioned denoising."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers.models import UNet2DModel
from torch import Generator, Tensor

from dbad.diffusion import noise
from dbad.diffusion.ddim import conditioned_step, ddim_towards, extrapolated, noise_of, visited_timesteps
from dbad.families.ddim.options import Reconstruction
from dbad.runtime.device import Machine, autocast, memory_format


class Denoiser(NamedTuple):
    """A trained U-Net with the diffusion process that it reverses.

        unet         eps_theta, a diffusers U-Net
        abar         cumulative alphas of the training schedule (T,)
        noise_kind   see `diffusion.noise`
        reachable    the last timestep that the network was trained for
        prediction   kind of the network's output, see `diffusion.ddim.noise_of`
    """

    unet: UNet2DModel
    abar: Tensor
    noise_kind: str = "gaussian"
    reachable: int = 1000
    prediction: str = "epsilon"


@torch.no_grad()
def reconstruct(denoiser: Denoiser, y: Tensor, streams: Sequence[Generator], options: Reconstruction,
                precision: str = "fp32") -> Tensor:
    """The defect-free version of each image.

        y         images under inspection (N, 3, S, S) in [-1, 1]
        streams   one random stream per image
    Returns (N, 3, S, S) float32 in [-1, 1].
    """
    abar, kind = denoiser.abar, denoiser.noise_kind
    visited = visited_timesteps(options.start_at_timestep, options.steps_to_regenerate)
    alphas = [float(abar[t]) for t in visited] + [1.0]
    x = alphas[0] ** 0.5 * y + (1 - alphas[0]) ** 0.5 * _noise_like(y, kind, streams)
    estimates: list[Tensor] = []
    for i, t in enumerate(visited):
        abar_t, abar_prev = alphas[i], alphas[i + 1]
        with autocast(y.device, precision):
            out = denoiser.unet(x, t).sample
        eps = noise_of(out.float(), x, abar_t, denoiser.prediction)
        sigma = options.eta * ((1 - abar_t / abar_prev) * (1 - abar_prev) / (1 - abar_t)) ** 0.5
        fresh = _noise_like(y, kind, streams) if sigma > 0 else None
        w = options.recon_weight if options.conditioning == "ddad" else 0.0
        x_t = x
        x, x_0 = conditioned_step(x_t, eps, y, abar_t, abar_prev, w, sigma, fresh)
        if options.sampler == "dpm++" and 0 < i < len(visited) - 1:     # the last step, to abar = 1, is of first order
            target = extrapolated(x_0, estimates[-1], alphas[i - 1], abar_t, abar_prev)
            x = ddim_towards(x_t, target, abar_t, abar_prev)
        estimates = [x_0]
        if options.conditioning == "blend":
            x = torch.lerp(x, y, min(options.recon_weight * (t + 1) / len(abar), 1.0))
    return x.clamp(-1, 1)


def reconstruct_all(denoiser: Denoiser, images: Tensor, options: Reconstruction, machine: Machine, seed: int,
                    sample: int = 0) -> Tensor:
    """`reconstruct` for any number of images (N, 3, S, S), in batches, on the CPU in and out.

    The noise of an image follows from `seed`, its pixels and the number of the `sample`.
    """
    done = []
    for batch in images.split(machine.batch_size):
        streams = [noise.image_stream(seed, image, sample) for image in batch]
        y = batch.to(machine.device, memory_format=memory_format(machine.device))
        done.append(reconstruct(denoiser, y, streams, options, machine.precision).cpu())
    return torch.cat(done)


def _noise_like(y: Tensor, kind: str, streams: Sequence[Generator]) -> Tensor:
    return noise.draw(kind, y.shape[1:], streams).to(y.device)
