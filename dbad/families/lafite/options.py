"""The options of LafitE and of its memory bank alone, knn: features, their diffusion, and the maps made of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from dbad.errors import UserError
from dbad.families.settings import Settings
from dbad.fields import Given, opt
from dbad.options.shared import (
    AnyRunOptions,
    BackboneOptions,
    ScoreOptions,
    SeveralItems,
    ThresholdOptions,
    TrainingOptions,
    TuneOptions,
    one_for_each_level,
)

PARTS = ("discriminator", "knn", "edit", "denoise", "inversion")
DIFFUSED = frozenset(PARTS) - {"knn", "edit"}       # the maps that need the denoiser
TIMESTEPS = 1000
DENOISER = "Training of the denoiser"       # heading in the help


def _timestep(value: int) -> str | None:
    return f"expected at most {TIMESTEPS}, the timesteps there are" if value > TIMESTEPS else None


@dataclass(frozen=True, kw_only=True)
class FeatureMapOptions(ScoreOptions):
    """From features to the anomaly map."""

    heading: ClassVar[str] = "Anomaly map"

    neighbours: int = opt("number of nearest good patches; their weighted mean is the edited patch", later=3,
                          least=1)
    editing: bool = opt("edit the features before noising and denoising", later=True)
    feature_start: int = opt("noise features up to this timestep of 1000", later=600, least=1, check=_timestep)
    feature_steps_back: int = opt("denoising steps from --feature_start to 0", later=1, least=1)
    context_power: float = opt(
        "exponent for dividing each distance by the error predicted from the patch's surroundings; 0 = "
        "off", later=0.0, least=0, most=10)
    discriminator_contrib: float = opt("weight of the discriminator, a network trained on pseudo-anomalies that scores "
                                       "a patch by all its distances", later=1.0, least=0)
    knn_contrib: float = opt("weight of the distance to the nearest good patch", later=0.0, least=0)
    edit_contrib: float = opt("weight of the distance to the edited patch", later=0.0, least=0)
    denoise_contrib: float = opt("weight of the distance to the denoised patch", later=0.0, least=0)
    inversion_contrib: float = opt("weight of the inversion map: how unlikely the noise is that belongs to the "
                                   "features", later=0.0,
                                   least=0)

    @staticmethod
    def contradictions(given: Given) -> Iterator[str]:
        """Yield messages about maps that cannot be made."""
        names = [f"{name}_contrib" for name in PARTS]
        if all(getattr(given, name) == 0 for name in names):
            yield f"--{', --'.join(names[:-1])} and --{names[-1]} are all 0: the anomaly map would be empty"
        if given.feature_start is not None and (given.feature_steps_back or 1) > given.feature_start:
            yield (f"--feature_steps_back {given.feature_steps_back}: more steps than the {given.feature_start} "
                   "timesteps of --feature_start")


@dataclass(frozen=True, kw_only=True)
class FeatureSettings(FeatureMapOptions, Settings):
    """The settings of a detector of this family."""

    discriminator: str = opt("file of the discriminator in the run folder; empty for none", "", flag=False)

    @property
    def contributions(self) -> dict[str, float]:
        """The weights of the maps whose weight is not 0."""
        found = {name: getattr(self, f"{name}_contrib") for name in PARTS}
        return {name: weight for name, weight in found.items() if weight > 0}

    @property
    def needs_context(self) -> bool:
        """True if a map depends on the prediction of patches from their surroundings."""
        return bool(self.context_power or self.discriminator_contrib)


@dataclass(frozen=True, kw_only=True)
class FeatureOptions(BackboneOptions, ThresholdOptions, TuneOptions, TrainingOptions):
    """Features, memory bank and training of the denoiser."""

    heading: ClassVar[str] = "Features and memory bank"

    method: Literal["lafite", "knn"] = opt("lafite, or knn (memory bank only, no diffusion) (default: lafite)", None,
                                           first=2)
    grid: int = opt("patches along each side of an image", later=32, least=4, most=512)
    feature_cache: Path | None = opt("folder for extracted features (default: ~/.cache/dbad/features)", None)
    bank_mb: float = opt("size of the memory bank in MB (10^6 bytes), divided equally among the "
                         "categories", later=8.0, above=0,
                         most=1_000_000)
    components: int = opt("number of principal components of the features for diffusion", later=64, least=1,
                          most=65536, heading=DENOISER)
    prediction: Literal["x0", "v", "epsilon"] = opt(
        "what the network predicts: clean features (x0), velocity (v) or noise (epsilon)", later="x0",
        heading=DENOISER)
    feature_channels: tuple[int, ...] = opt("channels of each U-Net level, full grid first",
                                            demo=(64, 128, 192), base=(128, 256, 384, 512), most=4096,
                                            check=one_for_each_level, heading=DENOISER)
    steps_features: int = opt("training length in optimiser steps", demo=600, small=1500, base=20000, least=1,
                              heading=DENOISER)
    feature_batch_size: int = opt("feature maps per training batch, over all processes", demo=8, base=64, least=1,
                                  most=65536, heading=DENOISER)
    feature_learning_rate: float = opt("peak learning rate of AdamW", demo=1e-3, base=1e-4, between=(0, 1),
                                       heading=DENOISER)


@dataclass(frozen=True, kw_only=True)
class LafiteOptions(SeveralItems, AnyRunOptions, FeatureOptions, FeatureMapOptions):
    """The options of a run and of its training."""


L = TypeVar("L", bound=LafiteOptions)

# The settings of knn, which has no denoiser.
_PLAIN = {"discriminator_contrib": 0.0, "knn_contrib": 1.0, "edit_contrib": 0.0, "denoise_contrib": 0.0,
          "inversion_contrib": 0.0, "context_power": 0.0}


def has_denoiser(method: str) -> bool:
    """True for a method whose runs diffuse features: lafite, not knn."""
    return method == "lafite"


def of_method(options: L, method: str) -> L:
    """The options with the values that the method fixes: without a denoiser, only distances to good patches count."""
    if has_denoiser(method):
        return options
    for name in ("discriminator_contrib", "denoise_contrib", "inversion_contrib", "context_power"):
        if getattr(options, name):
            raise UserError(f"--{name} {getattr(options, name)}: --method {method} has no denoiser; expected 0")
    return replace(options, **{name: value for name, value in _PLAIN.items() if getattr(options, name) is None})


def may_judge(options: LafiteOptions, given: Collection[str]) -> bool:
    """True if discriminators are trained; the search may give them no weight. It leaves `given` settings alone."""
    searched = options.tune and "discriminator_contrib" not in given
    return has_denoiser(options.method) and bool(options.discriminator_contrib > 0 or searched)


def fixed_settings(options: LafiteOptions, given: Collection[str]) -> set[str]:
    """The settings that a search leaves alone: the given ones, and those that a method without denoiser fixes."""
    return set(given) | (set() if has_denoiser(options.method) else {"knn_contrib", "edit_contrib"})
