"""Train the KL auto-encoder of DiAD on good images, or fine-tune a published one; one for any number of categories.

    python finetune_autoencoder.py --item all                                 (built-in demo data, minutes on a CPU)
    python finetune_autoencoder.py --item all --dataset_path data/mvtec --start kl-f8.ckpt

The loss is that of latent diffusion (arXiv:2112.10752): L1, a perceptual distance, KL, and late in the training a patch
discriminator. The defaults of size kl-f8 are DiAD's (arXiv:2312.06607), but for the perceptual network. At the end the
latents of the training images are measured, and 1 / their standard deviation is stored as their scale, so that a
diffusion model sees unit variance; what began with the published weights keeps the published scale.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dbad.data.categories import chosen_items, open_category, split_category
from dbad.data.depth import begun_with, keep_intensity, run_intensity
from dbad.data.images import fingerprint, read_images
from dbad.data.intensity import INTENSITY
from dbad.errors import UserError
from dbad.families.diad.adversarial import (
    AdversarialAutoencoder,
    PatchDiscriminator,
    Terms,
    build_perceptual,
    held_out_losses,
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
from dbad.files.atomic import read_json, write_json
from dbad.files.locks import writing_run
from dbad.files.names import AUTOENCODER, LOG, MODEL_CONFIG, REPORT, SAMPLES, TRAIN_OPTIONS
from dbad.networks.extractors import EMBEDDED
from dbad.options.command_line import check, data_of, main, opt, plain, run_folder
from dbad.options.presets import PRESETS, default_preset
from dbad.runtime.device import memory_advice, memory_format, pick_device, pick_precision
from dbad.training.early_stopping import Best
from dbad.training.loop import fit
from dbad.training.plan import IMAGES, Hooks, Place, Plan
from dbad.training.samples import in_turn, write_sheet

# The lengths and speeds of the sizes. kl-f8 is as published: constant rate, a step of 8 batches of 4.
DEFAULTS: dict[str, dict[str, Any]] = {
    "tiny": {"resolution": 64, "batch_size": 8, "accumulate": 1, "num_steps": 1000, "epoch_steps": 100, "patience": 3,
             "learning_rate": 2e-3, "schedule": "cosine"},
    "middle": {"resolution": 128, "batch_size": 8, "accumulate": 1, "num_steps": 4000, "epoch_steps": 250,
               "patience": 4, "learning_rate": 1e-3, "schedule": "cosine"},
    "kl-f8": {"resolution": 256, "batch_size": 4, "accumulate": 8, "num_steps": 100_000, "epoch_steps": 500,
              "patience": 20, "learning_rate": 1.8e-4, "schedule": "constant"},
}
PERCEPTUAL_WEIGHTS = {"lpips": 1.0, "features": 0.1, "none": 0.0}


def by_size(help: str, name: str) -> Any:
    """An option whose default is that of the size."""
    return opt(f"{help} (default: {', '.join(f'{size} {values[name]}' for size, values in DEFAULTS.items())})", None)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What shapes the training of an auto-encoder."""

    item: tuple[str, ...] = opt("one category, several, or all", aliases=["--mvtec_item"])
    dataset_path: Path | None = opt("folder of the data set; without it the built-in demo data is drawn", None)
    layout: Literal["auto", "mvtec", "mvtec_ad_2", "visa", "mtd", "btad", "ksdd2", "folder", "manifest"] = opt(
        "how the data lie on disk; auto recognises it: python -m dbad.data PATH shows what is found", "auto")
    run_id: str = opt("name of the run: its folders are called so", "autoencoder", aliases=["--run_name"])
    diffusion_checkpoint_dir: Path = opt("folder in which every run has a folder of its own", Path("checkpoints"),
                                         aliases=["--checkpoint_dir"])
    log_dir: Path = opt("folder for TensorBoard's events", Path("logs"))
    size: Literal["tiny", "middle", "kl-f8"] | None = opt(
        "the network, and the defaults of its training: kl-f8 is the published one (84 M parameters), the others have "
        "its shape and fewer channels (that of --start, else tiny with the demo data; with real data middle on a CPU, "
        "kl-f8 on a GPU)", None)
    start: Path | None = opt("what to begin with: a run folder of this script, or the .ckpt of a KL-f8 auto-encoder in "
                             "latent diffusion's format, such as kl-f8 or DiAD's mvtecad_fs (random weights)", None)
    intensity: str | None = opt(f"{INTENSITY} (auto)", None)
    resolution: int | None = by_size("side to which images are resized, in px", "resolution")
    holdout: float = opt("share of train/good kept out of training, which says when to stop; a data set with "
                         "validation/good has its own", 0.1)
    batch_size: int | None = by_size("images per batch, over all processes", "batch_size")
    accumulate: int | None = by_size("batches whose mean gradient makes an optimiser step", "accumulate")
    num_steps: int | None = by_size("optimiser steps at most", "num_steps")
    epoch_steps: int | None = by_size("steps of an epoch, after which the held-out loss is measured", "epoch_steps")
    patience: int | None = by_size("epochs without a lower held-out reconstruction loss after which training stops, 0 "
                                   "for never; the weights of the best epoch are kept in any case", "patience")
    learning_rate: float | None = by_size("learning rate of Adam, for auto-encoder and discriminator", "learning_rate")
    schedule: Literal["cosine", "constant"] | None = by_size("course of the learning rate", "schedule")
    adam_betas: tuple[float, ...] = opt("Adam's decay rates of the mean gradient and of its square", (0.5, 0.9))
    perceptual: Literal["lpips", "features", "none"] = opt(
        "perceptual distance: features of --extractor, or LPIPS (as published), which needs the package lpips and "
        "downloads a VGG-16", "features")
    perceptual_weight: float | None = opt(
        f"weight of the perceptual distance beside L1 (default: "
        f"{', '.join(f'{name} {value:g}' for name, value in PERCEPTUAL_WEIGHTS.items())})", None)
    extractor: str = opt("backbone of --perceptual features", EMBEDDED)
    kl_weight: float = opt("weight of the KL divergence of the latents from a normal distribution", 1e-6)
    discriminator_weight: float = opt("weight of the patch discriminator, beside its adaptive factor", 0.5)
    discriminator_start: int = opt("step at which the discriminator comes in", 50_001)
    seed: int = opt("every random number of the run follows from it", 0)
    resume: bool = opt("go on from the last saved state of this run, if there is one", True)
    gradient_checkpointing: bool = opt("compute activations twice instead of keeping them: less memory, a third slower",
                                       False)
    device: str = opt("auto, cpu, cuda, cuda:1 or mps", "auto")
    precision: Literal["auto", "fp32", "bf16"] = opt(
        "number format inside the networks; auto is bf16 where the processor has it", "auto")
    num_workers: int = opt("threads that read images; 0 for none", 2)
    dry_run: bool = opt("print the options and what would be written, then stop", False)


def run(options: Options) -> Path:
    """Train the auto-encoder, and return its run folder."""
    start, options = settle(options)
    folder = run_folder(options)
    if announce(options, folder):
        with writing_run(folder):
            train(options, start)
    return folder


def train(options: Options, start: AutoencoderKL | None) -> None:
    """Train the auto-encoder of a run, which begins as `start`, and save its best weights."""
    folder = run_folder(options)
    device = pick_device(options.device)
    precision = pick_precision(options.precision, device)

    # Read the good images; a share of each category is never trained on.
    categories = {name: open_category(replace(options, item=name)) for name in options.item}
    intensity = run_intensity(options, begun(options), [s for each in categories.values() for s in each.good])
    good, held_out = {}, {}
    for name, category in categories.items():
        good[name], held_out[name] = (read_images(part, options.resolution, options.num_workers, intensity)
                                      for part in split_category(category, options.holdout))
    data = BalancedImages(list(good.values()), options.batch_size, options.accumulate, options.seed)

    # Build the networks.
    torch.manual_seed(options.seed)
    autoencoder = start or build_autoencoder(options.size, options.resolution)
    autoencoder.register_to_config(sample_size=options.resolution)
    if options.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    discriminator = PatchDiscriminator() if options.discriminator_start < options.num_steps else None
    perceptual = build_perceptual(options.perceptual, options.extractor, options.resolution)
    terms = Terms(options.perceptual_weight, options.kl_weight, options.discriminator_weight,
                  options.discriminator_start)
    model = AdversarialAutoencoder(autoencoder, discriminator, terms, perceptual, precision)
    print(f"{sum(map(len, good.values()))} good images to train on, {sum(map(len, held_out.values()))} held out; "
          f"{sum(p.numel() for p in autoencoder.parameters()) / 1e6:.1f} M parameters; {device.type}, {precision}")

    # Train until the held-out loss rises, and keep the best.
    best = Best(options.patience)

    def measure(autoencoder: AutoencoderKL) -> dict[str, dict[str, float]]:
        return held_out_losses(autoencoder, held_out, perceptual, terms.perceptual, options.batch_size, precision)

    def report(model: AdversarialAutoencoder, epoch: int) -> dict[str, float]:
        write_samples(model.autoencoder, held_out, epoch, options, precision)
        return mean_over_categories(measure(model.autoencoder))

    with memory_advice(options, "batch_size", "accumulate", "resolution", otherwise="a smaller --resolution"):
        fit(model.to(memory_format=memory_format(device)), data, lambda model, batch: model(batch),
            plan_of(options, good, held_out),
            Place(folder, options.log_dir / options.run_id, "autoencoder", options.resume),
            batch_size=options.batch_size, device=device, hooks=Hooks(
                lambda: write_json(folder / TRAIN_OPTIONS, plain(options) | intensity.settings()), report, best))

    # Write the best weights, the scale of their latents, and how well they reconstruct.
    model.eval()
    if autoencoder.config.scaling_factor != PUBLISHED_SCALE:
        everything = [image for images in good.values() for image in images]
        scale = latent_scale(autoencoder, everything, options.batch_size, precision)
        autoencoder.register_to_config(scaling_factor=scale)
    found = measure(autoencoder)
    means = mean_over_categories(found)
    write_json(folder / REPORT, means | {
        "val_loss_before": best.first, "best_epoch": best.epoch, "last_epoch": best.seen,
        "latent_scale": autoencoder.config.scaling_factor, "categories": found})
    save_autoencoder(autoencoder, folder)
    print(f"held-out reconstruction loss {best.first:.4g} before training, {means['val_loss']:.4g} after epoch "
          f"{best.epoch} of {best.seen}, whose weights are kept; mean difference of pixels "
          f"{means['val_mean_abs_error']:.4f} of 1; scale of the latents {autoencoder.config.scaling_factor:.4g}")


def settle(options: Options) -> tuple[AutoencoderKL | None, Options]:
    """The network to begin with, None for a random one, and the options completed from it, the data and the size."""
    start, size = load_start(options.start) if options.start else (None, options.size)
    if options.size not in (None, size):
        raise UserError(f"--size {options.size}: --start {options.start} is {size}; expected the same, or no --size")
    size = size or default_size(options.dataset_path, options.device)
    folder = run_folder(options)
    if (folder / TRAIN_OPTIONS).is_file() and "discriminator_start" not in read_json(folder / TRAIN_OPTIONS):
        raise UserError(f"--run_id {options.run_id}: {folder} is the run of another script; expected a new name")
    options = keep_intensity(options, begun(options))
    values = DEFAULTS[size] | {"perceptual_weight": PERCEPTUAL_WEIGHTS[options.perceptual], "intensity": "auto"}
    missing = {name: value for name, value in values.items() if getattr(options, name) is None}
    options = replace(options, size=size, item=chosen_items(options), **missing)
    check(replace(options, item=None))
    if options.resolution % 8 or options.resolution < 32:
        raise UserError(f"--resolution {options.resolution}: expected a multiple of 8, at least 32")
    return start, options


def begun(options: Options) -> dict[str, Any]:
    """The --intensity of the run that is gone on with, see `begun_with`."""
    return begun_with(options, "finetune_autoencoder.py", "autoencoder")


def default_size(dataset_path: Path | None, device: str) -> str:
    """The size that the preset of the diad family stands for, where none is given."""
    size = PRESETS[default_preset(dataset_path, device, "diad")]["size"]
    return "kl-f8" if size == "sd15" else size


def announce(options: Options, folder: Path) -> bool:
    """Say what is trained on; on `--dry_run` also all options and what would be written. Whether to go on."""
    print(f"{' '.join(options.item)} from {data_of(options)}; size {options.size}")
    if options.dry_run:
        print("\n".join(f"  {name} = {value}" for name, value in plain(options).items()))
        files = (AUTOENCODER, MODEL_CONFIG, TRAIN_OPTIONS, REPORT, LOG)
        print("would write:", *(folder / name for name in files), sep="\n  ")
    return not options.dry_run


def plan_of(options: Options, *images: dict[str, list[Tensor]]) -> Plan:
    """The length and speed of the training; options that only say where and how fast do not bind a resumed run."""
    free = ("dataset_path", "layout", "run_id", "diffusion_checkpoint_dir", "log_dir", "resume", "device", "precision",
            "gradient_checkpointing", "num_workers", "dry_run", "intensity")     # which the images' fingerprint tells
    settings = {name: value for name, value in plain(options).items() if name not in free}
    settings[IMAGES] = fingerprint(image for part in images for category in part.values() for image in category)
    return Plan(options.num_steps, options.epoch_steps, 1, options.learning_rate, warmup_steps=50, seed=options.seed,
                settings=settings, weight_decay=0.0, betas=tuple(options.adam_betas), max_grad_norm=float("inf"),
                accumulate=options.accumulate, schedule=options.schedule)


def write_samples(autoencoder: AutoencoderKL, held_out: dict[str, list[Tensor]], epoch: int, options: Options,
                  precision: str) -> None:
    """Held-out images above their reconstructions."""
    x = in_turn(held_out.values()).to(next(autoencoder.parameters()).device)
    write_sheet(run_folder(options) / SAMPLES / f"epoch_{epoch}.png", [x, reconstruct(autoencoder, x, precision)],
                options.log_dir / options.run_id, "autoencoder/samples",
                min(epoch * options.epoch_steps, options.num_steps))


if __name__ == "__main__":
    main(Options, lambda options: f"The auto-encoder is in {run(options)}", __doc__)
