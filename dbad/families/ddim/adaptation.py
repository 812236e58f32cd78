"""The adaptation of the feature extractor to one category: its images, their counterparts, its length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dbad.data.augment import random_crops
from dbad.data.categories import num_good, split_category
from dbad.data.images import fingerprint, read_images, to_float
from dbad.data.intensity import Intensity
from dbad.diffusion.noise import stream
from dbad.families.ddim.detector import open_denoiser
from dbad.families.ddim.objectives import OBJECTIVES, Pairs, denoise_towards, network_and_loss
from dbad.families.ddim.options import DdimAdaptation, ExtractorOptions, Reconstruction
from dbad.families.ddim.reconstruct import reconstruct_all
from dbad.networks.extractors import build_extractor
from dbad.options.resolve import plain, run_folder, subset
from dbad.records import Category
from dbad.runtime.device import Machine, memory_format
from dbad.training.early_stopping import Best
from dbad.training.plan import IMAGES, Plan
from dbad.training.trial import say_forecast

MIN_STEPS = 100     # of adaptation, where its length is not given: an epoch of 50 images changes nothing
CROPS = 4           # of an image, with --patching


def chosen_objective(options: ExtractorOptions) -> str:
    """The objective, from --objective or from --extractor_use_diff in its place."""
    return options.objective or ("reconstruction" if options.extractor_use_diff else "autoencoder")


def images_of(pixels: list[Tensor], purpose: str, options: DdimAdaptation, crops_per_image: int = CROPS) -> Tensor:
    """Images as (N, 3, S, S) in [-1, 1]; with --patching some random crops of each."""
    if not options.patching:
        return to_float(torch.stack(pixels))
    streams = [stream(options.seed, purpose, i) for i in range(len(pixels))]
    return to_float(torch.cat([random_crops(pixels, options.resolution, streams) for _ in range(crops_per_image)]))


def good_images(category: Category, options: DdimAdaptation, intensity: Intensity) -> Iterator[Tensor]:
    """Yield the good images of a category to train on, then those held out, each (N, 3, S, S) in [-1, 1]."""
    size = None if options.patching else options.resolution
    for part, purpose in zip(split_category(category, options.holdout),
                             ("extractor crop", "extractor validation crop"), strict=True):
        yield images_of(read_images(part, size, options.num_workers, intensity), purpose, options)


def pairing(objective: str, options: DdimAdaptation, machine: Machine) -> Callable[[Tensor], Tensor]:
    """A function from good images (N, 3, S, S) in [-1, 1] to their counterparts, likewise.

    The counterpart is the image itself (autoencoder), its reconstruction by the trained diffusion model
    (reconstruction), or another image denoised towards it (ddad). It does not depend on the extractor, so it is made
    once.
    """
    if objective == "autoencoder":
        return lambda images: images
    denoiser = open_denoiser(run_folder(options), options.diffusion_checkpoint_name)
    denoiser.unet.to(machine.device, memory_format=memory_format(machine.device))
    how = subset(Reconstruction, options)
    if objective == "ddad":
        how = replace(how, conditioning="ddad", recon_weight=options.extractor_recon_weight)
        return partial(denoise_towards, denoiser, options=how, machine=machine, seed=options.seed)
    return partial(reconstruct_all, denoiser, options=how, machine=machine, seed=options.seed)


def enough_epochs(options: DdimAdaptation, num_images: int) -> int:
    """The epochs of the adaptation where their number is not given: few images get more."""
    return max(options.epochs_extractor, math.ceil(MIN_STEPS * options.batch_size / num_images))


def try_training(options: DdimAdaptation, length_given: bool) -> None:
    """Print how long the adaptation takes; steps are tried on random images, with a backbone of random weights."""
    if not options.epochs_extractor:
        return
    machine, side = Machine.of(options.device, options.precision, options.batch_size), options.resolution
    extractor = build_extractor(options.extractor, options.extractor_layers, options.feature_resolution, False)
    model, loss_of = network_and_loss(chosen_objective(options), extractor, options.extractor_weight, *machine[:2])
    images = torch.rand(options.batch_size, 3, side, side) * 2 - 1
    count = num_good(options, options.item) * (CROPS if options.patching else 1)
    epochs = options.epochs_extractor if length_given else enough_epochs(options, count)
    say_forecast("extractor", model.to(memory_format=memory_format(machine.device)), Pairs(images, images), loss_of,
                 epochs * -(-count // options.batch_size), device=machine.device, at_most=True)


def plan_of(objective: str, options: DdimAdaptation, data: Pairs, validation: Pairs) -> Plan:
    """The length and speed of the training, and the settings that a resumed run must share."""
    steps_per_epoch = -(-len(data) // options.batch_size)
    shaping = ("item", "holdout", "batch_size", "seed", "extractor", "extractor_layers", "feature_resolution",
               "epochs_extractor", "extractor_patience", "extractor_learning_rate", "patching", *OBJECTIVES[objective])
    settings = {name: value for name, value in plain(options).items() if name in shaping} | {
        "objective": objective,
        IMAGES: fingerprint([data.images, data.counterparts, validation.images, validation.counterparts])}
    return Plan(options.epochs_extractor * steps_per_epoch, steps_per_epoch, 1, options.extractor_learning_rate,
                warmup_steps=0, seed=options.seed, settings=settings)


def outcome(objective: str, best: Best) -> str:
    """One line that says which weights are kept."""
    decoder = "" if objective == "ddad" else " and an untrained decoder"
    before = f"{objective}: held-out loss {best.first:.4g} with the pretrained weights{decoder}"
    stopped = f"; stopped after epoch {best.seen}" if best.exhausted else ""
    if best.epoch == 0:
        return f"{before}, no epoch was better, so they are kept{stopped}"
    return f"{before}, {best.loss:.4g} after epoch {best.epoch}, whose weights are kept{stopped}"
