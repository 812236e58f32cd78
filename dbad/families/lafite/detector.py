"""The detector of the LafitE family: patch features, memory bank and, unless it is the plain `knn`, a denoiser.

A discriminator, which judges a patch by all its distances, may come with the denoiser (see `discriminator`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers.models import UNet2DModel
from torch import Tensor
from torch.nn import functional as F

from dbad import maps
from dbad.diffusion.noise import image_stream
from dbad.errors import UserError
from dbad.families.detector import Detector
from dbad.families.lafite import discriminator
from dbad.families.lafite.bank import Bank
from dbad.families.lafite.discriminator import Discriminator
from dbad.families.lafite.model import (
    HIDDEN,
    Components,
    Context,
    denoise,
    feature_schedule,
    invert,
    patch_differences,
    surroundings,
    unlikelihood,
    upsampled,
)
from dbad.families.lafite.options import DIFFUSED, FeatureSettings
from dbad.networks.features import PatchExtractor, Standardisation, to_maps, to_patches
from dbad.runtime.device import place


class FeatureSpace(NamedTuple):
    """The way from images to the features that are compared, and to their components, which are diffused.

        patches           images -> features
        standardisation   of the channels of the features
        tau               temperature of the editing, see `Bank.temperature`
        components        principal components that are diffused; None for plain `knn`
        prediction        kind of the denoiser's output, see `lafite.estimate`
        categories        names of the categories that the model has learnt
    """

    patches: PatchExtractor
    standardisation: Standardisation
    tau: float
    components: Components | None
    prediction: str
    categories: tuple[str, ...]


class LookedUp(NamedTuple):
    """A batch of images, its features and their nearest vectors in the bank.

        images      (N, 3, S, S) in [-1, 1]; the noise follows from them
        features    standardised features of the images (N, C, G, G)
        distances   from every patch to its nearest vectors in the bank (N * G * G, k), nearest first
        indices     of these vectors in the bank (N * G * G, k)
        context     how well the network predicts each patch from its surroundings; None where it is not needed
    """

    images: Tensor
    features: Tensor
    distances: Tensor
    indices: Tensor
    context: Context | None = None


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class FeatureDetector(Detector):
    """LafitE or, with `net` None, its memory bank alone.

        space   the way from images to features
        bank    good patches
        net     the denoiser
        judge   the discriminator; None where it has no weight
    """

    family = "lafite"
    counterpart = "nearest good patches"

    settings: FeatureSettings
    space: FeatureSpace
    bank: Bank
    net: UNet2DModel | None = None
    judge: Discriminator | None = None

    def __post_init__(self):
        """Move the networks to the machine, in place; copy bank and standardisation to it where necessary."""
        if self.net is None and (DIFFUSED & self.settings.contributions.keys() or self.settings.context_power):
            raise UserError("--discriminator_contrib, --denoise_contrib, --inversion_contrib and --context_power: this "
                            "run has a memory bank and no denoiser; expected 0, or a run of train_lafite.py --method "
                            "lafite")
        device = self.machine.device
        for network in (self.space.patches, self.net):      # on a CPU a fourth (backbone), a seventh (denoiser) faster
            if network is not None:
                place(network, device, torch.channels_last)
        if self.judge is not None:
            self.judge.to(device)
        standardisation = self.space.standardisation.to(device)
        object.__setattr__(self, "space", self.space._replace(standardisation=standardisation))
        object.__setattr__(self, "bank", self.bank.to(device))

    @property
    def size(self) -> int:
        """See `Detector`."""
        return self.space.patches.extractor.resolution

    @property
    def patching(self) -> bool:
        """False: features are taken from whole images."""
        return False

    def parts(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """See `Detector.parts`; works through the images in batches, on the CPU in and out."""
        found = [self._parts(batch) for batch in images.split(self.machine.batch_size)]
        parts, mosaics = zip(*found, strict=True)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, (
            None if mosaics[0] is None else torch.cat(mosaics))

    def _parts(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        found = self.look_up(images)
        distances = {name: part.cpu() for name, part in self.relative(
            self.compare(found, self.settings.contributions), found.context).items()}
        return self.blurred(distances), self._mosaic(found.indices[:, 0])

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) in [-1, 1] -> standardised (N, C, G, G) float32, on the device."""
        found = self.space.patches(images.to(self.machine.device)).half()       # float16, as in the bank
        return self.space.standardisation.apply(found)

    def look_up(self, images: Tensor, neighbours: int | None = None, judged: bool = False) -> LookedUp:
        """The features of a batch of images, their neighbours in the bank and their surroundings, on the device.

            neighbours   number of neighbours; None for as many as the settings need
            judged       look up all that a discriminator needs, even if its weight is 0
        The surroundings are looked up if the settings need them and `neighbours` is not given.
        """
        features = self.features(images)
        judged = judged or bool(self.settings.discriminator_contrib)
        wanted = neighbours or self.settings.neighbours
        if judged and neighbours is None:
            wanted = max(wanted, min(discriminator.NEIGHBOURS, len(self.bank.vectors)))
        distances, indices = self.bank.nearest(to_patches(features), wanted)
        found = LookedUp(images, features, distances, indices)
        if neighbours is None and (judged or self.settings.needs_context):
            return found._replace(context=self.context(found, judged))
        return found

    @torch.no_grad()
    def context(self, found: LookedUp, judged: bool = False) -> Context:
        """`model.surroundings` of the features of a batch; `judged` asks for all that a discriminator needs."""
        sides = HIDDEN if judged or self.settings.discriminator_contrib else HIDDEN[:1]
        net, components = self._diffused()
        return surroundings(net, components.project(found.features), self._streams(found.images), feature_schedule(),
                            self.space.prediction, self.machine.precision, sides)

    def _diffused(self) -> tuple[UNet2DModel, Components]:
        """The denoiser and the components that it works on, where the settings need them."""
        assert self.net is not None and self.space.components is not None, "plain knn has no denoiser"
        return self.net, self.space.components

    @torch.no_grad()
    def compare(self, found: LookedUp, wanted: Collection[str]) -> dict[str, Tensor]:
        """The `wanted` maps among `options.PARTS`, each (N, 1, G, G) on the device."""
        features, settings, space = found.features, self.settings, self.space
        grid, abar, compared = features.shape[-1], feature_schedule(), {}
        if "discriminator" in wanted:
            assert self.judge is not None, "the discriminator has a weight"
            compared["discriminator"] = self.judge.surprise(self.evidence(found))
        if "knn" in wanted:
            compared["knn"] = to_maps(found.distances[:, :1].square(), grid)
        edited = features
        if "edit" in wanted or ("denoise" in wanted and settings.editing):
            edited = self._edited(found, settings.neighbours)
        if "edit" in wanted:
            compared["edit"] = patch_differences(edited, features)
        if "denoise" in wanted:
            net, components = self._diffused()
            x = components.project(edited if settings.editing else features)
            clean = denoise(net, x, self._streams(found.images), abar, settings.feature_start,
                            settings.feature_steps_back, space.prediction, self.machine.precision)
            compared["denoise"] = patch_differences(clean, components.project(features))
        if "inversion" in wanted:
            net, components = self._diffused()
            z = invert(net, components.project(features), abar, space.prediction, self.machine.precision)
            compared["inversion"] = unlikelihood(z)
        return compared

    def relative(self, parts: dict[str, Tensor], context: Context | None) -> dict[str, Tensor]:
        """Distances (N, 1, G, G) relative to the expected error, see `model.surroundings`."""
        if not self.settings.context_power:
            return parts
        assert context is not None, "the expected error has a power"
        unit = context.expected[:, :1].pow(self.settings.context_power)
        return {name: part if name in ("inversion", "discriminator") else part / unit for name, part in parts.items()}

    def blurred(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Blurred maps at the size of the image: (N, 1, G, G) each -> (N, 1, size, size)."""
        sigma = self.settings.blur_sigma * self.size / 256
        return {name: maps.blur(upsampled(part, self.size), sigma) for name, part in parts.items()}

    def score(self, anomaly_map: Tensor) -> Tensor:
        """See `Detector.score`."""
        return maps.image_score(anomaly_map, self.settings.top_share)

    @torch.no_grad()
    def evidence(self, found: LookedUp) -> Tensor:
        """The evidence for the discriminator, see `discriminator.evidence`."""
        edited = self._edited(found, discriminator.NEIGHBOURS)
        nearest = to_maps(found.distances[:, :1].square(), found.features.shape[-1])
        channels = self.space.patches.extractor.channels
        assert found.context is not None, "evidence needs what was looked up for a discriminator"
        return discriminator.evidence(found.features, edited, nearest, found.context, channels)

    def _edited(self, found: LookedUp, neighbours: int) -> Tensor:
        edited = self.bank.weighted(found.distances[:, :neighbours], found.indices[:, :neighbours], self.space.tau)
        return to_maps(edited, found.features.shape[-1])

    def _streams(self, images: Tensor) -> list[torch.Generator]:
        return [image_stream(self.settings.seed, image.cpu()) for image in images]

    def _mosaic(self, nearest: Tensor) -> Tensor | None:
        """Images (N, 3, S, S) made of the pieces that the nearest vectors of all patches (N * G * G,) describe."""
        if self.bank.pixels is None:
            return None
        pieces = self.bank.pixels[nearest.cpu()].unflatten(0, (-1, self.space.patches.grid, self.space.patches.grid))
        images = pieces.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3).float() / 127.5 - 1
        if images.shape[-1] != self.size:
            images = F.interpolate(images, size=(self.size, self.size), mode="nearest")
        return images
