"""Inspect images: reconstruct, map, score and decide; with ground truth, measure how well.

    python inference_ddim.py --item hazelnut                                      (the test images of the demo data)
    python inference_ddim.py --item screw --dataset_path data/mvtec --item_states good scratch_neck
    python inference_ddim.py --item screw --images "camera/*.png" new/ --drift_check

Settings are those that evaluation.py calibrated the run with. With --pxl_threshold and --feature_threshold it works
without a calibration: a pixel, and its image, is then defective where the anomaly map reaches 1.
"""

from dataclasses import dataclass
from pathlib import Path

from dbad.inspection.run import InspectionOptions, NewImageOptions, check_new_images, inspect_run, results_of
from dbad.inspection.settle import settle
from dbad.options.command_line import MapOptions, ReconstructionOptions, RunOptions, main, opt


@dataclass(frozen=True, kw_only=True)
class ThresholdOptions:
    """Files and thresholds, in place of the calibrated ones."""

    extractor_path: Path | None = opt("file of the adapted extractor (extractor.pt in the run folder)", None,
                                      aliases=["--save_to"])
    pxl_threshold: float | None = opt("pixel difference that counts as 1 in the anomaly map (calibrated)", None,
                                      aliases=["--pl_threshold"])
    feature_threshold: float | None = opt("feature difference that counts as 1 in the anomaly map (calibrated)", None,
                                          aliases=["--fl_threshold"])


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions, NewImageOptions, InspectionOptions, ThresholdOptions, ReconstructionOptions, MapOptions):
    """What shapes an inspection; saved as options.json beside its results."""


def run(options: Options) -> Path:
    """Inspect, and return the folder of the results."""
    check_new_images(options)
    return inspect_run(*settle(options), results_of(options))


if __name__ == "__main__":
    main(Options, lambda options: f"Scores, pictures and report.html are in {run(options)}", __doc__)
