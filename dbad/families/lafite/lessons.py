"""Pseudo-anomalies as lessons: from them LafitE's discriminators learn, and its settings are chosen by them.

They are drawn on training images that are set aside, and compared with a memory bank without these: patches that a bank
holds are at no distance, as no new one ever is. Settings are chosen by the maps of discriminators trained on the other
half of the images: there are two of them, for that alone.
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
from dbad.families.lafite.bank import build_bank
from dbad.families.lafite.detector import FeatureDetector
from dbad.families.lafite.discriminator import Discriminator, train_discriminator
from dbad.families.lafite.options import FeatureMapOptions, FeatureSettings
from dbad.families.lafite.search import FeatureSearch, best_on_average
from dbad.families.search import (
    NUM_PSEUDO,
    PseudoValidation,
    changes,
    outcome,
    pseudo_validation,
    write_trials,
)
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
        """A discriminator trained on the images where `images` (N,) is true."""
        good, damaged = self.evidence
        rows = images.repeat_interleave(self.per_image)
        return train_discriminator(good[images], damaged[rows], self.shares[rows], seed)

    def surprises(self, seed: int) -> dict[str, Tensor]:
        """Anomaly maps of the shown images, from the discriminator trained on the other half of the images."""
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


def without(detector: FeatureDetector, aside: Mapping[str, list[int]], good: Mapping[str, Good],
            bank_mb: float) -> FeatureDetector:
    """The detector with a memory bank of the training images that are not set aside; of all where none is left."""
    others, space, settings = {}, detector.space, detector.settings
    for name, part in good.items():
        rest = np.delete(np.arange(len(part.train)), aside[name])
        others[name] = part.train_features[rest] if len(rest) else part.train_features
    bank = build_bank(others, space.standardisation, bank_mb, settings.seed, space.patches.description(),
                      detector.machine.device)
    return replace(detector, bank=bank)


def prepare_lessons(detector: FeatureDetector, good: Mapping[str, Good], aside: Mapping[str, list[int]],
                    taught: int, shown: int) -> dict[str, Lesson]:
    """For each category, with about `taught` pseudo-anomalies; about `shown` of them are kept as images.

    `taught` is 0 where there is no discriminator.
    """
    lessons = {}
    for name, part in good.items():
        images, names = part.images(aside[name])
        drawn = pseudo_validation(images, names, images[:0], detector.settings.seed, taught or shown)
        evidence = (evidence_of(detector, images), evidence_of(detector, drawn.pseudo)) if taught else None
        places = first_of_each(len(images), len(drawn.pseudo) // len(images), shown)
        shares = F.adaptive_avg_pool2d(drawn.masks, min(drawn.masks.shape[-1], 2 * detector.space.patches.grid))
        kept = replace(drawn, pseudo=drawn.pseudo[places], masks=drawn.masks[places])
        lessons[name] = Lesson(kept, places, shares, evidence)
    return lessons


def evidence_of(detector: FeatureDetector, images: Tensor) -> Tensor:
    """What the detector's discriminator judges images (N, 3, S, S) by, (N, P, G, G) on the CPU."""
    found = []
    for batch in tqdm(images.split(detector.machine.batch_size), desc="comparing", unit="batch"):
        found.append(detector.evidence(detector.look_up(batch, judged=True)).cpu())
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

def choose(detector: FeatureDetector, lessons: dict[str, Lesson], fixed: Collection[str], minutes: float,
           folder: Path) -> dict[str | None, FeatureSettings]:
    """The settings that are best for each category but for the `fixed` ones, and those that are best on average.

    Every search begins with the settings of the detector, and all that was tried is written to `folder`. `minutes` are
    for all categories. The lessons are used up: what a search keeps of its category takes the memory that their
    evidence leaves.
    """
    searches, names, seed = {}, list(lessons), detector.settings.seed
    deadline = time.monotonic() + 60 * minutes
    for name in names:
        lesson = lessons.pop(name)
        left = (deadline - time.monotonic()) / 60 / (len(names) - len(searches))
        judged = lesson.surprises(seed) if lesson.evidence else None
        search = searches[name] = FeatureSearch(detector, lesson.shown, fixed, left, judged)
        best, first = search.run(), search.trials[0]
        write_trials(folder / trials_file(name, names), search.trials, best, (FeatureMapOptions,))
        print(f"{name}, tuned on pseudo-anomalies: {outcome(first, best)}; changed: {listed(changes(first, best))}")
    return {name: search.best.settings for name, search in searches.items()} | {
        None: best_on_average(list(searches.values()))}


def trials_file(name: str, items: Sequence[str]) -> str:
    """The file of what was tried for a category of a model for `items`."""
    return TUNING if len(items) == 1 else CATEGORY_TUNING.format(name)


# ------------------------------------------------------------------------------------------ both

@dataclass(frozen=True)
class Learnt:
    """What a run has learnt from damage, by category, None being all together."""

    settings: dict[str | None, FeatureSettings]
    judges: dict[str | None, Discriminator]

    def detector(self, detector: FeatureDetector, name: str | None) -> FeatureDetector:
        """The detector under the settings of a category, with its discriminator if one counts."""
        judge = self.judges.get(name)
        file = judge_file(name) if judge is not None else ""
        return replace(detector, settings=replace(self.settings[name], discriminator=file), judge=judge)

    def files(self) -> dict[str, Discriminator]:
        """The discriminators by the names of their files."""
        return {judge_file(name): judge for name, judge in self.judges.items()}


def learn_from_damage(detector: FeatureDetector, good: Mapping[str, Good], fixed: Collection[str], judged: bool,
                      tune_minutes: float | None, bank_mb: float, folder: Path) -> Learnt:
    """Train the discriminators, and choose the settings that are not `fixed`, by pseudo-anomalies.

        judged         discriminators are trained
        tune_minutes   None where settings are not chosen
        bank_mb        size of the bank
        folder         what was tried is written here
    """
    chosen: dict[str | None, FeatureSettings] = dict.fromkeys([*good, None], detector.settings)
    if tune_minutes is None and not judged:
        return Learnt(chosen, {})
    share = max(1.0, LEAST_ASIDE * len(good) / NUM_ASIDE) / len(good)
    aside = {name: set_aside(len(part.train), share) for name, part in good.items()}
    other = without(detector, aside, good, bank_mb)
    taught, shown = (math.ceil(share * number) for number in (NUM_TAUGHT, NUM_PSEUDO))
    lessons = prepare_lessons(other, good, aside, taught if judged else 0, shown)
    judges = teach(lessons, detector.settings.seed) if judged else {}
    if tune_minutes is not None:
        chosen = choose(other, lessons, fixed, tune_minutes, folder)
    names = [*good, None] if len(good) > 1 else [None]
    return Learnt(chosen, {name: judges[name] for name in names
                           if name in judges and chosen[name].discriminator_contrib})
