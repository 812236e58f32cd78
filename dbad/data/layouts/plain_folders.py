"""The layout of plain folders: good images only, or folders of images, one of them good, the others defects."""

from __future__ import annotations

from pathlib import Path

from dbad.data.finding import files_below, good_folder, is_good, list_images, subfolders
from dbad.data.layouts.listing import (
    MASK_FOLDERS,
    Found,
    defect_samples,
    good_samples,
    left_out,
    loose_images,
    read_files,
    refuse_masks,
)
from dbad.data.splits import in_order, split_by_hash
from dbad.records import Category, Sample

TEST_SHARE = 0.2        # of the good images


def find_folder(root: Path) -> Found | None:
    """The one category of a folder, named after the folder."""
    images = list_images(root)
    kinds = [p for p in subfolders(root) if files_below(p).images]
    if bool(images) == bool(kinds) or (kinds and not any(is_good(p.name) for p in kinds)):
        return None
    if images:
        refuse_masks(root, images)
        return (root.name,), lambda name: _images(root, name)
    return (root.name,), lambda name: _folders(root, name)


def _images(root: Path, name: str) -> Category:
    notes: list[str] = []
    train = tuple(Sample(path, name, "good") for path in read_files(root, root, notes, recursive=False))
    return Category(name, root, train, (), notes=tuple(notes))


def _folders(root: Path, name: str) -> Category:
    """The category of a folder with a folder of good images and folders of defects.

    Masks lie among the images, or in a mask folder (`MASK_FOLDERS`) with one folder per defect. With a single kind of
    defect, they may lie in the mask folder itself.
    """
    notes: list[str] = []
    good, folders = good_folder(root), subfolders(root)
    assert good is not None         # `find_folder` has seen it
    truths = [p for p in folders if p.name.lower() in MASK_FOLDERS]
    truth = truths[0] if truths else None
    defects = [p for p in folders if p != good and p not in truths]
    alone = truth is not None and len(defects) == 1 and bool(list_images(truth))
    train, test_good = split_by_hash(good_samples(good, name, root, notes, grouped=True), TEST_SHARE)
    test = [sample for folder in defects
            for sample in defect_samples(folder, folder.name, truth if alone else truth and truth / folder.name,
                                         name, root, notes)]
    left_out(truths[1:], (), root, f"as {truth and truth.name} has the masks", notes)
    if truth and not alone:
        loose_images(truth, root, f"a folder such as {truth.name}/crack", notes)
        left_out((p for p in subfolders(truth) if not is_good(p.name)), {truth / p.name for p in defects}, root,
                 "as there is no folder of images of that name", notes)
    return Category(name, root, tuple(train), in_order(test + test_good), notes=tuple(notes))
