"""Recognise data sets on disk in the common layouts, and list their categories and files.

    mvtec       CATEGORY/train/good/000.png, test/DEFECT/000.png, ground_truth/DEFECT/000_mask.png or 000.png;
                MVTec AD, MVTec LOCO, MPDD, and VisA converted to it
    mvtec_ad_2  CATEGORY/train/good, validation/good, test_public/good, test_public/bad,
                test_public/ground_truth/bad/000_regular_mask.png; MVTec AD 2
    btad        like mvtec with folders called ok and ko: 01/train/ok, test/ok, test/ko, ground_truth/ko; BTAD
    visa        CATEGORY/Data/Images and Data/Masks with split_csv/1cls.csv, or with a visa.csv; VisA
    mtd         MT_Free/Imgs/exp1_num_4727.jpg with its mask exp1_num_4727.png, MT_Blowhole, ...; Magnetic Tile Defects
    ksdd2       train/10000.png with its mask train/10000_GT.png, test/20000.png, ...; KolektorSDD2
    manifest    train.json and test.json, one image a line; UniAD and DiAD
    folder      images, all good; or folders of images, one of them called good, ok or normal, the others defects;
                or a folder with such a folder for each category

A folder or label of good images may be called good, ok or normal, in upper or lower case; a defect is never called so.
Images may lie in sub-folders; each sub-folder is then a group that is trained on or held out as a whole. Files are
listed in sorted order, and masks are found by name. The notes of a category name what is left out. Only lists of files
are opened here, and the masks of KolektorSDD2, since they alone tell what is defective.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dbad.data.finding import is_good, subfolders
from dbad.data.layouts.ksdd2 import find_ksdd2
from dbad.data.layouts.listing import Found
from dbad.data.layouts.manifests import find_manifest, find_visa
from dbad.data.layouts.mtd import find_mtd
from dbad.data.layouts.mvtec import find_btad, find_mvtec, find_mvtec_ad_2
from dbad.data.layouts.plain_folders import find_folder, takes_name
from dbad.data.splits import in_order
from dbad.errors import UserError, printable
from dbad.records import Category

_READERS: dict[str, Callable[[Path], Found | None]] = {        # in the order in which auto tries them
    "mvtec_ad_2": find_mvtec_ad_2, "mvtec": find_mvtec, "btad": find_btad, "visa": find_visa, "mtd": find_mtd,
    "ksdd2": find_ksdd2, "manifest": find_manifest, "folder": find_folder}
LAYOUTS = ("auto", "mvtec", "mvtec_ad_2", "visa", "mtd", "btad", "ksdd2", "folder", "manifest")
EXPECTED = {
    "mvtec": "CATEGORY/train/good", "mvtec_ad_2": "CATEGORY/train/good with CATEGORY/test_public",
    "btad": "CATEGORY/train/ok", "visa": "split_csv/1cls.csv or visa.csv", "mtd": "MT_Free/Imgs",
    "ksdd2": "train/NAME.png with train/NAME_GT.png", "manifest": "train.json",
    "folder": "images without masks, or folders of images, one of them called good, ok or normal",
}


@dataclass(frozen=True)
class DataSet:
    """A recognised data set and the names of its categories; `category` lists their files."""

    layout: str
    root: Path
    names: tuple[str, ...]
    find: Callable[[str], Category] = field(repr=False, compare=False)

    def category(self, name: str, states: Sequence[str] = ("all",)) -> Category:
        """List the files of a category; `states` limits the test to some defects ("good" is one of them).

        A defective image whose mask is missing has the mask None, see `Category.unmasked`.
        """
        if name not in self.names and not (self.layout == "folder" and takes_name(self.root, name)):
            near = difflib.get_close_matches(name, self.names, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(self.names)}"
            if os.path.isdir(self.root / name):
                hint = f"the folder is there, but layout {self.layout} expects {EXPECTED[self.layout]}"
            raise UserError(f"--item {name}: no such category in {self.root}; {hint}")
        found = self.find(name)
        if not found.train:
            raise UserError(f"{found.root}: no good images to train on")
        states = ["good" if is_good(state) else state for state in states]
        there = sorted({sample.defect for sample in found.test})
        unknown = [state for state in states if state not in ("all", *there)]
        if unknown:
            raise UserError(f"--item_states {' '.join(unknown)}: not in the test of {found.root}; "
                            f"there are: {' '.join(['all', *there])}")
        test = tuple(sample for sample in found.test if "all" in states or sample.defect in states)
        unmasked = {sample for sample in test if sample.label and not (sample.mask and os.path.exists(sample.mask))}
        test = tuple(replace(sample, mask=None) if sample in unmasked else sample for sample in test)
        return replace(found, test=test, unmasked=in_order(unmasked), layout=self.layout)


def open_dataset(path: Path, layout: str = "auto") -> DataSet:
    """Recognise the data set in the folder `path`; the path of a train.json stands for its folder."""
    path = Path(path)
    if layout not in LAYOUTS:
        raise UserError(f"--layout {layout}: expected one of {', '.join(LAYOUTS)}")
    if os.path.isfile(path) and path.name in ("train.json", "train.jsonl") and layout in ("auto", "manifest"):
        path, layout = path.parent, "manifest"
    if not os.path.isdir(path):
        found = "a file" if os.path.exists(path) else "nothing"
        raise UserError(f"--dataset_path {path}: expected a folder, found {found}")
    root = path if path.name not in ("", "..") else path.resolve()      # a folder's name is needed
    for name in (layout,) if layout != "auto" else _READERS:
        found = _READERS[name](root)
        if found is not None:
            return DataSet(name, root, *found)
    if layout in ("auto", "mvtec", "mvtec_ad_2", "btad") and (root / "train").is_dir():
        raise UserError(f"--dataset_path {path}: this is a category; give the data set: --dataset_path {root.parent} "
                        f"--item {root.name}")
    there = sorted(p.name + "/" * p.is_dir() for p in root.iterdir())
    shown = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "") if there else "nothing"
    if layout == "auto":
        hint = _hint(root) or "expected " + "; or ".join(f"{what} ({name})" for name, what in EXPECTED.items())
        raise UserError(f"--dataset_path {path}: no known layout; found {shown}; {hint}")
    raise UserError(f"--layout {layout}: {path} has another layout; found {shown}; expected {EXPECTED[layout]}")


def _hint(root: Path) -> str:
    """Advice if the data set lies one folder deeper, as in many archives: the folder to give; else an empty text."""
    for folder in subfolders(root):
        with suppress(UserError):
            for name, reader in _READERS.items():
                if name != "folder" and reader(folder) is not None:
                    return f"{folder} has layout {name}: give that folder"
    return ""


def describe(dataset: DataSet) -> str:
    """The layout, a table of each category's contents, and the notes on files left out; no image is read.

    A mask counts if its file exists, even if the mask is empty.
    """
    rows: list[tuple[str, ...]] = [("category", "train good", "test good", "defective", "with mask", "defects")]
    totals, notes = np.zeros(4, int), []
    for name in dataset.names:
        category = dataset.category(name)
        defective = [sample for sample in category.test if sample.label]
        kinds = Counter(sample.defect for sample in defective)
        masks = Counter(sample.defect for sample in defective if sample.mask is not None)
        counts = (len(category.train), len(category.test) - len(defective), len(defective), masks.total())
        totals += counts
        defects = [f"{kind} {count}" + f" ({masks[kind]} with mask)" * (masks[kind] < count and masks.total() > 0)
                   for kind, count in sorted(kinds.items())]
        rows.append((printable(name), *map(str, counts), printable(", ".join(defects))))
        notes += [printable(f"{name}: {note}") for note in category.notes]
    if len(dataset.names) > 1:
        rows.append((f"{len(dataset.names)} categories", *map(str, totals), ""))
    first, *widths = (max(len(row[column]) for row in rows) for column in range(5))
    lines = [printable(f"{dataset.root}: layout {dataset.layout}"), ""]
    for label, *counts, defects in rows:
        cells = "  ".join(count.rjust(width) for count, width in zip(counts, widths, strict=True))
        lines.append(f"{label.ljust(first)}  {cells}  {defects}".rstrip())
    return "\n".join(lines + [""] * bool(notes) + notes)
