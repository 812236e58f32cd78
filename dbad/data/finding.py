"""Find the image files of a data set and the folders that are called good."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from dbad.errors import UserError
from dbad.files.special import special_kind

SUFFIXES = tuple(sorted(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN))
GOOD_NAMES = ("good", "ok", "normal")       # names of folders and labels, in upper or lower case


class Files(NamedTuple):
    """Entries with an image's file name: files (also links, even broken ones), and entries that must not be opened."""

    images: list[Path]
    special: list[Path]     # named pipes, sockets, devices


def files_below(folder: Path, recursive: bool = True) -> Files:
    """The entries of a folder with an image's file name, then those of its sub-folders, each sorted by name.

    A missing folder gives none. Hidden files and folders are left out. Links to folders are followed, but no folder is
    read twice: a link to a folder above would be followed for ever.
    """
    found, todo, seen = Files([], []), [folder], set()
    while todo:
        here = todo.pop()
        real = os.path.realpath(here)
        if real in seen:
            continue
        seen.add(real)
        below = []
        for entry in _entries(here):
            path = Path(entry.path)
            if _is_folder(entry):
                below.append(path)
            elif path.suffix.lower() in SUFFIXES:
                (found.special if _is_special(entry) else found.images).append(path)
        todo += reversed(below) if recursive else ()
    return found


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by name; none if there is no folder."""
    return files_below(folder, recursive=False).images


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted by name; none if there is no folder."""
    return [Path(entry.path) for entry in _entries(folder) if _is_folder(entry)]


def is_good(name: str) -> bool:
    """True if a folder or a label of this name stands for good images."""
    return name.lower() in GOOD_NAMES


def good_folders(folder: Path) -> list[Path]:
    """The sub-folders that are called good, ok or normal."""
    return [path for path in subfolders(folder) if is_good(path.name)]


def good_folder(folder: Path) -> Path | None:
    """The sub-folder of good images, or None; two of them are a `UserError`."""
    found = good_folders(folder)
    if len(found) > 1:
        raise UserError(f"{folder}: folders {' and '.join(path.name for path in found)} both stand for good images; "
                        "expected one of them")
    return found[0] if found else None


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 image, 2 images."""
    return f"{number} {noun}{'s' * (number != 1)}"


def shortened(paths: Sequence[Path], root: Path, most: int = 3) -> str:
    """Names of files for a line, relative to `root`: up to `most` names, then the number of those left."""
    names = [path.relative_to(root).as_posix() for path in paths[:most]]
    return ", ".join(names) + (f" and {len(paths) - most} more" if len(paths) > most else "")


def _entries(folder: Path) -> list[os.DirEntry]:
    """The entries of a folder, sorted by name, without hidden ones; an entry knows its kind without a system call."""
    if not os.path.isdir(folder):
        return []
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror})") from None


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:             # a link that leads back to itself
        return False


def _is_special(entry: os.DirEntry) -> bool:
    return not entry.is_file(follow_symlinks=False) and special_kind(entry.path) is not None
