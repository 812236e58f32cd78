"""KolektorSDD2: train/10000.png with its mask train/10000_GT.png, test/20000.png, ..."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dbad.data.finding import counted, list_images, shortened, subfolders
from dbad.data.layouts.listing import Found, left_out, read_files
from dbad.data.masks import marks
from dbad.records import Category, Sample

SPLITS = ("train", "test")


def find_ksdd2(root: Path) -> Found | None:
    """The one category of KolektorSDD2, recognised by its masks."""
    if not any(p.stem.endswith("_GT") for p in list_images(root / "train")):
        return None
    return ("kolektorsdd2",), lambda name: _category(root, name)


def _category(root: Path, name: str) -> Category:
    """The category of KolektorSDD2; reads its masks, since only they tell which of the numbered images are defective.
    """
    notes: list[str] = []

    def sample(path: Path) -> Sample:
        mask = path.with_name(f"{path.stem}_GT.png")
        defective = marks(mask)
        return Sample(path, name, "defect" if defective else "good", mask if defective else None)

    with ThreadPoolExecutor(8) as pool:         # decoding releases the interpreter's lock
        train, test = (tuple(pool.map(sample, _numbered(root / split, root, notes))) for split in SPLITS)
    for split in SPLITS:
        left_out(subfolders(root / split), (), root, f"as images are expected in {split} itself", notes)
    good = tuple(s for s in train if not s.label)
    if len(good) < len(train):
        notes.append(f"{counted(len(train) - len(good), 'defective image')} of train left out")
    return Category(name, root, good, test, notes=tuple(notes))


def _numbered(folder: Path, root: Path, notes: list[str]) -> list[Path]:
    """The images named by numbers; other files, such as a copied pair in the archive, are listed in `notes`."""
    files = read_files(folder, root, notes, recursive=False)
    images = [path for path in files if path.stem.isdigit()]
    masks = {f"{path.stem}_GT" for path in images}
    others = [path for path in files if not path.stem.isdigit() and path.stem not in masks]
    if others:
        notes.append(f"{folder.name}: {len(others)} left out, as expected names are NUMBER.png for images and "
                     f"NUMBER_GT.png for masks ({shortened(others, root)})")
    return images
