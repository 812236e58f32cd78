"""The contracts of a data set: an image file with what is known of it, the files of a category, their split by name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from dbad.data.finding import list_images


@dataclass(frozen=True)
class Sample:
    """One image file of a category, not read yet.

        defect      name of the defect, or "good"
        mask        file with the ground truth, or folder of several files that together are it (MVTec LOCO); None for
                    good images and where no ground truth exists
        group       images of one group must stay on one side of every split; None: the image is on its own
    """

    path: Path
    category: str
    defect: str
    mask: Path | None = None
    group: str | None = None

    @property
    def label(self) -> int:
        return int(self.defect != "good")

    @property
    def files(self) -> tuple[Path, ...]:
        """The image and its masks."""
        return (self.path, *(mask_files(self.mask) if self.mask else ()))


@dataclass(frozen=True)
class Category:
    """The files of one category: good ones to train on, and those of the test.

    Paths are reported relative to the parent of `root`.

        held_out    good images that the data set itself keeps for validation; empty where they are to be taken from
                    `train`
        unmasked    the defective images of the test without mask; as samples whose `mask`, if any, is the file that was
                    looked for
        notes       what was left out and what a reader would not expect, in lines
        layout      how the data set lies on disk
    """

    name: str
    root: Path
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    held_out: tuple[Sample, ...] = ()
    unmasked: tuple[Sample, ...] = ()
    notes: tuple[str, ...] = ()
    layout: str = ""

    @property
    def good(self) -> tuple[Sample, ...]:
        """The good images that a training may look at: those to train on, and those that are held out."""
        return self.train + self.held_out


Found = tuple[tuple[str, ...], Callable[[str], Category]]      # names of the categories, and what lists one's files


def mask_files(mask: Path) -> list[Path]:
    """The file, or the files of the folder, that a sample's `mask` is."""
    return list_images(mask) if os.path.isdir(mask) else [mask]


def in_order(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """The samples sorted by their paths."""
    return tuple(sorted(samples, key=lambda sample: sample.path))


def split_by_hash(samples: Sequence[Sample], share: float) -> tuple[list[Sample], list[Sample]]:
    """Part samples into (the others, about `share` of them), groups undivided; all are others where there is one group.

    Taken are the files whose names, or the groups whose names, hash lowest: the same wherever the data lie, and adding
    files moves few others. At least one group is taken, never all.
    """
    groups: dict[object, list[Sample]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(index if sample.group is None else sample.group, []).append(sample)
    by_hash = sorted(groups.values(), key=lambda group: _hash(group[0].group or group[0].path.name))
    aim = min(max(1, round(share * len(samples))), len(samples) - 1)
    sizes = list(accumulate(len(group) for group in by_hash[:-1]))
    count = 1 + min(range(len(sizes)), key=lambda i: abs(sizes[i] - aim), default=-1)
    taken = {sample for group in by_hash[:count] for sample in group}
    return [s for s in samples if s not in taken], [s for s in samples if s in taken]


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape")).digest()   # names of files need not be text
