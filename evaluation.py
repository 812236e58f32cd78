"""Tune a trained run on good images only: measure the scales of its maps and set its thresholds.

The good images are the held-out share of train/good. The result is calibration.json in the run folder.

    python evaluation.py --item hazelnut
    python evaluation.py --item screw --dataset_path data/mvtec --pixel_quantile 0.995
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbad.calibration.digests import digests
from dbad.calibration.thresholds import Calibration, calibrate
from dbad.checkpoints.trained import trained_process
from dbad.data.depth import run_intensity
from dbad.data.images import Sample, open_category, random_crops, read_images, some_of, split_category, to_float
from dbad.diffusion.noise import stream
from dbad.families.ddim.normalise import save_normalisation
from dbad.families.ddim.search import Search, normalisation_of, pseudo_validation, write_trials
from dbad.families.detector import DdimDetector, build_ddim, detector_settings
from dbad.files.atomic import read_json, write_json
from dbad.files.locks import writing_run
from dbad.files.names import CALIBRATION, EXTRACTOR, NORMALISATION, TUNED, TUNING
from dbad.inspection.calibrate import check_promises
from dbad.inspection.loop import walk
from dbad.options.command_line import (
    SETTING_NAMES,
    MapOptions,
    ReconstructionOptions,
    RunOptions,
    announce,
    main,
    opt,
    resolve,
    run_folder,
    trained_options,
)
from dbad.options.declared import check_declared, check_types
from dbad.options.setting_types import setting_types
from dbad.report.results import listed
from dbad.runtime.device import pick_device, pick_precision


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Thresholds from good images."""

    extractor_path: Path | None = opt("file of the adapted extractor (extractor.pt in the run folder)", None,
                                      aliases=["--save_to"])
    pixel_quantile: float = opt("share of good pixels below the scales of the maps and the pixel threshold", 0.999)
    false_alarm_rate: float | None = opt(
        "promised share of good images called defective (0.05, or what the held-out images can promise)", None)
    tune: bool | None = opt("choose the settings that are not given by pseudo-anomalies on good images; with --no_tune "
                            "the preset's are taken, otherwise those chosen before (train_tune_eval.py: always chosen)",
                            None)
    tune_minutes: float = opt("stop tuning after so many minutes, with the best settings so far", 30.0)


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions, CalibrationOptions, ReconstructionOptions, MapOptions):
    """What shapes the calibration; it is saved with it."""


def run(options: Options) -> Path:
    """Calibrate, and return the file it is saved in."""
    given = {name for name in SETTING_NAMES if getattr(options, name) is not None}
    options = settled(options, trained_options(options))
    folder = run_folder(options)
    path = folder / CALIBRATION
    if announce(options, path, *[folder / TUNING, folder / TUNED] * bool(options.tune)):
        with writing_run(folder):
            measure(options, folder, given).save(path)
    return path


def settled(options: Options, trained: Mapping[str, Any]) -> Options:
    """The options with every default filled in; a promise that the held-out images cannot make is a `UserError`."""
    options = resolve(options, trained)
    check_promises(options, [options.item])
    return options


def measure(options: Options, folder: Path, given: set[str]) -> Calibration:
    """The calibration of a run; the settings that are not `given` are chosen before, if that is asked for."""
    # Build the detector; choose its settings, if that is asked for.
    device = pick_device(options.device)
    extractor = options.extractor_path or folder / EXTRACTOR
    category = open_category(options)
    intensity = run_intensity(options, trained_options(options), category.good)
    settings = detector_settings(options, extractor, intensity)
    if options.tune is None:
        settings |= tuned_before(folder, settings, given)
    detector = build_ddim(folder, options.diffusion_checkpoint_name, settings, device,
                          pick_precision(options.precision, device), options.batch_size)
    train, held_out = split_category(category, options.holdout)
    if options.tune:
        settings |= tune(detector, train, options, given)
        write_json(folder / TUNED, {"settings": settings, "digests": digests(folder, settings | {"map_norm": "none"})})

    # What good images show everywhere, and then how different they get.
    if detector.maps.map_norm != "none":
        reference = detector.differences(network_images(detector, some_of(train[1::2])))
        detector.normalisation = normalisation_of(detector.maps, reference)
    parts = [parts for _, parts in walk(detector, held_out, options.num_workers, "calibrating")]
    calibration = calibrate(detector.combine, parts, options.pixel_quantile, options.false_alarm_rate,
                            options.center_crop, [sample.path for sample in held_out])
    if detector.normalisation is not None:
        save_normalisation(detector.normalisation, folder / NORMALISATION)
    print(f"{len(calibration.scores)} held-out good images: an image is called defective from a score of "
          f"{calibration.image_threshold:.4g}, which promises at most {calibration.false_alarm_rate:.1%} false alarms; "
          f"a pixel from {calibration.pixel_threshold:.4g}")
    return replace(calibration, settings=settings, digests=digests(folder, settings))


def tune(detector: DdimDetector, train: Sequence[Sample], options: Options, given: set[str]) -> dict[str, Any]:
    """Choose the settings that were not given, by pseudo-anomalies on good images; sets the detector to them.

    The images are those of the training: settings that are chosen on the held-out ones suit these better than new
    ones, and the false-alarm rate that they then promise is not kept.
    """
    good, reference = some_of(train[::2]), some_of(train[1::2])
    images = pseudo_validation(network_images(detector, good), [sample.path.name for sample in good],
                               network_images(detector, reference), options.seed)
    search = Search(detector, images, given, options.tune_minutes, trained_process(run_folder(options)).reachable)
    best = search.run()
    write_trials(run_folder(options), search.trials, best)
    first = search.trials[0]
    changes = {name: value for name, value in best.settings().items() if value != first.settings()[name]}
    print(f"tuned on {len(images.pseudo)} pseudo-anomalies{' until --tune_minutes' * search.stopped}: AUPRO "
          f"{first.aupro:.3f} -> {best.aupro:.3f}, image AUROC {first.auroc:.3f} -> {best.auroc:.3f} with "
          f"{listed(changes)}")
    return best.settings()


def tuned_before(folder: Path, settings: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """The settings that --tune has chosen for these weights, but for those that are given; empty if it has not."""
    if not (folder / TUNED).is_file():
        return {}
    known = read_json(folder / TUNED)
    check_types(known, {"settings": dict[str, Any], "digests": dict[str, str]}, folder / TUNED, ("settings", "digests"))
    check_declared(known["settings"], setting_types("ddim"), folder / TUNED)
    now = digests(folder, settings | {"map_norm": "none"})
    if not known["digests"] or {**now, **known["digests"]} != now:      # older ones have fewer
        print(f"{folder / TUNED} belongs to other weights; the preset's settings are taken")
        return {}
    print(f"settings as chosen before ({folder / TUNED}); --tune chooses again, --no_tune takes the preset's")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in known["settings"].items()
            if name in SETTING_NAMES - given - {"extractor_path"}}


def network_images(detector: DdimDetector, samples: Sequence[Sample]) -> Tensor:
    """The images at the network's size, (N, 3, S, S) in [-1, 1]; where it works in tiles, a random crop of each."""
    pixels = read_images(samples, None if detector.patching else detector.size, intensity=detector.intensity)
    if not detector.patching:
        return to_float(torch.stack(pixels))
    return to_float(random_crops(pixels, detector.size, [stream(0, "tuning", s.path.name) for s in samples]))


if __name__ == "__main__":
    main(Options, lambda options: f"The calibration is in {run(options)}", __doc__)
