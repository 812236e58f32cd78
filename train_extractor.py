"""Adapt the feature extractor to one category.

The pretrained network is trained on the good images with one of three objectives (--objective). The loss on the
held-out good images decides when to stop and which epoch is kept.

    python train_extractor.py --item hazelnut
    python train_extractor.py --item screw --dataset_path data/mvtec --objective ddad --epochs_extractor 8
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dbad.errors import UserError
from dbad.families.ddim.options import DdimAdaptation
from dbad.files.names import EXTRACTOR, check_written
from dbad.options.command_line import main
from dbad.options.resolve import announce, name_of, resolve, run_folder, subset


@dataclass(frozen=True, kw_only=True)
class Options(DdimAdaptation):
    """What shapes the adaptation of the extractor."""


def run(options: Options) -> Path:
    """Adapt the extractor, and return the file it is in."""
    from dbad.families.ddim.adaptation import try_training  # these load torch, which the command line does without
    from dbad.families.runs import trained_options
    from dbad.files.locks import writing_run
    length_given = options.epochs_extractor is not None
    options = resolve_all(options, trained_options(options, "ddim"))
    path = extractor_path(options)
    if announce(options, path):
        with writing_run(run_folder(options)):
            adapt(options, length_given)
    else:
        try_training(options, length_given)
    return path


def resolve_all(options: Options, trained: Mapping[str, Any]) -> Options:
    """The options with every default filled in.

    An extractor that cannot be built, or a path that it cannot be saved to, is a `UserError`.
    """
    from dbad.networks.extractors import chosen_layers
    options = resolve(options, trained)
    chosen_layers(options.extractor, options.extractor_layers)
    path = extractor_path(options)
    check_written("extractor_path", path, EXTRACTOR)
    if path.resolve() == (run_folder(options) / options.diffusion_checkpoint_name).resolve():
        raise UserError(f"--extractor_path {path}: contains the diffusion model; expected a name such as {EXTRACTOR}")
    return options


def adapt(options: Options, length_given: bool) -> None:
    """Adapt the extractor of a run and save it."""
    import torch

    from dbad.data.categories import open_category
    from dbad.data.depth import run_intensity
    from dbad.families.ddim import adaptation
    from dbad.families.ddim.adaptation import chosen_objective, good_images, outcome, pairing, plan_of
    from dbad.families.ddim.objectives import Pairs, held_out_losses, network_and_loss
    from dbad.families.runs import trained_options
    from dbad.networks.extractors import build_extractor, is_extractor, save_extractor
    from dbad.runtime.device import Machine, memory_format
    from dbad.training.early_stopping import Best
    from dbad.training.loop import fit
    from dbad.training.plan import Hooks, Place

    path, objective = extractor_path(options), chosen_objective(options)
    if path.is_file() and not is_extractor(path):
        raise UserError(f"--extractor_path {path}: exists and is not an extractor; expected a new name")
    machine = Machine.of(options.device, options.precision, options.batch_size)
    torch.manual_seed(options.seed)
    extractor = build_extractor(options.extractor, options.extractor_layers, options.feature_resolution)
    category = open_category(options)

    if options.epochs_extractor:
        # Read the good images, those held out apart, and make their counterparts.
        counterparts = pairing(objective, options, machine)
        intensity = run_intensity(options, trained_options(options, "ddim"), category.good)
        data, validation = (Pairs(images, counterparts(images))
                            for images in good_images(category, options, intensity))
        if not length_given:
            options = replace(options, epochs_extractor=adaptation.enough_epochs(options, len(data)))

        # Train until the held-out loss rises, and keep the best.
        model, loss_of = network_and_loss(objective, extractor, options.extractor_weight, *machine[:2])
        best = Best(options.extractor_patience)

        def report(model, epoch: int) -> dict[str, float]:
            return held_out_losses(model, validation, loss_of, options.batch_size, machine.device)

        fit(model.to(memory_format=memory_format(machine.device)), data, loss_of,
            plan_of(objective, options, data, validation),
            Place(run_folder(options), options.log_dir / name_of(options), "extractor", options.resume, options.yes),
            batch_size=options.batch_size, device=machine.device, hooks=Hooks(on_report=report, best=best))
        print(outcome(objective, best))
    save_extractor(extractor, path)


def extractor_path(options: Options) -> Path:
    """The file of the run's adapted extractor."""
    return options.extractor_path or run_folder(options) / EXTRACTOR


def check_phase(options: Options, trained: dict[str, Any], skipped: Set[str]) -> dict[str, Any]:
    """See train_ddim.check_phase; adds the number of layers that the extractor has, where that is known."""
    from dbad.networks.extractors import build_extractor, chosen_layers, load_extractor
    path = extractor_path(options)
    if "train_extractor" not in skipped:
        resolve_all(subset(Options, options), trained)
        layers = chosen_layers(options.extractor, options.extractor_layers)
        if not options.dry_run:
            build_extractor(options.extractor, layers)      # its weights may have to be downloaded
    else:
        layers = load_extractor(path).layers if path.is_file() or not options.dry_run else ()
    return trained | {"num_layers": len(layers)}


if __name__ == "__main__":
    main(Options, lambda options: f"The adapted extractor is {run(options)}", __doc__)
