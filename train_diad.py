"""Train a model of the diad family on the good images of many categories, and calibrate it (arXiv:2312.06607).

    python train_diad.py --item all                                   (built-in demo data, a model of build_diad.py)
    python train_diad.py --item all --dataset_path data/mvtec --model checkpoints/diad --run_id mvtec

It starts from the model that build_diad.py has put together. Images are not varied, so that their latents are encoded
only once; those of all categories are seen equally often. The SG network and the decoder of the U-Net learn, and with
random weights to begin with the whole U-Net. inference_diad.py inspects with what this leaves. Gradients are cut to
length 1 and weights averaged, unlike in the published training. A length of 0 steps calibrates the model as it is.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from dbad.calibration.digests import digests
from dbad.data.categories import chosen_items, open_category, split_category
from dbad.data.depth import begun_with, keep_intensity, run_intensity
from dbad.data.images import fingerprint, read_images
from dbad.data.intensity import AS_BEFORE, Intensity
from dbad.data.pictures import picture_size
from dbad.diffusion.batches import validation_loss
from dbad.diffusion.noise import image_stream
from dbad.errors import UserError
from dbad.families.diad.detector import DiadDetector, DiadSettings, check_foreign, extractor_settings
from dbad.families.diad.files import FAMILY, read_built, read_diad_config
from dbad.families.diad.latents import Encoded, LatentImages, encode_all, latent_loss
from dbad.families.diad.model import SIZES, Diad
from dbad.families.diad.reconstruction import reconstruct
from dbad.families.diad.storage import load_diad, save_diad
from dbad.files.atomic import read_json, write_json
from dbad.files.locks import writing_run
from dbad.files.names import BUILD_OPTIONS, CALIBRATION, DIAD_FILES, MODEL_CONFIG, SAMPLES, TRAIN_OPTIONS
from dbad.inspection.calibrate import begin_files, calibrate_all, check_promises, finish_files, is_whole
from dbad.networks.extractors import EMBEDDED, build_extractor, chosen_layers
from dbad.options.command_line import (
    DiadMapOptions,
    RunOptions,
    announce,
    main,
    opt,
    plain,
    resolve,
    run_folder,
    run_name,
    trained_options,
)
from dbad.options.presets import PRESETS
from dbad.records import Sample
from dbad.report.results import listing_digest
from dbad.runtime.device import memory_advice, memory_format, pick_device, pick_precision
from dbad.training.loop import fit
from dbad.training.plan import IMAGES, Hooks, Place, Plan
from dbad.training.samples import in_turn, write_sheet

REPORT_EVERY = 2        # epochs


@dataclass(frozen=True, kw_only=True)
class LatentOptions:
    """Training of the guided latent diffusion."""

    model: Path | None = opt("folder of the model to begin with, of build_diad.py (diad in --diffusion_checkpoint_dir; "
                             "train_tune_eval.py builds one)", None)
    train_unet: Literal["decoder", "whole"] | None = opt(
        "what of the U-Net learns: its decoder, as published, or the whole (the whole for models of random weights)",
        None)
    steps_latent: int = opt("length of the training in optimiser steps; 0 only calibrates", by_preset=True)
    latent_batch_size: int = opt("images per training batch, over all processes", by_preset=True)
    latent_accumulate: int = opt("batches whose mean gradient makes an optimiser step", by_preset=True)
    latent_learning_rate: float = opt("peak learning rate of AdamW", by_preset=True)
    latent_schedule: Literal["cosine", "constant"] = opt("course of the learning rate", by_preset=True)
    latent_max_timestep: int = opt("train on timesteps up to this one of 1000; inspection can visit no others",
                                   by_preset=True)
    gradient_checkpointing: bool = opt("compute activations twice instead of keeping them: less memory, a third slower",
                                       False)
    fused_optimizer: bool = opt("AdamW in one kernel: faster, and less memory for what it works with", False)
    extractor: str = opt("backbone: efficientnet_lite0 (comes with its weights), a torchvision ResNet such as "
                         "resnet50 (as published), or any timm backbone", EMBEDDED)
    extractor_layers: tuple[int, ...] | None = opt("feature stages, the first being 0 (those of strides 4, 8 and 16)",
                                                   None)
    feature_resolution: int = opt("side to which the extractor resizes images, in px", by_preset=True)
    pixel_quantile: float = opt("share of good pixels below the scales of the maps and the pixel threshold", 0.999)
    false_alarm_rate: float | None = opt(
        "promised share of good images called defective (0.05, or what the held-out images can promise)", None)
    resume: bool = opt("go on from the last saved state of this run, if there is one", True)
    log_dir: Path = opt("folder for TensorBoard's events", Path("logs"))


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions, LatentOptions, DiadMapOptions):
    """What shapes a run; saved as train_arg_config.json in its run folder, once it is finished."""

    item: tuple[str, ...] = opt("one category, several, or all", aliases=["--mvtec_item"])


def run(options: Options) -> Path:
    """Train and calibrate; returns the run folder."""
    options = settled(options)
    folder = run_folder(options)
    if announce(options, *(folder / name for name in (*DIAD_FILES, MODEL_CONFIG, CALIBRATION, TRAIN_OPTIONS))):
        with writing_run(folder):
            train(options, folder)
    return folder


def train(options: Options, folder: Path) -> None:
    """Train and calibrate a run, unless that is done."""
    categories = {name: open_category(replace(options, item=name)) for name in options.item}
    names = (*DIAD_FILES, MODEL_CONFIG)
    files = [options.model / name for name in names] + [
        sample.path for category in categories.values() for sample in category.good]
    record = plain(options) | {"method": FAMILY, "data": listing_digest(files)}
    if options.resume and is_whole(folder, record, names):
        print(f"{folder} is finished; --no_resume makes it anew")
        return
    device = pick_device(options.device)
    precision = pick_precision(options.precision, device)
    extractor = build_extractor(options.extractor, options.extractor_layers, options.feature_resolution)

    intensity = run_intensity(options, autoencoders(options.model) or begun(options),
                              [sample for category in categories.values() for sample in category.good])
    record |= intensity.settings()

    # The model, and the good images with their latents; a share of each category is never trained on.
    model = load_diad(options.model, torch.float32)
    model.to(device, memory_format=memory_format(device)).set_trainable(whole_unet=options.train_unet == "whole")
    if options.gradient_checkpointing:
        model.checkpoint_gradients()
    good, validation, held_out = {}, {}, {}
    for name, category in categories.items():
        kept, held_out[name] = split_category(category, options.holdout)
        good[name], validation[name] = (
            encode_all(model, read_images(each, model.resolution, options.num_workers, intensity), options.batch_size,
                       device, precision) for each in (kept, held_out[name]))
        say_sizes(name, category.good, model.resolution)
    print(f"{sum(len(part.images) for part in good.values())} good images to train on, "
          f"{sum(map(len, held_out.values()))} held out; {millions(model, True):.1f} M of {millions(model):.1f} M "
          f"parameters learn; {device.type}, {precision}")

    # Train.
    if options.steps_latent:
        with memory_advice(options, "latent_batch_size", "latent_accumulate",
                           otherwise="a model of a smaller resolution (build_diad.py)"):
            train_latents(model, good, validation, options, intensity, device, precision)
    begin_files(folder, record, ())
    save_diad(model, folder)
    if (options.model / BUILD_OPTIONS).is_file():
        write_json(folder / BUILD_OPTIONS, read_json(options.model / BUILD_OPTIONS))

    # Thresholds, from held-out images.
    detector = DiadDetector(model, extractor, DiadSettings.of(vars(options)), seed=options.seed,
                            batch_size=options.batch_size, device=device, precision=precision, intensity=intensity)
    settings = vars(detector.settings) | extractor_settings(extractor) | intensity.settings() | {
        "method": FAMILY, "seed": options.seed}
    finish_files(folder, record, calibrate_all(detector, held_out, settings, options))


def begun(options: Options) -> dict[str, Any]:
    """The --intensity of the run that is gone on with, see `begun_with`."""
    return begun_with(options, "train_diad.py", "diad")


def autoencoders(model: Path) -> dict[str, Any]:
    """The intensity that the auto-encoder of a built model was trained with; empty where it is not known."""
    if not (model / BUILD_OPTIONS).is_file():
        return {}
    known = Intensity.of(AS_BEFORE.settings() | read_json(model / BUILD_OPTIONS))
    return known.settings() if known.is_known else {}


def settled(options: Options) -> Options:
    """The options with every default filled in from the model, the data and the preset, and the categories by name."""
    check_foreign(options)
    model = options.model or options.diffusion_checkpoint_dir / FAMILY
    preset, whole = options.preset, options.train_unet
    if (model / MODEL_CONFIG).is_file() or not options.dry_run:     # a dry run may come before the model
        channels = tuple(read_diad_config(model)["unet"].get("block_out_channels", ()))
        for name in DIAD_FILES:
            if not (model / name).is_file():
                raise UserError(f"{model / name}: no such file; expected a whole model, as build_diad.py writes it")
        known = {SIZES[values["size"]].channels: name for name, values in PRESETS.items()}
        preset = preset or known.get(channels, "base")
        built = read_built(model)
        if built and built["autoencoder"] is None:
            raise UserError(f"--model {model}: its auto-encoder has random weights; expected one that was trained "
                            "(finetune_autoencoder.py), and the model built with it: build_diad.py --autoencoder")
        whole = whole or ("whole" if built.get("random") else "decoder")
    options = replace(options, item=chosen_items(options), run_id=run_name(options, FAMILY), preset=preset,
                      model=model, train_unet=whole)
    encoder = autoencoders(model)
    if options.intensity not in (None, encoder.get("intensity", options.intensity)):
        raise UserError(f"--intensity {options.intensity}: the auto-encoder of {model} was trained with "
                        f"{encoder['intensity']}; expected the same")
    options = resolve(keep_intensity(options, encoder or begun(options)))
    trained_options(options, "train_diad.py")       # refuses a run of another script
    chosen_layers(options.extractor, options.extractor_layers)
    check_promises(options, options.item)
    if run_folder(options).absolute() == model.absolute():
        raise UserError(f"--model {model}: is the run folder itself; expected another --run_id, so that the model to "
                        "begin with is kept")
    return options


def say_sizes(name: str, samples: Sequence[Sample], resolution: int) -> None:
    """Tell of images of several sizes, or of another shape than a square; they are all resized to one square."""
    sizes = {picture_size(sample.path) for sample in samples}
    if len(sizes) > 1 or any(width != height for width, height in sizes):
        shown = ", ".join(f"{width}x{height}" for width, height in sorted(sizes)[:3]) + ", ..." * (len(sizes) > 3)
        print(f"{name}: images of {shown} px are resized to {resolution}x{resolution} px, whatever their shape")


def millions(model: Diad, trained: bool = False) -> float:
    """Parameters in 10^6; of those that learn, if `trained`."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained) / 1e6


def train_latents(model: Diad, train: dict[str, Encoded], validation: dict[str, Encoded], options: Options,
                  intensity: Intensity, device: torch.device, precision: str) -> None:
    """Train the model, or load it where that is done; it ends with its EMA weights."""
    folder, batch_size = run_folder(options), options.latent_batch_size
    shared = dict(seed=options.seed, batch_size=batch_size, num_timesteps=options.latent_max_timestep)
    data = LatentImages(list(train.values()), purpose="train", accumulate=options.latent_accumulate, **shared)
    held_out = LatentImages(list(validation.values()), purpose="validation", accumulate=1, **shared)

    def loss_of(wrapped, batch) -> dict[str, torch.Tensor]:
        return {"loss": latent_loss(wrapped, batch, model.abar, precision)}

    def report(model: Diad, epoch: int) -> dict[str, float]:
        x = in_turn(part.images for part in validation.values()).to(device)
        samples = reconstruct(model, x, [image_stream(options.seed, image) for image in x], options.latent_start,
                              options.latent_steps_back, options.paper_exact, precision)
        write_sheet(folder / SAMPLES / f"epoch_{epoch}.png", [x, model.decode(model.encode(x)), samples],
                    options.log_dir / options.run_id, f"{FAMILY}/samples",
                    min(epoch * plan.steps_per_epoch, plan.num_steps))
        return {"val_loss": validation_loss(
            held_out, lambda batch: latent_loss(model, batch, model.abar, precision), device)}

    shaping = ("item", "holdout", "seed", "train_unet", "steps_latent", "latent_batch_size", "latent_accumulate",
               "latent_learning_rate", "latent_schedule", "latent_max_timestep")
    settings: dict[str, Any] = {name: value for name, value in plain(options).items() if name in shaping}
    settings |= intensity.binding()
    weights = " ".join(digests(options.model, {"method": FAMILY}).values())
    settings["model"] = hashlib.blake2b(weights.encode(), digest_size=8).hexdigest()
    settings[IMAGES] = fingerprint(image for part in (*train.values(), *validation.values()) for image in part.images)
    plan = Plan(options.steps_latent, -(-len(data) // (batch_size * options.latent_accumulate)), REPORT_EVERY,
                options.latent_learning_rate, warmup_steps=50, seed=options.seed, settings=settings, weight_decay=0.01,
                betas=(0.9, 0.999), accumulate=options.latent_accumulate, schedule=options.latent_schedule,
                fused=options.fused_optimizer)
    fit(model, data, loss_of, plan, Place(folder, options.log_dir / options.run_id, FAMILY, options.resume),
        batch_size=batch_size, device=device, hooks=Hooks(on_report=report))
    model.eval()


if __name__ == "__main__":
    main(Options, lambda options: f"The trained model is in {run(options)}", __doc__)
