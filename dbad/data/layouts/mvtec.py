"""Categories whose folders are called train, test and ground_truth: MVTec AD and similar data sets.

    bolt/train/good            to train on; good may be called ok or normal, in upper or lower case
    bolt/validation/good       held out from training, if it exists (MVTec LOCO, MVTec AD 2)
    bolt/test/good, crack      the test; in MVTec AD 2 test_public
    bolt/ground_truth/crack    masks; in MVTec AD 2 test_public/ground_truth/bad
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from dbad.data.finding import counted, files_below, good_folder, good_folders, is_good, subfolders
from dbad.data.layouts.ksdd2 import find_ksdd2
from dbad.data.layouts.listing import Found, defect_samples, good_samples, left_out, loose_images
from dbad.errors import UserError
from dbad.records import Category, Sample

TRUTH, PUBLIC, PRIVATE = "ground_truth", "test_public", ("test_private", "test_private_mixed")


def find_mvtec(root: Path) -> Found | None:
    """The categories of MVTec AD, MPDD, VisA converted to its layout, and any data set with the same folder names."""
    names = _categories(root)
    return None if not names or _all_ok(root, names) else (names, partial(_category, root, "test"))


def find_btad(root: Path) -> Found | None:
    """The categories of a data set in the same layout if the good folder of every category is called ok."""
    names = _categories(root)
    return (names, partial(_category, root, "test")) if names and _all_ok(root, names) else None


def find_mvtec_ad_2(root: Path) -> Found | None:
    """The categories of MVTec AD 2."""
    names = tuple(p.name for p in subfolders(root) if (p / "train").is_dir() and (p / PUBLIC).is_dir())
    return (names, partial(_category, root, PUBLIC)) if names else None


def _categories(root: Path) -> tuple[str, ...]:
    return tuple(p.name for p in subfolders(root)
                 if (p / "train").is_dir() and not (p / PUBLIC).is_dir() and not find_ksdd2(p))


def _all_ok(root: Path, names: tuple[str, ...]) -> bool:
    return all([p.name.lower() for p in good_folders(root / name / "train")] == ["ok"] for name in names)


def _category(base: Path, test_name: str, name: str) -> Category:
    root, notes = base / name, []
    folder = good_folder(root / "train")
    if folder is None:
        raise UserError(f"{root / 'train' / 'good'}: no such folder; expected the good images to train on")
    train = good_samples(folder, name, root, notes, grouped=True)
    if not train:
        raise UserError(f"{folder}: no images; expected files such as 000.png")
    held_out = _validation(root, name, notes)
    for split in ("train", "validation"):
        left_out(subfolders(root / split), good_folders(root / split), root, "as training uses good images only", notes)
        loose_images(root / split, root, f"{split}/good", notes)
    known = {root / part for part in ("train", "validation", test_name, TRUTH, *PRIVATE)}
    left_out(subfolders(root), known, root, f"as only train, validation, {test_name} and {TRUTH} are read", notes)
    for folder in (root / private for private in PRIVATE):
        count = len(files_below(folder).images)
        if count:
            notes.append(f"{folder.name}: {counted(count, 'image')} without label, not in the test; --images {folder} "
                         "inspects them")
    return Category(name, root, tuple(train), tuple(_test(root, root / test_name, name, notes)), tuple(held_out),
                    notes=tuple(notes))


def _validation(root: Path, name: str, notes: list[str]) -> list[Sample]:
    """The good images that the data set itself holds out from training; none if it has no such folder."""
    folder = good_folder(root / "validation")
    if folder is None:
        return []
    samples = good_samples(folder, name, root, notes)
    if samples:
        notes.append(f"{folder.relative_to(root).as_posix()}: {counted(len(samples), 'good image')} held out, instead "
                     "of a share of the training images")
    return samples


def _test(root: Path, test: Path, name: str, notes: list[str]) -> list[Sample]:
    """The test images, with masks from the folder ground_truth beside the test folder or in it."""
    truth = next((p for p in (root / TRUTH, test / TRUTH) if p.is_dir()), None)
    good, samples, folders = good_folder(test), [], subfolders(test)
    for folder in folders:
        if folder == good:
            samples += good_samples(folder, name, root, notes)
        elif folder.name != TRUTH:
            samples += defect_samples(folder, folder.name, truth and truth / folder.name, name, root, notes)
    loose_images(test, root, f"a folder such as {test.name}/good or {test.name}/crack", notes)
    if truth:
        left_out((p for p in subfolders(truth) if not is_good(p.name)), {truth / p.name for p in folders}, root,
                 f"as {test.name} has no folder of that name", notes)
        loose_images(truth, root, f"a folder such as {TRUTH}/crack", notes)
    return samples
