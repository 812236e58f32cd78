"""What pseudo-anomalies teach a detector of the LafitE family: its discriminators, and its settings.

They are drawn on training images that are set aside, and looked at with a memory bank that has none of these: patches
that a bank holds are at no distance, as no new one ever is. Settings are chosen with what discriminators say of images
that they have not been taught by: there are two of them, each taught by one half of the images, for that alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dbad.data.images import to_float
from dbad.data.splits import some_of
from dbad.families.ddim.search import PseudoValidation, pseudo_validation
from dbad.families.lafite.bank import Bank, build_bank
from dbad.families.lafite.detector import FeatureDetector, FeatureSettings
from dbad.families.lafite.discriminator import Discriminator, train_discriminator
from dbad.families.lafite.search import FeatureSearch, best_on_average, changes, write_feature_trials
from dbad.files.names import CATEGORY_DISCRIMINATOR, CATEGORY_TUNING, DISCRIMINATOR, TUNING
from dbad.records import Sample
from dbad.report.results import listed

NUM_ASIDE = 40      # good images that are damaged, at most a third of a category's; shared by several categories, with
LEAST_ASIDE = 20    # so many at least for each
NUM_TAUGHT = 640    # pseudo-anomalies on them that a discriminator learns from, likewise; settings are chosen by fewer


@dataclass(frozen=True)
class Good:
    """The good images of a category, to train on and held out, and their features (N, C, G, G) float16."""

    train: list[Sample]
    held_out: list[Sample]
    pixels: list[Tensor]
    train_features: np.ndarray
    held_out_features: np.ndarray

    def images(self, numbers: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Training images (N, 3, S, S) in [-1, 1] and the names of their files."""
        return (to_float(torch.stack([self.pixels[number] for number in numbers])),
                [self.train[number].path.name for number in numbers])


@dataclass(frozen=True)
class Lesson:
    """What is known of pseudo-anomalies on good images of a category, image by image.

        shown      the good images, and of each the first of its pseudo-anomalies, to choose settings by
        places     of these among all pseudo-anomalies
        shares     of the pixels that are damaged, around every patch, (M, 1, 2G, 2G)
        evidence   of good images (N, P, G, G) and of all damaged ones (M, P, G, G), see `discriminator`; None
                   where there is no discriminator
    """

    shown: PseudoValidation
    places: Tensor
    shares: Tensor
    evidence: tuple[Tensor, Tensor] | None

    @property
    def per_image(self) -> int:
        return len(self.shares) // len(self.shown.good)

    def taught(self, images: Tensor, seed: int) -> Discriminator:
        """A discriminator that knows the images where `images` (N,) is true."""
        good, damaged = self.evidence
        rows = images.repeat_interleave(self.per_image)
        return train_discriminator(good[images], damaged[rows], self.shares[rows], seed)

    def surprises(self, seed: int) -> dict[str, Tensor]:
        """What is said of the images that are shown, good and damaged, by who knows the other half of them."""
        half = torch.arange(len(self.shown.good)) % 2 == 0
        rows = half.repeat_interleave(self.per_image)
        maps = tuple(torch.empty_like(known[:, :1]) for known in self.evidence)
        for asked, damaged in ((half, rows), (~half, ~rows)):
            if asked.any():
                judge = self.taught(asked if asked.all() else ~asked, seed)     # one image alone is known to it
                maps[0][asked], maps[1][damaged] = (judge.surprise(known[part]) for known, part in zip(
                    self.evidence, (asked, damaged), strict=True))
        return {"good": maps[0], "pseudo": maps[1][self.places]}


def first_of_each(images: int, per_image: int, count: int) -> Tensor:
    """Places of the first pseudo-anomalies of every image, about `count` in all."""
    each = min(per_image, math.ceil(count / images))
    return (torch.arange(images * per_image) % per_image < each).nonzero()[:, 0]


def set_aside(count: int, share: float) -> list[int]:
    """Numbers of the training images, of `count`, that are damaged; `share` is that of a category in `NUM_ASIDE`."""
    return list(some_of(range(count), min(math.ceil(share * NUM_ASIDE), max(1, count // 3))))


def bank_without(aside: Mapping[str, list[int]], good: Mapping[str, Good], detector: FeatureDetector, bank_mb: float,
                 seed: int) -> Bank:
    """A memory bank like the detector's, of the training images that are not set aside; of all where none is left."""
    others = {}
    for name, part in good.items():
        rest = np.delete(np.arange(len(part.train)), aside[name])
        others[name] = part.train_features[rest] if len(rest) else part.train_features
    return build_bank(others, detector.standardisation, bank_mb, seed, detector.patches.description(),
                      detector.device)


def prepare_lessons(detector: FeatureDetector, good: Mapping[str, Good], aside: Mapping[str, list[int]],
                    taught: int, shown: int, seed: int) -> dict[str, Lesson]:
    """For each category, with about `taught` pseudo-anomalies; about `shown` of them are kept as images.

    `taught` is 0 where there is no discriminator.
    """
    lessons = {}
    for name, part in good.items():
        images, names = part.images(aside[name])
        drawn = pseudo_validation(images, names, images[:0], seed, taught or shown)
        evidence = (evidence_of(detector, images), evidence_of(detector, drawn.pseudo)) if taught else None
        places = first_of_each(len(images), len(drawn.pseudo) // len(images), shown)
        shares = F.adaptive_avg_pool2d(drawn.masks, min(drawn.masks.shape[-1], 2 * detector.patches.grid))
        kept = replace(drawn, pseudo=drawn.pseudo[places], masks=drawn.masks[places])
        lessons[name] = Lesson(kept, places, shares, evidence)
    return lessons


def evidence_of(detector: FeatureDetector, images: Tensor) -> Tensor:
    """What the detector's discriminator judges images (N, 3, S, S) by, (N, P, G, G) on the CPU."""
    found = []
    for batch in tqdm(images.split(detector.batch_size), desc="comparing", unit="batch"):
        features = detector.features(batch)
        context = detector.context(batch, features, judged=True)
        found.append(detector.evidence(features, *detector.nearest(features, judged=True), context).cpu())
    return torch.cat(found)


# ------------------------------------------------------------------------------------------ discriminators

def teach(lessons: Mapping[str, Lesson], seed: int) -> dict[str | None, Discriminator]:
    """A discriminator for every category, and one for all together."""
    judges: dict[str | None, Discriminator] = {}
    for name, lesson in lessons.items():
        images = len(lesson.shown.good)
        print(f"{name}: the discriminator learns from {len(lesson.shares)} pseudo-anomalies on {images} of the good "
              "images")
        judges[name] = lesson.taught(torch.ones(images, dtype=torch.bool), seed)
    known = [torch.cat(parts) for parts in zip(*(lesson.evidence for lesson in lessons.values()), strict=True)]
    shares = torch.cat([lesson.shares for lesson in lessons.values()])
    judges[None] = train_discriminator(*known, shares, seed) if len(lessons) > 1 else judges[next(iter(lessons))]
    return judges


def judge_file(name: str | None) -> str:
    """Where the discriminator of a category is kept, None for that of all together."""
    return DISCRIMINATOR if name is None else CATEGORY_DISCRIMINATOR.format(name)


# ------------------------------------------------------------------------------------------ settings

def choose(detector: FeatureDetector, lessons: dict[str, Lesson], fixed: Collection[str], seed: int, minutes: float,
           folder: Path) -> dict[str | None, FeatureSettings]:
    """The settings that are best for each category but for the `fixed` ones, and those that are best on average.

    What was tried is written to `folder`. `minutes` are for all categories. The lessons are used up: what a search
    keeps of its category takes the memory that their evidence leaves.
    """
    begun, searches, names = detector.settings, {}, list(lessons)
    deadline = time.monotonic() + 60 * minutes
    for name in names:
        lesson = lessons.pop(name)
        detector.settings = begun       # not what was found for the category before
        left = (deadline - time.monotonic()) / 60 / (len(names) - len(searches))
        judged = lesson.surprises(seed) if lesson.evidence else None
        search = searches[name] = FeatureSearch(detector, lesson.shown, fixed, left, judged)
        best, first = search.run(), search.trials[0]
        write_feature_trials(folder / trials_file(name, names), search.trials, best)
        print(f"{name}, tuned on pseudo-anomalies: AUPRO {first.aupro:.3f} -> {best.aupro:.3f}, image AUROC "
              f"{first.auroc:.3f} -> {best.auroc:.3f}; changed: {listed(changes(first, best))}")
    return {name: search.best.settings for name, search in searches.items()} | {
        None: best_on_average(list(searches.values()))}


def trials_file(name: str, items: Sequence[str]) -> str:
    """Where it is written what was tried for a category of a model for `items`."""
    return TUNING if len(items) == 1 else CATEGORY_TUNING.format(name)
