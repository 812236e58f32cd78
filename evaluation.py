"""Tune a trained run on good images only: measure the scales of its maps and set its thresholds.

The good images are the held-out share of train/good. The result is calibration.json in the run folder; an earlier one
with other contents is kept as calibration.1.json.

    python evaluation.py --item hazelnut
    python evaluation.py --item screw --dataset_path data/mvtec --pixel_quantile 0.995
"""

import os
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbad.families.ddim.options import AdaptedExtractor, DdimSettings, GivenThresholds, MapOptions, Reconstruction
from dbad.fields import fields_of
from dbad.files.names import CALIBRATION, EXTRACTOR, NORMALISATION, TUNED, TUNING
from dbad.options.command_line import main
from dbad.options.resolve import announce, resolve, run_folder, subset
from dbad.options.shared import RestorationOption, RunOptions, ThresholdOptions, TuneOptions

if TYPE_CHECKING:
    from dbad.calibration.thresholds import Calibration


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions, ThresholdOptions, RestorationOption, AdaptedExtractor, TuneOptions, Reconstruction,
              MapOptions):
    """What shapes the calibration; it is saved with it."""


def run(options: Options) -> Path:
    """Calibrate, and return the file it is saved in."""
    from dbad.families.runs import trained_options  # these load torch, which reading the command line does without
    from dbad.files.locks import writing_run
    from dbad.inspection.calibrate import keeping_earlier
    given = {name for name in fields_of(DdimSettings) if getattr(options, name) is not None}
    options = resolve_all(options, trained_options(options, "ddim"))
    folder = run_folder(options)
    path = folder / CALIBRATION
    if announce(options, path, *[folder / TUNING, folder / TUNED] * bool(options.tune)):
        with writing_run(folder):
            calibration = measure(options, folder, given)
            with keeping_earlier(path):
                calibration.save(path)
    return path


def resolve_all(options: Options, trained: Mapping[str, Any]) -> Options:
    """The options with every default filled in; a promise that the held-out images cannot make is a `UserError`."""
    from dbad.inspection.calibrate import check_promises
    options = resolve(options, trained)
    check_promises(options, [options.item])
    return options


def measure(options: Options, folder: Path, given: set[str]) -> "Calibration":
    """The calibration of a run; with --tune, the settings that are not `given` are chosen first."""
    from dbad.data.categories import open_category, split_category
    from dbad.data.depth import run_intensity
    from dbad.families.ddim import DDIM
    from dbad.families.ddim.detector import open_ddim
    from dbad.families.ddim.normalise import save_normalisation
    from dbad.families.ddim.search import normalisation_of
    from dbad.families.ddim.tuning import reference_of, save_tuned, tune, tuned_before
    from dbad.families.digests import digests
    from dbad.families.runs import trained_options
    from dbad.families.search import network_images
    from dbad.inspection.calibrate import calibrate_all
    from dbad.inspection.restoration import save_restoration
    from dbad.runtime.device import Machine

    # Build the detector; choose its settings, if that is asked for.
    category = open_category(options)
    intensity = run_intensity(options, trained_options(options, "ddim"), category.good)
    path = Path(os.path.relpath(options.extractor_path or folder / EXTRACTOR, folder))
    settings = DdimSettings.of(options, extractor_path=path, **intensity.settings())
    if options.tune is None:
        settings = tuned_before(folder, settings, given)
    machine = Machine.of(options.device, options.precision, options.batch_size)
    detector = open_ddim(folder, settings, machine, measured=False)
    train, held_out = split_category(category, options.holdout)
    if options.tune:
        detector = replace(detector, settings=tune(detector, train, given, options.tune_minutes, folder))
        save_tuned(folder, detector.settings)

    # What good images show everywhere, and then how different they get.
    if detector.settings.map_norm != "none":
        reference = detector.differences(network_images(detector, reference_of(train)))
        if normalisation := normalisation_of(detector.settings, reference):
            detector = replace(detector, normalisation=normalisation)
            save_normalisation(normalisation, folder / NORMALISATION)
    calibration = calibrate_all(DDIM, lambda name: detector, {options.item: held_out}, options)[None]
    save_restoration(folder, detector, held_out, options.restoration)
    return replace(calibration, digests=digests(folder, DDIM, detector.settings))


class Chained(Options, GivenThresholds):
    """The options of all phases."""


def in_chain(options: Chained, skipped: Set[str]) -> Chained:
    """The options as train_tune_eval.py means them: it tunes if not told otherwise, and calibrates the thresholds."""
    if "evaluation" not in skipped and (options.pxl_threshold or options.feature_threshold):
        print("--pxl_threshold and --feature_threshold are not used: calibration measures them; --skip_threshold uses "
              "them")
    if "evaluation" not in skipped:
        options = replace(options, pxl_threshold=None, feature_threshold=None)
    return replace(options, tune=options.tune is not False)


def check_phase(options: Options, trained: dict[str, Any], skipped: Set[str]) -> dict[str, Any]:
    """See train_ddim.check_phase."""
    from dbad.families.ddim.detector import check_layer_weights
    if "evaluation" not in skipped:
        settings = resolve_all(subset(Options, options), trained)
        if trained["num_layers"]:
            path = options.extractor_path or run_folder(options) / EXTRACTOR
            check_layer_weights(settings.layer_weights, trained["num_layers"], path)
    return trained


if __name__ == "__main__":
    main(Options, lambda options: f"The calibration is in {run(options)}", __doc__)
