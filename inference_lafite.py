"""Inspect images with a run of train_lafite.py: map, score and decide; with ground truth, measure how well.

    python inference_lafite.py --item hazelnut                                    (the test images of the demo data)
    python inference_lafite.py --item screw --dataset_path data/mvtec --run_id several
    python inference_lafite.py --item screw --images "camera/*.png" new/ --drift_check

Without --run_id, the run is NAME-lafite or, if there is none, NAME-knn. Instead of a reconstruction, the pictures show
the nearest good patches of the memory bank.
"""

from dataclasses import dataclass, replace

from dbad.families.lafite.options import FeatureMapOptions
from dbad.inspection.options import InspectionRun
from dbad.options.command_line import main
from dbad.options.resolve import run_name
from dbad.records import RunResults

METHODS = ("lafite", "knn")


@dataclass(frozen=True, kw_only=True)
class Options(InspectionRun, FeatureMapOptions):
    """What shapes an inspection; saved as options.json beside its results."""


def run(options: Options) -> RunResults:
    """Inspect, and return the folder of the results with the metrics."""
    from dbad.inspection.calibrated import resolve_calibrated  # these load torch
    from dbad.inspection.run import check_new_images, inspect_run, results_of
    check_new_images(options)
    names = [run_name(options, method) for method in METHODS]
    there = [name for name in names if (options.diffusion_checkpoint_dir / name).is_dir()]
    options = replace(options, run_id=(there or names)[0])
    folder = results_of(options, *METHODS)
    return inspect_run(*resolve_calibrated(options, *METHODS), folder)


if __name__ == "__main__":
    main(Options, lambda options: f"Scores, pictures and report.html are in {run(options)}", __doc__)
