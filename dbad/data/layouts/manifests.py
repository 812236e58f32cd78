"""Data sets whose images are listed in a file: VisA's CSV, and the JSON lines of UniAD and DiAD.

    object,split,label,image,mask
    candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/Data/Masks/Anomaly/000.png

    {"filename": "bottle/test/cut/000.png", "label": 1, "label_name": "defective", "clsname": "bottle",
     "maskname": "bottle/ground_truth/cut/000_mask.png"}                                          (all in one line)
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dbad.data.finding import counted, is_good, subfolders
from dbad.data.layouts.listing import Found
from dbad.data.splits import in_order
from dbad.errors import UserError
from dbad.records import Category, Sample

COLUMNS = ("object", "split", "label", "image", "mask")


class Entry(NamedTuple):
    """One image of a list."""

    where: str              # file and line
    split: str              # "train" or "test"
    category: str
    defect: str             # "good", or the name of the defect
    image: str              # relative to a folder that `_located` finds
    mask: str | None


class Listing(NamedTuple):
    """The entries of the categories that exist, and the folder that their paths are relative to."""

    base: Path
    entries: list[Entry]


def find_visa(root: Path) -> Found | None:
    """The categories of VisA, found by its CSV."""
    return _listed(read_visa(root, subfolders(root)))


def find_manifest(root: Path) -> Found | None:
    """The categories that train.json lists."""
    return _listed(read_json_lines(root, subfolders(root)))


def _listed(listing: Listing | None) -> Found | None:
    if listing is None:
        return None
    names = tuple(sorted({entry.category for entry in listing.entries}))
    return names, lambda name: _category(listing, name)


def _category(listing: Listing, name: str) -> Category:
    sides: dict[str, list[Sample]] = {"train": [], "test": []}
    for entry in listing.entries:
        if entry.category == name:
            path = listing.base / entry.image
            if not os.path.isfile(path):
                raise UserError(f"{entry.where}: no such file {path}")
            mask = listing.base / entry.mask if entry.mask else None
            sides[entry.split].append(Sample(path, name, entry.defect, mask))
    train, test = in_order(sides["train"]), in_order(sides["test"])
    good = tuple(sample for sample in train if not sample.label)
    num_left_out = len(train) - len(good)
    notes = (f"{counted(num_left_out, 'defective image')} listed for training left out",) if num_left_out else ()
    return Category(name, listing.base / name, good, test, notes=notes)


def read_visa(root: Path, folders: Sequence[Path]) -> Listing | None:
    """The listing in VisA's CSV: split_csv/1cls.csv, another file there, visa.csv, or visa.csv beside `root`.

    None without such a file. Paths start from `root` or from one of the `folders` in it.
    """
    own = [root / "split_csv" / "1cls.csv", *sorted((root / "split_csv").glob("*.csv")), root / "visa.csv"]
    path = next((p for p in own if p.is_file()), None)
    if path is not None:
        return _located(list(_csv_entries(path)), path, (root, *folders))
    path = root.parent / "visa.csv"         # as in training/VisA/visa.csv for root = training/VisA/visa
    if not path.is_file():
        return None
    try:
        entries = list(_csv_entries(path))
    except UserError:
        return None                         # it may describe another folder
    if any((root / entry.image).exists() for entry in entries):
        return _located(entries, path, (root,))
    inside = [entry for entry in entries if entry.image.startswith(f"{root.name}/")]
    return _located(inside, path, (root.parent,)) if inside else None


def read_json_lines(root: Path, folders: Sequence[Path]) -> Listing | None:
    """The listing in train.json and test.json (or .jsonl), one object a line; None without train.json.

    Paths start from `root` or from one of the `folders` in it.
    """
    paths = {split: next((p for p in (root / f"{split}.json", root / f"{split}.jsonl") if p.is_file()), None)
             for split in ("train", "test")}
    if paths["train"] is None:
        return None
    entries = [entry for split, path in paths.items() if path for entry in _json_entries(path, split)]
    return _located(entries, paths["train"], (root, *folders))


def _located(entries: list[Entry], path: Path, bases: Sequence[Path]) -> Listing:
    """The entries with the folder that their paths start from; categories whose topmost folder is missing are dropped.

    People unpack a part of a data set and keep its whole list.
    """
    if not entries:
        raise UserError(f"{path}: lists no images")
    firsts = {entry.category: entry.image for entry in reversed(entries)}
    for base in bases:
        there = {category for category, image in firsts.items() if (base / image.split("/")[0]).exists()}
        if any((base / firsts[category]).is_file() for category in there):
            return Listing(base, [entry for entry in entries if entry.category in there])
    raise UserError(f"{entries[0].where}: no file {entries[0].image} in {bases[0]} or in a folder of it")


def _csv_entries(path: Path) -> Iterator[Entry]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        try:
            missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                raise UserError(f"{path}: no column {' '.join(missing)}; expected {','.join(COLUMNS)}")
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                good = is_good(row["label"] or "")
                if row["split"] not in ("train", "test") or not (good or row["label"] == "anomaly"):
                    raise UserError(f"{where}: split {row['split']!r} and label {row['label']!r}; expected train or "
                                    "test, and normal or anomaly")
                yield _entry(where, row["split"], row["object"], "good" if good else "anomaly", row["image"],
                             row["mask"])
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not readable as CSV ({error})") from None


def _json_entries(path: Path, split: str) -> Iterator[Entry]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not readable as JSON ({error})") from None
        missing = [name for name in ("filename", "label", "clsname") if name not in value] if isinstance(
            value, dict) else ["object"]
        if missing:
            raise UserError(f"{where}: no {' '.join(missing)}; expected an object with filename, label and clsname")
        if value["label"] not in (0, 1):
            raise UserError(f"{where}: label {value['label']!r}; expected 0 (good) or 1 (defective)")
        defect = (value.get("label_name") or "defective") if value["label"] else "good"
        if value["label"] and is_good(str(defect)):
            raise UserError(f"{where}: label 1 (defective) with label_name {defect}")
        yield _entry(where, split, value["clsname"], defect, value["filename"], value.get("maskname"))


def _entry(where: str, split: str, category: object, defect: object, image: object, mask: object) -> Entry:
    """An entry with checked paths and names; masks of good images have no meaning and are dropped."""
    return Entry(where, split, _name(where, category), _name(where, defect), _path(where, image),
                 _path(where, mask) if mask and defect != "good" else None)


def _name(where: str, name: object) -> str:
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name:
        raise UserError(f"{where}: name {name!r}; expected a plain name, without folders")
    return name


def _path(where: str, path: object) -> str:
    if not isinstance(path, str) or not path or path.startswith("/") or ".." in path.split("/"):
        raise UserError(f"{where}: path {path!r}; expected one relative to the data set's folder, without ..")
    return path
