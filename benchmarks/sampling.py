"""Accuracy against the number of U-Net calls per image, for both samplers.

    python -m benchmarks.sampling --item metal_plate --dataset_path data/mpdd --checkpoints runs/checkpoints --out runs

The category has to be trained (train_ddim.py, train_extractor.py). Everything but the number of steps and the sampler
is the preset's; the scales of the maps are measured anew for each. Adds its rows to sampling.csv in --out and draws
sampling.png over all categories that it has.
"""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import evaluation
from dbad import metrics
from dbad.calibration.thresholds import map_quantile
from dbad.data.categories import open_category, split_category, test_images
from dbad.data.images import read_items
from dbad.data.intensity import Intensity
from dbad.families.ddim.detector import DdimDetector, open_ddim
from dbad.families.ddim.options import DdimSettings, MapOptions, Reconstruction
from dbad.families.runs import trained_options
from dbad.fields import default_of, fields_of
from dbad.files.atomic import atomic_write
from dbad.files.tables import read_table, write_table
from dbad.options.resolve import resolve, run_folder
from dbad.options.shared import SeedOption
from dbad.runtime.device import Machine

CALLS = (1, 2, 3, 5, 10, 25)
COLUMNS = ("category", "sampler", "calls", "image_auroc", "aupro", "pixel_ap", "ms_per_image")


def detector_of(options: evaluation.Options, extractor_path: Path) -> DdimDetector:
    """With the preset's settings, not calibrated."""
    trained = trained_options(options, "ddim")
    options = resolve(options, trained)
    of_preset = {name: default_of(field, options.preset)
                 for name, field in fields_of(Reconstruction, MapOptions, SeedOption).items()}
    settings = DdimSettings.of(options, **of_preset, **Intensity.of(trained).settings(), patching=False,
                               extractor_path=Path(os.path.relpath(extractor_path, run_folder(options))))
    return open_ddim(run_folder(options), settings, Machine.of("auto", "auto", options.batch_size))


def measured(detector: DdimDetector, good: torch.Tensor, items: Sequence) -> tuple[float, float, float, float]:
    """Image AUROC, AUPRO, pixel AP and milliseconds per image of the test; `good` are held-out images."""
    held_out, _ = detector.parts(good)
    scales = {name: map_quantile([part.numpy()], 0.999) for name, part in held_out.items()}
    begun = time.monotonic()
    parts, _ = detector.parts(torch.stack([item.image for item in items]))
    seconds = time.monotonic() - begun
    maps, scores = detector.combine(parts, scales)
    masks = torch.stack([item.mask for item in items]).bool().numpy()
    pixel = metrics.pixel_metrics(masks[:, 0], maps[:, 0].numpy(), "exact")
    return (metrics.auroc([item.label for item in items], scores.numpy()), pixel["aupro_0.3"], pixel["ap"],
            1000 * seconds / len(items))


def draw(path: Path, rows: Sequence[Sequence]) -> None:
    """Image AUROC and AUPRO against the calls, a line per category and sampler."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row[0] for row in rows))}
    for axis, column, title in zip(figure.subplots(1, 2), (3, 4), ("image AUROC", "AUPRO"), strict=True):
        for (category, sampler) in dict.fromkeys((row[0], row[1]) for row in rows):
            found = np.array([[float(row[2]), float(row[column])] for row in rows if (row[0], row[1]) == (
                category, sampler)])
            axis.plot(*found.T, "o-" if sampler == "ddim" else "x--", color=colours[category], markersize=4,
                      label=f"{category}, {sampler}")
        axis.set(title=title, xlabel="U-Net calls per image", xscale="log", xticks=CALLS, xticklabels=CALLS)
        axis.minorticks_off()
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, format="png", dpi=110, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--item", required=True)
    parser.add_argument("--dataset_path", type=Path)
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder that holds the trained run")
    parser.add_argument("--out", type=Path, required=True, help="folder for sampling.csv and sampling.png")
    args = parser.parse_args(argv)
    options = evaluation.Options(item=args.item, dataset_path=args.dataset_path,
                                 diffusion_checkpoint_dir=args.checkpoints)
    detector = detector_of(options, run_folder(options) / "extractor.pt")
    category = open_category(options)
    trained = resolve(options, trained_options(options, "ddim"))
    _, held_out = split_category(category, trained.holdout)
    items = read_items(test_images(category, "required"), detector.size, intensity=detector.intensity)
    good = torch.stack([item.image for item in read_items(held_out, detector.size, intensity=detector.intensity)])
    path, rows = args.out / "sampling.csv", []
    if path.is_file():
        rows = [list(row.values()) for row in read_table(path) if row["category"] != args.item]
    for sampler in ("ddim", "dpm++"):
        for calls in CALLS if sampler == "ddim" else CALLS[2:]:     # with fewer, both are the same
            settings = replace(detector.settings, steps_to_regenerate=calls, sampler=sampler)
            detector = replace(detector, settings=settings)
            rows.append([args.item, sampler, calls, *measured(detector, good, items)])
            print("| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in rows[-1]) + " |")
            write_table(path, COLUMNS, rows)
    draw(args.out / "sampling.png", rows)


if __name__ == "__main__":
    main()
