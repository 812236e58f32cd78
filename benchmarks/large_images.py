"""Large images: what tiles find that resizing loses, the memory they need, and whether their grid shows.

    python -m benchmarks.large_images demo --out runs/large
    python -m benchmarks.large_images dataset --item screw --dataset_path data/mvtec --out runs/large
    python -m benchmarks.large_images memory --out runs/large
    python -m benchmarks.large_images seams --item carpet --out runs/large

`demo` draws 1024 px images with defects of about 8 px and compares two models: one is shown tiles of full-resolution
images (--patching), the other whole images resized. Network, training steps and all settings are the same, the
extractor keeps its ImageNet weights, and maps are compared with masks at the size of the files. The denoising, one
step from timestep 50, was chosen on the drawings of --seed 1. `dataset` does the same on photographs. `memory`
inspects one large image in a fresh process. `seams` looks for the grid of tiles in the mean map of good test images,
for the trained tiles and, as a check that a grid would be found, for tiles without overlap (next to none, where whole
tiles do not fill the image). Every part adds its rows to a CSV file in --out and prints them.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import train_tune_eval
from benchmarks.seams import draw_maps, measure_seams
from dbad.calibration.thresholds import Calibration
from dbad.data.categories import open_category, test_images
from dbad.data.demo import draw
from dbad.data.images import read_items
from dbad.data.tiling import tile_places
from dbad.diffusion.ddim import schedule
from dbad.errors import UserError
from dbad.families.ddim.detector import DdimDetector
from dbad.families.ddim.options import DdimSettings
from dbad.families.ddim.reconstruct import Denoiser
from dbad.families.ddim.training import new_network
from dbad.families.detector import load_detector
from dbad.files.atomic import read_json
from dbad.files.tables import read_table, write_table
from dbad.networks.extractors import EMBEDDED, build_extractor
from dbad.options.resolve import resolve, run_folder
from dbad.records import Sample
from dbad.runtime.device import Machine
from dbad.runtime.failures import one_line_failures

DEFECT_PX = 8.0
COUNTS = (20, 10, 7)        # drawn images to train on, good ones to test, and of each of three defects
LIMIT_GB = 3.0
COMPARED = ("category", "images", "network_px", "steps", "seed", "image_auroc", "image_ap", "aupro", "pixel_ap",
            "pixel_auroc", "ms_per_image")
MEMORY = ("side", "batch_size", "tile", "tiles", "seconds", "peak_gb", "before_gb")
SEAMS = ("category", "overlap", "good_images", "period_px", "border_ratio", "expected", "p_value", "energy_ratio",
         "usual_energy")


# ------------------------------------------------------------------------------------------ tiles or resizing

def data_folder(args: argparse.Namespace) -> Path:
    """The given data set, or else where the images of this seed are drawn."""
    return getattr(args, "dataset_path", None) or args.out / "data" / f"seed{args.seed}"


def run_id(args: argparse.Namespace, patching: bool) -> str:
    """The name of a run's folders."""
    return f"{args.item}-{'tiles' if patching else 'resized'}-seed{args.seed}"


def options_of(args: argparse.Namespace, patching: bool) -> train_tune_eval.Options:
    """A run on tiles or on resized images; the two differ in nothing else."""
    return train_tune_eval.Options(
        item=(args.item,), dataset_path=data_folder(args), preset="demo", patching=patching, resolution=args.resolution,
        steps_diffusion=args.steps_diffusion, seed=args.seed, holdout=0.2, save_n_epochs=args.steps_diffusion,
        start_at_timestep=args.start_at_timestep, steps_to_regenerate=args.steps_to_regenerate, epochs_extractor=0,
        tune=False, eval_resolution="original", run_id=run_id(args, patching),
        diffusion_checkpoint_dir=args.out / "checkpoints", img_dir=args.out / "results", log_dir=args.out / "logs")


def compare(args: argparse.Namespace) -> None:
    """Train and measure both ways; a model that is there already is not trained again."""
    if args.part == "demo":
        draw.write_demo(data_folder(args), (args.item,), args.side, *COUNTS, args.seed, DEFECT_PX)
    for patching in (True, False):
        metrics = read_json(train_tune_eval.run(options_of(args, patching)) / "metrics.json")
        image, pixel = metrics["image"], metrics["pixel"]
        record(args.out / "compared.csv", COMPARED, 5, [[
            args.item, "tiles" if patching else "resized", args.resolution, args.steps_diffusion, args.seed,
            image["auroc"], image["ap"], pixel["aupro_0.3"], pixel["ap"], pixel["auroc"],
            1000 * metrics["seconds_per_image"]]])


# ------------------------------------------------------------------------------------------ memory

def random_detector(batch_size: int) -> DdimDetector:
    """The preset demo with random weights, working in tiles, with one denoising step."""
    options = resolve(train_tune_eval.Options(item="carpet", preset="demo", patching=True, steps_to_regenerate=1))
    torch.manual_seed(0)
    return DdimDetector(
        settings=DdimSettings.of(options), machine=Machine.of("cpu", "auto", batch_size),
        denoiser=Denoiser(new_network(options), schedule(1000, "linear")),
        extractor=build_extractor(EMBEDDED, resolution=options.feature_resolution),
        calibration=Calibration({"pixel": 1.0, "feature": 1.0}, 1.0, 1.0))


def predict(side: int, batch_size: int) -> list:
    """The row of one image of `side` px, (side, side, 3) uint8 as from a camera, inspected in this process."""
    detector = random_detector(batch_size)
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    before, begun = peak_gb(), time.monotonic()
    prediction = detector(image)
    seconds = time.monotonic() - begun
    if prediction.anomaly_map.shape != (side, side) or not np.isfinite(prediction.anomaly_map).all():
        raise RuntimeError(f"anomaly map {prediction.anomaly_map.shape} of an image of {side} px")
    tiles = tile_places(side, side, detector.size, detector.settings.tile_overlap)
    return [side, batch_size, detector.size, len(tiles), seconds, peak_gb(), before]


def peak_gb() -> float:
    """The most memory this process has had, in GB of 10^9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def memory(args: argparse.Namespace) -> None:
    """Inspect one image per batch size, each in a new process."""
    rows = []
    for batch_size in args.batch_size:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(predict, args.side, batch_size).result())
        record(args.out / "memory.csv", MEMORY, 2, rows[-1:])
    worst = max(row[5] for row in rows)
    print(f"at most {worst:.2f} GB, {'below' if worst < LIMIT_GB else 'NOT below'} {LIMIT_GB:g} GB")


# ------------------------------------------------------------------------------------------ seams

def mean_map(detector: DdimDetector, samples: Sequence[Sample]) -> np.ndarray:
    """Mean anomaly map (H, W) of images of one size."""
    total = 0.0
    for sample in samples:
        image = read_items([sample], None, intensity=detector.intensity)[0].image[None]
        found = detector.combine(detector.parts(image)[0], detector.calibration.scales)[0][0, 0].numpy()
        if np.ndim(total) and total.shape != found.shape:
            raise UserError(f"{sample.path}: of another size than the images before; a mean map needs images of one")
        total = total + found.astype(np.float64)
    return total / len(samples)


def seams(args: argparse.Namespace) -> None:
    """Measure the mean map of good test images under the run's own overlap and under none."""
    options = train_tune_eval.Options(item=args.item, dataset_path=data_folder(args),
                                      run_id=run_id(args, patching=True),
                                      diffusion_checkpoint_dir=args.out / "checkpoints")
    detector = load_detector(run_folder(options), batch_size=16)
    good = [sample for sample in test_images(open_category(options)) if sample.label == 0][:args.num_images]
    rows, maps, own = [], [], detector.settings.tile_overlap
    for overlap in dict.fromkeys((own, 0.0)):
        detector = replace(detector, settings=replace(detector.settings, tile_overlap=overlap))
        maps.append(mean_map(detector, good))
        found = measure_seams(maps[-1], detector.size, overlap, seed=args.seed)
        rows.append([args.item, overlap, len(good), found.period[0], found.border, found.expected, found.p_value,
                     found.energy, found.usual])
        record(args.out / "seams.csv", SEAMS, 2, rows[-1:])
    titles = [f"overlap {row[1]:g}: tile borders / elsewhere {row[4]:.3f}, by chance {row[5]:.3f}, p = {row[6]:.3f}"
              for row in rows]
    draw_maps(args.out / f"seams-{args.item}-seed{args.seed}.png", maps, titles, detector.size)


# ------------------------------------------------------------------------------------------ tables, command line

def record(path: Path, columns: Sequence[str], num_keys: int, rows: Sequence[Sequence]) -> None:
    """Print rows and add them to a CSV file, in place of those whose first `num_keys` values are the same."""
    keys, kept = {tuple(map(str, row[:num_keys])) for row in rows}, []
    if path.is_file():
        kept = [row for row in (list(found.values()) for found in read_table(path))
                if tuple(row[:num_keys]) not in keys]
    write_table(path, columns, [*kept, *rows])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row) + " |")
    print("\n".join(lines), flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line; every part has its own --help."""
    whole = argparse.ArgumentParser(prog="python -m benchmarks.large_images", description=__doc__,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = whole.add_subparsers(dest="part", required=True)
    demo_, dataset, memory_, seams_ = (
        parts.add_parser(name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for name, help in (("demo", "tiles against resizing, on drawn images"),
                           ("dataset", "tiles against resizing, on a category of a data set"),
                           ("memory", "memory and time of one large image"),
                           ("seams", "look for the grid of tiles in the mean map of good images")))
    for part in (demo_, dataset, memory_, seams_):
        part.add_argument("--out", type=Path, required=True, help="folder for models and results")
    for part in (demo_, dataset, seams_):
        part.add_argument("--item", required=part is not demo_, default="carpet", help="category")
        part.add_argument("--seed", type=int, default=0, help="every random number follows from it")
    dataset.add_argument("--dataset_path", type=Path, required=True, help="folder of the categories")
    seams_.add_argument("--dataset_path", type=Path, help="folder of the categories; None: what `demo` has drawn")
    seams_.add_argument("--num_images", type=int, default=10, help="good test images, at most")
    demo_.add_argument("--side", type=int, default=1024, help="of the drawn images, in px")
    for part in (demo_, dataset):
        part.add_argument("--resolution", type=int, default=128, help="of the network: side of a tile, or of an image")
        part.add_argument("--steps_diffusion", type=int, default=150, help="length of the training")
        part.add_argument("--start_at_timestep", type=int, default=50, help="where denoising starts")
        part.add_argument("--steps_to_regenerate", type=int, default=1, help="denoising steps")
    memory_.add_argument("--side", type=int, default=4096, help="of the image, in px")
    memory_.add_argument("--batch_size", type=int, nargs="+", default=[1, 8, 32], help="tiles at once")
    return whole


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    with one_line_failures():
        {"demo": compare, "dataset": compare, "memory": memory, "seams": seams}[args.part](args)


if __name__ == "__main__":
    main()
