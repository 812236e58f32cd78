"""Adapt the feature extractor to one category.

The pretrained network learns from the good images by one of three objectives; those held out say
after which epoch to stop, and whether it became better at all.

    python train_extractor.py --item hazelnut
    python train_extractor.py --item screw --dataset_path data/mvtec --objective ddad --epochs_extractor 8
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dbad.checkpoints.trained import trained_process
from dbad.checkpoints.weights import load_unet
from dbad.data.augment import random_crops
from dbad.data.categories import open_category, split_category
from dbad.data.depth import run_intensity
from dbad.data.images import fingerprint, read_images, to_float
from dbad.diffusion.ddim import Conditioning, reconstruct_all, schedule
from dbad.diffusion.noise import stream
from dbad.errors import UserError
from dbad.families.ddim.objectives import OBJECTIVES, Pairs, denoise_towards, held_out_losses, network_and_loss
from dbad.files.locks import writing_run
from dbad.files.names import EXTRACTOR, check_written
from dbad.networks.extractors import EMBEDDED, build_extractor, chosen_layers, is_extractor, save_extractor
from dbad.options.command_line import (
    ReconstructionOptions,
    RunOptions,
    announce,
    main,
    opt,
    plain,
    resolve,
    run_folder,
    trained_options,
)
from dbad.runtime.device import memory_format, pick_device, pick_precision
from dbad.training.early_stopping import Best
from dbad.training.loop import fit
from dbad.training.plan import IMAGES, Hooks, Place, Plan

MIN_STEPS = 100     # of adaptation, where its length is not given: an epoch of 50 images changes nothing


@dataclass(frozen=True, kw_only=True)
class ExtractorOptions:
    """Training of the feature extractor."""

    extractor: str = opt("backbone: efficientnet_lite0 (comes with its weights), a torchvision ResNet such as "
                         "wide_resnet101_2, or any timm backbone", EMBEDDED)
    extractor_layers: tuple[int, ...] | None = opt(
        "feature stages to compare and, with ddad, to adapt, the first being 0 (those of strides 4, 8 and 16)", None)
    extractor_path: Path | None = opt("file of the adapted extractor (extractor.pt in the run folder)", None,
                                      aliases=["--save_to"])
    objective: Literal["autoencoder", "reconstruction", "ddad"] | None = opt(
        "what is learnt: autoencoder decodes the image from its features, reconstruction the diffusion model's "
        "reconstruction of it (both mean squared error); ddad brings the features of an image and of another one "
        "denoised towards it together (cosine distance) and distils the pretrained network (autoencoder)", None)
    extractor_use_diff: bool = opt("the same as --objective reconstruction", False, aliases=["--use_diffusion_model"])
    extractor_weight: float = opt("lambda, weight of ddad's two distillation terms, against forgetting", 0.1)
    extractor_recon_weight: float = opt("w of ddad's pairs, pull towards the other image while denoising", 3.0)
    epochs_extractor: int = opt("epochs of adaptation at most; 0 keeps the pretrained weights. Where it is not given, "
                                "few images get more epochs, for 100 steps", by_preset=True)
    extractor_patience: int = opt("epochs without a lower loss on the held-out good images after which adaptation "
                                  "stops, 0 for never; the weights of the best epoch are kept in any case", 3)
    extractor_learning_rate: float = opt("peak learning rate of AdamW for the extractor", 1e-4)
    resolution: int = opt("side of the images, in px; that of the trained diffusion model, if there is one",
                          by_preset=True)
    feature_resolution: int = opt("side to which the extractor resizes images, in px", by_preset=True)
    resume: bool = opt("go on from the last saved state of this run, if there is one", True)
    log_dir: Path = opt("folder for TensorBoard's events", Path("logs"))

    def __post_init__(self):
        """What can be refused without a file is refused at once: other scripts train for hours before this one."""
        if self.extractor_use_diff and self.objective not in (None, "reconstruction"):
            raise UserError(f"--extractor_use_diff: the same as --objective reconstruction, but --objective "
                            f"{self.objective} is given; expected one of them")
        for name in ("extractor_weight", "extractor_recon_weight", "extractor_patience"):
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name} {getattr(self, name)}: expected at least 0")


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions, ExtractorOptions, ReconstructionOptions):
    """What shapes the adaptation of the extractor."""


def run(options: Options) -> Path:
    """Adapt the extractor, and return the file it is in."""
    length_given = options.epochs_extractor is not None
    options = settled(options, trained_options(options))
    path = extractor_path(options)
    if announce(options, path):
        with writing_run(run_folder(options)):
            adapt(options, length_given)
    return path


def settled(options: Options, trained: Mapping[str, Any]) -> Options:
    """The options with every default filled in; what an extractor could not be made or kept with is a `UserError`."""
    options = resolve(options, trained)
    chosen_layers(options.extractor, options.extractor_layers)
    path = extractor_path(options)
    check_written("extractor_path", path, EXTRACTOR)
    if path.resolve() == (run_folder(options) / options.diffusion_checkpoint_name).resolve():
        raise UserError(f"--extractor_path {path}: has the diffusion model; expected a name such as {EXTRACTOR}")
    return options


def adapt(options: Options, length_given: bool) -> None:
    """Adapt the extractor of a run and save it."""
    folder, path, objective = run_folder(options), extractor_path(options), chosen_objective(options)
    if path.is_file() and not is_extractor(path):
        raise UserError(f"--extractor_path {path}: is there, and no extractor; expected a new name")
    device = pick_device(options.device)
    precision = pick_precision(options.precision, device)
    torch.manual_seed(options.seed)
    extractor = build_extractor(options.extractor, options.extractor_layers, options.feature_resolution)
    category = open_category(options)

    if options.epochs_extractor:
        # Read the good images, those held out apart, and make what each is paired with.
        counterparts = pairing(objective, folder, options, device, precision)
        train, held_out = split_category(category, options.holdout)
        intensity = run_intensity(options, trained_options(options), category.good)
        size = None if options.patching else options.resolution
        images = images_of(read_images(train, size, options.num_workers, intensity), "extractor crop", options)
        data = Pairs(images, counterparts(images))
        images = images_of(read_images(held_out, size, options.num_workers, intensity), "extractor validation crop",
                           options)
        validation = Pairs(images, counterparts(images))
        if not length_given:
            epochs = max(options.epochs_extractor, math.ceil(MIN_STEPS * options.batch_size / len(data)))
            options = replace(options, epochs_extractor=epochs)

        # Train until the held-out loss rises, and keep the best.
        model, loss_of = network_and_loss(objective, extractor, options.extractor_weight, device, precision)
        best = Best(options.extractor_patience)

        def report(model, epoch: int) -> dict[str, float]:
            return held_out_losses(model, validation, loss_of, options.batch_size, device)

        fit(model.to(memory_format=memory_format(device)), data, loss_of,
            plan_of(objective, options, data, validation),
            Place(folder, options.log_dir / options.run_id, "extractor", options.resume),
            batch_size=options.batch_size, device=device, hooks=Hooks(on_report=report, best=best))
        print(outcome(objective, best))
    save_extractor(extractor, path)


def extractor_path(options: Any) -> Path:
    """Where the adapted extractor of the run is kept."""
    return options.extractor_path or run_folder(options) / EXTRACTOR


def chosen_objective(options: ExtractorOptions) -> str:
    """--objective, which --extractor_use_diff may have set in its stead."""
    return options.objective or ("reconstruction" if options.extractor_use_diff else "autoencoder")


def images_of(pixels: list[Tensor], purpose: str, options: Options, crops_per_image: int = 4) -> Tensor:
    """Images as (N, 3, S, S) in [-1, 1]; with --patching some random crops of each."""
    if not options.patching:
        return to_float(torch.stack(pixels))
    streams = [stream(options.seed, purpose, i) for i in range(len(pixels))]
    return to_float(torch.cat([random_crops(pixels, options.resolution, streams) for _ in range(crops_per_image)]))


def pairing(objective: str, folder: Path, options: Options, device: torch.device,
            precision: str) -> Callable[[Tensor], Tensor]:
    """From good images (N, 3, S, S) in [-1, 1] to what each is paired with, likewise.

    With autoencoder that is the image itself, with reconstruction what the trained diffusion model makes of it, with
    ddad another image denoised towards it. None depends on the extractor, so that they are made once.
    """
    if objective == "autoencoder":
        return lambda images: images
    unet = load_unet(folder, options.diffusion_checkpoint_name).to(device, memory_format=memory_format(device))
    process = trained_process(folder)
    conditioning, weight, make = options.conditioning, options.recon_weight, reconstruct_all
    if objective == "ddad":
        conditioning, weight, make = "ddad", options.extractor_recon_weight, denoise_towards
    how = Conditioning(conditioning, weight, options.eta, options.start_at_timestep, options.steps_to_regenerate,
                       options.sampler)
    return partial(make, unet, abar=schedule(process.train_steps, process.beta_schedule), how=how,
                   noise_kind=process.noise_kind, seed=options.seed, batch_size=options.batch_size, device=device,
                   precision=precision)


def plan_of(objective: str, options: Options, data: Pairs, validation: Pairs) -> Plan:
    """The length and speed of the training, and what a resumed run must agree in."""
    steps_per_epoch = -(-len(data) // options.batch_size)
    shaping = ("item", "holdout", "batch_size", "seed", "extractor", "extractor_layers", "feature_resolution",
               "epochs_extractor", "extractor_patience", "extractor_learning_rate", "patching", *OBJECTIVES[objective])
    settings = {name: value for name, value in plain(options).items() if name in shaping} | {
        "objective": objective,
        IMAGES: fingerprint([data.images, data.counterparts, validation.images, validation.counterparts])}
    return Plan(options.epochs_extractor * steps_per_epoch, steps_per_epoch, 1, options.extractor_learning_rate,
                warmup_steps=0, seed=options.seed, settings=settings)


def outcome(objective: str, best: Best) -> str:
    """Which weights are kept, in a line."""
    decoder = "" if objective == "ddad" else " and an untrained decoder"
    before = f"{objective}: held-out loss {best.first:.4g} with the pretrained weights{decoder}"
    stopped = f"; stopped after epoch {best.seen}" if best.exhausted else ""
    if best.epoch == 0:
        return f"{before}, no epoch improved on it, and they are kept{stopped}"
    return f"{before}, {best.loss:.4g} after epoch {best.epoch}, whose weights are kept{stopped}"


if __name__ == "__main__":
    main(Options, lambda options: f"The adapted extractor is {run(options)}", __doc__)
