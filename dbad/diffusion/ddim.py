"""Conditioned denoising: from the image under inspection to its defect-free version.

The image is noised to an intermediate timestep and denoised again in a few deterministic steps (DDIM). Each step is
pulled towards the image itself. So the model replaces defects with what it knows of good parts, and keeps the rest.
"""

from __future__ import annotations

import math

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor


def schedule(train_steps: int, beta_schedule: str) -> Tensor:
    """abar_t, the cumulative alphas (train_steps,) float64, of one of diffusers' beta schedules.

    The linear schedule runs from 1e-4 to 0.02.
    """
    return DDIMScheduler(num_train_timesteps=train_steps, beta_start=1e-4, beta_end=0.02,
                         beta_schedule=beta_schedule).alphas_cumprod.double()


def visited_timesteps(start: int, num_steps: int) -> list[int]:
    """The indices into abar at which steps begin, evenly spaced down from start - 1; after the last the image is clean.

    250 in 10 steps: 249, 224, ..., 24. The image is noised to the first of them, which is also the first timestep that
    the network receives.
    """
    return [round(start * (num_steps - i) / num_steps) - 1 for i in range(num_steps)]


def conditioned_step(x_t, eps, y, abar_t, abar_prev, w=0.0, sigma=0.0, fresh=None):
    """One DDIM step from x_t to x_{t-1}, pulled towards the image under inspection.

    DDIM: arXiv:2010.02502, Eq. 12. Conditioning: arXiv:2305.15956, Eq. 6 to 8, where
    eps_hat = eps - w sqrt(1 - abar_t) (y_t - x_t) with y_t = sqrt(abar_t) y + sqrt(1 - abar_t) eps. Since
    y_t - x_t = sqrt(abar_t) (y - x_0), this moves x_0 by the share lambda = w (1 - abar_t) of the way to y. A share
    above 1 would overshoot the image; it is clamped.
        x_t        noisy sample                                (N, C, H, W)
        eps        eps_theta(x_t, t), predicted noise          (N, C, H, W)
        y          image under inspection, in [-1, 1]          (N, C, H, W)
        abar_*     cumulative alpha at this and the next step  scalars in (0, 1]
        w          strength of the pull; 0 is plain DDIM
        sigma      std of the noise `fresh` (N, C, H, W); 0 is deterministic
    Returns x_{t-1} and the current estimate of x_0, both (N, C, H, W).
    """
    x_0 = (x_t - (1 - abar_t) ** 0.5 * eps) / abar_t ** 0.5             # "predicted x_0", unconditioned
    x_0 = torch.lerp(x_0, y, min(w * (1 - abar_t), 1.0))
    x_prev = ddim_towards(x_t, x_0, abar_t, abar_prev, sigma)
    return (x_prev if fresh is None else x_prev + sigma * fresh), x_0


def noise_of(out, x_t, abar_t, prediction):
    """The predicted noise eps, from the network's output for the noisy sample x_t, all (N, C, H, W).

        abar_t       cumulative alpha at this step, in (0, 1)
        prediction   what the output is: "epsilon", the noise; "x0", the clean image; "v" = sqrt(abar) eps -
                     sqrt(1 - abar) x_0 (arXiv:2202.00512)
    """
    if prediction == "epsilon":
        return out
    x_0 = out if prediction == "x0" else abar_t ** 0.5 * x_t - (1 - abar_t) ** 0.5 * out
    return (x_t - abar_t ** 0.5 * x_0) / (1 - abar_t) ** 0.5


def ddim_towards(x_t, x_0, abar_t, abar_prev, sigma=0.0):
    """DDIM's next sample for the estimate x_0, without fresh noise; arguments as for `conditioned_step`."""
    eps_hat = (x_t - abar_t ** 0.5 * x_0) / (1 - abar_t) ** 0.5         # the noise that leads to this x_0
    return abar_prev ** 0.5 * x_0 + max(1 - abar_prev - sigma ** 2, 0.0) ** 0.5 * eps_hat


def extrapolated(x_0, x_0_before, abar_before, abar_t, abar_prev):
    """The estimate of x_0 that makes a DDIM step one of DPM-Solver++(2M): arXiv:2211.01095, algorithm 2.

        x_0, x_0_before    estimates of this step and of the one before    (N, C, H, W)
        abar_*             cumulative alpha at the step before, at this and at the next one, rising, below 1
    Measured in the half log-SNR lambda = log(abar / (1 - abar)) / 2, the estimate lies half a step beyond x_0.
    """
    before, now, then = (0.5 * math.log(abar / (1 - abar)) for abar in (abar_before, abar_t, abar_prev))
    return x_0 + (then - now) / (2 * (now - before)) * (x_0 - x_0_before)
