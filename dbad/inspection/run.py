"""The shared part of the inference scripts: test images, or any images, through the detector of any family."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dbad.calibration.drift import drift, sentence
from dbad.calibration.thresholds import Calibration
from dbad.data.categories import open_category, test_images
from dbad.data.depth import run_intensity
from dbad.data.images import check_readable
from dbad.errors import UserError
from dbad.families.detector import Detector, open_detector
from dbad.families.registry import FAMILIES, trained_alike
from dbad.families.runs import trained_options
from dbad.files.atomic import check_folders, write_json
from dbad.files.locks import writing_results
from dbad.files.names import DRIFT, METRICS, MODEL_CONFIG, OVERLAYS, PAGE, SCORES, TRAIN_OPTIONS
from dbad.inspection.again import again_of
from dbad.inspection.calibrated import summary_of, with_given_threshold
from dbad.inspection.category import Also, inspect_category
from dbad.inspection.new_images import find_images, inspect_new, last_line
from dbad.inspection.options import AnyInspectionRun, InspectionRun
from dbad.metrics.verdicts import Thresholds, curves
from dbad.options.resolve import announce, changed, name_of, run_folder
from dbad.records import RunResults
from dbad.report import page
from dbad.report.colours import map_scales
from dbad.report.panels import show
from dbad.report.results import headline, listing_digest, mask_words, results_folder
from dbad.runtime.device import Machine


def results_of(options: InspectionRun, *methods: str) -> Path:
    """The folder of the results, named after the run and, for a model of several categories, the category.

    `methods` are those of the script that trained the run, see `trained_alike`.
    """
    together = FAMILIES[methods[0]].together
    learnt = trained_options(options, *methods).get("item", [options.item]) if together else [options.item]
    name = name_of(options) + f"-{options.item}" * (learnt != [options.item])
    return options.img_dir / (name + "-images" * bool(options.images))


def inspect_run(calibration: Calibration | None, options: InspectionRun, folder: Path, *more: str) -> RunResults:
    """Inspect the images of the options with the run of the options; returns the results, which `folder` holds.

    On --dry_run there is no calibration. `more` names further files that the family writes for test images.
    """
    if calibration is not None:
        calibration = with_given_threshold(calibration, options)
    if not about_to_write(options, folder, *more) or calibration is None:
        return RunResults(folder)
    family = FAMILIES[calibration.method]
    with writing_results(folder):
        detector = open_run(calibration, options)
        if options.images:
            return RunResults(inspect_images(detector, calibration, options, folder))
        scale = map_scales(calibration)["anomaly map"]
        also = family.pictures(detector, scale) if family.pictures else None
        return inspect_test(detector, calibration, options, folder, also)


def about_to_write(options: InspectionRun, folder: Path, *more: str) -> bool:
    """Print what is inspected and, on --dry_run, what would be written; returns True to go on."""
    check_folders(img_dir=options.img_dir)
    if folder.resolve() == run_folder(options).resolve() or any(
            (folder / name).is_file() for name in (MODEL_CONFIG, TRAIN_OPTIONS)):
        raise UserError(f"--img_dir {options.img_dir}: the results would be written to the run folder {folder}; "
                        "expected another folder")
    written = (OVERLAYS,) if options.images else (METRICS, PAGE, *more)
    return announce(options, folder / SCORES, *(folder / name for name in written))


def open_run(calibration: Calibration, options: InspectionRun) -> Detector:
    """The detector of the run, on the machine of the options; the last one is kept for the next category."""
    machine = Machine.of(options.device, options.precision, options.batch_size)
    key = (run_folder(options).resolve(), machine, calibration.method, calibration.settings, calibration.digests)
    if _last_opened[:1] != [key]:
        _last_opened.clear()        # frees its memory before the next one is loaded
        _last_opened.extend([key, open_detector(run_folder(options), calibration, machine)])
    return replace(_last_opened[1], calibration=calibration)


_last_opened: list[Any] = []        # the arguments of the last detector, and the detector


def inspect_test(detector: Detector, calibration: Calibration, options: InspectionRun, folder: Path,
                 also: Also | None = None) -> RunResults:
    """Inspect the test images of the category; write scores, metrics, pictures and the report, and return the metrics.

    `also` writes what a family adds for every image, see `inspect_category`.
    """
    category = open_category(options, options.item_states)
    test_images(category, options.masks)        # refuses a test that is not whole
    metrics, panels = inspect_category(detector, calibration, category, options, folder, also)
    if options.plt_imgs:
        show(random.Random(options.seed).sample(panels, len(panels)) if options.shuffle else panels)
    for words in mask_words(metrics["masks"], ("cut",)):
        print(words)
    print(headline(options.item, metrics, options.dataset_path is None))
    return RunResults(folder, page.plain(metrics))


def inspect_images(detector: Detector, calibration: Calibration, options: InspectionRun, folder: Path) -> Path:
    """Inspect images without ground truth; write scores, overlays and the report."""
    paths = find_images(options.images or (), options.recursive)
    folder = results_folder(folder, options, listing_digest(paths))
    found = inspect_new(detector, paths, folder, options.num_workers, category=options.item)
    thresholds = Thresholds(calibration.image_threshold, calibration.pixel_threshold)
    family = FAMILIES[calibration.method]
    summary = summary_of(options, calibration, found.num_good + found.num_defective)
    counts = {"num_good": found.num_good, "num_defective": found.num_defective, "num_unreadable": len(found.unreadable),
              "seconds_per_image": found.seconds_per_image}
    if options.drift_check:
        result = drift(calibration, [row.score for row in found.rows], script=family.scripts.calibration)
        write_json(folder / DRIFT, page.plain(vars(result)))
        summary["Drift"] = sentence(result)
        print(sentence(result))
    page.write_report(folder / PAGE, found.rows, found.gallery, counts, summary, thresholds, curves(found.rows),
                      again_of(options, calibration))
    print(last_line(found))
    return folder


def check_new_images(options: AnyInspectionRun) -> None:
    """Raise `UserError` where options contradict each other, before anything is loaded."""
    if options.images is None:
        for name in ("recursive", "drift_check"):
            if getattr(options, name):
                raise UserError(f"--{name}: works only with --images")
        return
    for name in ("item_states", "eval_resolution", "masks", "export_maps", "plt_imgs"):
        if name in changed(options):
            raise UserError(f"--{name}: needs ground truth or test folders; --images have neither")
    if options.drift_check and getattr(options, "pxl_threshold", None):
        raise UserError("--drift_check: needs the scores of a calibration; the thresholds were set by hand")
    find_images(options.images, options.recursive)


def check_inspected(options: InspectionRun, begun: Callable[[Any], dict[str, Any]] | None, method: str) -> None:
    """Raise `UserError`, before the long work, for anything that would make the inspection of a category fail.

        begun     options -> the intensity of a training that is resumed; None where the training is skipped
        method    method of the run
    On --dry_run only options are looked at. A category without test images is none: it can be trained on.
    """
    check_new_images(options)
    if options.dry_run:
        return
    check_folders(img_dir=options.img_dir)
    if options.images:
        return
    category = open_category(options, options.item_states)
    known = begun(options) if begun else trained_options(options, *trained_alike(method))
    if category.test:
        check_readable(test_images(category, options.masks), options.num_workers,
                       run_intensity(options, known, category.good, quiet=True))
