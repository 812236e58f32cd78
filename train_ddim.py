"""Train the denoising U-Net on the good images of one category.

    python train_ddim.py --item hazelnut                                          (built-in demo data)
    python train_ddim.py --item screw --dataset_path data/mvtec --preset small
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from PIL import Image
from torch import Tensor

from dbad.checkpoints.trained import ProcessOptions
from dbad.checkpoints.weights import build_unet, model_config, save_weights
from dbad.data.categories import open_category, split_category
from dbad.data.depth import begun_with, keep_intensity, run_intensity
from dbad.data.images import fingerprint, read_images, to_pixels
from dbad.diffusion.batches import NoisedImages, denoising_loss, validation_loss
from dbad.diffusion.ddim import Conditioning, reconstruct, schedule
from dbad.diffusion.noise import image_stream
from dbad.errors import UserError
from dbad.files.atomic import atomic_write, write_json
from dbad.files.locks import writing_run
from dbad.files.names import LAST, MODEL_CONFIG, SAMPLES, TRAIN_OPTIONS, epoch_file, epoch_of
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
from dbad.training.loop import fit
from dbad.training.plan import IMAGES, Hooks, Place, Plan


@dataclass(frozen=True, kw_only=True)
class DiffusionOptions(ProcessOptions):
    """Training of the diffusion model."""

    resolution: int = opt("side of the network's input, in px; images are resized, or cropped with --patching",
                          by_preset=True)
    channels: tuple[int, ...] = opt("channels of the U-Net at each resolution, the full one first", by_preset=True)
    layers_per_block: int = opt("residual layers at each resolution", by_preset=True)
    attention_levels: tuple[int, ...] = opt("resolutions with self-attention, 0 being the full one", by_preset=True)
    epochs_diffusion: int | None = opt("length of the training in epochs", by_preset=True, aliases=["--epochs"])
    steps_diffusion: int | None = opt("length of the training in optimiser steps, instead of epochs", by_preset=True)
    learning_rate: float = opt("peak learning rate of AdamW", by_preset=True)
    adam_betas: tuple[float, ...] = opt("AdamW's decay rates of the mean gradient and of its square", by_preset=True)
    warmup_steps: int = opt("steps in which the learning rate rises, at most a tenth of all; then it falls as a cosine",
                            by_preset=True)
    flip: bool = opt("mirror training images at random", False)
    rotate: float = opt("turn training images at random, up to so many degrees", 0.0)
    color_jitter: float = opt("change brightness, contrast and saturation at random, up to this share", 0.0)
    save_n_epochs: int = opt("epochs between checkpoints, validations and sample pictures", by_preset=True)
    calc_val_loss: bool = opt("measure the loss on the held-out good images at every checkpoint", True)
    resume: bool = opt("go on from the last saved state of this run, if there is one", True)
    log_dir: Path = opt("folder for TensorBoard's events", Path("logs"))


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions, DiffusionOptions, ReconstructionOptions):
    """What shapes a training run; saved as train_arg_config.json in its run folder."""


def run(options: Options) -> Path:
    """Train, and return the run folder."""
    options = settled(options)
    folder = run_folder(options)
    if announce(options, folder / options.diffusion_checkpoint_name, folder / MODEL_CONFIG, folder / TRAIN_OPTIONS):
        with writing_run(folder):
            train(options, folder)
    return folder


def settled(options: Options) -> Options:
    """The options with every default filled in; a training that was stopped goes on with the preset that it had."""
    before = trained_options(options)       # refuses a run of another script
    if options.resume and before.get("dataset_path") == plain(options)["dataset_path"] and (
            run_folder(options) / LAST).is_file():
        options = replace(options, preset=options.preset or before.get("preset"))
    options = resolve(keep_intensity(options, begun(options)))
    with torch.device("meta"):
        new_network(options)        # refuses channels and sizes that do not fit
    return options


def begun(options: Options) -> dict[str, Any]:
    """The --intensity of the run that is gone on with, see `begun_with`."""
    return begun_with(options, "train_ddim.py", "diffusion")


def new_network(options: Options) -> UNet2DModel:
    """The U-Net that the options describe, with random weights."""
    return build_unet(options.resolution, options.channels, options.layers_per_block, options.attention_levels)


def train(options: Options, folder: Path) -> None:
    """Train the U-Net of a run, or what is left to train of it."""
    device = pick_device(options.device)
    precision = pick_precision(options.precision, device)
    torch.manual_seed(options.seed)
    unet = new_network(options)

    # Read the good images; a share of them is never trained on.
    category = open_category(options)
    good, held_out = split_category(category, options.holdout)
    intensity = run_intensity(options, begun(options), category.good)
    size = None if options.patching else options.resolution
    noised = dict(seed=options.seed, batch_size=options.batch_size, noise_kind=options.noise_kind,
                  num_timesteps=options.reachable,
                  crop_px=options.resolution if options.patching else None)
    data = NoisedImages(read_images(good, size, options.num_workers, intensity), purpose="train", flip=options.flip,
                        rotate=options.rotate, color_jitter=options.color_jitter, **noised)
    validation = NoisedImages(read_images(held_out, size, options.num_workers, intensity), purpose="validation",
                              **noised)
    print(f"{len(good)} good images to train on, {len(held_out)} held out; "
          f"{sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters; {device.type}, {precision}")

    # Train.
    plan = plan_of(options, data.images)
    check_epoch(options.diffusion_checkpoint_name, -(-plan.num_steps // plan.steps_per_epoch))
    abar = schedule(options.train_steps, options.beta_schedule)

    def begin() -> None:
        """What later scripts read instead of asking again."""
        write_json(folder / MODEL_CONFIG, model_config(unet))
        write_json(folder / TRAIN_OPTIONS, plain(options) | intensity.settings())

    def loss_of(model, batch) -> dict[str, Tensor]:
        return {"loss": denoising_loss(model, batch, abar, precision)}

    def report(model, epoch: int) -> dict[str, float]:
        save_weights(model.state_dict(), folder / epoch_file(epoch, options.diffusion_checkpoint_name))
        write_samples(folder / SAMPLES / f"epoch_{epoch}.png", model, validation, abar, options, device, precision)
        if not options.calc_val_loss:
            return {}
        return {"val_loss": validation_loss(
            validation, lambda batch: denoising_loss(model, batch, abar, precision), device)}

    unet = unet.to(memory_format=memory_format(device))
    place = Place(folder, options.log_dir / options.run_id, "diffusion", options.resume)
    unet = fit(unet, data, loss_of, plan, place, batch_size=options.batch_size, device=device,
               hooks=Hooks(begin, report))
    save_weights(unet.state_dict(), folder / options.diffusion_checkpoint_name)


def check_epoch(name: str, last: int) -> None:
    """Raise `UserError` for final weights that are called like those of an epoch before the last one."""
    epoch = epoch_of(name)
    if epoch is not None and epoch < last:
        raise UserError(f"--diffusion_checkpoint_name {name}: the weights after epoch {epoch} of {last} are called so; "
                        "expected another name, such as final.pt")


def write_samples(path: Path, model, data: NoisedImages, abar: Tensor, options: Options, device: torch.device,
                  precision: str, count: int = 4) -> None:
    """Held-out good images above their reconstructions, as one picture."""
    images = data.__getitems__([(0, slot, slot) for slot in range(min(count, len(data)))])["image"]
    y = images.to(device)
    how = Conditioning(options.conditioning, options.recon_weight, options.eta, options.start_at_timestep,
                       options.steps_to_regenerate, options.sampler)
    streams = [image_stream(options.seed, image) for image in images]
    x = reconstruct(model, y, streams, abar, how, options.noise_kind, precision)
    rows = [torch.cat(list(row.cpu()), dim=2) for row in (y, x)]
    with atomic_write(path) as temporary:
        Image.fromarray(to_pixels(torch.cat(rows, dim=1))).save(temporary)


def plan_of(options: Options, images: Sequence[Tensor]) -> Plan:
    """The length and speed of the training; options that only say where things are do not bind a resumed run."""
    num_images = len(images)
    steps_per_epoch = -(-num_images // options.batch_size)
    num_steps = options.steps_diffusion
    if num_steps is None:
        num_steps = -(-options.epochs_diffusion * num_images // options.batch_size)
    if num_steps == 0:
        raise UserError("--epochs_diffusion 0: nothing to train; use --skip_train to go on with a trained model")
    shaping = ("item", "holdout", "batch_size", "seed", "patching", "resolution", "channels", "layers_per_block",
               "attention_levels", "epochs_diffusion", "steps_diffusion", "learning_rate", "adam_betas",
               "warmup_steps", "train_steps", "max_timestep", "beta_schedule", "noise_kind", "flip", "rotate",
               "color_jitter")
    settings = {name: value for name, value in plain(options).items() if name in shaping} | {
        IMAGES: fingerprint(images)}
    return Plan(num_steps, steps_per_epoch, options.save_n_epochs, options.learning_rate, options.warmup_steps,
                options.seed, settings, betas=tuple(options.adam_betas))


if __name__ == "__main__":
    main(Options, lambda options: f"The trained model is in {run(options)}", __doc__)
