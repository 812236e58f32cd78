"""The options of conditioned denoising: how an image is reconstructed, mapped and trained for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from dbad.errors import UserError
from dbad.families.settings import Settings
from dbad.fields import Given, opt
from dbad.options.shared import (
    BackboneOptions,
    RunOptions,
    ScoreOptions,
    TrainingOptions,
    one_for_each_level,
    share,
    two_betas,
)

Kind = Literal["cut_paste", "poisson_paste", "scar", "scratch", "texture", "stain", "spots", "missing", "warp", "blur"]
ALL_KINDS: tuple[str, ...] = get_args(Kind)     # as in dbad.damage.kinds, which the command line need not load


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How an image is reconstructed."""

    heading: ClassVar[str] = "Conditioned denoising"

    conditioning: Literal["ddad", "blend"] = opt(
        "how the inspected image guides denoising: ddad corrects the predicted noise, blend mixes the image in",
        later="ddad")
    recon_weight: float = opt("w: how strongly the reconstruction is pulled towards the inspected image; 0 = "
                              "unconditioned", later=2.0, least=0,
                              aliases=["--reconstruction_weight"], first=20)
    eta: float = opt(
        "DDIM's eta, share of fresh noise per step: 0 = deterministic, 1 = as in DDPM", later=0.0, least=0,
        check=lambda eta: "expected a number from 0 (deterministic) to 1 (as DDPM)" if eta > 1 else None)
    start_at_timestep: int = opt("noise the image up to this training timestep", later=250, least=1, first=21)
    steps_to_regenerate: int = opt("denoising steps from --start_at_timestep to 0", demo=3, base=25, least=1,
                                   aliases=["--num_inference_steps"])
    sampler: Literal["ddim", "dpm++"] = opt("solver of the denoising steps; dpm++ is second order from the third step "
                                            "on",
                                            later="ddim")

    @staticmethod
    def contradictions(given: Given) -> Iterator[str]:
        """Yield messages about settings that the solver cannot handle."""
        if given.sampler == "dpm++" and given.eta:
            yield f"--eta {given.eta}: --sampler dpm++ adds no noise; expected 0"
        start, steps = given.start_at_timestep, given.steps_to_regenerate
        if start is not None and steps is not None and steps > start:
            yield f"--steps_to_regenerate {steps}: more steps than the {start} timesteps of --start_at_timestep"


def _weights(value: tuple[float, ...]) -> str | None:
    usable = min(value, default=-1) >= 0 and max(value) > 0
    return None if usable else "expected numbers of at least 0, not all 0"


@dataclass(frozen=True, kw_only=True)
class MapOptions(ScoreOptions):
    """The anomaly map of an image and its reconstruction."""

    heading: ClassVar[str] = "Anomaly map"

    num_samples: int = opt("noise draws per image; their maps are averaged", later=1, least=1, most=10_000)
    pixel_difference: Literal["max_square", "mean_abs"] = opt(
        "pixel map: maximum of the squared or mean of the absolute differences of the colour "
        "channels", later="max_square")
    layer_weights: tuple[float, ...] = opt("weight of each extractor layer in the feature map, or one weight for all",
                                           later=(1.0,), check=_weights)
    map_norm: Literal["none", "location", "contrast"] = opt(
        "normalise maps by mean and standard deviation over good images, at the same pixel (location; for aligned "
        "parts) or at the same local contrast", later="none")
    feature_smoothing_kernel: int = opt(
        "side of the mean filter over features, in feature pixels; 1 = off", later=3, least=1, most=255,
        check=lambda side: None if side % 2 else "expected an odd number", aliases=["-fsk"])
    tile_overlap: float = opt(
        "with --patching: smallest overlap of neighbouring tiles, as a share of a tile's side", later=0.25,
        check=lambda value: None if 0 <= value <= 0.9 else "expected a share from 0 to 0.9")
    pl_contrib: float = opt("weight of the pixel map in the anomaly map", later=0.7, least=0)
    fl_contrib: float = opt("weight of the feature map in the anomaly map", later=0.7, least=0)

    @staticmethod
    def contradictions(given: Given) -> Iterator[str]:
        """Yield messages about maps that cannot be made."""
        if given.patching and given.map_norm == "location":
            yield "--map_norm location: the tiles of --patching have no common position; try contrast"
        if given.pl_contrib == 0 and given.fl_contrib == 0:
            yield "--pl_contrib and --fl_contrib are both 0: the anomaly map would be empty"


@dataclass(frozen=True, kw_only=True)
class AdaptedExtractor:
    """The file of the feature extractor."""

    heading: ClassVar[str] = "Run"

    extractor_path: Path | None = opt("file of the adapted extractor (default: extractor.pt in the run folder)", None,
                                      aliases=["--save_to"])


@dataclass(frozen=True, kw_only=True)
class DdimSettings(MapOptions, Reconstruction, AdaptedExtractor, Settings):
    """The settings of a detector of this family; the extractor's path is relative to the run folder."""

    @property
    def contributions(self) -> dict[str, float]:
        """The weights of the pixel and the feature map."""
        return {"pixel": self.pl_contrib, "feature": self.fl_contrib}


@dataclass(frozen=True, kw_only=True)
class GivenThresholds:
    """Thresholds set by hand, instead of calibrated."""

    pxl_threshold: float | None = opt("pixel difference that becomes 1 in the anomaly map (default: calibrated)", None,
                                      above=0, aliases=["--pl_threshold"])
    feature_threshold: float | None = opt("feature difference that becomes 1 in the anomaly map (default: "
                                          "calibrated)", None,
                                          above=0, aliases=["--fl_threshold"])


@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """The diffusion process that the network learns to reverse."""

    heading: ClassVar[str] = "Training of the diffusion model"

    train_steps: int = opt("timesteps of the diffusion process", 1000, least=2, most=100_000)
    max_timestep: int = opt("largest timestep of the training; --start_at_timestep cannot exceed it; 0 = --train_steps",
                            demo=250, base=0, least=0)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = opt("noise schedule", "linear")
    prediction: Literal["epsilon", "v", "x0"] = opt(
        "what the network predicts: noise (epsilon), velocity (v) or the clean image (x0)", "epsilon")
    noise_kind: Literal["gaussian", "simplex"] = opt("kind of noise, in training and at inspection", "gaussian")

    @property
    def reachable(self) -> int:
        """The last timestep that the network was trained for."""
        return self.max_timestep or self.train_steps

    @staticmethod
    def contradictions(given: Given) -> Iterator[str]:
        """Yield messages about timesteps that do not exist."""
        for name in ("start_at_timestep", "max_timestep"):
            value = getattr(given, name)
            if given.train_steps is not None and value is not None and value > given.train_steps:
                yield f"--{name} {value}: beyond the {given.train_steps} timesteps of --train_steps"
        start = given.start_at_timestep
        if start is not None and given.max_timestep and start > given.max_timestep:
            yield f"--start_at_timestep {start}: beyond the {given.max_timestep} timesteps of --max_timestep"


@dataclass(frozen=True, kw_only=True)
class ImageSize:
    """The size of the images that go into the networks."""

    heading: ClassVar[str] = "Data"

    resolution: int = opt("side of the network's input, in px; images are resized, or cropped with --patching; "
                          "train_extractor.py takes that of the trained diffusion model, if there is one",
                          demo=64, small=128, base=256, least=8, most=4096, first=19)


@dataclass(frozen=True, kw_only=True)
class DiffusionOptions(ProcessOptions, ImageSize, TrainingOptions):
    """Training of the diffusion model."""

    channels: tuple[int, ...] = opt("channels of each U-Net level, full resolution first",
                                    demo=(32, 32, 64, 128), small=(32, 32, 64, 128, 128),
                                    base=(128, 128, 256, 256, 512, 512), most=4096, check=one_for_each_level)
    layers_per_block: int = opt("residual layers of each U-Net level", demo=1, base=2, least=1, most=16)
    attention_levels: tuple[int, ...] = opt("U-Net levels with self-attention; 0 = full resolution", demo=(),
                                            base=(4,))
    epochs_diffusion: int | None = opt("training length in epochs", demo=None, base=1000, least=0,
                                       aliases=["--epochs"], first=14)
    steps_diffusion: int | None = opt("training length in optimiser steps, instead of epochs", demo=900,
                                      small=3000, base=None, least=0, first=13)
    learning_rate: float = opt("peak learning rate of AdamW", demo=3e-3, small=2e-3, base=1e-4, between=(0, 1))
    adam_betas: tuple[float, ...] = opt("AdamW's beta1 and beta2", demo=(0.9, 0.99),
                                        base=(0.95, 0.999), check=two_betas)
    warmup_steps: int = opt("warm-up steps of the learning rate, at most a tenth of all steps; then cosine decay",
                            demo=50, small=100, base=500, least=0)
    train_on: Literal["good", "damage"] = opt(
        "images that the network denoises: good ones as published, or with damage drawn on a share of them, for which "
        "it has to give the good image back", "good")
    damage_share: float = opt("with --train_on damage: share of the images that are damaged", 0.5, above=0, check=share)
    damage_kinds: tuple[Kind, ...] = opt("with --train_on damage: kinds of damage to draw", ALL_KINDS)
    flip: bool = opt("mirror training images at random", False)
    rotate: float = opt("rotate training images at random, by up to this many degrees", 0.0, least=0, most=360)
    color_jitter: float = opt("change brightness, contrast and saturation at random, by up to this share", 0.0, least=0,
                              most=10)
    save_n_epochs: int = opt("epochs between checkpoints, validations and sample pictures", demo=4, small=10, base=50,
                             least=1)
    calc_val_loss: bool = opt("measure the loss on the held-out good images at every checkpoint", True)

    @staticmethod
    def contradictions(given: Given) -> Iterator[str]:
        """Yield a message if the length is given twice."""
        if given.epochs_diffusion is not None and given.steps_diffusion is not None:
            yield "--epochs_diffusion and --steps_diffusion are both given: expected one of them"


@dataclass(frozen=True, kw_only=True)
class ExtractorOptions(BackboneOptions, AdaptedExtractor, ImageSize, TrainingOptions):
    """Training of the feature extractor."""

    objective: Literal["autoencoder", "reconstruction", "ddad"] | None = opt(
        "training objective. autoencoder: decode the image from its features; reconstruction: decode the diffusion "
        "model's reconstruction of it (both mean squared error); ddad: equal features (cosine distance) for an image "
        "and another image denoised towards it, with distillation of the pretrained network (default: "
        "autoencoder)", None, first=15)
    extractor_use_diff: bool = opt("same as --objective reconstruction", False, aliases=["--use_diffusion_model"])
    extractor_weight: float = opt("lambda: weight of the two distillation terms of --objective ddad", 0.1, least=0)
    extractor_recon_weight: float = opt("w for the image pairs of --objective ddad: pull towards the other image in "
                                        "denoising", 3.0, least=0)
    epochs_extractor: int = opt("maximum number of epochs; 0 keeps the pretrained weights; if not given, few images "
                                "get more epochs, to reach 100 steps", demo=1, base=30, least=0, first=16)
    extractor_patience: int = opt("stop after this many epochs without a lower loss on the held-out good images; 0 = "
                                  "never; the weights of the best epoch are kept", 3, least=0)
    extractor_learning_rate: float = opt("peak learning rate of AdamW for the extractor", 1e-4, between=(0, 1))

    def __post_init__(self):
        """What can be refused without a file is refused at once: other scripts train for hours before this one."""
        if self.extractor_use_diff and self.objective not in (None, "reconstruction"):
            raise UserError(f"--extractor_use_diff: the same as --objective reconstruction, but --objective "
                            f"{self.objective} is given; expected one of them")


@dataclass(frozen=True, kw_only=True)
class DdimTraining(RunOptions, DiffusionOptions, Reconstruction):
    """The options of a run and of its training."""


@dataclass(frozen=True, kw_only=True)
class DdimAdaptation(RunOptions, ExtractorOptions, Reconstruction):
    """The options of a run and of the adaptation of its extractor."""
