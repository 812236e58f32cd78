"""The training of the guided latent diffusion: its latents, its length, and the model it begins with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dbad.data.categories import split_category
from dbad.data.images import fingerprint, read_images
from dbad.data.intensity import AS_BEFORE, Intensity
from dbad.data.pictures import picture_size
from dbad.diffusion.batches import validation_loss
from dbad.diffusion.noise import image_stream
from dbad.errors import UserError
from dbad.families.diad import DIAD
from dbad.families.diad.files import read_built, read_diad_config
from dbad.families.diad.latents import Encoded, LatentImages, encode_all, latent_loss
from dbad.families.diad.model import SIZES, Diad
from dbad.families.diad.options import DiadTraining, ModelOptions
from dbad.families.diad.reconstruction import reconstruct
from dbad.families.digests import digests
from dbad.fields import PRESETS, default_of, fields_of
from dbad.files.atomic import read_json
from dbad.files.names import BUILD_OPTIONS, DIAD_FILES, SAMPLES
from dbad.options.resolve import plain, run_folder
from dbad.records import Category, Sample
from dbad.runtime.device import Machine, memory_advice, memory_format
from dbad.training.loop import fit
from dbad.training.plan import IMAGES, Hooks, Place, Plan
from dbad.training.samples import in_turn, write_sheet

REPORT_EVERY = 2        # epochs
# The options that shape the model, so that a training resumes only under equal ones.
SHAPING = ("item", "holdout", "seed", "train_unet", "steps_latent", "latent_batch_size", "latent_accumulate",
           "latent_learning_rate", "latent_schedule", "latent_max_timestep")


def model_to_begin_with(model: Path) -> tuple[str, str]:
    """The preset of a model, and the part of its U-Net that learns; one that cannot be trained is a `UserError`."""
    channels = tuple(read_diad_config(model)["unet"].get("block_out_channels", ()))
    for name in DIAD_FILES:
        if not (model / name).is_file():
            raise UserError(f"{model / name}: no such file; expected a complete model, as build_diad.py writes it")
    size = fields_of(ModelOptions)["size"]
    known = {SIZES[default_of(size, preset)].channels: preset for preset in PRESETS}
    built = read_built(model)
    if built and built["autoencoder"] is None:
        raise UserError(f"--model {model}: its auto-encoder has random weights; expected a trained one: run "
                        "finetune_autoencoder.py, then build_diad.py --autoencoder")
    return known.get(channels, "base"), "whole" if built.get("random") else "decoder"


def autoencoders(model: Path) -> dict[str, Any]:
    """The intensity that the auto-encoder of a built model was trained with; empty where it is not known."""
    if not (model / BUILD_OPTIONS).is_file():
        return {}
    known = Intensity.of(AS_BEFORE.settings() | read_json(model / BUILD_OPTIONS))
    return known.settings() if known.is_known else {}


def encode_categories(model: Diad, categories: Mapping[str, Category], options: DiadTraining, intensity: Intensity,
                      machine: Machine) -> tuple[dict[str, Encoded], dict[str, Encoded], dict[str, list[Sample]]]:
    """The latents to train on and those held out, by category, and the held-out images."""
    good, validation, held_out = {}, {}, {}
    for name, category in categories.items():
        kept, held_out[name] = split_category(category, options.holdout)
        good[name], validation[name] = (
            encode_all(model, read_images(each, model.resolution, options.num_workers, intensity), options.batch_size,
                       machine.device, machine.precision) for each in (kept, held_out[name]))
        say_sizes(name, category.good, model.resolution)
    return good, validation, held_out


def make_trainable(model: Diad, options: DiadTraining, machine: Machine) -> None:
    """Move a model to the machine, with the parts that learn ready for training."""
    model.to(machine.device).to(memory_format=memory_format(machine.device))
    model.set_trainable(whole_unet=options.train_unet == "whole")
    if options.gradient_checkpointing:
        model.checkpoint_gradients()


def say_sizes(name: str, samples: Sequence[Sample], resolution: int) -> None:
    """Report images of several sizes or that are not square; all are resized to one square."""
    sizes = {picture_size(sample.path) for sample in samples}
    if len(sizes) > 1 or any(width != height for width, height in sizes):
        shown = ", ".join(f"{width}x{height}" for width, height in sorted(sizes)[:3]) + ", ..." * (len(sizes) > 3)
        print(f"{name}: images of {shown} px are resized to {resolution}x{resolution} px, whatever their shape")


def millions(model: Diad, trained: bool = False) -> float:
    """The number of parameters in 10^6; with `trained`, only of those that learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained) / 1e6


def train_latents(model: Diad, train: dict[str, Encoded], validation: dict[str, Encoded], options: DiadTraining,
                  intensity: Intensity, machine: Machine) -> None:
    """Train the model, or load it where that is done; it ends with its EMA weights; 0 steps leave it as it is."""
    if not options.steps_latent:
        return
    folder, batch_size = run_folder(options), options.latent_batch_size
    logs = options.log_dir / folder.name
    shared = dict(seed=options.seed, batch_size=batch_size, num_timesteps=options.latent_max_timestep)
    data = LatentImages(list(train.values()), purpose="train", accumulate=options.latent_accumulate, **shared)
    held_out = LatentImages(list(validation.values()), purpose="validation", accumulate=1, **shared)

    def loss_of(wrapped, batch) -> dict[str, torch.Tensor]:
        return {"loss": latent_loss(wrapped, batch, model.abar, machine.precision)}

    def report(model: Diad, epoch: int) -> dict[str, float]:
        x = in_turn(part.images for part in validation.values()).to(machine.device)
        samples = reconstruct(model, x, [image_stream(options.seed, image) for image in x], options.latent_start,
                              options.latent_steps_back, options.paper_exact, machine.precision)
        rows = {"image": x, "auto-encoder alone": model.decode(model.encode(x)), "reconstruction": samples}
        write_sheet(folder / SAMPLES / f"epoch_{epoch}.png", rows, logs, "diad/samples",
                    min(epoch * plan.steps_per_epoch, plan.num_steps))
        return {"val_loss": validation_loss(
            held_out, lambda batch: latent_loss(model, batch, model.abar, machine.precision), machine.device)}

    plan = plan_of(options, (train, validation), intensity, len(data))
    with memory_advice(options, "latent_batch_size", "latent_accumulate",
                       otherwise="a model of a smaller resolution (build_diad.py)"):
        fit(model, data, loss_of, plan, Place(folder, logs, "diad", options.resume, options.yes),
            batch_size=batch_size, device=machine.device, hooks=Hooks(on_report=report))
    model.eval()


def plan_of(options: DiadTraining, images: Sequence[dict[str, Encoded]], intensity: Intensity, count: int) -> Plan:
    """The length and speed of the training on `count` images, and the settings that a resumed run must share."""
    settings: dict[str, Any] = {name: value for name, value in plain(options).items() if name in SHAPING}
    settings |= intensity.binding()
    assert options.model is not None        # train_diad.py fills it in
    weights = " ".join(digests(options.model, DIAD, None).values())
    settings["model"] = hashlib.blake2b(weights.encode(), digest_size=8).hexdigest()
    settings[IMAGES] = fingerprint(image for parts in images for part in parts.values() for image in part.images)
    images_per_step = options.latent_batch_size * options.latent_accumulate
    return Plan(options.steps_latent, -(-count // images_per_step), REPORT_EVERY,
                options.latent_learning_rate, warmup_steps=50, seed=options.seed, settings=settings, weight_decay=0.01,
                betas=(0.9, 0.999), accumulate=options.latent_accumulate, schedule=options.latent_schedule,
                fused=options.fused_optimizer)
