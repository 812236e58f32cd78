"""Functions on samples of a data set: their files, their order, a split by name, an even choice."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from dbad.data.finding import list_images
from dbad.records import Sample

T = TypeVar("T")


def files_of(sample: Sample) -> tuple[Path, ...]:
    """The image file of a sample, and the files of its mask."""
    return (sample.path, *(mask_files(sample.mask) if sample.mask else ()))


def names_of(samples: Sequence[Sample]) -> list[str]:
    """A name for every sample, unlike those of the others: that of its file, or its path below what all have in common.

    The second is taken where files in several folders have the same name.
    """
    names = [sample.path.name for sample in samples]
    if len(set(names)) == len(names):
        return names
    root = os.path.commonpath([sample.path.parent for sample in samples])
    return [sample.path.relative_to(root).as_posix() for sample in samples]


def mask_files(mask: Path) -> list[Path]:
    """The files of a sample's `mask`: the file itself, or the files in the folder."""
    return list_images(mask) if os.path.isdir(mask) else [mask]


def in_order(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """The samples sorted by their paths."""
    return tuple(sorted(samples, key=lambda sample: sample.path))


def split_by_hash(samples: Sequence[Sample], share: float) -> tuple[list[Sample], list[Sample]]:
    """Split samples into (the others, about `share` of them); with one group only, all are others.

    The share has the files, or the groups, whose names have the lowest hashes: the same ones wherever the data lie.
    Adding files moves few others. A group is never divided. The share has at least one group, never all.
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


def some_of(things: Sequence[T], most: int = 40) -> Sequence[T]:
    """At most `most` of the samples or images, chosen at even distances."""
    return things[::-(-len(things) // most)]


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape")).digest()   # file names need not be valid UTF-8
