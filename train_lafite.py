"""Train LafitE on the good images of one category or of many: features, memory bank, denoiser, discriminator, settings.

    python train_lafite.py --item hazelnut                                        (built-in demo data)
    python train_lafite.py --item screw --dataset_path data/mvtec
    python train_lafite.py --item all --dataset_path data/mvtec                   (one model for all categories)
    python train_lafite.py --item screw --dataset_path data/mvtec --method knn    (the memory bank alone)

Features are extracted once and kept in --feature_cache. Next script: inference_lafite.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dbad.errors import UserError
from dbad.families.lafite.options import (
    FeatureMapOptions,
    FeatureSettings,
    LafiteOptions,
    fixed_settings,
    has_denoiser,
    may_judge,
    of_method,
)
from dbad.files.names import BANK, CALIBRATION, SPACE, TRAIN_OPTIONS
from dbad.options.command_line import main
from dbad.options.resolve import announce, default_preset, plain, resolve, run_folder, run_name

METHODS = ("lafite", "knn")


@dataclass(frozen=True, kw_only=True)
class Options(LafiteOptions):
    """What shapes a run; saved as train_arg_config.json in its run folder, once it is finished."""


def run(options: Options) -> Path:
    """Train, tune and calibrate; returns the run folder."""
    from dbad.families.lafite.lessons import judge_file  # these load torch
    from dbad.families.lafite.training import try_training
    from dbad.files.locks import writing_run
    from dbad.inspection.calibrate import with_thresholds
    given = sorted(field.name for field in fields(FeatureMapOptions) if getattr(options, field.name) is not None)
    options = resolve_all(options)
    folder = run_folder(options)
    writes = [SPACE, BANK, CALIBRATION, TRAIN_OPTIONS]
    writes += [options.diffusion_checkpoint_name] * has_denoiser(options.method)
    writes += [judge_file(name) for name in with_thresholds(options.item)] * may_judge(options, given)
    writes += trials_of(options)
    if announce(options, *(folder / name for name in writes)):
        with writing_run(folder):
            train(options, given, folder)
    elif has_denoiser(options.method):
        try_training(options)
    return folder


def resolve_all(options: Options) -> Options:
    """The options with every default filled in, and the categories by name."""
    import torch

    from dbad.data.categories import chosen_items
    from dbad.families.lafite.training import default_layers, new_network
    from dbad.families.registry import FAMILIES
    from dbad.families.runs import keep_intensity, trained_options
    from dbad.inspection.calibrate import check_promises
    from dbad.networks.extractors import chosen_layers
    if options.patching:
        raise UserError("--patching: features are taken from whole images; expected --no_patching")
    method = options.method or METHODS[0]
    preset = options.preset or default_preset(options.dataset_path, options.device, FAMILIES[method].on_gpu)
    options = replace(of_method(options, method), item=chosen_items(options), run_id=run_name(options, method),
                      preset=preset, tune=options.tune is not False, method=method)
    options = resolve(keep_intensity(options, begun(options)))
    trained_options(options, *METHODS)      # refuses a run of another script
    chosen_layers(options.extractor, options.extractor_layers or default_layers(options.extractor))
    check_promises(options, options.item)
    with torch.device("meta"):
        new_network(options, options.components)    # refuses channels and grids that do not fit
    return options


def begun(options: Options) -> dict[str, Any]:
    """The --intensity of the resumed run, see `begun_with`."""
    from dbad.families.runs import begun_with
    return begun_with(options, "features", *METHODS)


def train(options: Options, given: Sequence[str], folder: Path) -> None:
    """Train, tune and calibrate a run, unless that is done; `given` are the settings that the search leaves alone."""
    from dbad.data.categories import category_of
    from dbad.data.depth import run_intensity
    from dbad.families.lafite import model as lafite
    from dbad.families.lafite.lessons import learn_from_damage
    from dbad.families.lafite.run_folder import save_run
    from dbad.families.lafite.training import build_detector
    from dbad.families.registry import FAMILIES
    from dbad.inspection.calibrate import PLACED, begin_files, calibrate_all, finish_files, is_whole
    from dbad.report.results import listing_digest
    from dbad.runtime.device import Machine

    samples = [sample for name in options.item for sample in category_of(options, name).good]
    record = plain(options) | {"given": given, "data": listing_digest(sample.path for sample in samples),
                               "hidden_blocks": list(lafite.HIDDEN)}    # discriminators by others are taught again
    if options.resume and is_whole(folder, record, (SPACE, BANK), PLACED | {"feature_cache"}):
        print(f"{folder} is finished; --no_resume trains it again")
        return
    machine = Machine.of(options.device, options.precision, options.batch_size)
    intensity = run_intensity(options, begun(options), samples)
    record |= intensity.settings()

    # Features, memory bank and denoiser; then what damaged good images teach.
    settings = FeatureSettings.of(options, discriminator="", **intensity.settings())
    detector, good = build_detector(options, settings, machine)
    learnt = learn_from_damage(detector, good, fixed_settings(options, given), may_judge(options, given),
                               options.tune_minutes if options.tune else None, options.bank_mb, folder)

    # Thresholds; then all files, so that those of the run before serve until then.
    held_out = {name: part.held_out for name, part in good.items()}
    thresholds = calibrate_all(FAMILIES[options.method], lambda name: learnt.detector(detector, name), held_out,
                               options)
    begin_files(folder, record, [*learnt.files(), *trials_of(options)])
    save_run(folder, detector, learnt.files())
    finish_files(folder, record, thresholds)


def trials_of(options: Options) -> list[str]:
    """The names of the files with the trials."""
    from dbad.families.lafite.lessons import trials_file
    return [trials_file(name, options.item) for name in options.item] * bool(options.tune)


if __name__ == "__main__":
    main(Options, lambda options: f"The trained model is in {run(options)}", __doc__)
