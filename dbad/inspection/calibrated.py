"""The options and thresholds in force when a calibrated run inspects images."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dbad.calibration.thresholds import Calibration
from dbad.errors import UserError, printable
from dbad.families.digests import check_digests
from dbad.families.registry import FAMILIES
from dbad.families.runs import calibration_file, learnt_categories, load_calibration, trained_options
from dbad.files.names import UNFINISHED
from dbad.options.resolve import check_bound, resolve, run_folder
from dbad.options.shared import RunOptions
from dbad.report.results import run_summary

if TYPE_CHECKING:
    from dbad.inspection.options import InspectionRun

T = TypeVar("T", bound=RunOptions)


def resolve_calibrated(options: T, *methods: str) -> tuple[Calibration | None, T]:
    """The calibration of a run of one of the `methods`, and the options completed from it.

    The thresholds are those of the category, if the model has learnt it. A given option that differs from the
    calibration is a `UserError`. On --dry_run there is no calibration, and the options are completed
    from the training alone.
    """
    options = dataclasses.replace(options, run_id=options.run_id or options.item)
    folder, trained, family = run_folder(options), trained_options(options, *methods), FAMILIES[methods[0]]
    bound = {name: value for name, value in trained.items() if not (family.together and name == "item")}
    if options.dry_run:
        return None, resolve(options, bound)
    if not trained:
        script = family.scripts.model
        raise UserError(f"{folder}: no run of {script}; train it first: python {script} --item {options.item}"
                        if family.together else
                        f"{folder}: no trained run; run {script}, {family.scripts.extractor} and "
                        f"{family.scripts.calibration} first")
    if trained.get(UNFINISHED):
        raise UserError(f"{folder}: {family.scripts.model} was stopped while writing the files of this run; run its "
                        "command again")
    learnt = learnt_categories(trained, folder) if family.together else ()
    if family.together and options.item not in learnt:
        print(printable(f"warning: {folder} was not trained on {options.item}, only on {', '.join(learnt)}; the common "
                        "thresholds of all of these are used"), file=sys.stderr)
    path = calibration_file(folder, options.item, learnt)
    calibration = load_calibration(path)
    check_digests(calibration, path)
    check_bound(options, bound)
    return calibration, resolve(_as_calibrated(options, calibration, path), bound)


def with_given_threshold(calibration: Calibration, options: InspectionRun) -> Calibration:
    """The calibration with the image threshold that the options ask for; no file changes."""
    if options.image_threshold is not None:
        calibration = calibration.with_threshold(options.image_threshold)
    if options.false_alarm_rate is not None:
        calibration = calibration.with_rate(options.false_alarm_rate)
    return calibration


def summary_of(options: InspectionRun, calibration: Calibration, num_images: int) -> dict[str, str]:
    """The facts of an inspection for its report, see `run_summary`; a threshold or rate that was given says so."""
    summary = run_summary(options, calibration, num_images, FAMILIES[calibration.method].about)
    if options.image_threshold is not None:
        summary["False alarms promised"] = "none"
        summary["Image threshold"] = f"{options.image_threshold:g} (given)"
    if options.false_alarm_rate is not None:
        summary["False alarms promised"] += " (given)"
    return summary


def _as_calibrated(options: T, calibration: Calibration, path: Path) -> T:
    """The options with the settings of the calibration in the file `path`."""
    family = FAMILIES[calibration.method]
    settings = family.settings.read(calibration.settings)
    by_hand = ", or give both thresholds" * hasattr(options, "pxl_threshold")
    for field in dataclasses.fields(settings):
        if not hasattr(options, field.name):
            continue
        value, calibrated = getattr(options, field.name), getattr(settings, field.name)
        if isinstance(calibrated, Path):
            calibrated, same = path.parent / calibrated, _same_file(value, path.parent / calibrated)
        else:
            same = value == calibrated
        if value is not None and not same:
            raise UserError(f"--{field.name} {value}: {path} was measured with {calibrated}; run "
                            f"{family.scripts.calibration} with --{field.name} {value} first{by_hand}")
        if not isinstance(calibrated, Path):
            options = dataclasses.replace(options, **{field.name: calibrated})
    return options


def _same_file(one: Path | None, other: Path) -> bool:
    return one is not None and os.path.realpath(one) == os.path.realpath(other)
