"""What the inference scripts share: a category's test images, or any images, through the detector of any family."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dbad.calibration.drift import drift, sentence
from dbad.calibration.thresholds import Calibration
from dbad.data.images import open_category, test_images
from dbad.errors import UserError
from dbad.families.detector import Detector, build_detector
from dbad.files.atomic import check_folders, write_json
from dbad.files.locks import writing_results
from dbad.files.names import DRIFT, METRICS, MODEL_CONFIG, OVERLAYS, PAGE, SCORES, TRAIN_OPTIONS
from dbad.inspection.category import Also, inspect_category
from dbad.inspection.new_images import find_images, inspect_new, last_line
from dbad.metrics.verdicts import Thresholds, curves
from dbad.options.command_line import announce, changed, opt, run_folder, trained_options
from dbad.report import page
from dbad.report.panels import show
from dbad.report.results import headline, listing_digest, mask_words, results_folder, run_summary
from dbad.runtime.device import pick_device, pick_precision


@dataclass(frozen=True, kw_only=True)
class InspectionOptions:
    """What is inspected, and what is written of it."""

    item_states: tuple[str, ...] = opt("folders of test/ to inspect, such as: good crack", ("all",),
                                       aliases=["--mvtec_item_states"])
    eval_resolution: Literal["network", "original"] = opt(
        "where maps are compared with masks: at the network's resolution, or at the size of the files", "network")
    masks: Literal["where_there_are", "required"] = opt(
        "defective test images without mask: left out of pixel metrics, which is said, or refused", "where_there_are")
    export_maps: Literal["none", "mvtec"] = opt(
        "also write the maps as float TIFF files, as the evaluation program of MVTec AD reads them; with the data of "
        "MVTec AD 2 as its evaluation server does, and thresholded ones beside them", "none")
    img_dir: Path = opt("folder in which every run has a folder of results", Path("results"))
    plt_imgs: bool = opt("also show the figures on the screen, half a second each, where there is one", False)
    shuffle: bool = opt("with --plt_imgs: show the images in a random order", False)


@dataclass(frozen=True, kw_only=True)
class NewImageOptions:
    """Images without ground truth, instead of the test images of a data set."""

    images: tuple[str, ...] | None = opt("files, folders or quoted patterns such as 'camera/*.png'", None)
    recursive: bool = opt("with --images: also those in sub-folders", False)
    drift_check: bool = opt("with --images: test whether, as a whole, they still look like the good images of the "
                            "calibration; if not, its promise is void", False)


def results_of(options: Any, script: str | None = None) -> Path:
    """The folder of the results: called as the run and, where the model of `script` is for more, as the category."""
    learnt = trained_options(options, script).get("item", [options.item]) if script else [options.item]
    name = options.run_id or options.item
    return options.img_dir / (name + f"-{options.item}" * (learnt != [options.item]) + "-images" * bool(options.images))


def inspect_run(calibration: Calibration | None, options: Any, folder: Path) -> Path:
    """Inspect what the options name with the run that they name; `folder` is that of the results, which is returned."""
    if not about_to_write(options, folder):
        return folder
    inspect_them = inspect_images if options.images else inspect_test
    with writing_results(folder):
        return inspect_them(open_detector(calibration, options), calibration, options, folder)


def about_to_write(options: Any, folder: Path, *more: str) -> bool:
    """Say what is inspected and, on --dry_run, what would be written; whether to go on."""
    check_folders(img_dir=options.img_dir)
    if folder.resolve() == run_folder(options).resolve() or any(
            (folder / name).is_file() for name in (MODEL_CONFIG, TRAIN_OPTIONS)):
        raise UserError(f"--img_dir {options.img_dir}: the results would lie in {folder}, a run folder; expected "
                        "another folder than that of the runs")
    written = (OVERLAYS,) if options.images else (METRICS, PAGE, *more)
    return announce(options, folder / SCORES, *(folder / name for name in written))


def open_detector(calibration: Calibration, options: Any) -> Detector:
    """The detector of the run, on the machine that the options name."""
    device = pick_device(options.device)
    return build_detector(run_folder(options), calibration.settings, device, pick_precision(options.precision, device),
                          options.batch_size, calibration)


def inspect_test(detector: Detector, calibration: Calibration, options: Any, folder: Path,
                 also: Also | None = None) -> Path:
    """Inspect the test images of the category; write scores, metrics, pictures and the report.

    What a family writes besides of every image is done by `also`, see `inspect_category`.
    """
    category = open_category(options, options.item_states)
    test_images(category, options.masks)        # refuses a test that is not whole
    metrics, panels = inspect_category(detector, calibration, category, options, folder, also)
    if options.plt_imgs:
        show(random.Random(options.seed).sample(panels, len(panels)) if options.shuffle else panels)
    for words in mask_words(metrics["masks"], ("cut",)):
        print(words)
    print(headline(options.item, metrics, options.dataset_path is None))
    return folder


def inspect_images(detector: Detector, calibration: Calibration, options: Any, folder: Path) -> Path:
    """Inspect images without ground truth; write scores, overlays and the report."""
    paths = find_images(options.images, options.recursive)
    folder = results_folder(folder, options, listing_digest(paths))
    found = inspect_new(detector, paths, folder, options.num_workers, category=options.item)
    thresholds = Thresholds(calibration.image_threshold, calibration.pixel_threshold)
    summary = run_summary(options, calibration, found.num_good + found.num_defective, changed(options))
    counts = {"num_good": found.num_good, "num_defective": found.num_defective, "num_unreadable": len(found.unreadable),
              "seconds_per_image": found.seconds_per_image}
    if options.drift_check:
        result = drift(calibration, [row.score for row in found.rows])
        write_json(folder / DRIFT, page.plain(vars(result)))
        summary["Drift"] = sentence(result)
        print(sentence(result))
    page.write_report(folder / PAGE, found.rows, found.gallery, counts, summary, thresholds, curves(found.rows))
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
