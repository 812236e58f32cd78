"""The training of the diffusion model: its network, its length, and the pictures it shows on the way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from diffusers.models import UNet2DModel
from torch import Tensor

from dbad.checkpoints.weights import save_weights
from dbad.damage.drawn import Damage
from dbad.data.categories import num_good, split_category
from dbad.data.images import fingerprint, read_images
from dbad.data.intensity import Intensity
from dbad.diffusion.batches import NoisedImages, denoising_loss, validation_loss
from dbad.diffusion.ddim import schedule
from dbad.diffusion.noise import image_stream
from dbad.errors import UserError
from dbad.families.ddim.options import DdimTraining, DiffusionOptions, Reconstruction
from dbad.families.ddim.reconstruct import Denoiser, reconstruct
from dbad.files.names import SAMPLES, epoch_file, epoch_of
from dbad.networks.unet import build_unet
from dbad.options.resolve import name_of, plain, run_folder
from dbad.records import Category
from dbad.runtime.device import Machine, memory_format
from dbad.training.plan import IMAGES, Plan
from dbad.training.samples import write_sheet
from dbad.training.trial import say_forecast

# The options that shape the result, so that a training resumes only under equal ones.
SHAPING = ("item", "holdout", "batch_size", "seed", "patching", "resolution", "channels", "layers_per_block",
           "attention_levels", "epochs_diffusion", "steps_diffusion", "learning_rate", "adam_betas", "warmup_steps",
           "train_steps", "max_timestep", "beta_schedule", "noise_kind", "flip", "rotate", "color_jitter")
LATER = {"prediction": "epsilon", "train_on": "good"}       # shape it too; the runs of before had these values


def new_network(options: DiffusionOptions) -> UNet2DModel:
    """The U-Net that the options describe, with random weights."""
    return build_unet(options.resolution, options.channels, options.layers_per_block, options.attention_levels)


def good_images(options: DdimTraining, category: Category, intensity: Intensity
                ) -> tuple[NoisedImages, NoisedImages]:
    """The good images of a category to train on, varied as the options say, and those held out."""
    size, crop_px = (None, options.resolution) if options.patching else (options.resolution, None)
    train, held_out = (read_images(part, size, options.num_workers, intensity)
                       for part in split_category(category, options.holdout))
    noised = partial(NoisedImages, seed=options.seed, batch_size=options.batch_size, noise_kind=options.noise_kind,
                     num_timesteps=options.reachable, crop_px=crop_px)
    if options.train_on == "damage":
        noised = partial(noised, damage_share=options.damage_share,
                         damage=Damage(options.damage_kinds, whole=crop_px is None))
    return (noised(train, purpose="train", flip=options.flip, rotate=options.rotate, color_jitter=options.color_jitter),
            noised(held_out, purpose="validation"))


def check_epoch(name: str, last: int) -> None:
    """Raise `UserError` if the final weights have the file name of an epoch before the last."""
    epoch = epoch_of(name)
    if epoch is not None and epoch < last:
        raise UserError(f"--diffusion_checkpoint_name {name}: this name is reserved for the weights after epoch "
                        f"{epoch} of {last}; expected another one, such as final.pt")


def report_epoch(denoiser: Denoiser, epoch: int, plan: Plan, validation: NoisedImages, options: DdimTraining,
                 machine: Machine) -> dict[str, float]:
    """Write the weights and the sample pictures of an epoch; the loss on the held-out images, if it is asked for."""
    folder = run_folder(options)
    save_weights(denoiser.unet.state_dict(), folder / epoch_file(epoch, options.diffusion_checkpoint_name))
    rows = samples(denoiser, validation, options, machine, options.seed)
    write_sheet(folder / SAMPLES / f"epoch_{epoch}.png", rows, options.log_dir / name_of(options), "diffusion/samples",
                min(epoch * plan.steps_per_epoch, plan.num_steps))
    if not options.calc_val_loss:
        return {}
    return {"val_loss": validation_loss(validation, lambda batch: denoising_loss(
        denoiser.unet, batch, denoiser.abar, machine.precision, denoiser.prediction), machine.device)}


def samples(denoiser: Denoiser, data: NoisedImages, options: Reconstruction, machine: Machine, seed: int
            ) -> dict[str, Tensor]:
    """Four held-out good images and their reconstructions, (4, 3, S, S) in [-1, 1] each."""
    images = data.__getitems__([(0, slot, slot) for slot in range(min(4, len(data)))])["image"]
    y = images.to(machine.device)
    x = reconstruct(denoiser, y, [image_stream(seed, image) for image in images], options, machine.precision)
    return {"image": y, "reconstruction": x}


def length(options: DdimTraining, num_images: int) -> int:
    """The number of steps of the training on so many images; none at all is a `UserError`."""
    num_steps = options.steps_diffusion
    if num_steps is None:
        num_steps = -(-(options.epochs_diffusion or 0) * num_images // options.batch_size)
    if num_steps == 0:
        raise UserError("--epochs_diffusion 0: nothing to train; use --skip_train for a run that is trained")
    return num_steps


def try_training(options: DdimTraining) -> None:
    """Print how long the training takes; steps are tried on random images."""
    machine, side = Machine.of(options.device, options.precision, options.batch_size), options.resolution
    abar = schedule(options.train_steps, options.beta_schedule)
    data = NoisedImages(list(torch.randint(0, 256, (options.batch_size, 3, side, side), dtype=torch.uint8)),
                        options.seed, "train", options.batch_size, options.noise_kind, options.reachable)
    num_images = 0 if options.steps_diffusion is not None else num_good(options, options.item)

    def loss_of(model, batch) -> dict[str, Tensor]:
        return {"loss": denoising_loss(model, batch, abar, machine.precision, options.prediction)}

    say_forecast("diffusion", new_network(options).to(memory_format=memory_format(machine.device)), data, loss_of,
                 length(options, num_images), device=machine.device)


def plan_of(options: DdimTraining, images: Sequence[Tensor]) -> Plan:
    """The length and speed of the training; options that only say where things are do not bind a resumed run."""
    steps_per_epoch, num_steps = -(-len(images) // options.batch_size), length(options, len(images))
    given = plain(options)
    settings = {name: given[name] for name in SHAPING} | {
        name: given[name] for name, before in LATER.items() if given[name] != before} | {IMAGES: fingerprint(images)}
    if options.train_on == "damage":
        settings |= {name: given[name] for name in ("damage_share", "damage_kinds")}
    return Plan(num_steps, steps_per_epoch, options.save_n_epochs, options.learning_rate, options.warmup_steps,
                options.seed, settings, betas=(options.adam_betas[0], options.adam_betas[1]))
