"""Inspect the test images of one category: reconstruct, map, score, decide, and measure how well.

    python inference_ddim.py --item hazelnut
    python inference_ddim.py --item screw --dataset_path data/mvtec --item_states good scratch_neck

Settings are those that evaluation.py calibrated the run with. With --pxl_threshold and --feature_threshold it works
without a calibration: a pixel, and its image, is then defective where the anomaly map reaches 1.
"""

import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path

from dbad import figures, report, verdicts
from dbad.calibration import Calibration, load_calibration
from dbad.checkpoints import CALIBRATION
from dbad.config import (
    MapOptions,
    ReconstructionOptions,
    RunOptions,
    announce,
    changed,
    main,
    opt,
    resolve,
    run_folder,
    trained_options,
)
from dbad.data import open_category
from dbad.detectors import DdimDetector, build_ddim, check_digests, detector_settings
from dbad.errors import UserError
from dbad.evaluate import inspect, measure
from dbad.results import results_folder, run_summary
from dbad.runtime import pick_device, pick_precision


@dataclass(frozen=True, kw_only=True)
class InspectionOptions:
    """What is inspected, and what is written of it."""

    item_states: tuple[str, ...] = opt("folders of test/ to inspect, such as: good crack", ("all",),
                                       aliases=["--mvtec_item_states"])
    extractor_path: Path | None = opt("file of the adapted extractor (extractor.pt in the run folder)", None,
                                      aliases=["--save_to"])
    pxl_threshold: float | None = opt("pixel difference that counts as 1 in the anomaly map (calibrated)", None,
                                      aliases=["--pl_threshold"])
    feature_threshold: float | None = opt("feature difference that counts as 1 in the anomaly map (calibrated)", None,
                                          aliases=["--fl_threshold"])
    img_dir: Path = opt("folder in which every run has a folder of results", Path("results"))
    plt_imgs: bool = opt("also show the figures on the screen, half a second each, where there is one", False)
    shuffle: bool = opt("with --plt_imgs: show the images in a random order", False)


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions, InspectionOptions, ReconstructionOptions, MapOptions):
    """What shapes an inspection; saved as options.json beside its results."""


def run(options: Options) -> Path:
    """Inspect, and return the folder of the results."""
    folder = options.img_dir / (options.run_id or options.item)
    if options.dry_run:
        options = resolve(options, trained_options(options))
    else:
        calibration, options = settle(options)
    if not announce(options, folder / "scores.csv", folder / "metrics.json", folder / "report.html"):
        return folder
    detector = load(options, calibration)
    category = open_category(options, options.item_states)
    if not category.test:
        raise UserError(f"{category.root / 'test'}: no test images; expected folders such as good and crack")

    # Inspect the test images.
    inspections, seconds = inspect(detector, calibration, category.test, category.root.parent, options.num_workers)

    # Write scores, metrics and pictures.
    folder = results_folder(options.img_dir, options)
    metrics = measure(inspections, calibration) | {"seconds_per_image": seconds}
    thresholds = verdicts.Thresholds(calibration.image_threshold, calibration.pixel_threshold)
    found = verdicts.curves(inspections)
    report.write_scores(folder / "scores.csv", inspections)
    report.write_metrics(folder, metrics)
    panels = figures.write_panels(folder / "images", inspections, thresholds, options.num_workers)
    figures.write_overview(folder / "overview.png", inspections, thresholds)
    figures.write_curves(folder / "curves.png", inspections, thresholds, found)
    summary = run_summary(options, calibration, len(inspections), changed(options))
    report.write_report(folder / "report.html", inspections, metrics, summary, thresholds, found)
    if options.plt_imgs:
        figures.show(random.Random(options.seed).sample(panels, len(panels)) if options.shuffle else panels)
    print(headline(options.item, metrics, options.dataset_path is None))
    return folder


def settle(options: Options) -> tuple[Calibration, Options]:
    """The calibration in force, and the options completed from it.

    An option that was given and differs from what the run was calibrated with is an error, unless both thresholds
    are given too: they replace the calibration.
    """
    options = dataclasses.replace(options, run_id=options.run_id or options.item)
    given = {"pixel": options.pxl_threshold, "feature": options.feature_threshold}
    if None not in given.values():
        options = resolve(options, trained_options(options))
        settings = detector_settings(options, options.extractor_path or run_folder(options) / "extractor.pt")
        return Calibration(given, pixel_threshold=1.0, image_threshold=1.0, settings=settings), options

    folder = run_folder(options)
    if not trained_options(options):
        raise UserError(f"{folder}: no trained run; run train_ddim.py, train_extractor.py and evaluation.py first")
    calibration = load_calibration(folder / CALIBRATION)
    if any(given.values()):
        name = "feature_threshold" if given["feature"] is None else "pxl_threshold"
        raise UserError(f"--{name}: missing; expected both thresholds or, to use those of {folder / CALIBRATION}, none")
    check_digests(calibration, folder, options.diffusion_checkpoint_name)
    for name, calibrated in calibration.settings.items():
        value = getattr(options, name)
        if name == "extractor_path":
            calibrated = folder / calibrated
            value = value and (calibrated if value.resolve() == calibrated.resolve() else value)
        if value is not None and value != calibrated:
            raise UserError(f"--{name} {value}: {folder / CALIBRATION} was measured with {calibrated}; run "
                            f"evaluation.py with --{name} {value} first, or give both thresholds")
        if name != "extractor_path":
            options = dataclasses.replace(options, **{name: calibrated})
    return calibration, resolve(options, trained_options(options))


def load(options: Options, calibration: Calibration) -> DdimDetector:
    """The detector that the options and the calibration describe."""
    device = pick_device(options.device)
    return build_ddim(run_folder(options), options.diffusion_checkpoint_name, calibration.settings, device,
                      pick_precision(options.precision, device), options.batch_size, calibration)


def headline(item: str, metrics: dict, drawn: bool) -> str:
    """The result in one line."""
    parts = [f"{item}{' (drawn demo data)' if drawn else ''}: {metrics['num_images']} images"]
    if metrics["image"]:
        rates = metrics["image_rates"]
        parts += [f"image AUROC {metrics['image']['auroc']:.4f}",
                  f"missed {rates['fn']} of {rates['fn'] + rates['tp']} defective",
                  f"false alarms {rates['fp']} of {rates['fp'] + rates['tn']} good"]
    if metrics["pixel"]:
        parts += [f"pixel AUROC {metrics['pixel']['auroc']:.4f}", f"pixel AP {metrics['pixel']['ap']:.4f}",
                  f"AUPRO {metrics['pixel']['aupro_0.3']:.4f}"]
    if "reason" in metrics:
        parts.append(metrics["reason"])
    return ", ".join(parts)


if __name__ == "__main__":
    main(Options, lambda options: f"Scores, metrics, pictures and report.html are in {run(options)}", __doc__)
