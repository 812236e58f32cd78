"""The training of DiAD's auto-encoder: its options by size, its images, its length, and how well it reconstructs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models import AutoencoderKL
from torch import Tensor

from dbad.data.categories import chosen_items, split_category
from dbad.data.images import fingerprint, read_images
from dbad.data.intensity import Intensity
from dbad.errors import UserError
from dbad.families.diad.adversarial import (
    AdversarialAutoencoder,
    PatchDiscriminator,
    Terms,
    build_perceptual,
    mean_over_categories,
)
from dbad.families.diad.autoencoder import (
    PUBLISHED_SCALE,
    BalancedImages,
    build_autoencoder,
    latent_scale,
    load_start,
    reconstruct,
    save_autoencoder,
)
from dbad.families.diad.options import PERCEPTUAL_WEIGHTS, SIZE_DEFAULTS, AutoencoderOptions, ModelOptions
from dbad.families.registry import recorded_method
from dbad.families.runs import begun_with, keep_intensity
from dbad.fields import EACH_PRESET, default_of, fields_of
from dbad.files.atomic import read_json, write_json
from dbad.files.names import REPORT, SAMPLES, TRAIN_OPTIONS
from dbad.options.resolve import check_options, default_preset, plain, run_folder
from dbad.records import Category
from dbad.runtime.device import Machine, memory_format
from dbad.training.early_stopping import Best
from dbad.training.plan import IMAGES, Plan
from dbad.training.samples import in_turn, write_sheet
from dbad.training.trial import say_forecast

T = TypeVar("T")
Measured = dict[str, dict[str, float]]      # by category and name, the losses on held-out images


def resolve_autoencoder(options: AutoencoderOptions) -> tuple[AutoencoderKL | None, AutoencoderOptions]:
    """The network to begin with, None for a random one, and the options completed from it, the data and the size."""
    start, size = load_start(options.start) if options.start else (None, options.size)
    if options.size not in (None, size):
        raise UserError(f"--size {options.size}: --start {options.start} is {size}; expected the same, or no --size")
    size = size or default_size(options.dataset_path, options.device)
    path = run_folder(options) / TRAIN_OPTIONS
    if path.is_file() and recorded_method(read_json(path), path) != "autoencoder":
        raise UserError(f"--run_id {options.run_id}: {path.parent} is the run of another script; expected a new name")
    options = keep_intensity(options, begun(options))
    later = {field.name: default_of(field, "base") for field in fields(options) if EACH_PRESET in field.metadata}
    values = SIZE_DEFAULTS[size] | {"perceptual_weight": PERCEPTUAL_WEIGHTS[options.perceptual]} | later
    missing = {name: value for name, value in values.items() if getattr(options, name) is None}
    options = replace(options, size=size, item=chosen_items(options), **missing)
    check_options(options)
    if known(options.resolution) % 8 or known(options.resolution) < 32:
        raise UserError(f"--resolution {options.resolution}: expected a multiple of 8, at least 32")
    return start, options


def known(value: T | None) -> T:
    """The value of an option that `resolve_autoencoder` has completed."""
    assert value is not None
    return value


def begun(options: AutoencoderOptions) -> dict[str, Any]:
    """The --intensity of the resumed run, see `begun_with`."""
    return begun_with(options, "autoencoder", "autoencoder")


def default_size(dataset_path: Path | None, device: str) -> str:
    """The size that the preset of the diad family stands for, where none is given."""
    size = default_of(fields_of(ModelOptions)["size"], default_preset(dataset_path, device))
    return "kl-f8" if size == "sd15" else size


def read_categories(categories: dict[str, Category], options: AutoencoderOptions, intensity: Intensity
                    ) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """The good images of every category, those to train on and those held out, each (3, S, S) uint8."""
    good, held_out = {}, {}
    for name, category in categories.items():
        good[name], held_out[name] = (read_images(part, options.resolution, options.num_workers, intensity)
                                      for part in split_category(category, options.holdout))
    return good, held_out


def build_networks(start: AutoencoderKL | None, options: AutoencoderOptions, precision: str) -> AdversarialAutoencoder:
    """The auto-encoder, which begins as `start` or with random weights, with its discriminator and losses."""
    autoencoder = start or build_autoencoder(known(options.size), known(options.resolution))
    autoencoder.register_to_config(sample_size=options.resolution)
    if options.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    discriminator = PatchDiscriminator() if options.discriminator_start < known(options.num_steps) else None
    perceptual = build_perceptual(options.perceptual, options.extractor, known(options.resolution))
    terms = Terms(known(options.perceptual_weight), options.kl_weight, options.discriminator_weight,
                  options.discriminator_start)
    return AdversarialAutoencoder(autoencoder, discriminator, terms, perceptual, precision)


def try_training(start: AutoencoderKL | None, options: AutoencoderOptions) -> None:
    """Print how long the training takes; steps are tried on random images."""
    machine, side = Machine.of(options.device, options.precision, known(options.batch_size)), known(options.resolution)
    model = build_networks(start, options, machine.precision)
    images = torch.randint(0, 256, (machine.batch_size, 3, side, side), dtype=torch.uint8)
    data = BalancedImages([list(images)], machine.batch_size, known(options.accumulate), options.seed)
    say_forecast("autoencoder", model.to(memory_format=memory_format(machine.device)), data,
                 lambda model, batch: model(batch), known(options.num_steps), device=machine.device,
                 accumulate=known(options.accumulate), at_most=True)


def plan_of(options: AutoencoderOptions, *images: dict[str, list[Tensor]]) -> Plan:
    """The length and speed of the training; options that only say where and how fast do not bind a resumed run."""
    free = ("dataset_path", "layout", "run_id", "diffusion_checkpoint_dir", "log_dir", "resume", "device", "precision",
            "gradient_checkpointing", "num_workers", "dry_run", "yes", "intensity",
            "intensity_bits")     # which the images' fingerprint tells
    settings = {name: value for name, value in plain(options).items() if name not in free}
    settings[IMAGES] = fingerprint(image for part in images for category in part.values() for image in category)
    first, second = options.adam_betas
    return Plan(known(options.num_steps), known(options.epoch_steps), 1, known(options.learning_rate), warmup_steps=50,
                seed=options.seed, settings=settings, weight_decay=0.0, betas=(first, second),
                max_grad_norm=float("inf"), accumulate=known(options.accumulate), schedule=known(options.schedule))


def write_samples(autoencoder: AutoencoderKL, held_out: dict[str, list[Tensor]], epoch: int,
                  options: AutoencoderOptions, precision: str) -> None:
    """Held-out images above their reconstructions."""
    x = in_turn(held_out.values()).to(next(autoencoder.parameters()).device)
    rows = {"image": x, "reconstruction": reconstruct(autoencoder, x, precision)}
    write_sheet(run_folder(options) / SAMPLES / f"epoch_{epoch}.png", rows, options.log_dir / options.run_id,
                "autoencoder/samples", min(epoch * known(options.epoch_steps), known(options.num_steps)))


def finish(autoencoder: AutoencoderKL, good: dict[str, list[Tensor]], options: AutoencoderOptions, precision: str,
           best: Best, measure: Callable[[AutoencoderKL], Measured]) -> None:
    """Write the best weights, the scale of their latents, and their losses on held-out images."""
    folder = run_folder(options)
    if autoencoder.config["scaling_factor"] != PUBLISHED_SCALE:
        everything = [image for images in good.values() for image in images]
        scale = latent_scale(autoencoder, everything, known(options.batch_size), precision)
        autoencoder.register_to_config(scaling_factor=scale)
    found = measure(autoencoder)
    means = mean_over_categories(found)
    write_json(folder / REPORT, means | {
        "val_loss_before": best.first, "best_epoch": best.epoch, "last_epoch": best.seen,
        "latent_scale": autoencoder.config["scaling_factor"], "categories": found})
    save_autoencoder(autoencoder, folder)
    print(f"held-out reconstruction loss {best.first:.4g} before training, {means['val_loss']:.4g} after epoch "
          f"{best.epoch} of {best.seen}, whose weights are kept; mean difference of pixels "
          f"{means['val_mean_abs_error']:.4f} of 1; scale of the latents {autoencoder.config['scaling_factor']:.4g}")
