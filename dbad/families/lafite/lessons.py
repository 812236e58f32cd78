"""Lessons: pseudo-anomalies that LafitE's discriminators learn from and that its settings are chosen by.

They are drawn on training images that are set aside. These are compared with a memory bank without them, since a patch
in the bank has distance 0 to it, which no new patch has. The settings are chosen by maps of two further discriminators,
each trained on one half of the images and applied to the other half.
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
from dbad.data.splits import names_of, some_of
from dbad.families.lafite.bank import build_bank
from dbad.families.lafite.comparing import affordable, evidence_of
from dbad.families.lafite.detector import FeatureDetector
from dbad.families.lafite.discriminator import STEPS, Discriminator, train_discriminator
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

NUM_ASIDE = 40      # good images to damage, over all categories; at most a third of a category's images
LEAST_ASIDE = 20    # lower bound for each category
NUM_TAUGHT = 640    # pseudo-anomalies to train a discriminator with, over all categories; the search uses fewer
COMPARING = 2 / 3   # share of that time in which pseudo-anomalies are compared with the bank
LEAST_STEPS = 60    # of the discriminators that serve the search alone


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
                names_of([self.train[number] for number in numbers]))


@dataclass(frozen=True)
class Lesson:
    """Pseudo-anomalies on good images of a category, in the order of the images.

        shown      the good images and the first pseudo-anomalies of each, by which settings are chosen
        places     indices of the shown pseudo-anomalies among all
        shares     share of damaged pixels around every patch, (M, 1, 2G, 2G)
        evidence   of the good images (N, P, G, G) and of all damaged ones (M, P, G, G), see `discriminator`; None
                   without a discriminator
    """

    shown: PseudoValidation
    places: Tensor
    shares: Tensor
    evidence: tuple[Tensor, Tensor] | None

    @property
    def known(self) -> tuple[Tensor, Tensor]:
        """The evidence of a lesson that has it."""
        assert self.evidence is not None, "the lesson was made without a discriminator"
        return self.evidence

    @property
    def per_image(self) -> int:
        return len(self.shares) // len(self.shown.good)

    def taught(self, images: Tensor, seed: int, **steps: int) -> Discriminator:
        """A discriminator trained on the images where `images` (N,) is true, for a number of `steps` if it is given."""
        good, damaged = self.known
        rows = images.repeat_interleave(self.per_image)
        return train_discriminator(good[images], damaged[rows], self.shares[rows], seed, **steps)

    def surprises(self, seed: int, share: float = 1.0) -> dict[str, Tensor]:
        """Anomaly maps of the shown images, from the discriminator trained on the other half of the images.

        With a `share` below 1 they are trained for that share of the usual steps.
        """
        fewer = {"steps": max(LEAST_STEPS, int(share * STEPS))} if share < 1 else {}
        half = torch.arange(len(self.shown.good)) % 2 == 0
        rows = half.repeat_interleave(self.per_image)
        maps = tuple(torch.empty_like(known[:, :1]) for known in self.known)
        for asked, damaged in ((half, rows), (~half, ~rows)):
            if asked.any():
                others = asked if asked.all() else ~asked       # one image is trained on and judged
                judge = self.taught(others, seed, **fewer)
                maps[0][asked], maps[1][damaged] = (judge.surprise(known[part]) for known, part in zip(
                    self.known, (asked, damaged), strict=True))
        return {"good": maps[0], "pseudo": maps[1][self.places]}


def first_of_each(images: int, per_image: int, count: int) -> Tensor:
    """Indices of the first pseudo-anomalies of every image, about `count` in all."""
    each = min(per_image, math.ceil(count / images))
    return (torch.arange(images * per_image) % per_image < each).nonzero()[:, 0]


def set_aside(count: int, share: float) -> list[int]:
    """The indices of the training images, out of `count`, to damage; `share` is the category's part of `NUM_ASIDE`."""
    return list(some_of(range(count), min(math.ceil(share * NUM_ASIDE), max(1, count // 3))))


def without(detector: FeatureDetector, aside: Mapping[str, list[int]], good: Mapping[str, Good],
            bank_mb: float) -> FeatureDetector:
    """The detector with a memory bank of the training images that are not set aside, or of all if none is left."""
    others, space, settings = {}, detector.space, detector.settings
    for name, part in good.items():
        rest = np.delete(np.arange(len(part.train)), aside[name])
        others[name] = part.train_features[rest] if len(rest) else part.train_features
    bank = build_bank(others, space.standardisation, bank_mb, settings.seed, space.patches.description(),
                      detector.machine.device)
    return replace(detector, bank=bank)


def prepare_lessons(detector: FeatureDetector, good: Mapping[str, Good], aside: Mapping[str, list[int]],
                    taught: int, shown: int, deadline: float = math.inf) -> dict[str, Lesson]:
    """The lesson of each category, with about `taught` pseudo-anomalies; about `shown` of them are kept as images.

    `taught` is 0 without a discriminator. Fewer are made if all could not be compared until the `deadline`, in seconds
    of time.monotonic.
    """
    lessons = {}
    for name, part in good.items():
        images, names = part.images(aside[name])
        wanted, evidence = taught or shown, None
        end = time.monotonic() + (deadline - time.monotonic()) / (len(good) - len(lessons))
        with tqdm(total=len(images) + wanted, desc=f"comparing {name}", unit="image", disable=not taught) as bar:
            if taught:
                known, image_s = evidence_of(detector, images, bar, (end - time.monotonic()) / 2)
                count, each = affordable(len(known), -(-wanted // len(images)), image_s, end - time.monotonic())
                if count * each < wanted:
                    bar.write(f"{name}: --tune_minutes leaves time for {count * each} pseudo-anomalies on {count} good "
                              f"images instead of {wanted} on {len(images)}")
                images, names, wanted = images[:count], names[:count], count * each
            drawn = pseudo_validation(images, names, images[:0], detector.settings.seed, wanted)
            bar.total = bar.n + len(drawn.pseudo)
            if taught:
                evidence = known[:len(images)], evidence_of(detector, drawn.pseudo, bar)[0]
        places = first_of_each(len(images), len(drawn.pseudo) // len(images), shown)
        shares = F.adaptive_avg_pool2d(drawn.masks, min(drawn.masks.shape[-1], 2 * detector.space.patches.grid))
        kept = replace(drawn, pseudo=drawn.pseudo[places], masks=drawn.masks[places])
        lessons[name] = Lesson(kept, places, shares, evidence)
    return lessons


# ------------------------------------------------------------------------------------------ discriminators

def teach(lessons: Mapping[str, Lesson], seed: int) -> dict[str | None, Discriminator]:
    """A discriminator for every category, and one for all together."""
    judges: dict[str | None, Discriminator] = {}
    for name, lesson in lessons.items():
        images = len(lesson.shown.good)
        print(f"{name}: the discriminator is trained on {len(lesson.shares)} pseudo-anomalies from {images} of the "
              "good images")
        judges[name] = lesson.taught(torch.ones(images, dtype=torch.bool), seed)
    good, damaged = (torch.cat(parts) for parts in zip(*(lesson.known for lesson in lessons.values()), strict=True))
    shares = torch.cat([lesson.shares for lesson in lessons.values()])
    judges[None] = train_discriminator(good, damaged, shares, seed) if len(lessons) > 1 else judges[next(iter(lessons))]
    return judges


def judge_file(name: str | None) -> str:
    """The file of a category's discriminator; None stands for all categories together."""
    return DISCRIMINATOR if name is None else CATEGORY_DISCRIMINATOR.format(name)


# ------------------------------------------------------------------------------------------ settings

def choose(detector: FeatureDetector, lessons: dict[str, Lesson], fixed: Collection[str], deadline: float,
           folder: Path, teaching_s: float = 0.0) -> dict[str | None, FeatureSettings]:
    """The best settings for each category, and those that are best on average; the `fixed` ones keep their values.

    Every search begins with the settings of the detector. All trials are written to `folder`. The time until the
    `deadline`, in seconds of time.monotonic, is for all categories together; `teaching_s` seconds train a
    discriminator. The lessons are emptied on the way: a search needs the memory of their evidence.
    """
    searches, names, seed = {}, list(lessons), detector.settings.seed

    def left_s() -> float:
        return max(0.0, deadline - time.monotonic()) / (len(names) - len(searches))
    for name in names:
        lesson = lessons.pop(name)
        judged = lesson.surprises(seed, left_s() / 2 / max(2 * teaching_s, 1e-9)) if lesson.evidence else None
        search = FeatureSearch(detector, lesson.shown, fixed, left_s() / 60, judged)
        searches[name] = search
        best, first = search.run(), search.trials[0]
        write_trials(folder / trials_file(name, names), search.trials, best, (FeatureMapOptions,))
        print(f"{name}, tuned on pseudo-anomalies{' until --tune_minutes' * search.stopped}: {outcome(first, best)}; "
              f"changed: {listed(changes(first, best))}")
    return {name: search.best.settings for name, search in searches.items()} | {
        None: best_on_average(list(searches.values()))}


def trials_file(name: str, items: Sequence[str]) -> str:
    """The name of the file with the trials for a category of a model for `items`."""
    return TUNING if len(items) == 1 else CATEGORY_TUNING.format(name)


# ------------------------------------------------------------------------------------------ both

@dataclass(frozen=True)
class Learnt:
    """The results of learning from damage, by category; None stands for all categories together."""

    settings: dict[str | None, FeatureSettings]
    judges: dict[str | None, Discriminator]

    def detector(self, detector: FeatureDetector, name: str | None) -> FeatureDetector:
        """The detector with the settings of a category, and with its discriminator if that has a weight."""
        judge = self.judges.get(name)
        file = judge_file(name) if judge is not None else ""
        return replace(detector, settings=replace(self.settings[name], discriminator=file), judge=judge)

    def files(self) -> dict[str, Discriminator]:
        """The discriminators by file name."""
        return {judge_file(name): judge for name, judge in self.judges.items()}


def learn_from_damage(detector: FeatureDetector, good: Mapping[str, Good], fixed: Collection[str], judged: bool,
                      tune_minutes: float | None, bank_mb: float, folder: Path) -> Learnt:
    """Train the discriminators, and choose the settings that are not `fixed`, by pseudo-anomalies.

        judged         train discriminators
        tune_minutes   time for all that serves the search; None to keep the settings
        bank_mb        size of the bank
        folder         where the trials are written
    """
    chosen: dict[str | None, FeatureSettings] = dict.fromkeys([*good, None], detector.settings)
    if tune_minutes is None and not judged:
        return Learnt(chosen, {})
    begun, budget_s = time.monotonic(), math.inf if tune_minutes is None else 60 * tune_minutes
    share = max(1.0, LEAST_ASIDE * len(good) / NUM_ASIDE) / len(good)
    aside = {name: set_aside(len(part.train), share) for name, part in good.items()}
    other = without(detector, aside, good, bank_mb)
    taught, shown = (math.ceil(share * number) for number in (NUM_TAUGHT, NUM_PSEUDO))
    lessons = prepare_lessons(other, good, aside, taught if judged else 0, shown, begun + COMPARING * budget_s)
    prepared = time.monotonic()
    judges = teach(lessons, detector.settings.seed) if judged else {}
    teaching_s = (time.monotonic() - prepared) / max(1, len(judges))
    if tune_minutes is not None:
        chosen = choose(other, lessons, fixed, begun + budget_s, folder, teaching_s)
    names = [*good, None] if len(good) > 1 else [None]
    return Learnt(chosen, {name: judges[name] for name in names
                           if name in judges and chosen[name].discriminator_contrib})
