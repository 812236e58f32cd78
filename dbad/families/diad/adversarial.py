"""The loss of the KL-f8 auto-encoder: reconstruction, a perceptual distance, KL and a patch discriminator.

The loss of latent diffusion's first stage (arXiv:2112.10752, appendix G) and of DiAD (arXiv:2312.06607): sums over the
values of an image, means over the batch, so that the weights of the terms are the published ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from diffusers.models import AutoencoderKL
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from dbad.data.images import to_float
from dbad.errors import UserError
from dbad.families.diad.autoencoder import from_imagenet, reconstruct, to_imagenet
from dbad.networks.extractors import build_extractor
from dbad.runtime.device import autocast

Distance = Callable[[Tensor, Tensor], Tensor]       # two batches (N, 3, S, S) in [-1, 1] -> a scalar

FEATURE_LAYERS = (0, 1, 2, 3)       # fine detail to parts of things; LPIPS compares five layers of strides 1 to 16


@dataclass(frozen=True)
class Terms:
    """Weights of the terms beside L1, and the optimiser step, from 0, at which the discriminator comes in."""

    perceptual: float
    kl: float
    discriminator: float
    discriminator_start: int


# ------------------------------------------------------------------------------------------------ the terms

def reconstruction_terms(x: Tensor, y: Tensor, perceptual: Distance | None, weight: float) -> dict[str, Tensor]:
    """The distance of the reconstruction y from x, both (N, 3, S, S), ImageNet-normalised.

        l1               mean of |x - y|
        perceptual       mean distance of the images; 0 without a network for it
        reconstruction   l1 + weight * perceptual
    Published losses are these times the 3 S^2 values of an image.
    """
    l1 = (x - y).abs().mean()
    distance = perceptual(from_imagenet(x), from_imagenet(y)) if perceptual else torch.zeros_like(l1)
    return {"l1": l1, "perceptual": distance, "reconstruction": l1 + weight * distance}


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)), summed over the values of a latent (N, C, h, w), mean over the batch."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: logits of images are to be above 1, those of reconstructions below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, generator: Tensor, last_layer: Tensor) -> Tensor:
    """lambda = |d reconstruction / d w| / (|d generator / d w| + 1e-4) in [0, 1e4], w = weights of the `last_layer`.

    VQGAN, arXiv:2012.09841, Eq. 7, with the constant of its code. It brings the two gradients to equal length.
    """
    norms = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (reconstruction, generator)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()


# ---------------------------------------------------------------------------------------------- the networks

class PatchDiscriminator(nn.Sequential):
    """Images (N, 3, S, S), S >= 32 -> logits (N, 1, S / 8 - 2, S / 8 - 2), each of a patch of 70 px.

    PatchGAN of pix2pix (arXiv:1611.07004) with three strided layers. Batch norm is over the batch at hand, always: the
    discriminator is used in training only, so that running averages would never be read.
    """

    def __init__(self, width: int = 64):
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for inputs, outputs, stride in ((width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 8 * width, 1)):
            layers += [nn.Conv2d(inputs, outputs, 4, stride, padding=1, bias=False),
                       nn.BatchNorm2d(outputs, track_running_stats=False), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(8 * width, 1, 4, stride=1, padding=1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)


def build_perceptual(kind: str, extractor: str, resolution: int) -> Distance | None:
    """The perceptual distance called `kind`: lpips, features or none.

        lpips      LPIPS (arXiv:1801.03924), VGG-16; the package lpips brings its linear weights, torchvision downloads
                   the network
        features   the same formula on the pretrained `extractor`, without learned linear weights:
                   squared differences of the channel-normalised features, summed over channels and layers, mean over
                   places. No human judgement of similarity is in it, and its values are larger than those of LPIPS
    """
    if kind == "none":
        return None
    network = _lpips() if kind == "lpips" else build_extractor(extractor, FEATURE_LAYERS, resolution)
    network = network.eval().requires_grad_(False)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        network.to(x.device)            # accelerate chooses the device when the training begins
        return network(x, y).float().mean() if kind == "lpips" else feature_distance(network(x), network(y))

    return distance


def feature_distance(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """LPIPS with all linear weights 1, of two lists of feature maps (N, C_l, h_l, w_l): a scalar, 0 to 4 per layer."""
    total = torch.zeros((), device=a[0].device)
    for one, other in zip(a, b, strict=True):
        difference = F.normalize(one.float(), dim=1, eps=1e-10) - F.normalize(other.float(), dim=1, eps=1e-10)
        total = total + difference.square().sum(dim=1).mean()
    return total


def _lpips() -> nn.Module:
    ways_out = "or use --perceptual features, whose default network comes with its weights"
    try:
        import lpips
    except ImportError:
        raise UserError(f"--perceptual lpips: the package lpips is not installed; run: pip install lpips, {ways_out}"
                        ) from None
    try:
        return lpips.LPIPS(net="vgg", verbose=False)
    except Exception as error:      # each version of torch and of its hub has its own exceptions for "no network"
        raise UserError(f"--perceptual lpips: the weights of its VGG-16 are neither on this machine nor could they be "
                        f"downloaded ({type(error).__name__}); put vgg16-397923af.pth into {torch.hub.get_dir()}/"
                        f"checkpoints, {ways_out}") from error


# ------------------------------------------------------------------------------------------------- all together

class AdversarialAutoencoder(nn.Module):
    """The auto-encoder and its discriminator, and the losses of a batch: what `training.fit` trains.

    The two learn from different parts of one loss, and neither gets a gradient from the other's part. One Adam over
    both is two of equal settings, as published, since Adam treats every weight on its own. Of several processes, each
    has its own adaptive weight, and batch norm over its own share of the batch.
    """

    def __init__(self, autoencoder: AutoencoderKL, discriminator: PatchDiscriminator | None, terms: Terms,
                 perceptual: Distance | None, precision: str):
        super().__init__()
        self.autoencoder, self.discriminator = autoencoder, discriminator
        self.terms, self.perceptual, self.precision = terms, perceptual, precision

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of `autoencoder.BalancedImages` -> {"loss": what is minimised, and its terms}."""
        x = to_imagenet(batch["image"])
        with autocast(x.device, self.precision):
            posterior = self.autoencoder.encode(x).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            z = mean + (0.5 * logvar).exp() * batch["noise"]
            y = self.autoencoder.decode(z).sample.float()
            found = reconstruction_terms(x, y, self.perceptual, self.terms.perceptual)
        values = x[0].numel()
        found["kl"] = kl_to_standard_normal(mean, logvar)
        found["loss"] = values * found["reconstruction"] + self.terms.kl * found["kl"]
        if self.discriminator is None:
            return found
        return self._adversarial(self.discriminator, found, x, y, int(batch["step"][0]), values)

    def _adversarial(self, judge: PatchDiscriminator, found: dict[str, Tensor], x: Tensor, y: Tensor, step: int,
                     values: int) -> dict[str, Tensor]:
        """Add the generator's and the discriminator's loss, both 0 before the discriminator comes in."""
        if step < self.terms.discriminator_start:
            # Every weight takes part in every loss: several processes wait for the gradients of all.
            nothing = cast(Tensor, 0 * sum(weight.sum() for weight in judge.parameters()))
            off = dict.fromkeys(("generator", "adaptive_weight"), torch.zeros_like(found["loss"]))
            return found | off | {"discriminator": nothing, "loss": found["loss"] + nothing}
        fixed = {name: weight.detach() for name, weight in judge.named_parameters()}
        with autocast(x.device, self.precision):
            judged = functional_call(judge, fixed, (y,))
            real, fake = judge(x), judge(y.detach())
        generator, discriminator = -judged.float().mean(), hinge_loss(real.float(), fake.float())
        weight = adaptive_weight(values * found["reconstruction"], generator, self.autoencoder.decoder.conv_out.weight)
        loss = found["loss"] + self.terms.discriminator * weight * generator + discriminator
        return found | {"generator": generator, "adaptive_weight": weight, "discriminator": discriminator, "loss": loss}


# ---------------------------------------------------------------------------------------- on held-out images

@torch.no_grad()
def held_out_losses(autoencoder: AutoencoderKL, categories: Mapping[str, Sequence[Tensor]], perceptual: Distance | None,
                    weight: float, batch_size: int, precision: str) -> dict[str, dict[str, float]]:
    """The means of `reconstruction_terms` over the uint8 (3, S, S) images of each category.

    Images are encoded to the mean of the posterior, so that the result is the same every time. A further term is
    mean_abs_error, the mean difference of pixels in [0, 1].
    """
    device, found = next(autoencoder.parameters()).device, {}
    for name, images in categories.items():
        sums: dict[str, float] = defaultdict(float)
        for first in range(0, len(images), batch_size):
            x = to_float(torch.stack(list(images[first:first + batch_size])).to(device))
            y = reconstruct(autoencoder, x, precision)
            with autocast(device, precision):
                terms = reconstruction_terms(to_imagenet(x), to_imagenet(y), perceptual, weight)
            terms["mean_abs_error"] = (x - y.clamp(-1, 1)).abs().mean() / 2
            for term, value in terms.items():
                sums[term] += float(value) * len(x) / len(images)
        found[name] = dict(sums)
    return found


def mean_over_categories(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """One number per term, in which every category counts alike; the reconstruction loss is called val_loss."""
    terms = next(iter(found.values()))
    means = {f"val_{term}": sum(each[term] for each in found.values()) / len(found) for term in terms}
    return {"val_loss": means.pop("val_reconstruction")} | means
