"""Magnetic Tile Defects: MT_Free/Imgs/exp1_num_4727.jpg with its mask exp1_num_4727.png, MT_Blowhole, ..."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from dbad.data.finding import counted, shortened, subfolders
from dbad.data.layouts.listing import Found, left_out, loose_images, read_files
from dbad.data.splits import in_order, split_by_hash
from dbad.errors import UserError
from dbad.records import Category, Sample

TEST_SHARE = 0.17       # of the good images
GAP = 260               # frames; two images of one tile are never further apart


def find_mtd(root: Path) -> Found | None:
    """The one category of Magnetic Tile Defects, in `root` or in a folder of it."""
    base = next((p for p in (root, *subfolders(root)) if (p / "MT_Free" / "Imgs").is_dir()), None)
    return None if base is None else (("magnetic_tile",), lambda name: _category(base, name))


def _category(base: Path, name: str) -> Category:
    """The category: good tiles are divided between training and test, defective tiles keep their defective images only.
    """
    train, test, num_left_out, notes = [], [], 0, []
    for tile in _tiles(_images(base, notes)):
        group = tile[0][0].stem
        defective = [Sample(path, name, kind, path.with_suffix(".png"), group) for path, kind in tile if kind != "free"]
        test += defective
        if defective:
            num_left_out += len(tile) - len(defective)
        else:
            train += [Sample(path, name, "good", group=group) for path, _ in tile]
    train, test_good = split_by_hash(train, TEST_SHARE)
    if num_left_out:
        notes.append(f"{counted(num_left_out, 'good image')} left out, as their tile shows a defect at another "
                     "exposure, or looks like such a tile")
    return Category(name, base, in_order(train), in_order(test + test_good), notes=tuple(notes))


def _images(base: Path, notes: list[str]) -> list[tuple[Path, str]]:
    """All images with their kinds; other files with an image's file name that are no mask are listed in `notes`."""
    images: list[tuple[Path, str]] = []
    for kind in subfolders(base):
        if not kind.name.startswith("MT_"):
            continue
        files = read_files(kind / "Imgs", base, notes, recursive=False)
        here = [path for path in files if path.suffix.lower() in (".jpg", ".jpeg")]
        stems = {path.stem for path in here}
        others = [path for path in files if path.stem not in stems]
        if others:
            notes.append(f"{len(others)} left out, as no .jpg has that name ({shortened(others, base)})")
        loose_images(kind, base, f"{kind.name}/Imgs", notes)
        deeper = (*subfolders(kind), *subfolders(kind / "Imgs"))
        left_out(deeper, (kind / "Imgs",), base, f"as images are expected in {kind.name}/Imgs itself", notes)
        images += [(path, kind.name.removeprefix("MT_").lower()) for path in here]
    return images


def _tiles(images: Iterable[tuple[Path, str]]) -> list[list[tuple[Path, str]]]:
    """The images (path, kind) in groups by tile, as far as the names expE_num_N tell.

    N counts frames over the whole collection. Each tile was taken at the exposures E = 1 to 6, a few also at 0, within
    some hundred frames. A new group starts where N jumps, and where E does not rise after all six have come equally
    often. The latter keeps together tiles whose frames mix, which names cannot tell apart, and tiles with missing
    exposures. A group may hold two tiles, but no tile is in two groups.
    """
    def numbers(image: tuple[Path, str]) -> tuple[int, int]:
        match = re.fullmatch(r"exp(\d+)_num_(\d+)", image[0].stem)
        if match is None:
            raise UserError(f"{image[0]}: expected a name such as exp1_num_4727.jpg (exposure, frame)")
        return int(match[2]), int(match[1])

    tiles: list[list[tuple[Path, str]]] = []
    counts, last = Counter(), (0, 0)
    for image in sorted(images, key=numbers):
        frame, exposure = numbers(image)
        six = [counts[e] for e in range(1, 7)]
        complete = 0 < min(six) == max(six)
        if not tiles or frame - last[0] > GAP or (complete and exposure <= last[1]):
            tiles.append([])
            counts.clear()
        tiles[-1].append(image)
        counts[exposure] += 1
        last = frame, exposure
    return tiles
