"""Train a model of the diad family on the good images of many categories, and calibrate it (arXiv:2312.06607).

    python train_diad.py --item all                                   (built-in demo data, a model of build_diad.py)
    python train_diad.py --item all --dataset_path data/mvtec --model checkpoints/diad --run_id mvtec

The training starts from a model of build_diad.py. Images are not augmented, so each is encoded to a latent only once.
All categories are sampled equally often. The SG network and the decoder of the U-Net are trained; a U-Net with random
initial weights is trained as a whole. Unlike in the published training, gradients are clipped to norm 1 and weights are
averaged. --steps_latent 0 only calibrates the model. Next script: inference_diad.py.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dbad.errors import UserError
from dbad.families.diad.options import DiadSettings, DiadTraining, check_foreign
from dbad.files.names import BUILD_OPTIONS, CALIBRATION, DIAD_FILES, MODEL_CONFIG, TRAIN_OPTIONS
from dbad.options.command_line import main
from dbad.options.resolve import announce, plain, resolve, run_folder, run_name


@dataclass(frozen=True, kw_only=True)
class Options(DiadTraining):
    """What shapes a run; saved as train_arg_config.json in its run folder, once it is finished."""


def run(options: Options) -> Path:
    """Train and calibrate; returns the run folder."""
    from dbad.files.locks import writing_run  # these load torch, which reading the command line does without
    options = resolve_all(options)
    folder = run_folder(options)
    if announce(options, *(folder / name for name in (*DIAD_FILES, MODEL_CONFIG, CALIBRATION, TRAIN_OPTIONS))):
        with writing_run(folder):
            train(options, folder)
    return folder


def resolve_all(options: Options) -> Options:
    """The options with every default filled in from the model, the data and the preset, and the categories by name."""
    from dbad.data.categories import chosen_items
    from dbad.families.diad.training import autoencoders, model_to_begin_with
    from dbad.families.runs import keep_intensity, trained_options
    from dbad.inspection.calibrate import check_promises
    from dbad.networks.extractors import chosen_layers
    check_foreign(options)
    model = model_folder(options)
    preset, whole = options.preset, options.train_unet
    if (model / MODEL_CONFIG).is_file() or not options.dry_run:     # a dry run may come before the model
        of_model, learning = model_to_begin_with(model)
        preset, whole = preset or of_model, whole or learning
    options = replace(options, item=chosen_items(options), run_id=run_name(options, "diad"), preset=preset,
                      model=model, train_unet=whole)
    encoder = autoencoders(model)
    if options.intensity not in (None, encoder.get("intensity", options.intensity)):
        raise UserError(f"--intensity {options.intensity}: the auto-encoder of {model} was trained with "
                        f"{encoder['intensity']}; expected the same")
    options = resolve(keep_intensity(options, encoder or begun(options)))
    trained_options(options, "diad")        # refuses a run of another script
    chosen_layers(options.extractor, options.extractor_layers)
    check_promises(options, options.item)
    if run_folder(options).absolute() == model.absolute():
        raise UserError(f"--model {model}: is also the run folder; expected another --run_id, so that the initial "
                        "model is kept")
    return options


def model_folder(options: Options) -> Path:
    """The folder of the model that the training begins with."""
    return options.model or options.diffusion_checkpoint_dir / "diad"


def begun(options: Options) -> dict[str, Any]:
    """The --intensity of the resumed run, see `begun_with`."""
    from dbad.families.runs import begun_with
    return begun_with(options, "diad", "diad")


def train(options: Options, folder: Path) -> None:
    """Train and calibrate a run, unless that is done."""
    import torch

    from dbad.data.categories import category_of
    from dbad.data.depth import run_intensity
    from dbad.families.diad import DIAD, training
    from dbad.families.diad.detector import DiadDetector, extractor_settings
    from dbad.families.diad.storage import load_diad, save_diad
    from dbad.files.atomic import read_json, write_json
    from dbad.inspection.calibrate import begin_files, calibrate_all, finish_files, is_whole
    from dbad.inspection.restoration import save_restoration
    from dbad.networks.extractors import build_extractor
    from dbad.networks.packing import ready
    from dbad.report.results import listing_digest
    from dbad.runtime.device import Machine

    categories = {name: category_of(options, name) for name in options.item}
    names = (*DIAD_FILES, MODEL_CONFIG)
    good = [sample for category in categories.values() for sample in category.good]
    begin = model_folder(options)
    files = [begin / name for name in names] + [sample.path for sample in good]
    record = plain(options) | {"method": "diad", "data": listing_digest(files)}
    if options.resume and is_whole(folder, record, names):
        print(f"{folder} is finished; --no_resume trains it again")
        return
    machine = Machine.of(options.device, options.precision, options.batch_size)
    extractor = build_extractor(options.extractor, options.extractor_layers, options.feature_resolution)
    intensity = run_intensity(options, training.autoencoders(begin) or begun(options), good)
    record |= intensity.settings()

    # The model, and the good images with their latents; a share of each category is never trained on.
    model = load_diad(begin, torch.float32)
    training.make_trainable(model, options, machine)
    latents, validation, held_out = training.encode_categories(model, categories, options, intensity, machine)
    print(f"{sum(len(part.images) for part in latents.values())} good images to train on, "
          f"{sum(map(len, held_out.values()))} held out; {training.millions(model, True):.1f} M of "
          f"{training.millions(model):.1f} M parameters are trained; {machine.device.type}, {machine.precision}")
    training.train_latents(model, latents, validation, options, intensity, machine)
    begin_files(folder, record, ())
    save_diad(model, folder)
    if (begin / BUILD_OPTIONS).is_file():
        write_json(folder / BUILD_OPTIONS, read_json(begin / BUILD_OPTIONS))

    # Thresholds, from held-out images.
    settings = DiadSettings.of(options, **extractor_settings(extractor), **intensity.settings())
    detector = DiadDetector(settings=settings, machine=machine, extractor=extractor,
                            model=ready(model, machine.device, machine.precision))
    save_restoration(folder, detector, sum(held_out.values(), []), options.restoration)
    finish_files(folder, record, calibrate_all(DIAD, lambda name: detector, held_out, options))


if __name__ == "__main__":
    main(Options, lambda options: f"The trained model is in {run(options)}", __doc__)
