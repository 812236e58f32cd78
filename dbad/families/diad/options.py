"""The options of latent diffusion with semantic guidance (DiAD): maps, training, and the model to begin with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dbad.errors import UserError
from dbad.families.settings import Settings
from dbad.fields import About, Given, opt
from dbad.options.shared import (
    AnyRunOptions,
    BackboneOption,
    BackboneOptions,
    CropOptions,
    DataOptions,
    FolderOptions,
    IntensityOptions,
    MachineOptions,
    MemoryOptions,
    RestorationOption,
    SeedOption,
    SeveralItems,
    Shared,
    ThresholdOptions,
    TrainingOptions,
    two_betas,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

TIMESTEPS = 1000
SizeName = Literal["tiny", "middle", "sd15"]


@dataclass(frozen=True, kw_only=True)
class DiadMapOptions(CropOptions):
    """From an image to its sample and the anomaly map."""

    heading: ClassVar[str] = "Reconstruction and anomaly map"

    latent_start: int = opt("noise latents up to this timestep of 1000", demo=200, small=400, base=1000, least=1)
    latent_steps_back: int = opt("denoising steps from --latent_start to 0", demo=5, small=10, base=10, least=1)
    paper_exact: bool = opt("use the same timesteps as DiAD's published code", later=False)
    map_sigma: float = opt("sigma of the Gaussian blur of the map, in px for a 256 px image; scaled with the image "
                           "size", later=5.0,
                           least=0, most=256, heading=str(CropOptions.heading))

    @staticmethod
    def contradictions(given: Given) -> Iterator[str]:
        """Yield messages about timesteps that do not exist."""
        reachable = given.latent_max_timestep or TIMESTEPS
        if reachable > TIMESTEPS:
            yield f"--latent_max_timestep {reachable}: expected at most {TIMESTEPS}, the timesteps there are"
        if (given.latent_start or 0) > reachable:
            yield f"--latent_start {given.latent_start}: beyond the {reachable} timesteps of --latent_max_timestep"
        if given.latent_start is not None and (given.latent_steps_back or 1) > given.latent_start:
            yield (f"--latent_steps_back {given.latent_steps_back}: more steps than the {given.latent_start} "
                   "timesteps of --latent_start")


@dataclass(frozen=True, kw_only=True)
class DiadSettings(DiadMapOptions, BackboneOptions, Settings):
    """The settings of a detector of this family."""

    extractor_weights: str = opt("digest of the backbone's weights", "", flag=False)

    @property
    def contributions(self) -> dict[str, float]:
        """The weight of the one map there is."""
        return {"feature": 1.0}


@dataclass(frozen=True, kw_only=True)
class LatentOptions(BackboneOptions, ThresholdOptions, TrainingOptions, MemoryOptions):
    """Training of the guided latent diffusion model."""

    model: Path | None = opt("folder of the initial model, written by build_diad.py (default: diad in "
                             "--diffusion_checkpoint_dir; train_tune_eval.py builds a model)", None, first=13)
    train_unet: Literal["decoder", "whole"] | None = opt(
        "part of the U-Net to train (default: decoder, as published; whole for a model with random weights)",
        None)
    steps_latent: int = opt("training length in optimiser steps; 0 = only calibrate", demo=600, small=10_000,
                            base=75_000, least=0, first=14)
    latent_batch_size: int = opt("images per training batch, over all processes", demo=8, base=12, least=1, most=65536)
    latent_accumulate: int = opt("batches per optimiser step (gradient accumulation)", demo=1, base=4, least=1)
    latent_learning_rate: float = opt("peak learning rate of AdamW", demo=1e-3, small=3e-4, base=1e-5, between=(0, 1))
    latent_schedule: Literal["cosine", "constant"] = opt("learning-rate schedule", demo="cosine", base="constant")
    latent_max_timestep: int = opt("largest timestep of the training, of 1000; --latent_start cannot exceed it",
                                   demo=200, small=400, base=1000, least=1)
    fused_optimizer: bool = opt("fused AdamW: faster, with less working memory", False)


@dataclass(frozen=True, kw_only=True)
class DiadTraining(SeveralItems, AnyRunOptions, LatentOptions, RestorationOption, DiadMapOptions):
    """The options of a run and of its training."""


@dataclass(frozen=True, kw_only=True)
class ResumeOptions:
    """The run folder by its path."""

    heading: ClassVar[str] = "Run"

    resume_path: Path | None = opt("folder of the run, instead of --run_id and --diffusion_checkpoint_dir", None)


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """Initial weights."""

    stable_diffusion: Path | None = opt(
        "Stable Diffusion 1.5: a folder in diffusers' format, or one file (.safetensors, or v1-5-pruned.ckpt)", None,
        first=22)
    autoencoder: Path | None = opt(
        "auto-encoder: a run folder of finetune_autoencoder.py, a folder in diffusers' format, or a file (kl-f8, "
        "mvtecad_fs.ckpt); the path of --stable_diffusion for Stable Diffusion's own", None, first=23)
    prompt_embedding: Path | None = opt(
        "file with the embedding of the empty prompt, one tensor 1x77x768; needed if --stable_diffusion has no text "
        "encoder",
        None)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(WeightFiles):
    """New model, if --model is not given."""

    size: SizeName | None = opt(
        "size of the networks: sd15 is the published one and needs --stable_diffusion; the others are smaller and "
        "start from random weights", demo="tiny", small="middle", base="sd15", first=8)
    autoencoder_start: Path | None = opt("initial weights for finetune_autoencoder.py, its --start (default: random "
                                         "weights)", None)
    autoencoder_steps: int | None = opt("optimiser steps of finetune_autoencoder.py", demo=500, small=4000,
                                        base=100_000, least=1)


class Assembled(ModelOptions, DiadTraining):
    """The options of a training that begins with a model put together for it."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions(WeightFiles, SeedOption):
    """New model; saved as build_arg_config.json in its run folder."""

    heading: ClassVar[str] = "New model"

    out: Path = opt("run folder to write, such as checkpoints/diad", first=1)
    random: bool = opt("random weights instead of --stable_diffusion; train_diad.py then trains the whole U-Net", False,
                       first=7)
    size: SizeName | None = opt(
        "with --random: tiny (6 M parameters, 128 px), middle (98 M, 256 px) or sd15 (1415 M, 256 px)", None, first=8)
    resolution: int | None = opt("side of the images, in px (default: 256, or that of "
                                 "--size)", None, least=8, most=4096)
    weights: Literal["fp32", "bf16"] = opt("number format of the saved weights; training needs fp32", "fp32")
    paper_exact: bool = opt("initialise the SFF block with zeros as in the published code; it then never learns", False)
    dry_run: bool = opt("print the options and what would be written, then stop", False, first=10)


# The defaults of an auto-encoder's training by its size.
SIZE_DEFAULTS: dict[str, dict[str, Any]] = {
    "tiny": {"resolution": 64, "batch_size": 8, "accumulate": 1, "num_steps": 1000, "epoch_steps": 100, "patience": 3,
             "learning_rate": 2e-3, "schedule": "cosine"},
    "middle": {"resolution": 128, "batch_size": 8, "accumulate": 1, "num_steps": 4000, "epoch_steps": 250,
               "patience": 4, "learning_rate": 1e-3, "schedule": "cosine"},
    "kl-f8": {"resolution": 256, "batch_size": 4, "accumulate": 8, "num_steps": 100_000, "epoch_steps": 500,
              "patience": 20, "learning_rate": 1.8e-4, "schedule": "constant"},
}
PERCEPTUAL_WEIGHTS = {"lpips": 1.0, "features": 0.1, "none": 0.0}


def by_size(help: str, name: str, **about: Unpack[About]) -> Any:
    """An option whose default is that of the size; until `resolve_autoencoder` fills it in, it is None."""
    defaults = ", ".join(f"{size} {values[name]}" for size, values in SIZE_DEFAULTS.items())
    return opt(f"{help} (default: {defaults})", None, **about)


@dataclass(frozen=True, kw_only=True)
class AutoencoderOptions(SeveralItems, BackboneOption, DataOptions, IntensityOptions, SeedOption, TrainingOptions,
                         MemoryOptions, MachineOptions, FolderOptions):
    """Training of the auto-encoder."""

    run_id: str = opt("name of the run and of its folders", "autoencoder", aliases=["--run_name"], first=6)
    size: Literal["tiny", "middle", "kl-f8"] | None = opt(
        "size of the network, and the defaults of its training: kl-f8 is the published one (84 M parameters), the "
        "others have fewer channels (default: that of --start; else tiny for the demo data; for real data middle on a "
        "CPU, kl-f8 on a GPU)", None, first=7)
    start: Path | None = opt("initial weights: a run folder of this script, or the .ckpt of a KL-f8 auto-encoder in "
                             "latent diffusion's format, such as kl-f8 or DiAD's mvtecad_fs (default: random "
                             "weights)", None, first=8)
    resolution: int = by_size("side to which images are resized, in px", "resolution", least=8, most=4096)
    batch_size: int = by_size("images per batch, over all processes", "batch_size", least=1, most=65536)
    accumulate: int = by_size("batches per optimiser step (gradient accumulation)", "accumulate", least=1)
    num_steps: int = by_size("maximum number of optimiser steps", "num_steps", least=1, first=9)
    epoch_steps: int = by_size("steps per epoch; each epoch ends with a measurement of the held-out "
                                      "loss", "epoch_steps",
                                      least=1)
    patience: int = by_size("stop after this many epochs without a lower held-out reconstruction loss; 0 = "
                                   "never; the weights of the best epoch are kept", "patience", least=0)
    learning_rate: float = by_size("Adam's learning rate, for auto-encoder and discriminator", "learning_rate",
                                          between=(0, 1))
    schedule: Literal["cosine", "constant"] = by_size("learning-rate schedule", "schedule")
    adam_betas: tuple[float, ...] = opt("Adam's beta1 and beta2", (0.5, 0.9),
                                        check=two_betas)
    perceptual: Literal["lpips", "features", "none"] = opt(
        "perceptual distance: features of --extractor, none, or LPIPS (as published; needs the package lpips and "
        "downloads a VGG-16)", "features")
    perceptual_weight: float = opt(
        f"weight of the perceptual distance beside L1 (default: "
        f"{', '.join(f'{name} {value:g}' for name, value in PERCEPTUAL_WEIGHTS.items())})", None, least=0)
    kl_weight: float = opt("weight of the KL divergence of the latents from a normal distribution", 1e-6, least=0)
    discriminator_weight: float = opt("weight of the patch discriminator, multiplied by its adaptive "
                                      "factor", 0.5, least=0)
    discriminator_start: int = opt("first step with the discriminator", 50_001, least=0)


def check_foreign(options: Shared) -> None:
    """Raise `UserError` for options of every script that this family has no use for."""
    if options.patching:
        raise UserError("--patching: latents are those of whole images; expected --no_patching")
    name = options.diffusion_checkpoint_name
    if name != Shared.diffusion_checkpoint_name:
        raise UserError(f"--diffusion_checkpoint_name {name}: a model of this family is several files, whose names are "
                        "fixed; expected no such option")
