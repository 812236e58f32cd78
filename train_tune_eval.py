"""Train, tune and evaluate one category, end to end.

    python train_tune_eval.py --item hazelnut                                     (built-in demo data, minutes on a CPU)
    python train_tune_eval.py --item screw --dataset_path data/mvtec --preset small

The four phases are train_ddim.py, train_extractor.py, evaluation.py and inference_ddim.py; each can be run alone.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import evaluation
import inference_ddim
import train_ddim
import train_extractor
from dbad.config import main, opt, run_folder, subset
from dbad.data import check_readable, open_category
from dbad.files import check_folders


@dataclass(frozen=True, kw_only=True)
class PhaseOptions:
    """Which phases run; a skipped one uses what is on disk."""

    skip_train: bool = opt("skip training the diffusion model", False)
    skip_extractor: bool = opt("skip adapting the feature extractor", False)
    skip_threshold: bool = opt("skip calibration; --pxl_threshold and --feature_threshold count only then", False)
    skip_evaluation: bool = opt("skip inspecting the test images", False)


@dataclass(frozen=True, kw_only=True)
class Options(PhaseOptions, train_ddim.Options, train_extractor.Options, evaluation.Options, inference_ddim.Options):
    """The options of all four phases."""


def run(options: Options) -> Path:
    """Run the phases in turn; returns the folder of the results, or of the run where evaluation is skipped."""
    if not options.skip_evaluation and not options.dry_run:
        check_folders(img_dir=options.img_dir)
        check_readable(open_category(options, options.item_states).test, options.num_workers)
    if not options.skip_train:
        train_ddim.run(subset(train_ddim.Options, options))
    if not options.skip_extractor:
        train_extractor.run(subset(train_extractor.Options, options))
    inspection = subset(inference_ddim.Options, options)
    if not options.skip_threshold:
        if options.pxl_threshold or options.feature_threshold:
            print("the given thresholds are not used: calibration measures them; --skip_threshold makes them count")
        inspection = replace(inspection, pxl_threshold=None, feature_threshold=None)
        evaluation.run(subset(evaluation.Options, options))
    if not options.skip_evaluation:
        return inference_ddim.run(inspection)
    return run_folder(options)


if __name__ == "__main__":
    main(Options, lambda options: f"Everything is in {run(options)}", __doc__)
