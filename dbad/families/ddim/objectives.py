"""The objectives by which the feature extractor is adapted to good images: their pairs of images and their losses.

    autoencoder      the decoded deepest features reproduce the image
    reconstruction   the decoded deepest features reproduce the diffusion model's reconstruction of the image
    ddad             the features of an image and of another one denoised towards it agree, near the pretrained ones

The first two are those of github.com/NilsB98/Diffusion-Based-AD, the third is the domain adaptation of DDAD
(arXiv:2305.15956). Weights train, batch norm's own scale and shift among them; its statistics are ImageNet's throughout
(`Extractor.train`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import torch
from diffusers.models import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from dbad.diffusion.ddim import conditioned_step, noise_of
from dbad.diffusion.noise import image_stream, stream
from dbad.families.ddim.options import Reconstruction
from dbad.families.ddim.reconstruct import Denoiser, reconstruct
from dbad.networks.extractors import Extractor
from dbad.runtime.device import Machine, autocast, memory_format

LossOf = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]

# Every objective with the options that shape it beside those of the training.
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "autoencoder": (),
    "reconstruction": ("conditioning", "recon_weight", "eta", "start_at_timestep", "steps_to_regenerate"),
    "ddad": ("extractor_weight", "extractor_recon_weight", "eta", "start_at_timestep", "steps_to_regenerate"),
}


class Pairs(Dataset):
    """Images with their counterparts, both (N, 3, S, S) in [-1, 1]; requested as in `training.StepBatches`."""

    def __init__(self, images: Tensor, counterparts: Tensor):
        self.images, self.counterparts = images, counterparts

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, wanted: list[tuple[int, int, int]]) -> dict[str, Tensor]:
        index = [index for _, _, index in wanted]
        return {"image": self.images[index], "counterpart": self.counterparts[index]}


def denoise_towards(denoiser: Denoiser, images: Tensor, options: Reconstruction, machine: Machine,
                    seed: int) -> Tensor:
    """DDAD's x_0 for each image y: a different good image, noised and denoised again under the condition y.

    The arguments are those of `reconstruct_all`; the pull is DDAD's whatever the conditioning. The images are paired
    in a ring of random order, so that each is y once and noised once; one image alone is its own partner. Order and
    noise follow from `seed` and the images.
    """
    ring = torch.randperm(len(images), generator=stream(seed, "extractor pairs"))
    others = torch.empty_like(images)
    others[ring] = images[ring.roll(1)]
    unguided = replace(options, conditioning="ddad", recon_weight=0.0)
    done = []
    for y, other in zip(images.split(machine.batch_size), others.split(machine.batch_size), strict=True):
        streams = [image_stream(seed, image) for image in y]
        y, other = (batch.to(machine.device, memory_format=memory_format(machine.device)) for batch in (y, other))
        network = _Guided(denoiser, y, options.recon_weight)
        guided = denoiser._replace(unet=cast(UNet2DModel, network), prediction="epsilon")       # which is only called
        done.append(reconstruct(guided, other, streams, unguided, machine.precision).cpu())
    return torch.cat(done)


class _Guided:
    """A denoiser that answers with DDAD's corrected noise: it pulls towards `y`, whichever images were noised."""

    def __init__(self, denoiser: Denoiser, y: Tensor, w: float):
        self.denoiser, self.y, self.w = denoiser, y, w

    def __call__(self, x_t: Tensor, t: int) -> SimpleNamespace:
        abar_t = float(self.denoiser.abar[t])
        eps = noise_of(self.denoiser.unet(x_t, t).sample.float(), x_t, abar_t, self.denoiser.prediction)
        _, x_0 = conditioned_step(x_t, eps, self.y, abar_t, 1.0, self.w)
        return SimpleNamespace(sample=(x_t - abar_t ** 0.5 * x_0) / (1 - abar_t) ** 0.5)


class AutoEncoder(nn.Module):
    """The extractor's deepest features, decoded to the image again by transposed convolutions.

    (N, 3, H, W) in [-1, 1] -> (N, 3, H, W).
    """

    def __init__(self, extractor: Extractor, width: int = 128):
        super().__init__()
        self.extractor = extractor
        doublings = (extractor.strides[-1] - 1).bit_length()
        widths = [extractor.channels[-1]] + [max(16, width // 2 ** k) for k in range(doublings)]
        stages = [nn.Sequential(nn.ConvTranspose2d(a, b, 4, stride=2, padding=1), nn.ReLU())
                  for a, b in zip(widths, widths[1:], strict=False)]
        self.decoder = nn.Sequential(*stages, nn.Conv2d(widths[-1], 3, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        rebuilt = self.decoder(self.extractor(images)[-1]).float()
        return F.interpolate(rebuilt, size=images.shape[-2:], mode="bilinear", antialias=True, align_corners=False)


def network_and_loss(objective: str, extractor: Extractor, weight: float, device: torch.device,
                     precision: str) -> tuple[nn.Module, LossOf]:
    """The network for `training.fit`, which has or is the extractor, and the loss of a batch of `Pairs`, by term.

    `weight` is lambda of the distillation terms, for ddad. Its pretrained network is a copy of the extractor as it is.
    """
    if objective == "ddad":
        pretrained = copy.deepcopy(extractor).to(device).to(memory_format=memory_format(device)).eval()
        pretrained.requires_grad_(False)

        def distillation(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            with autocast(device, precision):
                return distillation_loss(model, pretrained, batch["image"], batch["counterpart"], weight)

        return extractor, distillation

    def decoding(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with autocast(device, precision):
            rebuilt = model(batch["image"])
        return {"loss": F.mse_loss(rebuilt, batch["counterpart"])}

    return AutoEncoder(extractor), decoding


def distillation_loss(phi: Callable[[Tensor], list[Tensor]], pretrained: Callable[[Tensor], list[Tensor]], y: Tensor,
                      x_0: Tensor, weight: float) -> dict[str, Tensor]:
    """DDAD's domain adaptation (arXiv:2305.15956), with d(a, b) = sum over layers of 1 - cos(a_l, b_l), maps flattened.

        loss                   d(phi(x_0), phi(y)) + weight d(phi(y), phi'(y)) + weight d(phi(x_0), phi'(x_0))
        similarity             the first d: good images and their reconstructions are to look alike
        image_drift            the second, and
        reconstruction_drift   the third: phi is to stay near the `pretrained` phi', lest it calls everything alike
    All are means over the batch, `y` and `x_0` being (N, 3, S, S) in [-1, 1].
    """
    both = torch.cat([x_0, y])
    features = phi(both)
    with torch.no_grad():
        fixed = pretrained(both)
    none = torch.zeros((), device=both.device)
    similarity = sum((_cosine_distance(*maps.chunk(2)) for maps in features), none).mean()
    drift = sum((_cosine_distance(a, b) for a, b in zip(features, fixed, strict=True)), none)
    x_drift, y_drift = (part.mean() for part in drift.chunk(2))
    return {"loss": similarity + weight * (y_drift + x_drift), "similarity": similarity, "image_drift": y_drift,
            "reconstruction_drift": x_drift}


def _cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos of the flattened maps (N, C, H, W): (N,), 0 to 2."""
    return 1 - F.cosine_similarity(a.float().flatten(1), b.float().flatten(1))


@torch.no_grad()
def held_out_losses(model: nn.Module, data: Pairs, loss_of: LossOf, batch_size: int,
                    device: torch.device) -> dict[str, float]:
    """The terms of the loss over all of `data`, as val_loss, val_...; the same every time."""
    sums: dict[str, float] = {}
    for indices in torch.arange(len(data)).split(batch_size):
        batch = data.__getitems__([(0, i, i) for i in indices.tolist()])
        for name, value in loss_of(model, {key: part.to(device) for key, part in batch.items()}).items():
            sums[f"val_{name}"] = sums.get(f"val_{name}", 0.0) + float(value) * len(indices)
    return {name: total / len(data) for name, total in sums.items()}
