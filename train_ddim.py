"""Train the denoising U-Net on the good images of one category.

    python train_ddim.py --item hazelnut                                          (built-in demo data)
    python train_ddim.py --item screw --dataset_path data/mvtec --preset small
"""

from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dbad.families.ddim.options import DdimTraining
from dbad.files.names import LAST, MODEL_CONFIG, TRAIN_OPTIONS
from dbad.options.command_line import main
from dbad.options.resolve import announce, name_of, plain, resolve, run_folder, subset


@dataclass(frozen=True, kw_only=True)
class Options(DdimTraining):
    """What shapes a training run; saved as train_arg_config.json in its run folder."""


def run(options: Options) -> Path:
    """Train, and return the run folder."""
    from dbad.families.ddim.training import try_training  # these load torch, which the command line does without
    from dbad.files.locks import writing_run
    options = resolve_all(options)
    folder = run_folder(options)
    if announce(options, folder / options.diffusion_checkpoint_name, folder / MODEL_CONFIG, folder / TRAIN_OPTIONS):
        with writing_run(folder):
            train(options, folder)
    else:
        try_training(options)
    return folder


def resolve_all(options: Options) -> Options:
    """The options with every default filled in; a training that was stopped goes on with the preset that it had."""
    import torch

    from dbad.families.ddim.training import new_network
    from dbad.families.runs import keep_intensity, trained_options
    before = trained_options(options, "ddim")       # refuses a run of another script
    if options.resume and before.get("dataset_path") == plain(options)["dataset_path"] and (
            run_folder(options) / LAST).is_file():
        options = replace(options, preset=options.preset or before.get("preset"))
    options = resolve(keep_intensity(options, begun(options)))
    with torch.device("meta"):
        new_network(options)        # refuses channels and sizes that do not fit
    return options


def begun(options: Options) -> dict[str, Any]:
    """The --intensity of the resumed run, see `begun_with`."""
    from dbad.families.runs import begun_with
    return begun_with(options, "diffusion", "ddim")


def train(options: Options, folder: Path) -> None:
    """Train the U-Net of a run, or what is left to train of it."""
    import torch
    from torch import Tensor

    from dbad.checkpoints.weights import model_config, save_weights
    from dbad.data.categories import open_category
    from dbad.data.depth import run_intensity
    from dbad.diffusion.batches import denoising_loss
    from dbad.diffusion.ddim import schedule
    from dbad.families.ddim.reconstruct import Denoiser
    from dbad.families.ddim.training import check_epoch, good_images, new_network, plan_of, report_epoch
    from dbad.files.atomic import write_json
    from dbad.runtime.device import Machine, memory_format
    from dbad.training.loop import fit
    from dbad.training.plan import Hooks, Place

    machine = Machine.of(options.device, options.precision, options.batch_size)
    torch.manual_seed(options.seed)
    unet = new_network(options)

    # Read the good images; a share of them is never trained on.
    category = open_category(options)
    intensity = run_intensity(options, begun(options), category.good)
    data, validation = good_images(options, category, intensity)
    print(f"{len(data)} good images to train on, {len(validation)} held out; "
          f"{sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters; {machine.device.type}, "
          f"{machine.precision}")

    # Train.
    plan = plan_of(options, data.images)
    check_epoch(options.diffusion_checkpoint_name, -(-plan.num_steps // plan.steps_per_epoch))
    abar = schedule(options.train_steps, options.beta_schedule)

    def begin() -> None:
        """Write the options that later scripts read."""
        write_json(folder / MODEL_CONFIG, model_config(unet))
        write_json(folder / TRAIN_OPTIONS, plain(options) | intensity.settings() | {"method": "ddim"})

    def loss_of(model, batch) -> dict[str, Tensor]:
        return {"loss": denoising_loss(model, batch, abar, machine.precision, options.prediction)}

    def report(model, epoch: int) -> dict[str, float]:
        denoiser = Denoiser(model, abar, options.noise_kind, prediction=options.prediction)
        return report_epoch(denoiser, epoch, plan, validation, options, machine)

    unet = fit(unet.to(memory_format=memory_format(machine.device)), data, loss_of, plan,
               Place(folder, options.log_dir / name_of(options), "diffusion", options.resume, options.yes),
               batch_size=options.batch_size, device=machine.device, hooks=Hooks(begin, report))
    save_weights(unet.state_dict(), folder / options.diffusion_checkpoint_name)


def check_phase(options: Options, trained: dict[str, Any], skipped: Set[str]) -> dict[str, Any]:
    """The training options that later phases of train_tune_eval.py find; options that fail here are a `UserError`."""
    from dbad.checkpoints.weights import check_trained
    from dbad.families.runs import trained_options
    if "train_ddim" not in skipped:
        return plain(resolve_all(subset(Options, options)))
    if not (skipped >= {"evaluation", "inference_ddim"} or options.dry_run):
        check_trained(run_folder(options))
    return trained_options(options, "ddim")


if __name__ == "__main__":
    main(Options, lambda options: f"The trained model is in {run(options)}", __doc__)
