"""New images without ground truth, in any folders: find them, inspect them, write a score and an overlay for each.

The memory holds one row for each image, and pictures of the highest-scoring ones only.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from dbad.calibration.thresholds import Calibration
from dbad.data.finding import files_below
from dbad.errors import UserError, printable
from dbad.families.detector import Detector
from dbad.files.names import OVERLAYS, SCORES, UNREADABLE
from dbad.files.special import special_kind
from dbad.files.tables import read_table, write_table
from dbad.inspection.loop import Inspected, Jobs, batch_of, inspect
from dbad.inspection.reading import Unreadable, read_new
from dbad.records import Origin, ScoreRow
from dbad.report import page
from dbad.report.colours import map_scales
from dbad.report.gallery import Gallery, Shown, encode
from dbad.report.panels import write_overlay

KEPT_SIDE = 512     # px; longer sides are reduced to this before an image is drawn for the report


@dataclass(frozen=True)
class NewImages:
    """The results of an inspection.

        rows                every image that could be read, in the order they were given
        gallery             pictures of the highest-scoring ones, by index in `rows`
        unreadable          the other files, each with the reason
        seconds_per_image   mean over the images that could be read
    """

    rows: list[ScoreRow]
    gallery: Gallery
    unreadable: list[Unreadable]
    seconds_per_image: float

    @property
    def num_good(self) -> int:
        return len(self.rows) - self.num_defective

    @property
    def num_defective(self) -> int:
        return sum(row.decision == 1 for row in self.rows)


# ------------------------------------------------------------------------------------------ finding files

def find_images(patterns: Sequence[str | Path], recursive: bool = False) -> list[Path]:
    """The image files that files, folders and globs stand for, sorted, each once.

    A folder stands for its images, with `recursive` also for those of its sub-folders; hidden ones are left out. A glob
    (** allowed) stands for what it matches, as if the shell had replaced it; existing names with [ ] are no globs.
    A file named directly may have any suffix. Two paths are the same if both name and file agree; a link of another
    name is another path. A pattern that matches no image is a `UserError`, and so is a name that is no file, such as a
    named pipe. One that a folder or glob matches is among the paths; `inspect_new` reports it and leaves it out.
    """
    once: dict[tuple[str, str], Path] = {}
    for path in sorted(path for pattern in patterns for path in _matches(str(pattern), recursive)):
        once.setdefault((os.path.realpath(path), path.name), path)
    return list(once.values())


def _matches(pattern: str, recursive: bool) -> list[Path]:
    hits = _glob(os.path.expanduser(pattern)) if pattern else []
    if not hits:
        raise UserError(f"--images {pattern}: matches nothing; expected image files, folders of them, or a quoted glob "
                        "such as 'photos/**/*.png'")
    kind = special_kind(os.path.expanduser(pattern))
    if kind is not None:
        raise UserError(f"--images {pattern}: {kind}; expected image files, or folders of them")
    images = [path for hit in hits for path in (_images_in(hit, recursive) if os.path.isdir(hit) else [hit])]
    if not images:
        deeper = any(_images_in(hit, True) for hit in hits)
        raise UserError(f"--images {pattern}: no images in it, only in sub-folders; add --recursive" if deeper else
                        f"--images {pattern}: no images in it; expected files such as 000.png")
    return images


def _glob(pattern: str) -> list[Path]:
    path = Path(pattern)
    if os.path.lexists(path):
        return [path]
    there = next(parent for parent in path.parents if os.path.isdir(parent) or not parent.name)
    below = os.path.join(glob.escape(str(there)), path.relative_to(there))
    return [Path(hit) for hit in glob.glob(below, recursive=True)]


def _images_in(folder: Path, recursive: bool) -> list[Path]:
    files = files_below(folder, recursive)
    return files.images + files.special


# ------------------------------------------------------------------------------------------ inspecting

def inspect_new(detector: Detector, paths: Sequence[Path], folder: Path, num_workers: int, keep: int = 200,
                category: str = "") -> NewImages:
    """Inspect images and write, below `folder`, overlays/NAME.png for each, scores.csv and, if needed, unreadable.csv.

    Scores are the same as for test images in the same batches. For a file that cannot be read, one line goes to
    stderr. The report gets pictures of the `keep` highest-scoring images. If the run ends early for any reason, the
    scores of the images inspected so far are written.
    """
    _refuse_results(paths, folder)
    overlays = _overlays(paths, folder)
    before = _overlays(_inspected_before(folder), folder)
    begun, results = time.monotonic(), NewImageResults(overlays, detector.calibrated(), Gallery(len(paths), keep))
    origins = [Origin(printable(path.as_posix()), category, None, None) for path in paths]
    try:
        with ThreadPoolExecutor(max(1, num_workers)) as pool:
            jobs = Jobs(pool, batch_of(detector), results.keep)
            for found in inspect(detector, paths, origins, partial(read_new, intensity=detector.intensity), pool):
                if isinstance(found, Unreadable):
                    results.leave_out(found)
                else:
                    jobs.add(results.take(found))
            jobs.finish()
    finally:
        if results.rows:
            _write_tables(folder, results.rows, results.unreadable)
    if not results.rows:
        raise UserError(f"none of {len(paths)} files could be read: {': '.join(map(str, results.unreadable[0]))}")
    drawn = set(overlays.values()) - {overlays[path] for path, _ in results.unreadable}
    for path in set(before.values()) - drawn:
        path.unlink(missing_ok=True)
    return NewImages(results.rows, results.gallery, results.unreadable,
                     (time.monotonic() - begun) / len(results.rows))


class NewImageResults:
    """The results of new images that come one by one; see `CategoryResults` for those of test images."""

    def __init__(self, overlays: Mapping[Path, Path], calibration: Calibration, gallery: Gallery):
        self.overlays, self.gallery, self.pixel_threshold = overlays, gallery, calibration.pixel_threshold
        self.scale = map_scales(calibration)["anomaly map"]
        self.rows: list[ScoreRow] = []
        self.unreadable: list[Unreadable] = []

    def leave_out(self, found: Unreadable) -> None:
        """Report a file that is left out."""
        self.unreadable.append(found)
        tqdm.write(printable(f"{found.path}: left out: {found.reason}"), file=sys.stderr)

    def take(self, image: Inspected) -> Callable[[], tuple[int, Shown | None]]:
        """Keep the row of an image; returns the job that draws it. The job's result goes to `keep`."""
        number = len(self.rows)
        self.rows.append(image.row)
        return partial(self._draw, number, image, self.gallery.wants(number, image.row.score))

    def keep(self, drawn: tuple[int, Shown | None]) -> None:
        """Keep the pictures of an image for the report."""
        number, shown = drawn
        if shown:
            self.gallery.put(number, self.rows[number].score, shown)

    def _draw(self, number: int, image: Inspected, for_report: bool) -> tuple[int, Shown | None]:
        decoded = image.decoded
        assert decoded.original is not None, "new images are kept as they are in their files"
        write_overlay(self.overlays[decoded.path], decoded.original, image.prediction.anomaly_map[0, 0].numpy(),
                      self.pixel_threshold, image.row.decision != 0)
        return number, encode(image.pictures(KEPT_SIDE), self.scale, self.gallery.side,
                              self.gallery.image_bytes, decoded.original, decoded.size) if for_report else None


def last_line(found: NewImages) -> str:
    """The result in one line, such as 120 images: 115 good, 3 defective, 2 unreadable."""
    count = len(found.rows) + len(found.unreadable)
    unreadable = f", {len(found.unreadable)} unreadable" if found.unreadable else ""
    return f"{count} image{'s' * (count != 1)}: {found.num_good} good, {found.num_defective} defective{unreadable}"


# ------------------------------------------------------------------------------------------ files

def overlay_names(paths: Sequence[Path]) -> list[str]:
    """A file name for every image, made of its path below the folder that all share, such as shift_2_000.png.

    Names are safe on every system, and unique even where case is ignored. They depend only on the path and on the
    shared folder; a name that is taken gets a digest of the path. Suffixes other than png stay as words, so that
    000.png and 000.jpg (000_jpg.png) have the same names with and without each other.
    """
    whole = [Path(os.path.abspath(path)) for path in paths]
    shared = len(os.path.commonprefix([path.parent.parts for path in whole]))
    names, taken = [], set()
    for path in whole:
        below = "/".join(path.parts[shared:])
        base = re.sub(r"[^\w-]", "_", re.sub(r"\.png$", "", below, flags=re.IGNORECASE))[-60:].lstrip("-") or "_"
        name = base
        while name.casefold() in taken:
            name = f"{base}_{hashlib.blake2b(os.fsencode(name + below), digest_size=4).hexdigest()}"
        taken.add(name.casefold())
        names.append(f"{name}.png")
    return names


def _write_tables(folder: Path, rows: Sequence[ScoreRow], unreadable: Sequence[Unreadable]) -> None:
    page.write_scores(Path(folder, SCORES), rows)
    path = Path(folder, UNREADABLE)
    if not unreadable:
        path.unlink(missing_ok=True)
        return
    write_table(path, ("path", "reason"), ((printable(path.as_posix()), printable(reason))
                                           for path, reason in unreadable))


def _refuse_results(paths: Sequence[Path], folder: Path) -> None:
    """Raise `UserError` for an image in the folder of the results: it could be overwritten, or be a result."""
    home = os.path.realpath(folder)
    for path in paths:
        if Path(os.path.realpath(path)).is_relative_to(home):
            raise UserError(f"--images {path}: lies in the results folder {folder}; expected images elsewhere")


def _overlays(paths: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """The file of every image's overlay."""
    return dict(zip(paths, (Path(folder, OVERLAYS, name) for name in overlay_names(paths)), strict=True))


def _inspected_before(folder: Path) -> list[Path]:
    """The images that an earlier run into the same folder inspected, from its tables."""
    paths: set[Path] = set()
    for name in (SCORES, UNREADABLE):
        with suppress(OSError, KeyError, UserError):
            paths |= {Path(row["path"]) for row in read_table(Path(folder, name))}
    return sorted(paths)
