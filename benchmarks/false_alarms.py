"""Whether the promised false-alarm rate is kept: good images, split again and again.

    python -m benchmarks.false_alarms --out runs/false_alarms
    python -m benchmarks.false_alarms --out runs/false_alarms --dataset_path data/mvtec --item screw

Each category gets a model (`train_tune_eval.py --preset demo`), which has seen none of the images that are split: the
held-out and the good test images, for the demo data also freshly drawn ones. In every repeat some of them calibrate,
scales included, and the rest are new. Writes a row per repeat into splits.csv, and false_alarms.png over all categories
that splits.csv in --out has.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import trange

import train_tune_eval
from dbad.calibration.thresholds import calibrate, smallest_rate
from dbad.data.categories import open_category, split_category
from dbad.data.demo import draw as demo
from dbad.data.images import to_float, to_uint8
from dbad.families.ddim.detector import DdimDetector
from dbad.families.detector import load_detector
from dbad.files.atomic import atomic_write
from dbad.files.tables import read_table, write_table
from dbad.inspection.loop import walk

RATES = (0.05, 0.1, 0.2)
COLUMNS = ("category", "num_calibration", "num_new", "promised", "repeat", "false_alarms")


def trained(item: str, dataset_path: Path | None, out: Path, seed: int) -> train_tune_eval.Options:
    """Train and calibrate one category, if that was not done before; returns the options."""
    options = train_tune_eval.Options(
        item=item, dataset_path=dataset_path, preset="demo", seed=seed, run_id=item, log_dir=out / "logs",
        diffusion_checkpoint_dir=out / "checkpoints", img_dir=out / "results")
    train_tune_eval.run(replace(options, item=(item,)))
    return options


def good_parts(options: train_tune_eval.Options, detector: DdimDetector, num_fresh: int
               ) -> tuple[list[dict[str, Tensor]], int]:
    """The parts of all good images that training has not seen, and how many of them were held out."""
    category = open_category(options)
    _, held_out = split_category(category, 0.1)
    unseen = held_out + [sample for sample in category.test if sample.label == 0]
    parts = [found for _, found in walk(detector, unseen, 0, "good images")]
    for first in trange(0, num_fresh if options.dataset_path is None else 0, 10, desc="freshly drawn", unit="batch"):
        drawn = [demo.draw(options.item, "good", 1000 + first + i, split="test")[0] for i in range(10)]
        size = (detector.size, detector.size)
        images = [Image.fromarray(image).resize(size, Image.Resampling.BILINEAR) for image in drawn]
        found, _ = detector.parts(torch.stack([to_float(to_uint8(image)) for image in images]))
        parts += [{name: part[i:i + 1] for name, part in found.items()} for i in range(len(images))]
    return parts, len(held_out)


def splits(item: str, detector: DdimDetector, parts: Sequence[dict[str, Tensor]], repeats: int, seed: int
           ) -> list[list]:
    """Rows of splits.csv: each repeat calibrates with two thirds of the images, at most 50, and counts on the rest."""
    count, rng, rows = min(50, 2 * len(parts) // 3), np.random.default_rng(seed), []
    for repeat in trange(repeats, desc=f"{item}, splits"):
        order = rng.permutation(len(parts))
        known, new = ([parts[i] for i in part] for part in (order[:count], order[count:]))
        for rate in RATES:
            if rate < smallest_rate(count):
                continue
            calibration = calibrate(detector.combine, known, 0.999, rate)
            scores = [float(detector.combine(p, calibration.scales)[1]) for p in new]
            rows.append([item, count, len(new), rate, repeat, sum(map(calibration.decide, scores))])
    return rows


def draw(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """The share of false alarms per repeat, as boxes, with its mean and the promise."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["category"] for row in rows))
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axis, rate in zip(figure.subplots(1, len(RATES)), RATES, strict=True):
        shares = [[int(row["false_alarms"]) / int(row["num_new"]) for row in rows
                   if row["category"] == name and float(row["promised"]) == rate] for name in names]
        axis.boxplot(shares, whis=(5, 95), showfliers=False, showmeans=True, medianprops={"alpha": 0},
                     meanprops={"marker": "D", "markerfacecolor": "#2f6fb0", "markeredgecolor": "#2f6fb0"})
        axis.axhline(rate, color="#c8501e", linestyle="--")
        axis.set(title=f"promised: at most {rate:.0%}", ylabel="good images called defective", ylim=(-0.01, 0.5))
        axis.set_xticks(range(1, len(names) + 1), names, rotation=45, ha="right")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.supxlabel("diamond: mean; box: middle half; whiskers: 5 % and 95 % of the splits", fontsize=9)
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, format="png", dpi=110, metadata={"Software": None})


def table(rows: Sequence[dict[str, str]]) -> str:
    """Mean false-alarm rate per category and promise, beside the promise and its binomial error for so many images."""
    lines = ["| category | calibrated with | new | promised | mean | 5 % to 95 % of splits | promised + error | kept |",
             "|---|---|---|---|---|---|---|---|"]
    for name, rate in dict.fromkeys((row["category"], float(row["promised"])) for row in rows):
        of = [row for row in rows if row["category"] == name and float(row["promised"]) == rate]
        known, new = int(of[0]["num_calibration"]), int(of[0]["num_new"])
        shares = np.array([int(row["false_alarms"]) for row in of]) / new
        bound = rate + (rate * (1 - rate) / (known + new)) ** 0.5
        low, high = np.quantile(shares, [0.05, 0.95])
        lines.append(f"| {name} | {known} | {new} | {rate:.0%} | {shares.mean():.1%} | {low:.1%} to {high:.1%} | "
                     f"{bound:.1%} | {'yes' if shares.mean() <= bound else 'no'} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--item", nargs="+", default=list(demo.CATEGORIES), help="categories (default: the demo's)")
    parser.add_argument("--dataset_path", type=Path, help="folder of the categories (default: the built-in demo data)")
    parser.add_argument("--repeats", type=int, default=200, help="splits (default: 200)")
    parser.add_argument("--num_fresh", type=int, default=200, help="demo images to draw besides (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of training and splits (default: 0)")
    args = parser.parse_args(argv)
    path, rows = args.out / "splits.csv", []
    if path.is_file():
        rows = [list(row.values()) for row in read_table(path) if row["category"] not in args.item]
    for item in args.item:
        options = trained(item, args.dataset_path, args.out, args.seed)
        detector = load_detector(args.out / "checkpoints" / item, batch_size=16)
        parts, num_held_out = good_parts(options, detector, args.num_fresh)
        print(f"{item}: {len(parts)} good images that training has not seen, {num_held_out} of them held out")
        rows += splits(item, detector, parts, args.repeats, args.seed)
        write_table(path, COLUMNS, rows)
    records = [dict(zip(COLUMNS, map(str, row), strict=True)) for row in rows]
    draw(args.out / "false_alarms.png", records)
    print(table(records))


if __name__ == "__main__":
    main()
