"""Open and check the categories that the options name, and split their good images for training and calibration."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from dbad.data.demo import draw
from dbad.data.layouts.registry import open_dataset
from dbad.data.splits import split_by_hash
from dbad.errors import UserError
from dbad.records import Category, Sample
from dbad.runtime.failures import say_once


class Source(Protocol):
    """The options that name a data set; every script's options have them.

        dataset_path    folder of the data set; None for the built-in demo data
        layout          name of the data set's layout on disk, see `dbad.data.layouts.registry`
    """

    @property
    def dataset_path(self) -> Path | None: ...

    @property
    def layout(self) -> str: ...


class Chosen(Source, Protocol):
    """The options that name a category of a data set."""

    @property
    def item(self) -> str: ...


class ChosenItems(Source, Protocol):
    """The options that name a category of a data set, or several."""

    @property
    def item(self) -> str | tuple[str, ...]: ...


class HeldOut(Source, Protocol):
    """The options that name a data set, and the share of its good images that is held out."""

    @property
    def holdout(self) -> float: ...


def open_category(options: Chosen, states: Sequence[str] = ("all",)) -> Category:
    """The category that the options name, see `category_of`."""
    return category_of(options, options.item, states)


def category_of(options: Source, item: str, states: Sequence[str] = ("all",)) -> Category:
    """A category of the data set that the options name; the built-in demo data is drawn on first use.

    `states` limits the test to some defects. Notes, such as the files that were left out, are printed the first time.
    """
    if options.dataset_path is not None:
        category = find_category(options.dataset_path, item, states, options.layout)
        for note in category.notes:
            say_once(f"{category.name}: {note}")
        return category
    if item not in draw.CATEGORIES:
        near = difflib.get_close_matches(item, draw.CATEGORIES, 1)
        raise UserError(f"--item {item}: the built-in demo data has {', '.join(draw.CATEGORIES)}"
                        + (f"; did you mean {near[0]}?" if near else "; real data need --dataset_path"))
    if options.layout not in ("auto", "mvtec"):
        raise UserError(f"--layout {options.layout}: the built-in demo data has layout mvtec; expected --dataset_path")
    root = draw.write_demo(draw.demo_root(), (item,))
    return find_category(root, item, states, "mvtec")


def category_names(options: Source) -> tuple[str, ...]:
    """The names of all categories of `--dataset_path`, or of the built-in demo data."""
    if options.dataset_path is None:
        return tuple(draw.CATEGORIES)
    return open_dataset(options.dataset_path, options.layout).names


def named_items(options: ChosenItems) -> tuple[str, ...]:
    """The categories that the option `item` names, each once, in its order: one, several, or all of the data set."""
    names = (options.item,) if isinstance(options.item, str) else options.item
    known = category_names(options)
    if "all" in names:
        return known
    for name in set(names) - set(known):
        category_of(options, name)      # raises the error for a wrong name
    return tuple(dict.fromkeys(names))


def chosen_items(options: ChosenItems) -> tuple[str, ...]:
    """The categories that the option `item` names, sorted: their order does not matter to a model of all."""
    return tuple(sorted(named_items(options)))


def find_category(dataset_path: Path, item: str, states: Sequence[str] = ("all",), layout: str = "auto") -> Category:
    """The files of category `item`; `states` limits the test to some defects ("good" is one of them)."""
    return open_dataset(dataset_path, layout).category(item, states)


def test_images(category: Category, masks: str = "where_there_are") -> tuple[Sample, ...]:
    """The test images of a category; a category without any is a `UserError` that says how to inspect new images.

    A defective image without a mask is a `UserError` if `masks` is "required", and allowed if it is "where_there_are".
    """
    if not category.test:
        test = category.root if category.layout == "folder" else category.root / "test"
        raise UserError(f"{category.root}: no test images; expected folders such as {test / 'good'} and "
                        f"{test / 'crack'}, or new images: --images PATH")
    if masks == "required" and category.unmasked:
        first, count = category.unmasked[0], sum(sample.label for sample in category.test)
        raise UserError(f"{first.path} shows a defect, but there is no mask{f' {first.mask}' if first.mask else ''}: "
                        f"{len(category.unmasked)} of {count} defective images have none; --masks where_there_are "
                        "measures the others")
    return category.test


def split_category(category: Category, share: float) -> tuple[list[Sample], list[Sample]]:
    """Split the good images of a category into those to train on and those held out for calibration, (train, held out).

    The held-out images are those that the data set itself keeps for validation. If it keeps none, they are a share of
    the training images, see `split_holdout`.
    """
    if category.held_out:
        return list(category.train), list(category.held_out)
    return split_holdout(category.train, share)


def num_good(options: HeldOut, item: str) -> int:
    """The number of good images of a category to train on. None is read, and the demo data is not drawn."""
    if options.dataset_path is None:
        return draw.Parameters.num_train - round(options.holdout * draw.Parameters.num_train)
    return len(split_category(category_of(options, item), options.holdout)[0])


def split_holdout(samples: Sequence[Sample], share: float) -> tuple[list[Sample], list[Sample]]:
    """Split good images into those to train on and those held out for calibration, (train, held out).

    The held-out images are about a `share` of the files, or of the groups of files: those whose names have the lowest
    hashes, at least one. The split is the same in every script. A group is never divided.
    """
    train, held_out = split_by_hash(samples, share)
    if not held_out:
        one = f"{len(samples)} images of one group" if len(samples) > 1 else "1 image"
        raise UserError(f"{samples[0].path.parent}: {one}; expected at least 2, one of them to hold out")
    return train, held_out
