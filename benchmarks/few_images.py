"""A part of a category, for benchmarks that ask whether everything works and not how well."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from dbad.data.categories import open_category
from dbad.data.demo import draw
from dbad.data.images import read_sample
from dbad.data.intensity import Intensity
from dbad.data.splits import some_of
from dbad.options.shared import RunOptions
from dbad.records import Sample

NUM_TRAIN, NUM_TEST = 64, 6     # good images to train on, and of the test; as many of one kind of defect


def take_few(item: str, dataset_path: Path, folder: Path, drawn: bool = False) -> None:
    """Write a few images of a category into `folder`, which is made anew, laid out as MVTec AD.

    Those of the test are good ones and ones of a single kind of defect. With `drawn` the data set is drawn first.
    """
    if drawn:
        draw.write_demo(dataset_path, (item,), num_train=NUM_TRAIN, num_test_good=NUM_TEST, num_per_defect=NUM_TEST)
    category = open_category(RunOptions(item=item, dataset_path=dataset_path))
    kinds = sorted({sample.defect for sample in category.test} - {"good"})
    shutil.rmtree(folder, ignore_errors=True)
    for split, kind, count in (("train", "good", NUM_TRAIN), ("test", "good", NUM_TEST), ("test", kinds[0], NUM_TEST)):
        samples = [sample for sample in getattr(category, split) if sample.defect == kind]
        for number, sample in enumerate(some_of(samples, count)):
            _copy(sample, folder / item, split, number)


def _copy(sample: Sample, folder: Path, split: str, number: int) -> None:
    """Copy an image of a category, and its mask if it has one, into a folder laid out as MVTec AD."""
    path = folder / split / sample.defect / f"{number:03d}{sample.path.suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(sample.path, path)
    if sample.mask is not None:
        _, mask = read_sample(sample, Intensity("full"))
        truth = folder / "ground_truth" / sample.defect / f"{number:03d}_mask.png"
        truth.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((np.asarray(mask.image) > 0).astype(np.uint8) * 255).save(truth)
