"""Inspect images with a run of train_diad.py: map, score and decide; with ground truth, measure how well.

    python inference_diad.py --item all                                           (the test images of the demo data)
    python inference_diad.py --item screw bottle --dataset_path data/mvtec --resume_path checkpoints/all-diad
    python inference_diad.py --item screw --run_id all-diad --images "camera/*.png" new/

Every category is decided by its own thresholds. Beside the report, log_image/ has five pictures of every test image:

    xxx-input.jpg              the image
    xxx-reconstruction.jpg     what the auto-encoder alone makes of it, without diffusion
    xxx-samples.jpg            what auto-encoder and diffusion make of it
    xxx-features.jpg           the anomaly map, which tells how their features differ
    xxx-heatmap.png            the same over the image
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dbad.errors import UserError
from dbad.families.diad.options import DiadMapOptions, ResumeOptions, check_foreign
from dbad.files.names import LOG_IMAGE
from dbad.inspection.options import InspectionOptions, NewImageOptions
from dbad.options.command_line import main
from dbad.options.resolve import run_name
from dbad.options.shared import RunOptions, SeveralItems

if TYPE_CHECKING:
    from dbad.report.runs import Run


@dataclass(frozen=True, kw_only=True)
class Options(SeveralItems, RunOptions, ResumeOptions, NewImageOptions, InspectionOptions, DiadMapOptions):
    """What shapes an inspection; saved as options.json beside its results."""


def run(options: Options) -> Path:
    """Inspect; returns the folder of the results, for several categories that of all of them."""
    from dbad.report import summary  # these load torch, which reading the command line does without
    from dbad.report.results import set_summary
    results = inspect_categories(options)
    if len(results) == 1:
        return results[0].folder
    if not options.dry_run:
        about = set_summary(options, results)
        page = summary.write_summary(options.img_dir, results, about)
        print(table(results), f"The summary is {page}", sep="\n")
    return options.img_dir


def inspect_categories(options: Options) -> list["Run"]:
    """Inspect one category after the other, with the same model; says where the results of each are."""
    import time

    from dbad.data.categories import chosen_items, open_category, test_images
    from dbad.data.images import check_readable
    from dbad.data.intensity import Intensity
    from dbad.families.diad.log_images import write_log_images
    from dbad.families.runs import trained_options
    from dbad.files.atomic import check_folders
    from dbad.files.locks import writing_results
    from dbad.inspection.calibrated import resolve_calibrated
    from dbad.inspection.run import (
        about_to_write,
        check_new_images,
        inspect_images,
        inspect_test,
        open_run,
        results_of,
    )
    from dbad.report.colours import map_scales
    from dbad.report.runs import Run
    options = of_run(options)
    check_new_images(options)
    names, detector, results = chosen_items(options), None, []
    if options.images and len(names) > 1:
        raise UserError(f"--images: expected one --item with it, found {len(names)}")
    check_folders(img_dir=options.img_dir)
    trained = trained_options(options, "diad")
    for name in names if trained and not options.images and not options.dry_run else ():
        category = open_category(replace(options, item=name), options.item_states)
        check_readable(test_images(category, options.masks), options.num_workers, Intensity.of(trained))

    for name in names:
        begun, each = time.monotonic(), replace(options, item=name)
        folder = results_of(each, "diad")
        results.append(Run(name, options.seed or 0, folder, "done"))
        calibration, each = resolve_calibrated(each, "diad")
        if not about_to_write(each, folder, LOG_IMAGE):
            continue
        with writing_results(folder):
            detector = replace(detector or open_run(calibration, each), calibration=calibration)
            if options.images:
                inspect_images(detector, calibration, each, folder)
            else:
                inspect_test(detector, calibration, each, folder,
                             partial(write_log_images, detector, map_scales(calibration)["anomaly map"]))
        results[-1] = replace(results[-1], seconds=time.monotonic() - begun)
    return results


def of_run(options: Options) -> Options:
    """The options with the run that --resume_path or --run_id names."""
    check_foreign(options)
    path = options.resume_path
    if path is None:
        return replace(options, run_id=run_name(options, "diad"))
    if options.run_id is not None:
        raise UserError(f"--resume_path {path}: names the run, and so does --run_id {options.run_id}; expected one of "
                        "them")
    if not path.exists():
        raise UserError(f"--resume_path {path}: no such folder; expected a run folder of train_diad.py")
    if not path.is_dir():
        raise UserError(f"--resume_path {path}: a file; expected a run folder of train_diad.py. Published weights "
                        f"become a model by: python -m dbad.checkpoints import {path} --out FOLDER, and a run by: "
                        "python train_diad.py --model FOLDER --steps_latent 0, which calibrates them")
    path = path.resolve() if path.name in ("", "..") else path
    return replace(options, run_id=path.name, diffusion_checkpoint_dir=path.parent)


def table(results: "Sequence[Run]") -> str:
    """The seven metrics of DiAD's tables, in percent: a line for every category, and their mean."""
    from dbad.report.runs import COLUMNS, cells, measured
    columns = COLUMNS[:7]
    found = {each: measured(each) for each in results}
    shown = [cells(column, found) for column in columns]
    rows = [["", *(column.title for column in columns)]]
    rows += [[name, *(str(by_item[name]) for by_item, _ in shown)] for name in dict.fromkeys(r.item for r in results)]
    rows += [["mean", *(str(mean) for _, mean in shown)]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


if __name__ == "__main__":
    main(Options, lambda options: f"Scores, pictures and report.html are in {run(options)}", __doc__)
