"""What the inference scripts share: a category's test images, or any images, through the detector of any family."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dbad.calibration.drift import drift, sentence
from dbad.calibration.thresholds import Calibration
from dbad.data.depth import run_intensity
from dbad.data.images import check_readable, open_category, test_images
from dbad.errors import UserError
from dbad.families.detector import Detector, open_detector
from dbad.families.registry import FAMILIES, trained_alike
from dbad.families.runs import trained_options
from dbad.files.atomic import check_folders, write_json
from dbad.files.locks import writing_results
from dbad.files.names import DRIFT, METRICS, MODEL_CONFIG, OVERLAYS, PAGE, SCORES, TRAIN_OPTIONS
from dbad.inspection.loop import inspect
from dbad.inspection.new_images import find_images, inspect_new, last_line
from dbad.metrics.verdicts import Thresholds
from dbad.options.resolve import announce, changed, run_folder
from dbad.records import Inspection
from dbad.report import figures, page
from dbad.report.export import export_maps
from dbad.report.results import headline, listing_digest, mask_words, results_folder, run_summary, write_results
from dbad.runtime.device import Machine


def results_of(options: Any, *methods: str) -> Path:
    """The folder of the results: called as the run and, where a model of the `methods` is for more, as the category."""
    learnt = trained_options(options, *methods).get("item", [options.item]) if methods else [options.item]
    name = options.run_id or options.item
    return options.img_dir / (name + f"-{options.item}" * (learnt != [options.item]) + "-images" * bool(options.images))


def inspect_run(calibration: Calibration | None, options: Any, folder: Path) -> Path:
    """Inspect what the options name with the run that they name; `folder` is that of the results, which is returned."""
    if not about_to_write(options, folder):
        return folder
    inspect_them = inspect_images if options.images else inspect_test
    with writing_results(folder):
        return inspect_them(open_run(calibration, options), calibration, options, folder)


def about_to_write(options: Any, folder: Path, *more: str) -> bool:
    """Say what is inspected and, on --dry_run, what would be written; whether to go on."""
    check_folders(img_dir=options.img_dir)
    if folder.resolve() == run_folder(options).resolve() or any(
            (folder / name).is_file() for name in (MODEL_CONFIG, TRAIN_OPTIONS)):
        raise UserError(f"--img_dir {options.img_dir}: the results would lie in {folder}, a run folder; expected "
                        "another folder than that of the runs")
    written = (OVERLAYS,) if options.images else (METRICS, PAGE, *more)
    return announce(options, folder / SCORES, *(folder / name for name in written))


def open_run(calibration: Calibration, options: Any) -> Detector:
    """The detector of the run, on the machine that the options name."""
    machine = Machine.of(options.device, options.precision, options.batch_size)
    return open_detector(run_folder(options), calibration, machine)


def inspect_test(detector: Detector, calibration: Calibration, options: Any, folder: Path,
                 also: Callable[[Path, list[Inspection]], None] | None = None) -> Path:
    """Inspect the test images of the category; write scores, metrics, pictures and the report.

    What a family writes besides is done by `also`, called with the folder and what was found.
    """
    category = open_category(options, options.item_states)
    samples = test_images(category, options.masks)
    inspections, seconds = inspect(detector, calibration, samples, category.root.parent, options.num_workers)
    folder = results_folder(folder, options)
    metrics, panels = write_results(folder, inspections, samples, calibration, options, seconds,
                                    FAMILIES[calibration.method].about)
    if also:
        also(folder, inspections)
    if options.export_maps == "mvtec":
        export_maps(folder, category, inspections, calibration.pixel_threshold)
    if options.plt_imgs:
        figures.show(random.Random(options.seed).sample(panels, len(panels)) if options.shuffle else panels)
    for words in mask_words(metrics["masks"], ("cut",)):
        print(words)
    print(headline(options.item, metrics, options.dataset_path is None))
    return folder


def inspect_images(detector: Detector, calibration: Calibration, options: Any, folder: Path) -> Path:
    """Inspect images without ground truth; write scores, overlays and the report."""
    paths = find_images(options.images, options.recursive)
    folder = results_folder(folder, options, listing_digest(paths))
    found = inspect_new(detector, calibration, paths, folder, options.num_workers, category=options.item)
    thresholds = Thresholds(calibration.image_threshold, calibration.pixel_threshold)
    family = FAMILIES[calibration.method]
    summary = run_summary(options, calibration, found.num_good + found.num_defective, family.about)
    counts = {"num_good": found.num_good, "num_defective": found.num_defective, "num_unreadable": len(found.unreadable),
              "seconds_per_image": found.seconds_per_image}
    if options.drift_check:
        result = drift(calibration, [row.score for row in found.rows], script=family.scripts.calibration)
        write_json(folder / DRIFT, page.plain(vars(result)))
        summary["Drift"] = sentence(result)
        print(sentence(result))
    page.write_report(folder / PAGE, found.inspections, counts, summary, thresholds)
    print(last_line(found))
    return folder


def check_new_images(options: Any) -> None:
    """Raise `UserError` where options contradict each other, before anything is loaded."""
    if options.images is None:
        for name in ("recursive", "drift_check"):
            if getattr(options, name):
                raise UserError(f"--{name}: counts only with --images")
        return
    for name in ("item_states", "eval_resolution", "masks", "export_maps", "plt_imgs"):
        if name in changed(options):
            raise UserError(f"--{name}: needs ground truth or test folders, which --images have not")
    if options.drift_check and getattr(options, "pxl_threshold", None):
        raise UserError("--drift_check: needs the scores of a calibration; the thresholds were given by hand")
    find_images(options.images, options.recursive)


def check_inspected(options: Any, begun: Callable[[Any], dict[str, Any]] | None, method: str) -> None:
    """Raise `UserError` for what the inspection of a category would stumble over, before the long work.

        begun     gives the intensity of a training that is gone on with; None where the training is skipped
        method    of the run
    On --dry_run only options are looked at.
    """
    check_new_images(options)
    if options.dry_run:
        return
    check_folders(img_dir=options.img_dir)
    if options.images:
        return
    category = open_category(options, options.item_states)
    known = begun(options) if begun else trained_options(options, *trained_alike(method))
    check_readable(test_images(category, options.masks), options.num_workers,
                   run_intensity(options, known, category.good, quiet=True))
