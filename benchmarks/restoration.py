"""How well denoisers restore damage that they were not trained on: a table of networks and ways to reconstruct.

    python train_ddim.py --item hazelnut --run_id a --train_on damage --damage_kinds cut_paste scar stain
    python -m benchmarks.restoration --item hazelnut --runs a --kinds scratch missing texture

Damage of the kinds is drawn on held-out good images. The figures are medians over the images: the share of the damage
that is gone, and the mean error elsewhere in levels of 255; see dbad/metrics/restoration.py.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from dbad.damage.foreground import as_picture
from dbad.damage.pseudo import KINDS, draw_on, generator
from dbad.data.categories import open_category, split_category
from dbad.data.images import read_images, to_float
from dbad.data.splits import some_of
from dbad.errors import UserError
from dbad.families.ddim.detector import open_denoiser
from dbad.families.ddim.options import Reconstruction
from dbad.families.ddim.reconstruct import reconstruct_all
from dbad.files.atomic import write_json
from dbad.metrics.restoration import by_kind, restorations, typical
from dbad.options.shared import RunOptions
from dbad.runtime.device import Machine

WAYS = [(8, 50, 1), (2, 250, 3), (0, 50, 1), (0, 100, 1), (0, 250, 1), (0, 250, 3), (1, 250, 3)]     # w, start, steps
PLAIN = Reconstruction(conditioning="ddad", recon_weight=0.0, eta=0.0, start_at_timestep=250, steps_to_regenerate=1,
                       sampler="ddim")


def damaged(images, names, kinds, seed: int):
    """One pseudo-anomaly of each kind on each image, (good, drawn)."""
    pictures = [as_picture(image) for image in images]
    good, drawn = [], []
    for image, name, picture in zip(images, names, pictures, strict=True):
        for kind in kinds:
            try:
                drawn.append(draw_on(image, picture, kind, generator(seed, name, 0, kind), pictures))
            except UserError:       # it cannot be seen on this image
                continue
            good.append(image)
    return torch.stack(good), drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--item", required=True)
    parser.add_argument("--dataset_path", type=Path)
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument("--runs", nargs="+", required=True, help="run folders in --checkpoints")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--num_images", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    options = RunOptions(item=args.item, dataset_path=args.dataset_path, intensity="auto", seed=args.seed)
    _, held_out = split_category(open_category(options), 0.1)
    samples, rows, machine = some_of(held_out, args.num_images), [], Machine.of(args.device, "auto", 16)
    print(f"{len(samples)} images, kinds {' '.join(args.kinds)}; {machine.device.type}, {machine.precision}")
    print("run, w, start, steps: gone (by kind), elsewhere")
    for run in args.runs:
        denoiser = open_denoiser(args.checkpoints / run, "final.pt")
        size = int(denoiser.unet.config["sample_size"])
        images = to_float(torch.stack(read_images(samples, size)))
        good, drawn = damaged(images, [sample.path.name for sample in samples], args.kinds, args.seed)
        y, masks = (torch.stack([getattr(one, name) for one in drawn]) for name in ("image", "mask"))
        denoiser.unet.to(machine.device).eval()
        for weight, start, steps in WAYS:
            how = replace(PLAIN, recon_weight=float(weight), start_at_timestep=start, steps_to_regenerate=steps)
            found = reconstruct_all(denoiser, y, how, machine, args.seed)
            each = restorations(found, good, y, masks)
            kinds = by_kind(each, [one.kind for one in drawn])
            rows.append({"run": run, "w": weight, "start": start, "steps": steps, **typical(each)._asdict(),
                         "by_kind": {kind: one._asdict() for kind, one in kinds.items()}})
            shown = ", ".join(f"{kind} {one.gone:.2f}" for kind, one in kinds.items())
            middle = typical(each)
            print(f"{run}, {weight}, {start}, {steps}: {middle.gone:.2f} ({shown}), {middle.elsewhere:.1f}")
    if args.out:
        write_json(args.out, rows)


if __name__ == "__main__":
    main()
