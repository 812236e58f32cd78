"""The options of latent diffusion with semantic guidance (DiAD): maps, training, and the model to begin with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
    """From an image and its sample to one anomaly map: the parameters of inference that are worth editing."""

    latent_start: int = opt("noise latents up to this timestep of 1000", demo=200, small=400, base=1000, least=1)
    latent_steps_back: int = opt("denoising steps from there back to 0", demo=5, small=10, base=10, least=1)
    paper_exact: bool = opt("visit the timesteps that DiAD's published code visits", later=False)
    map_sigma: float = opt("Gaussian blur of the map, in px of a 256 px image; scales with the image", later=5.0,
                           least=0, most=256)

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
    """Training of the guided latent diffusion."""

    model: Path | None = opt("folder of the model to begin with, of build_diad.py (diad in --diffusion_checkpoint_dir; "
                             "train_tune_eval.py builds one)", None)
    train_unet: Literal["decoder", "whole"] | None = opt(
        "what of the U-Net learns: its decoder, as published, or the whole (the whole for models of random weights)",
        None)
    steps_latent: int = opt("length of the training in optimiser steps; 0 only calibrates", demo=600, small=10_000,
                            base=75_000, least=0)
    latent_batch_size: int = opt("images per training batch, over all processes", demo=8, base=12, least=1, most=65536)
    latent_accumulate: int = opt("batches whose mean gradient makes an optimiser step", demo=1, base=4, least=1)
    latent_learning_rate: float = opt("peak learning rate of AdamW", demo=1e-3, small=3e-4, base=1e-5, between=(0, 1))
    latent_schedule: Literal["cosine", "constant"] = opt("course of the learning rate", demo="cosine", base="constant")
    latent_max_timestep: int = opt("train on timesteps up to this one of 1000; inspection can visit no others",
                                   demo=200, small=400, base=1000, least=1)
    fused_optimizer: bool = opt("AdamW in one kernel: faster, and less memory for what it works with", False)


@dataclass(frozen=True, kw_only=True)
class DiadTraining(SeveralItems, AnyRunOptions, LatentOptions, DiadMapOptions):
    """The options of a run and of its training."""


@dataclass(frozen=True, kw_only=True)
class ResumeOptions:
    """The run, by its folder."""

    resume_path: Path | None = opt("run folder of the model, instead of --run_id and --diffusion_checkpoint_dir", None)


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """Weights to begin with."""

    stable_diffusion: Path | None = opt(
        "Stable Diffusion 1.5: a folder as diffusers saves it, or one file (.safetensors, or v1-5-pruned.ckpt)", None)
    autoencoder: Path | None = opt(
        "auto-encoder: the folder of a fine-tuned one (finetune_autoencoder.py trains one), one as diffusers saves it, "
        "or a file (kl-f8, mvtecad_fs.ckpt); that of --stable_diffusion to take Stable Diffusion's own", None)
    prompt_embedding: Path | None = opt(
        "file with the empty prompt's embedding, one tensor 1x77x768, where --stable_diffusion has no text encoder",
        None)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(WeightFiles):
    """The model that is put together where --model names none."""

    size: SizeName | None = opt(
        "the networks: sd15 are the published ones and need --stable_diffusion, the others are smaller and begin with "
        "random weights", demo="tiny", small="middle", base="sd15")
    autoencoder_start: Path | None = opt("what finetune_autoencoder.py is to --start with (random weights)", None)
    autoencoder_steps: int | None = opt("optimiser steps of finetune_autoencoder.py", demo=500, small=4000,
                                        base=100_000, least=1)


class Assembled(ModelOptions, DiadTraining):
    """The options of a training that begins with a model put together for it."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions(WeightFiles, SeedOption):
    """What the model is assembled from; saved as build_arg_config.json in its run folder."""

    out: Path = opt("run folder to write, such as checkpoints/diad")
    random: bool = opt("random weights instead of --stable_diffusion, for a training of the whole U-Net", False)
    size: SizeName | None = opt(
        "with --random: tiny (6 M parameters, 128 px), middle (98 M, 256 px) or sd15 (1415 M, 256 px)", None)
    resolution: int | None = opt("side of the images in px (256, or that of --size)", None, least=8, most=4096)
    weights: Literal["fp32", "bf16"] = opt("number format of the saved weights; a training needs fp32", "fp32")
    paper_exact: bool = opt("start the SFF block at zero as the published code does; it then never learns", False)
    dry_run: bool = opt("print the options and what would be written, then stop", False)


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

    run_id: str = opt("name of the run: its folders are called so", "autoencoder", aliases=["--run_name"])
    size: Literal["tiny", "middle", "kl-f8"] | None = opt(
        "the network, and the defaults of its training: kl-f8 is the published one (84 M parameters), the others have "
        "its shape and fewer channels (that of --start, else tiny with the demo data; with real data middle on a CPU, "
        "kl-f8 on a GPU)", None)
    start: Path | None = opt("what to begin with: a run folder of this script, or the .ckpt of a KL-f8 auto-encoder in "
                             "latent diffusion's format, such as kl-f8 or DiAD's mvtecad_fs (random weights)", None)
    resolution: int = by_size("side to which images are resized, in px", "resolution", least=8, most=4096)
    batch_size: int = by_size("images per batch, over all processes", "batch_size", least=1, most=65536)
    accumulate: int = by_size("batches whose mean gradient makes an optimiser step", "accumulate", least=1)
    num_steps: int = by_size("optimiser steps at most", "num_steps", least=1)
    epoch_steps: int = by_size("steps of an epoch, after which the held-out loss is measured", "epoch_steps",
                                      least=1)
    patience: int = by_size("epochs without a lower held-out reconstruction loss after which training stops, 0 "
                                   "for never; the weights of the best epoch are kept in any case", "patience", least=0)
    learning_rate: float = by_size("learning rate of Adam, for auto-encoder and discriminator", "learning_rate",
                                          between=(0, 1))
    schedule: Literal["cosine", "constant"] = by_size("course of the learning rate", "schedule")
    adam_betas: tuple[float, ...] = opt("Adam's decay rates of the mean gradient and of its square", (0.5, 0.9),
                                        check=two_betas)
    perceptual: Literal["lpips", "features", "none"] = opt(
        "perceptual distance: features of --extractor, or LPIPS (as published), which needs the package lpips and "
        "downloads a VGG-16", "features")
    perceptual_weight: float = opt(
        f"weight of the perceptual distance beside L1 (default: "
        f"{', '.join(f'{name} {value:g}' for name, value in PERCEPTUAL_WEIGHTS.items())})", None, least=0)
    kl_weight: float = opt("weight of the KL divergence of the latents from a normal distribution", 1e-6, least=0)
    discriminator_weight: float = opt("weight of the patch discriminator, beside its adaptive factor", 0.5, least=0)
    discriminator_start: int = opt("step at which the discriminator comes in", 50_001, least=0)


def check_foreign(options: Shared) -> None:
    """Raise `UserError` for options of every script that this family has no use for."""
    if options.patching:
        raise UserError("--patching: latents are those of whole images; expected --no_patching")
    name = options.diffusion_checkpoint_name
    if name != Shared.diffusion_checkpoint_name:
        raise UserError(f"--diffusion_checkpoint_name {name}: a model of this family is several files, whose names are "
                        "fixed; expected no such option")
