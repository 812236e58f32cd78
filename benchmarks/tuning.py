"""What tuning by pseudo-anomalies is worth: fixed defaults, tuned settings, and the best ones in hindsight.

    python -m benchmarks.tuning --item screw --dataset_path data/mvtec --preset small --out runs/tuning

Trains the category, if that was not done before, and measures the test with the preset's settings, with those that
`evaluation.py --tune` chooses, and with those that the same search chooses when it is shown the test images with their
masks, at most 80 of each kind, evenly chosen. The last is for comparison only: it is what choosing by the test would
promise. Adds its rows to results.csv in --out and prints them as a table.
"""

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

import evaluation
import train_ddim
import train_extractor
from dbad.data.categories import open_category, split_category, test_images
from dbad.data.images import read_items
from dbad.data.splits import some_of
from dbad.families.ddim.options import DdimSettings, MapOptions, Reconstruction
from dbad.families.ddim.search import DdimSearch
from dbad.families.ddim.tuning import reference_of
from dbad.families.detector import load_detector
from dbad.families.runs import load_calibration
from dbad.families.search import PseudoValidation, network_images
from dbad.fields import fields_of
from dbad.files.names import CALIBRATION
from dbad.files.tables import read_table, write_table
from dbad.inspection.loop import Timed, inspect_samples
from dbad.metrics.measure import Measurement
from dbad.metrics.protocol import Protocol
from dbad.metrics.verdicts import Thresholds
from dbad.options.resolve import run_folder, subset
from train_tune_eval import Options

COLUMNS = ("category", "settings", "image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro", "missed",
           "false_alarms", "ms_per_image", "seconds_to_choose", "chosen")


def measured(options: Options, name: str, seconds: float) -> list:
    """The row of a calibrated run."""
    folder = run_folder(options)
    calibration = load_calibration(folder / CALIBRATION)
    category = open_category(options)
    samples = test_images(category, "required")
    measurement = Measurement(Thresholds(calibration.image_threshold, calibration.pixel_threshold), Protocol())
    with ThreadPoolExecutor(2) as pool:
        images = Timed(inspect_samples(load_detector(folder, options.device), samples, category.root.parent, pool))
        for image in images:
            decoded = image.decoded
            measurement.add(image.row, image.pictures().anomaly_map, decoded.mask, None, decoded.cut)
    found, _ = measurement.result()
    image, pixel, rates = found["image"], found["pixel"], found["image_rates"]
    shown = {key: calibration.settings[key] for key in ("recon_weight", "start_at_timestep", "steps_to_regenerate",
             "map_norm", "pixel_difference", "layer_weights", "pl_contrib", "fl_contrib", "blur_sigma", "top_share")}
    return [options.item, name, image["auroc"], image["ap"], pixel["auroc"], pixel["ap"], pixel["aupro_0.3"],
            f"{rates['fn']} of {rates['fn'] + rates['tp']}", f"{rates['fp']} of {rates['fp'] + rates['tn']}",
            1000 * images.seconds / len(samples), seconds, " ".join(f"{key}={value}" for key, value in shown.items())]


def in_hindsight(options: Options) -> DdimSettings:
    """The settings that are best on the test."""
    detector = load_detector(run_folder(options), options.device)
    category = open_category(options)
    train, _ = split_category(category, options.holdout or 0.1)
    items = read_items(test_images(category, "required"), detector.size, intensity=detector.intensity)
    good, bad = (some_of([item for item in items if item.label == label], 80) for label in (0, 1))
    images = PseudoValidation(
        torch.stack([item.image for item in good]), torch.stack([item.image for item in bad]),
        torch.stack([item.mask for item in bad]), network_images(detector, reference_of(train)))
    return DdimSearch(detector, images).run().settings


def table(rows: Sequence[Sequence]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(COLUMNS[:-1]) + " |", "|" + "---|" * (len(COLUMNS) - 1)]
    for row in rows:
        cells = [f"{float(v):.3f}" if i in range(2, 7) else f"{float(v):.0f}" if i in (9, 10) else str(v)
                 for i, v in enumerate(row[:-1])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--item", required=True)
    parser.add_argument("--dataset_path", type=Path)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--steps_diffusion", type=int, help="length of the training (default: the preset's)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    options = Options(
        item=args.item, dataset_path=args.dataset_path, preset=args.preset, steps_diffusion=args.steps_diffusion,
        seed=args.seed, diffusion_checkpoint_dir=args.out / "checkpoints", log_dir=args.out / "logs", tune=False)
    train_ddim.run(subset(train_ddim.Options, options))
    train_extractor.run(subset(train_extractor.Options, options))
    path, rows = args.out / "results.csv", []
    if path.is_file():
        rows = [list(row.values()) for row in read_table(path) if row["category"] != args.item]
    for name in ("fixed", "tuned", "in hindsight"):
        begun = time.monotonic()
        chosen = in_hindsight(options) if name == "in hindsight" else None
        changes = {key: getattr(chosen, key) for key in fields_of(Reconstruction, MapOptions)} if chosen else {}
        calibrating = replace(subset(evaluation.Options, options), tune=name == "tuned", **changes)
        evaluation.run(calibrating)
        rows.append(measured(options, name, time.monotonic() - begun))
        write_table(path, COLUMNS, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
