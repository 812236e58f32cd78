"""The built-in demo data: three categories in the layout of MVTec AD, drawn, not photographed.

    python -m dbad.data.demo OUT --category hazelnut --size 128

Each image depends on the seed, its category, split, defect and index alone, whatever else is drawn.
"""
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dbad.data.demo.drawings import CATEGORIES, PICTURES
from dbad.data.demo.flaw import Flaw
from dbad.errors import UserError
from dbad.files.atomic import cache_folder, cannot_be_written, known_json
from dbad.files.temporary import remove_abandoned, temporary_folder
from dbad.runtime import parsing
from dbad.runtime.failures import one_line_failures

VERSION = 2     # raise it with every change to the drawings, so that earlier drawings are replaced
LARGEST, MOST_IMAGES = 8192, 1_000_000        # px, and images of a kind


@dataclass(frozen=True)
class Parameters:
    """The parameters of a drawn category, recorded in its demo.json. These defaults are declared only here."""
    size: int = 128                     # side of the images, in pixels
    num_train: int = 500                # images in train/good
    num_test_good: int = 40             # images in test/good
    num_per_defect: int = 20            # images in each other folder of test/
    seed: int = 0
    defect_px: float | None = None      # diameter of the defects in pixels; None: the natural size of each kind

    def check(self) -> None:
        """Raise UserError for a value that cannot be used for drawing."""
        if not 16 <= self.size <= LARGEST:
            raise UserError(f"size is {self.size}, expected 16 to {LARGEST} pixels")
        for name in ("num_train", "num_test_good", "num_per_defect", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}, expected 0 or more")
            if name != "seed" and getattr(self, name) > MOST_IMAGES:
                raise UserError(f"{name} is {getattr(self, name)}, expected at most {MOST_IMAGES}")
        if self.defect_px is not None and not 2 <= self.defect_px <= self.size:
            raise UserError(f"defect_px is {self.defect_px}, expected between 2 and the image size {self.size}")

    def record(self) -> dict:
        """The content of demo.json."""
        return {"drawn": True, "version": VERSION, **asdict(self)}

    def images(self, category: str) -> Iterator[tuple[str, str, int]]:
        """Yield (split, defect, index) of every image of a category."""
        folders = [("train", "good", self.num_train), ("test", "good", self.num_test_good)]
        folders += [("test", defect, self.num_per_defect) for defect in CATEGORIES[category]]
        for split, defect, count in folders:
            for index in range(count):
                yield split, defect, index


def draw(category, defect=None, index=0, seed=0, split="train", size=Parameters.size, defect_px=None, flawless=False):
    """One image of the demo data and the mask of its defect.

        defect      one of CATEGORIES[category]; None or "good": no defect
        split       "train" or "test"; an image with a defect is always a test image
        defect_px   diameter of the defect in pixels; None: the natural size of its kind
        flawless    draw the same scene as for a defective image, without the defect
    Returns image (size, size, 3) uint8 and mask (size, size) bool, True where the defect covers at least half a pixel
    (or where it covers most, if it is too fine to cover half of any pixel).
    """
    defect = defect or "good"
    check_names([category], defect)
    if split not in ("train", "test"):
        raise UserError(f"split is {split!r}, expected train or test")
    Parameters(size=size, seed=seed, defect_px=defect_px).check()
    flaw = None
    if defect != "good":
        split = "test"
        if not flawless:
            span = None if defect_px is None else 2 * defect_px / size
            flaw = Flaw(defect, stream(seed, category, split, defect, index, "flaw"), span)
    image, cover = PICTURES[category](size, stream(seed, category, split, defect, index, "scene"), flaw)
    return np.round(image.clip(0, 1) * 255).astype(np.uint8), (cover > 0) & (cover >= min(0.5, cover.max()))


def stream(*key) -> np.random.Generator:
    """The random stream of a key; the same in every process, unlike a stream seeded with hash()."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def check_names(categories, defect="good") -> None:
    """Raise UserError for a category or a defect that is not drawn here."""
    for category in categories:
        if category not in CATEGORIES:
            raise UserError(f"no demo category {category!r}, expected one of {', '.join(CATEGORIES)}")
        if defect != "good" and defect not in CATEGORIES[category]:
            raise UserError(f"no defect {defect!r} of {category}, expected good, {', '.join(CATEGORIES[category])}")


def write_demo(root, categories=tuple(CATEGORIES), size=Parameters.size, num_train=Parameters.num_train,
               num_test_good=Parameters.num_test_good, num_per_defect=Parameters.num_per_defect,
               seed=Parameters.seed, defect_px=Parameters.defect_px) -> Path:
    """Draw categories of the demo data below `root`, in the layout of MVTec AD; returns `root`.

    A complete category drawn with the same parameters is left as it is; one drawn with others is replaced. A category
    appears whole or not at all. A folder that was not drawn here is never changed: it is a UserError.
    """
    if isinstance(categories, str):
        categories = (categories,)
    root, parameters = Path(root), Parameters(size, num_train, num_test_good, num_per_defect, seed, defect_px)
    check_names(categories)
    parameters.check()
    for category in categories:
        folder = root / category
        if is_complete(folder, parameters):
            continue
        if folder.exists() and not (folder / "demo.json").is_file():
            raise UserError(f"{folder} exists and was not drawn here (no demo.json); name another folder")
        count = sum(1 for _ in parameters.images(category))
        print(f"Drawing {count} images of the demo category {category} (drawn, not photographed) into {folder}")
        write_category(folder, parameters)
    return root


def is_complete(folder: Path, parameters: Parameters) -> bool:
    """True if `folder` holds every image of its category, drawn with these parameters and this code."""
    return known_json(folder / "demo.json") == parameters.record() and all(
        path.is_file() for key in parameters.images(folder.name) for path in files(folder, *key))


def files(folder: Path, split: str, defect: str, index: int) -> list[Path]:
    """The file of an image and, if it shows a defect, that of its mask."""
    image = folder / split / defect / f"{index:03d}.png"
    return [image] if defect == "good" else [image, folder / "ground_truth" / defect / f"{index:03d}_mask.png"]


def write_category(folder: Path, parameters: Parameters) -> None:
    """Draw a category beside `folder`, then move it there in one step; remains of an interrupted drawing are removed.
    """
    with cannot_be_written(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder.parent, below=False)
        try:
            with temporary_folder(folder) as work:
                draw_category(work / "new", folder.name, parameters)
                if folder.exists():
                    folder.rename(work / "old")
                (work / "new").rename(folder)
        except OSError:
            if not is_complete(folder, parameters):     # else another process drew the same meanwhile
                raise


def draw_category(folder: Path, category: str, parameters: Parameters) -> None:
    """Draw every image of a category into a new folder; its demo.json comes last."""
    for split, defect, index in parameters.images(category):
        image, mask = draw(category, defect, index, parameters.seed, split, parameters.size, parameters.defect_px)
        pictures = (image, mask.astype(np.uint8) * 255)
        for path, picture in zip(files(folder, split, defect, index), pictures, strict=False):  # good: no mask file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    folder.mkdir(exist_ok=True)
    (folder / "demo.json").write_text(json.dumps(parameters.record(), indent=2) + "\n")


def demo_root(size=Parameters.size, num_train=Parameters.num_train, num_test_good=Parameters.num_test_good,
              num_per_defect=Parameters.num_per_defect, seed=Parameters.seed, defect_px=Parameters.defect_px) -> Path:
    """The cache folder for `write_demo` with these parameters; each set of parameters has its own.

    It lies in $DBAD_DEMO_DIR, or else in $XDG_CACHE_HOME/dbad/demo, or else in ~/.cache/dbad/demo.
    """
    base = os.environ.get("DBAD_DEMO_DIR") or cache_folder("demo")
    name = f"{size}px-{num_train}+{num_test_good}+{num_per_defect}-seed{seed}"
    return Path(base) / (name if defect_px is None else f"{name}-defect{defect_px:g}px")


def main(argv=None) -> None:
    parser = parsing.Parser(prog="python -m dbad.data.demo", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=parsing.path, help="folder to draw the categories into")
    parser.add_argument("--category", action="append", choices=CATEGORIES, help="may be repeated; default: all")
    parser.add_argument("--size", type=int, default=Parameters.size, help="side of the images in pixels")
    parser.add_argument("--num_train", type=int, default=Parameters.num_train, help="images in train/good")
    parser.add_argument("--num_test_good", type=int, default=Parameters.num_test_good, help="images in test/good")
    parser.add_argument("--num_per_defect", type=int, default=Parameters.num_per_defect, help="images of each defect")
    parser.add_argument("--seed", type=int, default=Parameters.seed, help="every image follows from it")
    parser.add_argument("--defect_px", type=float, help="diameter of the defects in pixels; default: natural")
    with one_line_failures():
        args = parser.parse_args(argv)
        root = write_demo(args.out, args.category or tuple(CATEGORIES), args.size, args.num_train,
                          args.num_test_good, args.num_per_defect, args.seed, args.defect_px)
        print(f"The demo data is in {root}")
