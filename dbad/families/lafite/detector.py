"""The detector of the LafitE family: patch features, memory bank and, unless it is the plain `knn`, a denoiser.

With the denoiser may come a discriminator, which judges a patch by all its distances (`discriminator`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel
from torch import Tensor
from torch.nn import functional as F

from dbad import maps as diffmaps
from dbad.calibration.thresholds import Calibration
from dbad.checkpoints.weights import load_pickle, load_unet, load_weights, save_pickle, save_weights
from dbad.data.intensity import UNKNOWN, Intensity
from dbad.diffusion.noise import image_stream
from dbad.errors import UserError
from dbad.families.combining import Settings
from dbad.families.detector import Calibrated
from dbad.families.lafite import discriminator
from dbad.families.lafite.bank import Bank, load_bank, save_bank
from dbad.families.lafite.discriminator import Discriminator, evidence
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
from dbad.files.names import BANK, SPACE
from dbad.networks.extractors import build_extractor
from dbad.networks.features import PatchExtractor, Standardisation, to_maps, to_patches

PARTS = ("discriminator", "knn", "edit", "denoise", "inversion")
DIFFUSED = frozenset(PARTS) - {"knn", "edit"}       # what needs the denoiser


@dataclass(frozen=True)
class FeatureSettings(Settings):
    """From features to the anomaly map; the fields are those of `config.FeatureMapOptions`."""

    neighbours: int
    editing: bool
    feature_start: int
    feature_steps_back: int
    context_power: float
    discriminator_contrib: float
    knn_contrib: float
    edit_contrib: float
    denoise_contrib: float
    inversion_contrib: float
    blur_sigma: float
    top_share: float
    center_crop: int

    @property
    def contributions(self) -> dict[str, float]:
        """Of the parts that count."""
        found = {name: getattr(self, f"{name}_contrib") for name in PARTS}
        return {name: weight for name, weight in found.items() if weight > 0}

    @property
    def needs_context(self) -> bool:
        """Whether it counts how well a patch is known by its surroundings."""
        return bool(self.context_power or self.discriminator_contrib)

    def relative(self, maps: dict[str, Tensor], context: Context | None) -> dict[str, Tensor]:
        """Distances (N, 1, G, G) in units of what is expected, see `lafite.surroundings`."""
        if not self.context_power:
            return maps
        unit = context.expected[:, :1].pow(self.context_power)
        return {name: part if name in ("inversion", "discriminator") else part / unit for name, part in maps.items()}

    def blurred(self, maps: dict[str, Tensor], side: int) -> dict[str, Tensor]:
        """(N, 1, G, G) each -> (N, 1, side, side)."""
        return {name: diffmaps.blur(upsampled(part, side), self.blur_sigma * side / 256)
                for name, part in maps.items()}

    def score(self, anomaly_map: Tensor) -> Tensor:
        """See `Settings.score`."""
        return diffmaps.image_score(anomaly_map, self.top_share)


class FeatureSpace(NamedTuple):
    """What turns images into what is compared and diffused.

        patches           images -> features
        standardisation   of their channels
        tau               temperature of the editing, see `Bank.temperature`
        components        what is diffused; None for plain `knn`
        prediction        what the denoiser gives, see `lafite.estimate`
        categories        the model has seen
    """

    patches: PatchExtractor
    standardisation: Standardisation
    tau: float
    components: Components | None
    prediction: str
    categories: tuple[str, ...]


class FeatureDetector(Calibrated):
    """LafitE, and with `net` None its memory bank alone."""

    method = "lafite"
    patching = False
    counterpart = "nearest good patches"

    def __init__(self, space: FeatureSpace, bank: Bank, net: UNet2DModel | None, settings: FeatureSettings, *,
                 seed: int, batch_size: int, device: torch.device, precision: str,
                 calibration: Calibration | None = None, judge: Discriminator | None = None,
                 intensity: Intensity = UNKNOWN):
        if net is None and (DIFFUSED & settings.contributions.keys() or settings.context_power):
            raise UserError("--discriminator_contrib, --denoise_contrib, --inversion_contrib and --context_power: this "
                            "run has a memory bank and no denoiser; expected 0, or a run of train_lafite.py --method "
                            "lafite")
        order = {"memory_format": torch.channels_last}     # backbone a fourth, denoiser a seventh faster on a CPU
        self.patches, self.standardisation = space.patches.to(device, **order).eval(), space.standardisation.to(device)
        self.net = None if net is None else net.to(device, **order).eval()
        self.settings, self.seed, self.batch_size = settings, seed, batch_size
        self.device, self.precision, self.calibration, self.intensity = device, precision, calibration, intensity
        self.size, self.abar = space.patches.extractor.resolution, feature_schedule()
        self.space, self.bank, self.judge = space, bank, judge

    @property
    def bank(self) -> Bank:
        """The memory bank; one that is put in its place is brought to the detector's device."""
        return self._bank

    @bank.setter
    def bank(self, bank: Bank) -> None:
        self._bank = bank.to(self.device)

    @property
    def judge(self) -> Discriminator | None:
        """The discriminator; one that is put in its place is brought to the detector's device."""
        return self._judge

    @judge.setter
    def judge(self, judge: Discriminator | None) -> None:
        self._judge = None if judge is None else judge.to(self.device)

    def parts(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """See `Detector.parts`. What stands for the reconstruction is put together of the nearest good patches."""
        found = [self._parts(batch) for batch in images.split(self.batch_size)]
        mosaics = [mosaic for _, mosaic in found]
        return ({name: torch.cat([parts[name] for parts, _ in found]) for name in found[0][0]},
                None if mosaics[0] is None else torch.cat(mosaics))

    def combine(self, parts: dict[str, Tensor], scales: dict[str, float]) -> tuple[Tensor, Tensor]:
        """See `Detector.combine`."""
        return self.settings.combine(parts, scales)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) in [-1, 1] -> standardised (N, C, G, G) float32, on the device."""
        return self.standardisation.apply(self.patches(images.to(self.device)).half())  # as the bank's have been kept

    def _parts(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        features = self.features(images)
        distances, indices = self.nearest(features)
        context = self.context(images, features) if self.settings.needs_context else None
        raw = self.compare(images, features, distances, indices, self.settings.contributions, context)
        maps = {name: part.cpu() for name, part in self.settings.relative(raw, context).items()}
        return self.settings.blurred(maps, self.size), self._mosaic(indices[:, 0])

    def nearest(self, features: Tensor, judged: bool = False) -> tuple[Tensor, Tensor]:
        """Of every patch of features (N, C, G, G) as many neighbours as the settings need, see `Bank.nearest`.

        `judged` asks for those that a discriminator needs, whether it counts or not.
        """
        needed = self.settings.neighbours
        if judged or self.settings.discriminator_contrib:
            needed = max(needed, min(discriminator.NEIGHBOURS, len(self.bank.vectors)))
        return self.bank.nearest(to_patches(features), needed)

    @torch.no_grad()
    def compare(self, images: Tensor, features: Tensor, distances: Tensor, indices: Tensor, wanted: Collection[str],
                context: Context | None = None) -> dict[str, Tensor]:
        """The `wanted` ones of `PARTS`, each (N, 1, G, G) on the device.

            images                (N, 3, S, S) in [-1, 1], by which the noise is drawn
            features              of them, standardised (N, C, G, G)
            distances, indices    their nearest vectors in the bank, at least as many as `nearest` gives
            context               what `context` gives; only the discriminator asks for it
        """
        chosen, grid, found = self.settings, features.shape[-1], {}
        if "discriminator" in wanted:
            found["discriminator"] = self.judge.surprise(self.evidence(features, distances, indices, context))
        if "knn" in wanted:
            found["knn"] = to_maps(distances[:, :1].square(), grid)
        edited = features
        if "edit" in wanted or ("denoise" in wanted and chosen.editing):
            edited = self._edited(distances, indices, chosen.neighbours, grid)
        if "edit" in wanted:
            found["edit"] = patch_differences(edited, features)
        if "denoise" in wanted:
            x = self.space.components.project(edited if chosen.editing else features)
            clean = denoise(self.net, x, self._streams(images), self.abar, chosen.feature_start,
                            chosen.feature_steps_back, self.space.prediction, self.precision)
            found["denoise"] = patch_differences(clean, self.space.components.project(features))
        if "inversion" in wanted:
            z = invert(self.net, self.space.components.project(features), self.abar, self.space.prediction,
                       self.precision)
            found["inversion"] = unlikelihood(z)
        return found

    @torch.no_grad()
    def context(self, images: Tensor, features: Tensor, judged: bool = False) -> Context:
        """`lafite.surroundings` of the features (N, C, G, G) of images, on the device.

        `judged` asks for all that a discriminator needs, whether it counts or not.
        """
        sides = HIDDEN if judged or self.settings.discriminator_contrib else HIDDEN[:1]
        return surroundings(self.net, self.space.components.project(features), self._streams(images), self.abar,
                            self.space.prediction, self.precision, sides)

    @torch.no_grad()
    def evidence(self, features: Tensor, distances: Tensor, indices: Tensor, context: Context) -> Tensor:
        """What the discriminator judges by, see `discriminator.evidence`; arguments as for `compare`."""
        edited = self._edited(distances, indices, discriminator.NEIGHBOURS, features.shape[-1])
        nearest = to_maps(distances[:, :1].square(), features.shape[-1])
        return evidence(features, edited, nearest, context, self.patches.extractor.channels)

    def _edited(self, distances: Tensor, indices: Tensor, neighbours: int, grid: int) -> Tensor:
        edited = self.bank.weighted(distances[:, :neighbours], indices[:, :neighbours], self.space.tau)
        return to_maps(edited, grid)

    def _streams(self, images: Tensor) -> list[torch.Generator]:
        return [image_stream(self.seed, image.cpu()) for image in images]

    def _mosaic(self, nearest: Tensor) -> Tensor | None:
        """Nearest vector of every patch (N * G * G,) -> the pieces of image they come from, (N, 3, S, S)."""
        if self.bank.pixels is None:
            return None
        pieces = self.bank.pixels[nearest.cpu()].unflatten(0, (-1, self.patches.grid, self.patches.grid))
        images = pieces.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3).float() / 127.5 - 1
        if images.shape[-1] != self.size:
            images = F.interpolate(images, size=(self.size, self.size), mode="nearest")
        return images


# ------------------------------------------------------------------------------------------ in the run folder

def save_space(space: FeatureSpace, folder: Path) -> None:
    """Write everything of `space` but the backbone's own weights."""
    about = space.patches.description()
    components = None if space.components is None else space.components.state()
    save_pickle({"about": about, "standardisation": space.standardisation.state(), "tau": space.tau,
                 "components": components, "prediction": space.prediction, "categories": list(space.categories)},
                folder / SPACE)


def load_space(folder: Path) -> FeatureSpace:
    """Read what `save_space` wrote; the backbone has to have the weights it had then."""
    path = folder / SPACE
    state = load_pickle(path)
    names = {"about", "standardisation", "tau", "components", "prediction", "categories"}
    if not isinstance(state, dict) or not names <= state.keys():
        raise UserError(f"{path}: not a feature space written by train_lafite.py")
    about = state["about"]
    extractor = build_extractor(about["backbone"], about["layers"], about["resolution"])
    patches = PatchExtractor(extractor, about["grid"], about["smoothing"])
    if patches.description() != about:
        raise UserError(f"{path}: was made with other weights of {about['backbone']} than are installed; run "
                        "train_lafite.py again")
    components = state["components"] and Components(**state["components"])
    return FeatureSpace(patches, Standardisation.from_state(state["standardisation"]), state["tau"], components,
                        state["prediction"], tuple(state["categories"]))


def save_run(folder: Path, space: FeatureSpace, bank: Bank, judges: Mapping[str, Discriminator] | None = None) -> None:
    """Write what a detector needs beside its network, with the discriminators by their files."""
    save_space(space, folder)
    save_bank(bank, folder / BANK)
    for name, judge in (judges or {}).items():
        save_discriminator(judge, folder / name)


def save_discriminator(judge: Discriminator, path: Path) -> None:
    """Write the weights of a discriminator; `load_discriminator` reads them."""
    save_weights(judge.state_dict(), path)


def load_discriminator(path: Path, layers: int) -> Discriminator:
    """Read what `save_discriminator` wrote, for a backbone of so many layers."""
    state, planes = load_pickle(path), discriminator.num_planes(layers)
    if not isinstance(state, dict) or not isinstance(state.get("mean"), Tensor):
        raise UserError(f"{path}: not a discriminator written by train_lafite.py")
    if len(state["mean"]) != planes:
        raise UserError(f"{path}: a discriminator that judges by {len(state['mean'])} numbers per patch, expected "
                        f"{planes}; run train_lafite.py again, which keeps the denoiser")
    judge = Discriminator(planes)
    load_weights(judge, path, "train_lafite.py")
    return judge.eval().requires_grad_(False)


def build_feature_detector(folder: Path, checkpoint_name: str, settings: dict[str, Any], device: torch.device,
                           precision: str, batch_size: int, calibration: Calibration | None = None) -> FeatureDetector:
    """The detector of a run of train_lafite.py under `settings`."""
    space = load_space(folder)
    bank = load_bank(folder / BANK, space.patches.description())
    net = None if space.components is None else load_unet(folder, checkpoint_name)
    layers = len(space.patches.extractor.channels)
    judge = load_discriminator(folder / settings["discriminator"], layers) if settings["discriminator"] else None
    return FeatureDetector(space, bank, net, FeatureSettings.of(settings), seed=settings["seed"],
                           batch_size=batch_size, device=device, precision=precision, calibration=calibration,
                           judge=judge, intensity=Intensity.of(settings))
