"""A small network that judges a patch by all its distances, learnt from pseudo-anomalies on good images.

Each distance alone misses some defects: the distance to the nearest good patch, the distances in the layers of the
backbone, the distance relative to what the surroundings allow (`lafite.surroundings`). The network learns how to weigh
them, as DRAEM (arXiv:2108.07610) learns to tell an image from its reconstruction. Its input is a few numbers per patch
instead of pixels. They tell so little of the look of pseudo-anomalies that what is learnt holds for real defects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from dbad.families.lafite.model import HIDDEN, Context

NEIGHBOURS = 3              # number that the edited patch is a mean of, see `Bank.edit`
REACH = (1, 3)              # side of the convolutions of each branch, in patches
WIDTH, DEPTH = 32, 2
STEPS, LEARNING_RATE, WEIGHT_DECAY = 600, 3e-3, 0.01
DAMAGED, INTACT = 16, 4     # number of images in a batch
LEAST = 1e-3                # lower bound of a squared distance
USUAL = 0.99                # share of good patches that count as usual


def evidence(features: Tensor, edited: Tensor, nearest: Tensor, context: Sequence[Tensor],
             channels: Sequence[int]) -> Tensor:
    """The logarithms of the distances and errors of each patch.

        features, edited   (N, C, G, G), see `Bank.edit`; compared over all channels, and over those of each layer
        nearest            (N, 1, G, G), squared distance to the nearest good patch
        context            (N, B, G, G) each: squared errors, without logarithm, see `lafite.Context`
        channels           number of channels of each layer; C is their sum
    Returns (N, 2 + layers + B * len(context), G, G) float32.
    """
    squares = (edited - features).square()
    layers = [part.sum(dim=1, keepdim=True) for part in squares.split(list(channels), dim=1)]
    known = torch.cat([nearest, squares.sum(dim=1, keepdim=True), *layers, *context], dim=1)
    return known.float().clamp_min(LEAST).log()


def num_planes(layers: int) -> int:
    """The number of values that `evidence` gives for every patch, with a backbone of so many layers."""
    return 2 + layers + len(HIDDEN) * len(Context._fields)


class Discriminator(nn.Module):
    """Evidence (N, P, G, G), see `evidence` -> logits (N, branches, G, G) that a patch is anomalous.

    One branch sees the patch alone and cannot learn the shapes of pseudo-anomalies. The other sees the neighbours too
    and tells single outliers from defects. Their mean is better than either.
    """

    mean: Tensor
    std: Tensor
    usual: Tensor

    def __init__(self, planes: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(planes))
        self.register_buffer("std", torch.ones(planes))
        self.register_buffer("usual", torch.zeros(()))      # the logit that a share USUAL of good patches stays below
        self.branches = nn.ModuleList(_branch(planes, reach) for reach in REACH)

    def forward(self, evidence: Tensor) -> Tensor:
        x = (evidence - self.mean.view(1, -1, 1, 1)) / self.std.view(1, -1, 1, 1)
        return torch.cat([branch(x) for branch in self.branches], dim=1)

    def surprise(self, evidence: Tensor) -> Tensor:
        """The excess of the log-odds of being anomalous over the usual ones of good patches, (N, 1, G, G) > 0.

        It is the softplus of the difference, so that usual patches keep their order near 0. Probabilities would be
        near 1 for all defects, which then would look alike.
        """
        return F.softplus(self.log_odds(evidence) - self.usual)

    def log_odds(self, evidence: Tensor) -> Tensor:
        """The mean of the branches, (N, 1, G, G)."""
        return self(evidence).mean(dim=1, keepdim=True)


def _branch(planes: int, reach: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in [planes] + (DEPTH - 1) * [WIDTH]:
        layers += [nn.Conv2d(inputs, WIDTH, reach, padding=reach // 2, padding_mode="replicate"), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(WIDTH, 1, 1))


def train_discriminator(good: Tensor, damaged: Tensor, masks: Tensor, seed: int, steps: int = STEPS) -> Discriminator:
    """Train a discriminator of damaged and good patches; a minute on a CPU, with the same result on any machine.

        good, damaged   evidence of images, (N, P, G, G) and (M, P, G, G)
        masks           (M, 1, H, W), share of damaged pixels, 0 to 1
    Evidence is standardised by the mean of good images and the deviation of all. The network is returned in eval mode,
    on the CPU.
    """
    good, damaged = good.cpu(), damaged.cpu()
    stream = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Discriminator(good.shape[1])
    net.mean.copy_(good.mean(dim=(0, 2, 3)))
    net.std.copy_(torch.cat([good, damaged]).std(dim=(0, 2, 3)).clamp_min(1e-6))
    side = min(masks.shape[-1], 2 * good.shape[-1])             # finer than a patch: a defect's border is
    shares = F.adaptive_avg_pool2d(masks.cpu().float(), side)
    optimiser = torch.optim.AdamW(net.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1, (step + 1) / 20) * (
        1 + math.cos(math.pi * step / steps)) / 2)
    for _ in range(steps):
        x, y = _batch(good, damaged, shares, stream)
        logits = F.interpolate(net(x), size=(side, side), mode="bilinear", align_corners=False)
        loss = F.binary_cross_entropy_with_logits(logits, y.expand_as(logits))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    net = net.eval().requires_grad_(False)
    net.usual.copy_(torch.quantile(net.log_odds(good), USUAL))
    return net


def _batch(good: Tensor, damaged: Tensor, shares: Tensor, stream: Generator) -> tuple[Tensor, Tensor]:
    """The evidence of random images and their shares of damaged pixels, the whole batch mirrored at random."""
    which, intact = (torch.randint(len(part), (count,), generator=stream) for part, count in (
        (damaged, DAMAGED), (good, INTACT)))
    x = torch.cat([damaged[which], good[intact]])
    y = torch.cat([shares[which], shares.new_zeros(INTACT, *shares.shape[1:])])
    axes = [axis for axis, chosen in zip((2, 3), torch.rand(2, generator=stream) < 0.5, strict=True) if chosen]
    return x.flip(axes), y.flip(axes)
