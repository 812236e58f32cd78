"""The demo categories from scratch, several seeds: accuracy, time and memory, beside a baseline that needs no model.

    python -m benchmarks.demo --out runs/demo
    python -m benchmarks.demo --out runs/demo --item pcb --seeds 0

The baseline scores an image by max |x - mean training image|. Prints a Markdown table; a run that is there already is
not repeated, but its minutes and memory are then those recorded when it was made.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from dbad import metrics
from dbad.data.categories import find_category
from dbad.data.demo import draw
from dbad.data.images import read_images
from dbad.report.results import commit

SCRIPT = Path(__file__).parents[1] / "train_tune_eval.py"


def baseline(item: str, size: int = 64) -> float:
    """Image AUROC of max |x - mean training image| over pixels and colours, at `size` px."""
    category = find_category(draw.write_demo(draw.demo_root(), (item,)), item)
    train, test = (torch.stack(read_images(samples, size)).float() for samples in (category.train, category.test))
    return metrics.auroc(np.array([s.label for s in category.test]),
                         (test - train.mean(0)).abs().flatten(1).amax(1).numpy())


def run(item: str, seed: int, out: Path) -> dict:
    """One run of the main command in a folder of its own; returns its metrics, minutes and peak memory."""
    folder = out / f"{item}-{seed}"
    record = folder / "record.json"
    if not record.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        with open(folder / "output.txt", "w") as output:
            process = subprocess.Popen([sys.executable, SCRIPT, "--item", item, "--seed", str(seed)], cwd=folder,
                                       stdout=output, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{item}, seed {seed} failed; see {folder / 'output.txt'}")
        found = json.loads((folder / "results" / item / "metrics.json").read_text())
        record.write_text(json.dumps(found | {"minutes": (time.monotonic() - begun) / 60,
                                              "gigabytes": usage.ru_maxrss / 2 ** 20}))
    return json.loads(record.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--item", nargs="+", default=list(draw.CATEGORIES), help="demo categories")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    print(f"commit {commit()}, {torch.get_num_threads()} threads\n")
    print("| category | seed | image AUROC | baseline | image AP | pixel AUROC | pixel AP | AUPRO | "
          "missed | false alarms | minutes | GB |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for item in options.item:
        without_model = baseline(item)
        for seed in options.seeds:
            r = run(item, seed, options.out)
            rates = r["image_rates"]
            print(f"| {item} | {seed} | {r['image']['auroc']:.3f} | {without_model:.3f} | {r['image']['ap']:.3f} | "
                  f"{r['pixel']['auroc']:.3f} | {r['pixel']['ap']:.3f} | {r['pixel']['aupro_0.3']:.3f} | "
                  f"{rates['fn']} of {rates['fn'] + rates['tp']} | {rates['fp']} of {rates['fp'] + rates['tn']} | "
                  f"{r['minutes']:.1f} | {r['gigabytes']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
