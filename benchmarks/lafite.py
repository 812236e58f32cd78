"""What each score of the LafitE family is worth: the ablation of docs/lafite.md.

    python -m benchmarks.lafite --item screw --dataset_path data/mvtec --out runs/lafite --seeds 0 1 2

Trains the categories, if that was not done before, and measures the test with each score alone and with the fused one
that pseudo-validation chose. Other settings are those of the run. "without diffusion" is the fused score with a
discriminator that has been taught likewise, but is told nothing that the denoiser says. Adds its rows to lafite.csv in
--out and prints the table of all that it has, means over the seeds with their spread.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import train_lafite
from dbad import metrics
from dbad.data.categories import open_category, split_category, test_images
from dbad.data.images import read_items
from dbad.families.detector import load_detector
from dbad.families.lafite.detector import FeatureDetector, LookedUp
from dbad.families.lafite.discriminator import Discriminator, train_discriminator
from dbad.families.lafite.lessons import NUM_TAUGHT, prepare_lessons, set_aside, without
from dbad.families.lafite.model import HIDDEN, Context
from dbad.families.lafite.options import PARTS
from dbad.families.lafite.training import read_good
from dbad.files.tables import read_table, write_table

BLIND = "fused, discriminator without diffusion"
NUM_TIMED = 32      # images
ERRORS = len(HIDDEN) * len(Context._fields)     # the last of what a discriminator is told, from the denoiser
ALONE = dict.fromkeys((f"{part}_contrib" for part in PARTS), 0.0) | {"context_power": 0.0}
VARIANTS = {
    "knn": ALONE | {"knn_contrib": 1.0}, "edit only": ALONE | {"edit_contrib": 1.0},
    "denoise, not edited": ALONE | {"denoise_contrib": 1.0, "editing": False},
    "denoise, edited": ALONE | {"denoise_contrib": 1.0, "editing": True},
    "inversion": ALONE | {"inversion_contrib": 1.0},
    "edit, power 0.5": ALONE | {"edit_contrib": 1.0, "context_power": 0.5},
    "discriminator": ALONE | {"discriminator_contrib": 1.0}, "fused": {}, BLIND: {},
}
COLUMNS = ("category", "model", "seed", "score", "image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro",
           "ms_per_image")


def look_up(detector: FeatureDetector, images: torch.Tensor) -> list[LookedUp]:
    """What is the same whichever score is measured."""
    batches = images.split(detector.machine.batch_size)
    return [detector.look_up(batch, judged=True) for batch in tqdm(batches, desc="looking up", unit="batch")]


def parts_of(detector: FeatureDetector, known: Sequence[LookedUp]) -> dict[str, torch.Tensor]:
    """Maps (N, 1, S, S) of the parts that count, as `detector.parts` gives them."""
    found = []
    for batch in known:
        distances = detector.relative(detector.compare(batch, detector.settings.contributions), batch.context)
        found.append(detector.blurred({name: part.cpu() for name, part in distances.items()}))
    return {name: torch.cat([parts[name] for parts in found]) for name in found[0]}


def measured(detector: FeatureDetector, good: Sequence[LookedUp], tested: Sequence[LookedUp],
             items: Sequence) -> list[float]:
    """AUROC and AP of images, AUROC, AP and AUPRO of pixels, milliseconds per image; `good` scales the parts."""
    scales = {name: float(np.quantile(part.numpy(), 0.999)) for name, part in parts_of(detector, good).items()}
    maps, scores = detector.combine(parts_of(detector, tested), scales)
    labels = [item.label for item in items]
    masks = torch.stack([item.mask for item in items]).bool().numpy()
    pixel = metrics.pixel_metrics(masks[:, 0], maps[:, 0].numpy(), "exact")
    image = metrics.image_metrics(np.array(labels), scores.numpy())
    timed = torch.stack([item.image for item in items[:NUM_TIMED]])
    begun = time.monotonic()
    detector.combine(detector.parts(timed)[0], scales)
    return [image["auroc"], image["ap"], pixel["auroc"], pixel["ap"], pixel["aupro_0.3"],
            1000 * (time.monotonic() - begun) / len(timed)]


class Blind(nn.Module):
    """A discriminator that is told nothing of what a denoiser makes of the surroundings."""

    def __init__(self, judge: Discriminator):
        super().__init__()
        self.judge = judge

    def surprise(self, evidence: torch.Tensor) -> torch.Tensor:
        return self.judge.surprise(evidence[:, :-ERRORS])


def blind_judge(detector: FeatureDetector, name: str, options: train_lafite.Options) -> Blind:
    """Taught by the same pseudo-anomalies as the discriminator of a category alone."""
    options = train_lafite.resolve_all(options)
    good = {name: read_good(name, detector.space.patches, options, detector.machine.device, detector.intensity)}
    aside = {name: set_aside(len(good[name].train), 1.0)}
    lesson = prepare_lessons(without(detector, aside, good, options.bank_mb), good, aside, NUM_TAUGHT, 1)[name]
    known = tuple(each[:, :-ERRORS] for each in lesson.evidence)
    return Blind(train_discriminator(*known, lesson.shares, options.seed))


def table(rows: Sequence[Sequence]) -> str:
    """Markdown; over several seeds means and, behind them, the largest less the smallest."""
    lines = ["| " + " | ".join(name for name in COLUMNS if name != "seed") + " |",
             "|" + "---|" * (len(COLUMNS) - 1)]
    for key in dict.fromkeys((row[0], row[1], row[3]) for row in rows):
        found = [[float(v) for v in row[4:]] for row in rows if (row[0], row[1], row[3]) == key]
        cells = [f"{statistics.fmean(values):.{0 if number == 5 else 3}f}"
                 + (f" ±{(max(values) - min(values)) / 2:.3f}" if len(values) > 1 and number < 5 else "")
                 for number, values in enumerate(zip(*found, strict=True))]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--item", required=True, nargs="+", help="categories of one model")
    parser.add_argument("--dataset_path", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for models and lafite.csv")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--scores", choices=VARIANTS, nargs="+", default=list(VARIANTS), help="what is measured")
    parser.add_argument("--prediction", choices=("x0", "v", "epsilon"))
    parser.add_argument("--steps_features", type=int)
    args = parser.parse_args(argv)
    path, rows = args.out / "lafite.csv", []
    if path.is_file():
        rows = [list(row.values()) for row in read_table(path)]
    model = "-".join(args.item) + f", {args.prediction}" * bool(args.prediction)
    for seed in args.seeds:
        options = train_lafite.Options(
            item=tuple(args.item), dataset_path=args.dataset_path, seed=seed, prediction=args.prediction,
            steps_features=args.steps_features, run_id=f"{model.replace(', ', '-')}-seed{seed}",
            diffusion_checkpoint_dir=args.out / "checkpoints", log_dir=args.out / "logs")
        folder = train_lafite.run(options)
        for item in args.item:
            detector = load_detector(folder, category=item)
            category = open_category(replace(options, item=item))
            items = read_items(test_images(category, "required"), detector.size, intensity=detector.intensity)
            _, held_out = split_category(category, 0.1)
            good, tested = (look_up(detector, torch.stack([each.image for each in part]))
                            for part in (read_items(held_out, detector.size, intensity=detector.intensity), items))
            rows = [row for row in rows if (row[0], row[1], int(row[2])) != (item, model, seed)
                    or row[3] not in args.scores]
            for name in args.scores:
                variant = replace(detector, settings=replace(detector.settings, **VARIANTS[name]))
                if name == BLIND:
                    variant = replace(variant, judge=blind_judge(detector, item, options))
                rows.append([item, model, seed, name, *measured(variant, good, tested, items)])
                print(rows[-1], flush=True)
            write_table(path, COLUMNS, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
