"""The layout of plain folders: good images only, or folders of images, one of them good, the others defects.

    photos/000.jpg                      one category, all good, of any name
    photos/good/000.jpg, crack/...      one category, of any name
    photos/bolt/000.jpg                 a category for each folder, all good
    photos/bolt/good/000.jpg, crack/... a category for each folder
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dbad.data.finding import counted, files_below, good_folder, is_good, list_images, subfolders
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
RESERVED = MASK_FOLDERS | {"train", "test", "validation", "test_public"}       # names that no folder of a category has


def find_folder(root: Path) -> Found | None:
    """The one category of a folder, named after the folder; or those of its sub-folders."""
    if _is_category(root):
        return (root.name,), lambda name: _category(root, name)
    folders = _with_images(root)
    if list_images(root) or any(p.name.lower() in RESERVED for p in folders) or not folders:
        return None
    if not all(_is_category(p) for p in folders):
        return None
    return tuple(p.name for p in folders), lambda name: _category(root / name, name)


def takes_name(root: Path, name: str) -> bool:
    """True if the folder is one category, which --item may call `name`: no folder in it is called so."""
    return _is_category(root) and name not in {p.name for p in subfolders(root)}


def _is_category(root: Path) -> bool:
    """True for a folder of images alone, and for one of folders of images, one of them called good."""
    images, kinds = list_images(root), _with_images(root)
    if images and not kinds:
        refuse_masks(root, images)
    return bool(images) != bool(kinds) and (not kinds or any(is_good(p.name) for p in kinds))


def _with_images(root: Path) -> list[Path]:
    return [p for p in subfolders(root) if files_below(p).images]


def _category(root: Path, name: str) -> Category:
    found = _folders(root, name) if _with_images(root) else _images(root, name)
    named = (f"the name given to the images in {root}",) * (name != root.name)
    return replace(found, notes=(*named, *found.notes))


def _images(root: Path, name: str) -> Category:
    notes: list[str] = []
    train = tuple(Sample(path, name, "good") for path in read_files(root, root, notes, recursive=False))
    notes.append(f"{counted(len(train), 'image')}, all taken as good; none to test")
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
