"""Inspect images: reconstruct, map, score and decide; with ground truth, measure how well.

    python inference_ddim.py --item hazelnut                                      (the test images of the demo data)
    python inference_ddim.py --item screw --dataset_path data/mvtec --item_states good scratch_neck
    python inference_ddim.py --item screw --images "camera/*.png" new/ --drift_check

The settings are those of the calibration by evaluation.py. With --pxl_threshold and --feature_threshold no calibration
is needed: pixels where the anomaly map reaches 1 are then defective, and so is their image. A run of another method is
inspected as by its own script.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbad.data.intensity import Intensity
from dbad.errors import UserError
from dbad.families.ddim.options import (
    AdaptedExtractor,
    DdimSettings,
    GivenThresholds,
    MapOptions,
    Reconstruction,
)
from dbad.files.names import CALIBRATION, EXTRACTOR
from dbad.inspection.options import InspectionRun
from dbad.options.command_line import main
from dbad.options.resolve import resolve, run_folder, subset
from dbad.records import RunResults

if TYPE_CHECKING:
    from dbad.calibration.thresholds import Calibration

METHODS = ("ddim",)


@dataclass(frozen=True, kw_only=True)
class Options(InspectionRun, AdaptedExtractor, GivenThresholds, Reconstruction, MapOptions):
    """What shapes an inspection; saved as options.json beside its results."""


def run(options: Options) -> RunResults:
    """Inspect, and return the folder of the results with the metrics."""
    from dbad.inspection.calibrated import resolve_calibrated  # these load torch
    from dbad.inspection.recognise import handed_over, recognised, script_for
    from dbad.inspection.run import check_new_images, inspect_run, results_of
    check_new_images(options)
    options = recognised(options, *METHODS)
    if options.method not in METHODS:
        script = importlib.import_module(script_for(options))
        return script.run(handed_over(options, script.Options))
    given = given_thresholds(options)
    calibration, options = by_hand(options, given) if given else resolve_calibrated(options, *METHODS)
    return inspect_run(calibration, options, results_of(options, *METHODS))


def given_thresholds(options: Options) -> dict[str, float]:
    """The thresholds that are given by hand, both or none."""
    given = {"pixel": options.pxl_threshold, "feature": options.feature_threshold}
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) == 1:
        name = "feature_threshold" if "pixel" in found else "pxl_threshold"
        raise UserError(f"--{name}: missing; expected both thresholds, or none to use those of "
                        f"{run_folder(options) / CALIBRATION}")
    return found


def by_hand(options: Options, given: dict[str, float]) -> tuple[Calibration | None, Options]:
    """A calibration of the given thresholds, under the options as the run was trained; none on --dry_run."""
    from dbad.calibration.thresholds import Calibration
    from dbad.families.runs import trained_options
    trained = trained_options(options, *METHODS)
    options = resolve(options, trained)
    if options.dry_run:
        return None, options
    folder = run_folder(options)
    path = os.path.relpath(options.extractor_path or folder / EXTRACTOR, folder)
    intensity = Intensity.of({**trained, "intensity": options.intensity})
    settings = DdimSettings.of(options, extractor_path=Path(path), **intensity.settings())
    return Calibration(given, pixel_threshold=1.0, image_threshold=1.0, settings=settings.record()), options


def check_phase(options: Options, trained: dict[str, Any], skipped: Set[str]) -> dict[str, Any]:
    """See train_ddim.check_phase."""
    given_thresholds(options)
    resolve(subset(Options, options), trained)
    return trained


if __name__ == "__main__":
    main(Options, lambda options: f"Scores, pictures and report.html are in {run(options)}", __doc__)
