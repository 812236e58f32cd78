"""New images, without layout and without ground truth: find them, inspect them, write a score and an overlay for each.

What is kept in memory does not grow with their number, but for one line each and the highest-scoring ones.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import maximum_filter
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dbad.calibration.thresholds import Calibration
from dbad.data.finding import files_below
from dbad.data.images import read_image, to_float, to_pixels, to_uint8
from dbad.data.intensity import Intensity
from dbad.errors import UserError, printable
from dbad.families.detector import Detector
from dbad.files.atomic import atomic_write
from dbad.files.names import OVERLAYS, SCORES, UNREADABLE
from dbad.files.special import special_kind
from dbad.files.tables import read_table, write_table
from dbad.finite import naming
from dbad.records import Inspection
from dbad.report import figures, page

KEPT_SIDE = 512     # px, the longer side of kept arrays at most: twice what the report shows


class Row(NamedTuple):
    """One line of scores.csv; the fields are those of `Inspection` that `report.SCORE_COLUMNS` names."""

    path: str
    category: str
    defect: None
    label: None
    score: float
    p_value: float | None
    normalised: float
    decision: int


@dataclass(frozen=True)
class NewImages:
    """What came of an inspection.

        inspections         the highest-scoring images with their arrays, the highest first
        rows                every image that could be read, in the order they were given
        unreadable          the others, each with the reason
        seconds_per_image   over those that could be read
    """

    inspections: list[Inspection]
    rows: list[Row]
    unreadable: list[tuple[Path, str]]
    seconds_per_image: float

    @property
    def num_good(self) -> int:
        return len(self.rows) - self.num_defective

    @property
    def num_defective(self) -> int:
        return sum(row.decision for row in self.rows)


class Decoded(NamedTuple):
    """An image as it is in its file, upright and in RGB, and as (3, H, W) in [-1, 1] for the detector."""

    path: Path
    original: Image.Image
    pixels: Tensor


# ------------------------------------------------------------------------------------------ finding files

def find_images(patterns: Sequence[str | Path], recursive: bool = False) -> list[Path]:
    """The image files that files, folders and globs stand for, sorted, each once.

    A folder stands for its images, with `recursive` also for those of its sub-folders; hidden ones are left out. A glob
    (** allowed) stands for what it matches, as if the shell had replaced it; names with [ ] that exist are no globs.
    Files are taken whatever their suffix. Two paths are the same if name and file are; a link of another name is not.
    A pattern that stands for no image is a `UserError`, and so is the name of what is no file, such as a named pipe.
    Where a folder or a glob stands for one, it is among the paths, and `inspect_new` names it and leaves it out.
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
        raise UserError(f"--images {pattern}: no images in it, but in sub-folders; add --recursive" if deeper else
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

def inspect_new(detector: Detector, calibration: Calibration, paths: Sequence[Path], folder: Path, num_workers: int,
                keep: int = 200, category: str = "") -> NewImages:
    """Inspect images and write, below `folder`, overlays/NAME.png for each, scores.csv and, if needed, unreadable.csv.

    Images are read as `evaluate.walk` reads them, so scores are those of a test set in the same batches. A file that
    cannot be read costs one line on stderr. In memory are at most three batches of images at their own size, and the
    `keep` highest-scoring ones with their arrays, reduced to `KEPT_SIDE` where images are tiled. Whatever ends the run
    before its time, the scores of the images inspected until then are written.
    """
    _refuse_results(paths, folder)
    overlays = _overlays(paths, folder)
    before = _overlays(_inspected_before(folder), folder)
    begun = time.monotonic()
    kept: list[Inspection] = []
    rows: list[Row] = []
    unreadable: list[tuple[Path, str]] = []
    drawing: list[Future] = []
    try:
        with (ThreadPoolExecutor(max(1, num_workers)) as pool,
              tqdm(total=len(paths), desc="inspecting", unit="image") as bar):
            for batch, broken in _batches(paths, detector, pool):
                found = _inspect_batch(detector, calibration, batch, category)
                _finish(drawing)        # of the batch before, drawn while the network worked on this one
                unreadable += broken
                for image, (row, anomaly_map, inspection) in zip(batch, found, strict=True):
                    drawing.append(pool.submit(_write_overlay, overlays[image.path], image.original, anomaly_map,
                                               calibration.pixel_threshold))
                    rows.append(row)
                    kept.append(inspection)
                kept = sorted(kept, key=lambda inspection: -inspection.score)[:keep]
                bar.update(len(batch) + len(broken))
            _finish(drawing)
    finally:
        if rows:
            _write_tables(folder, rows, unreadable)
    if not rows:
        raise UserError(f"none of {len(paths)} files could be read: {unreadable[0][0]}: {unreadable[0][1]}")
    drawn = set(overlays.values()) - {overlays[path] for path, _ in unreadable}
    for path in set(before.values()) - drawn:
        path.unlink(missing_ok=True)
    return NewImages(kept, rows, unreadable, (time.monotonic() - begun) / len(rows))


def last_line(found: NewImages) -> str:
    """What was found, in one line, such as 120 images: 115 good, 3 defective, 2 unreadable."""
    count = len(found.rows) + len(found.unreadable)
    unreadable = f", {len(found.unreadable)} unreadable" if found.unreadable else ""
    return f"{count} image{'s' * (count != 1)}: {found.num_good} good, {found.num_defective} defective{unreadable}"


def _batches(paths: Sequence[Path], detector: Detector, pool: Executor
             ) -> Iterator[tuple[list[Decoded], list[tuple[Path, str]]]]:
    """Whole batches of what can be read, each with what could not be read on the way, and why.

    While the caller works on one, the next is being decoded.
    """
    size, step = (None, 1) if detector.patching else (detector.size, detector.machine.batch_size)
    todo, batch, broken = iter(paths), [], []
    waiting = deque(pool.submit(_decode, path, size, detector.intensity) for path in islice(todo, step))
    while waiting:
        image = waiting.popleft().result()
        waiting.extend(pool.submit(_decode, path, size, detector.intensity) for path in islice(todo, 1))
        if isinstance(image, Decoded):
            batch.append(image)
        else:
            broken.append(image)
            tqdm.write(printable(f"{image[0]}: left out: {image[1]}"), file=sys.stderr)
        if len(batch) == step or not waiting:
            yield batch, broken
            batch, broken = [], []


def _decode(path: Path, size: int | None, intensity: Intensity) -> Decoded | tuple[Path, str]:
    """The image, resized to `size` for the detector (None: its own size); the path and the reason if it is none."""
    try:
        original = read_image(path, intensity)
    except Exception as error:      # decoders fail in many ways on broken files, and one file must not end the run
        reason = " ".join(str(error).removeprefix(printable(f"{path}: ")).split())
        return path, reason or type(error).__name__
    seen = original if size is None else original.resize((size, size), Image.Resampling.BILINEAR)
    return Decoded(path, original, to_float(to_uint8(seen)))


def _inspect_batch(detector: Detector, calibration: Calibration, batch: Sequence[Decoded], category: str
                   ) -> list[tuple[Row, np.ndarray, Inspection]]:
    """For every image its row, its anomaly map (H, W), and its inspection, which shares no memory with the batch."""
    if not batch:
        return []
    parts, reconstructions = detector.parts(torch.stack([image.pixels for image in batch]))
    names = [image.path for image in batch]
    with naming(names):
        maps, scores = detector.combine(parts, calibration.scales)
    found = []
    for i, image in enumerate(batch):
        score = float(scores[i])
        with naming(names, i):
            row = Row(printable(image.path.as_posix()), category, None, None, score, calibration.p_value(score),
                      calibration.normalised(score), calibration.decide(score))
        found.append((row, maps[i, 0].numpy(), Inspection(
            **row._asdict(), image=to_pixels(_reduced(image.pixels)),
            reconstruction=None if reconstructions is None else to_pixels(_reduced(reconstructions[i])),
            anomaly_map=_reduced_map(maps[i]), parts={name: _reduced_map(part[i]) for name, part in parts.items()},
            counterpart=detector.counterpart)))
    return found


def _reduced(image: Tensor) -> Tensor:
    """(3, H, W) with a longer side of at most `KEPT_SIDE`."""
    return F.adaptive_avg_pool2d(image, _reduced_shape(image))


def _reduced_map(values: Tensor) -> np.ndarray:
    """(1, H, W) -> (h, w) of the same maximum, with a longer side of at most `KEPT_SIDE`; a copy in any case."""
    return F.adaptive_max_pool2d(values, _reduced_shape(values))[0].numpy()


def _reduced_shape(values: Tensor) -> tuple[int, int]:
    factor = min(1.0, KEPT_SIDE / max(values.shape[-2:]))
    return tuple(max(1, round(length * factor)) for length in values.shape[-2:])


# ------------------------------------------------------------------------------------------ files

def overlay_names(paths: Sequence[Path]) -> list[str]:
    """A file name for every image: its path from the folder that all share, such as shift_2_000.png.

    Names are safe on every system and unique, also where case is ignored. They depend on the path alone, except for
    the folder that all share and for a name that is taken, which gets a digest of the path; suffixes other than png
    stay as words, so that 000.png and 000.jpg (000_jpg.png) keep their names with and without each other.
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


def _write_overlay(path: Path, original: Image.Image, anomaly_map: np.ndarray, pixel_threshold: float) -> None:
    """The image at its own size, covered by the colours of its map (H, W), with the outline of the anomalous pixels.

    The highest colour stands for twice the pixel threshold, so that colours mean the same in every image and every run.
    """
    values = np.asarray(Image.fromarray(anomaly_map).resize(original.size, Image.Resampling.BILINEAR))
    pixels = np.array(original)
    for top in range(0, len(pixels), 256):      # in strips, since colours take 30 times the memory of the image
        rows = slice(top, top + 256)
        pixels[rows] = figures.overlay(pixels[rows], values[rows], 2 * pixel_threshold)
    inside = values >= pixel_threshold
    if inside.any():
        width = max(1, round(max(original.size) / 300))
        for reach, colour in ((width + width // 2, (0, 0, 0)), (width, figures.OUTLINE)):
            near = maximum_filter(inside.view(np.uint8), 2 * reach + 1).view(bool)
            pixels[near & ~inside] = colour     # outside, so that small defects stay visible
    with atomic_write(path) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG", compress_level=1)


def _finish(jobs: list[Future]) -> None:
    """Wait for the jobs, raise what one of them failed with, and forget them."""
    while jobs:
        jobs.pop().result()


def _write_tables(folder: Path, rows: Sequence[Row], unreadable: Sequence[tuple[Path, str]]) -> None:
    page.write_scores(Path(folder, SCORES), rows)
    path = Path(folder, UNREADABLE)
    if not unreadable:
        path.unlink(missing_ok=True)
        return
    write_table(path, ("path", "reason"), ((printable(path.as_posix()), printable(reason))
                                           for path, reason in unreadable))


def _refuse_results(paths: Sequence[Path], folder: Path) -> None:
    """Raise `UserError` for an image that lies where the results go: it could be written over, or be one of them."""
    home = os.path.realpath(folder)
    for path in paths:
        if Path(os.path.realpath(path)).is_relative_to(home):
            raise UserError(f"--images {path}: lies in {folder}, where the results go; expected images elsewhere")


def _overlays(paths: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """The file of every image's overlay."""
    return dict(zip(paths, (Path(folder, OVERLAYS, name) for name in overlay_names(paths)), strict=True))


def _inspected_before(folder: Path) -> list[Path]:
    """The images that a former run in the same place was given, as its tables tell."""
    paths: set[Path] = set()
    for name in (SCORES, UNREADABLE):
        with suppress(OSError, KeyError, UserError):
            paths |= {Path(row["path"]) for row in read_table(Path(folder, name))}
    return sorted(paths)
