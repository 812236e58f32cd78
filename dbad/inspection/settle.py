"""The settings in force when a calibrated run inspects images."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any, TypeVar

from dbad.calibration.digests import check_digests
from dbad.calibration.thresholds import Calibration, load_calibration
from dbad.checkpoints.trained import learnt_categories
from dbad.data.intensity import Intensity
from dbad.errors import UserError, printable
from dbad.families.detector import calibration_file, detector_settings
from dbad.files.names import CALIBRATION, EXTRACTOR, UNFINISHED
from dbad.options.command_line import check_bound, resolve, run_folder, trained_options

T = TypeVar("T")


def settle(options: T) -> tuple[Calibration | None, T]:
    """The calibration in force, and the options completed from it; on --dry_run None, and from the training alone.

    An option that was given and differs from what the run was calibrated with is an error, unless both thresholds
    are given too: they replace the calibration.
    """
    options = dataclasses.replace(options, run_id=options.run_id or options.item)
    given = given_thresholds(options)
    if options.dry_run:
        return None, resolve(options, trained_options(options))
    if given:
        options = resolve(options, trained_options(options))
        intensity = Intensity.of({**trained_options(options), "intensity": options.intensity})
        settings = detector_settings(options, options.extractor_path or run_folder(options) / EXTRACTOR, intensity)
        return Calibration(given, pixel_threshold=1.0, image_threshold=1.0, settings=settings), options

    folder = run_folder(options)
    if not trained_options(options):
        raise UserError(f"{folder}: no trained run; run train_ddim.py, train_extractor.py and evaluation.py first")
    path = folder / CALIBRATION
    calibration = load_calibration(path)
    check_digests(calibration, path)
    check_bound(options, trained_options(options))
    for name, calibrated in calibration.settings.items():
        value = getattr(options, name, None)
        if name == "extractor_path":
            calibrated = folder / calibrated
            value = value and (calibrated if os.path.realpath(value) == os.path.realpath(calibrated) else value)
        if value is not None and value != calibrated:
            raise UserError(f"--{name} {value}: {path} was measured with {calibrated}; run evaluation.py with "
                            f"--{name} {value} first, or give both thresholds")
        if name != "extractor_path" and hasattr(options, name):
            options = dataclasses.replace(options, **{name: calibrated})
    return calibration, resolve(options, trained_options(options))


def given_thresholds(options: Any) -> dict[str, float]:
    """The thresholds that are given by hand, both or none."""
    given = {"pixel": options.pxl_threshold, "feature": options.feature_threshold}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 1:
        name = {"pixel": "pxl_threshold", "feature": "feature_threshold"}[missing[0]]
        raise UserError(f"--{name}: missing; expected both thresholds or, to use those of "
                        f"{run_folder(options) / CALIBRATION}, none")
    return {} if missing else given


def settle_trained(options: T, script: str) -> tuple[Calibration | None, T]:
    """`settle` for runs of a training `script` that also calibrates; `options` name the run.

    The thresholds are those of the category, if the model has learnt it.
    """
    folder, trained = run_folder(options), trained_options(options, script)
    shared = {name: value for name, value in trained.items() if name != "item"}
    if options.dry_run:
        return None, resolve(options, shared)
    if not trained:
        raise UserError(f"{folder}: no run of {script}; train it first: python {script} --item {options.item}")
    if trained.get(UNFINISHED):
        raise UserError(f"{folder}: {script} was stopped while it wrote the files of this run; give its command again")
    learnt = learnt_categories(trained, folder)
    if options.item not in learnt:
        print(printable(f"warning: {folder} has not learnt {options.item}, only {', '.join(learnt)}; its thresholds "
                        "are those of all of these together"), file=sys.stderr)
    path = calibration_file(folder, options.item, learnt)
    calibration = load_calibration(path)
    check_digests(calibration, path)
    check_bound(options, shared)
    for name, calibrated in calibration.settings.items():
        value = getattr(options, name, None)
        if value is not None and value != calibrated:
            raise UserError(f"--{name} {value}: {path} was measured with {calibrated}; run {script} with "
                            f"--{name} {value} first")
        if hasattr(options, name):
            options = dataclasses.replace(options, **{name: calibrated})
    return calibration, resolve(options, shared)
