"""What adapting the extractor changes: no adaptation against each objective, with the same diffusion model.

    python -m benchmarks.objectives --item screw --dataset_path data/mvtec --checkpoints runs/checkpoints --out runs

The category has to be trained (train_ddim.py). Settings are the preset's; the scales of the maps are measured anew for
each extractor. Adds its rows to objectives.csv in --out and prints them.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import evaluation
import train_extractor
from benchmarks.sampling import detector_of, measured
from dbad.data.categories import open_category, split_category, test_images
from dbad.data.images import read_items
from dbad.families.runs import trained_options
from dbad.files.tables import read_table, write_table
from dbad.networks.extractors import load_extractor
from dbad.options.resolve import resolve

COLUMNS = ("category", "objective", "epochs", "image_auroc", "aupro", "pixel_ap", "seconds")


def adapted(args: argparse.Namespace, objective: str, epochs: int) -> Path:
    """The file of the extractor, adapted if that was not done before."""
    path = args.out / "extractors" / f"{args.item}-{objective}-{epochs}.pt"
    if not path.is_file():
        train_extractor.run(train_extractor.Options(
            item=args.item, dataset_path=args.dataset_path, diffusion_checkpoint_dir=args.checkpoints,
            extractor_path=path, objective=None if objective == "none" else objective, epochs_extractor=epochs,
            resume=False, log_dir=args.out / "logs"))
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--item", required=True)
    parser.add_argument("--dataset_path", type=Path)
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder that holds the trained run")
    parser.add_argument("--out", type=Path, required=True, help="folder for objectives.csv and the extractors")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 8], help="epochs at most; it may stop earlier")
    args = parser.parse_args(argv)
    options = evaluation.Options(item=args.item, dataset_path=args.dataset_path,
                                 diffusion_checkpoint_dir=args.checkpoints)
    category = open_category(options)
    _, held_out = split_category(category, resolve(options, trained_options(options, "ddim")).holdout)
    path, rows = args.out / "objectives.csv", []
    if path.is_file():
        rows = [list(row.values()) for row in read_table(path) if row["category"] != args.item]
    detector = items = good = None
    for objective, epochs in [("none", 0)] + [(name, epochs) for name in ("autoencoder", "reconstruction", "ddad")
                                              for epochs in args.epochs]:
        begun = time.monotonic()
        extractor_path = adapted(args, objective, epochs)
        seconds = time.monotonic() - begun
        if detector is None:
            detector = detector_of(options, extractor_path)
            items, held = (read_items(samples, detector.size, intensity=detector.intensity)
                           for samples in (test_images(category, "required"), held_out))
            good = torch.stack([item.image for item in held])
        detector = replace(detector, extractor=load_extractor(extractor_path))
        rows.append([args.item, objective, epochs, *measured(detector, good, items)[:3], seconds])
        print("| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in rows[-1]) + " |", flush=True)
        write_table(path, COLUMNS, rows)


if __name__ == "__main__":
    main()
