"""Inspect images with a run of train_diad.py: map, score and decide; with ground truth, measure how well.

    python inference_diad.py --item all                                           (the test images of the demo data)
    python inference_diad.py --item screw bottle --dataset_path data/mvtec --resume_path checkpoints/all-diad
    python inference_diad.py --item screw --run_id all-diad --images "camera/*.png" new/

Every category has its own thresholds. log_image/ contains five pictures of every test image:

    xxx-input.jpg              the image
    xxx-reconstruction.jpg     the image after the auto-encoder alone, without diffusion
    xxx-samples.jpg            the image after auto-encoder and diffusion
    xxx-features.jpg           the anomaly map, the difference of the features of image and sample
    xxx-heatmap.png            the anomaly map over the image

A run of another method is inspected as by its own script.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dbad.errors import UserError
from dbad.families.diad.options import DiadMapOptions, ResumeOptions, check_foreign
from dbad.files.names import LOG_IMAGE, METRICS
from dbad.inspection.options import AnyInspectionRun, InspectionRun
from dbad.options.command_line import main
from dbad.options.resolve import subset
from dbad.options.shared import SeveralItems
from dbad.records import RunResults

if TYPE_CHECKING:
    from dbad.report.runs import Run

METHODS = ("diad",)


@dataclass(frozen=True, kw_only=True)
class DiadInspection(AnyInspectionRun, ResumeOptions, DiadMapOptions):
    """What shapes an inspection."""


@dataclass(frozen=True, kw_only=True)
class Options(SeveralItems, DiadInspection):
    """What shapes the inspections of any number of categories."""


@dataclass(frozen=True, kw_only=True)
class OneCategory(InspectionRun, DiadInspection):
    """What shapes an inspection; saved as options.json beside its results."""


def run(options: Options) -> RunResults:
    """Inspect; returns the folder of the results with the metrics, for several categories by their names."""
    from dbad.data.categories import chosen_items  # these load torch
    from dbad.families.registry import trained_alike
    from dbad.files.atomic import read_json
    from dbad.inspection.recognise import recognised
    from dbad.inspection.run import check_inspected, check_new_images, results_of
    from dbad.inspection.several import Job, run_jobs, write_set_summary
    options = recognised(of_path(options), *METHODS)
    if options.method in METHODS:
        check_foreign(options)
    check_new_images(options)
    items = (options.item,) if isinstance(options.item, str) else options.item
    names = items if options.images and "all" not in items else chosen_items(options)    # new images need no data set
    each = {name: subset(OneCategory, replace(options, item=name)) for name in names}
    if options.images and len(each) > 1:
        raise UserError(f"--images: expected one --item, found {len(each)}")
    if len(each) == 1:
        return inspect(*each.values())
    alike = trained_alike(str(options.method))
    job = Job(each, {name: results_of(one, *alike) for name, one in each.items()},
              check=lambda one: check_inspected(one, None, alike[0]), train=None, inspect=inspect)
    runs = run_jobs([job], lambda found: write_set_summary(options, found))
    if options.dry_run:
        return RunResults(options.img_dir)
    print(table(runs))
    return RunResults(options.img_dir, {
        one.item: read_json(one.folder / METRICS) for one in runs if (one.folder / METRICS).is_file()})


def inspect(options: OneCategory) -> RunResults:
    """Inspect the test images of a category, or new images."""
    from dbad.inspection.calibrated import resolve_calibrated
    from dbad.inspection.recognise import handed_over, script_for
    from dbad.inspection.run import inspect_run, results_of
    if options.method not in METHODS:
        script = importlib.import_module(script_for(options))
        return script.run(handed_over(replace(options, resume_path=None), script.Options))
    folder = results_of(options, *METHODS)
    return inspect_run(*resolve_calibrated(options, *METHODS), folder, LOG_IMAGE)


def of_path(options: Options) -> Options:
    """The options with the run that --resume_path names, if it is given."""
    path = options.resume_path
    if path is None:
        return options
    if options.run_id is not None:
        raise UserError(f"--resume_path {path}: --run_id {options.run_id} is also given; expected one of them")
    if not path.exists():
        raise UserError(f"--resume_path {path}: no such folder; expected a run folder of train_diad.py")
    if not path.is_dir():
        raise UserError(f"--resume_path {path}: a file; expected a run folder of train_diad.py. For published weights, "
                        f"first run: python -m dbad.checkpoints import {path} --out FOLDER; then calibrate: python "
                        "train_diad.py --model FOLDER --steps_latent 0")
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
