"""Inspect images with a run of train_lafite.py: map, score and decide; with ground truth, measure how well.

    python inference_lafite.py --item hazelnut                                    (the test images of the demo data)
    python inference_lafite.py --item screw --dataset_path data/mvtec --run_id several
    python inference_lafite.py --item screw --images "camera/*.png" new/ --drift_check

Without --run_id, the run is NAME-lafite or, if there is none, NAME-knn; with --method knn it is NAME-knn. Instead of a
reconstruction, the pictures show the nearest good patches of the memory bank. A run of another method is inspected as
by its own script.
"""

import importlib
from dataclasses import dataclass

from dbad.families.lafite.options import FeatureMapOptions
from dbad.inspection.options import InspectionRun
from dbad.options.command_line import main
from dbad.records import RunResults

METHODS = ("lafite", "knn")


@dataclass(frozen=True, kw_only=True)
class Options(InspectionRun, FeatureMapOptions):
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
    folder = results_of(options, *METHODS)
    return inspect_run(*resolve_calibrated(options, *METHODS), folder)


if __name__ == "__main__":
    main(Options, lambda options: f"Scores, pictures and report.html are in {run(options)}", __doc__)
