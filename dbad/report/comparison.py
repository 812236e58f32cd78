"""Two runs on the same test images as one page: the differences of all metrics, and both maps of every image."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dbad.errors import UserError
from dbad.files.atomic import atomic_write, known_json, parse_json, read_json
from dbad.files.names import ANOMALY_MAPS, METRICS, OPTIONS, PAGE, SCORES
from dbad.files.tables import read_table
from dbad.metrics.bootstrap import Interval, Ranked, Scored, difference_intervals, image_numbers
from dbad.report.colours import colour_stops
from dbad.report.page import COMPLEMENTS, flatten, is_share, readable_name, template

_PICTURE = re.compile(r"data:image/(?:jpeg|png);base64,[A-Za-z0-9+/=]*")
_DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


@dataclass(frozen=True)
class Row:
    """An image in a run's scores.csv."""

    path: str
    kind: str
    label: int | None
    score: float
    normalised: float | None
    decision: int | None

    @property
    def verdict(self) -> str:
        if self.wrong:
            return "miss" if self.label else "false alarm"
        return "not calibrated" if self.decision is None else ("called good", "called defective")[self.decision]

    @property
    def wrong(self) -> bool:
        return None not in (self.label, self.decision) and self.label != self.decision


@dataclass(frozen=True)
class Side:
    """One of the two runs: its folder, a row per image, the numbers of metrics.json, and its report's pictures."""

    folder: Path
    rows: dict[str, Row]
    numbers: Mapping[tuple[str, ...], Any]
    pictures: dict[str, dict[str, str]]
    commit: str


@dataclass(frozen=True)
class Difference:
    """A metric of both runs, as shown, and the interval of second - first."""

    name: str
    first: str
    second: str
    change: str
    interval: str
    clear: bool         # 0 lies outside the interval


@dataclass(frozen=True)
class Pair:
    """An image in both runs."""

    first: Row
    second: Row
    change: float       # of the normalised score, or of the rank where there is none
    pictures: dict[str, str]


def write_comparison(first: Path, second: Path, out: Path) -> Path:
    """Write the page; runs of different test images are a `UserError`."""
    one, other = read_run(first), read_run(second)
    check_same_images(one, other)
    paths = list(one.rows)
    intervals = difference_intervals(*(_image_side(run, paths) for run in (one, other)), len(paths))
    ranked = [pixels_of(run, one, paths) for run in (one, other)]
    if ranked[0] and ranked[1]:
        intervals |= difference_intervals(ranked[0].numbers, ranked[1].numbers, len(paths))
    page = template("compare.html").stream(
        first=one, second=other, pairs=pairs_of(one, other), differences=differences(one, other, intervals),
        notes=notes(one, other, all(ranked)), colours=colour_stops())
    with atomic_write(out) as temporary, open(temporary, "wb") as file:
        page.dump(file, "utf-8", "backslashreplace")
    return out


# Reading


def read_run(folder: Path) -> Side:
    """The results in a folder that an inspection wrote; anything else is a `UserError`."""
    path = folder / SCORES
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a folder of results, such as results/screw")
    try:
        rows = [Row(line["path"], line["defect"] or "unknown", _number(line["label"], int), float(line["score"]),
                    _number(line["normalised"], float), _number(line["decision"], int)) for line in read_table(path)]
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: not a table of scores ({error}); inspect the images again") from None
    if not rows:
        raise UserError(f"{path}: no images; expected at least one")
    numbers = flatten(read_json(folder / METRICS)) if (folder / METRICS).is_file() else {}
    return Side(folder, {row.path: row for row in rows}, numbers, report_pictures(folder / PAGE),
                      str(known_json(folder / OPTIONS).get("commit") or "unknown"))


def _number(text: str, kind: type) -> Any:
    return kind(text) if text else None


def report_pictures(path: Path) -> dict[str, dict[str, str]]:
    """The pictures in a report as data URIs, by the path of the image and the name of the picture."""
    if not path.is_file():
        return {}
    found = _DATA.search(path.read_text(encoding="utf-8", errors="replace"))
    try:
        images = parse_json(found[1])["images"] if found else []
        return {str(image["path"]): {
            name: uri for name, uri in (image["pictures"] or {}).items()
            if isinstance(uri, str) and _PICTURE.fullmatch(uri)} for image in images}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a report of this project ({error}); inspect the images again") from None


def check_same_images(one: Side, other: Side) -> None:
    """Raise `UserError` unless both runs have the same images, by path, with the same labels."""
    for run, against in ((one, other), (other, one)):
        alone = [path for path in run.rows if path not in against.rows]
        if alone:
            raise UserError(f"{one.folder} and {other.folder}: different test images, {len(alone)} only in "
                            f"{run.folder}, such as {alone[0]}; expected two runs on the same images")
    for path, row in one.rows.items():
        if row.label != other.rows[path].label:
            raise UserError(f"{one.folder} and {other.folder}: different labels of {path}; expected two runs on "
                            "the same images")


# The differences


def _image_side(run: Side, paths: Sequence[str]):
    """The metrics of chosen images of a run, as a function of their numbers; none where labels are missing."""
    rows = [run.rows[path] for path in paths]
    if any(row.label is None for row in rows):
        return lambda chosen: {}
    called = None if any(row.decision is None for row in rows) else np.array([row.decision == 1 for row in rows])
    scored = Scored(np.array([row.label for row in rows]), np.array([row.score for row in rows]), called)
    return lambda chosen: image_numbers(scored, chosen)


def pixels_of(run: Side, truth: Side, paths: Sequence[str]) -> Ranked | None:
    """The pixels of a run's exported maps with the masks in the report of `truth`; None where there are none."""
    masks, maps = [], []
    for path in paths:
        mask = truth.pictures.get(path, {}).get("truth")
        place = Path(path).with_suffix(".tiff")
        file = run.folder / ANOMALY_MAPS / place
        if place.is_absolute() or ".." in place.parts or not file.is_file():
            return None
        masks.append(None if mask is None else _decoded(mask))
        with Image.open(file) as values:
            size = values.size if masks[-1] is None else masks[-1].shape[::-1]
            maps.append(np.asarray(values.convert("F").resize(size, Image.Resampling.BILINEAR)))
    return Ranked(masks, maps) if any(mask is not None and mask.any() for mask in masks) else None


def _decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("L")) > 127


def differences(one: Side, other: Side, intervals: Mapping[str, Interval]) -> list[Difference]:
    """All shares of 1 that both runs have, and the time per image."""
    found = []
    for name, value in one.numbers.items():
        against, seconds = other.numbers.get(name), name == ("seconds_per_image",)
        if not isinstance(value, float) or not isinstance(against, float) or name[-1] in COMPLEMENTS or not (
                seconds or is_share(name)):
            continue
        factor, unit = (1000, "ms") if seconds else (100, "%")
        interval = intervals.get(".".join(name))
        found.append(Difference(
            "Time per image" if seconds else readable_name(name), f"{factor * value:.2f} {unit}",
            f"{factor * against:.2f} {unit}", _signed(factor * (against - value)),
            f"{_signed(100 * interval[0])} to {_signed(100 * interval[1])}" if interval else "–",
            interval is not None and not interval[0] <= 0 <= interval[1]))
    return found


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def pairs_of(one: Side, other: Side) -> list[Pair]:
    """Every image in both runs, the largest change first."""
    places = [_places(run) for run in (one, other)]
    found = []
    for path, row in one.rows.items():
        against = other.rows[path]
        before, after = row.normalised, against.normalised
        if before is None or after is None:
            before, after = places[0][path], places[1][path]
        mine, theirs = one.pictures.get(path, {}), other.pictures.get(path, {})
        pictures = {"input": mine.get("input") or theirs.get("input"), "first": mine.get("map"),
                    "second": theirs.get("map"), "truth": mine.get("truth") or theirs.get("truth")}
        found.append(Pair(row, against, after - before, {name: uri for name, uri in pictures.items() if uri}))
    return sorted(found, key=lambda pair: (-abs(pair.change), pair.first.path))


def _places(run: Side) -> dict[str, float]:
    """The rank of every image by score, from 0 to 1."""
    ranked = sorted(run.rows.values(), key=lambda row: row.score)
    return {row.path: place / len(ranked) for place, row in enumerate(ranked)}


def notes(one: Side, other: Side, pixels: bool) -> list[str]:
    """What a reader must know of the numbers, in sentences."""
    said = []
    known = [{name: value for name, value in run.numbers.items() if name[0] == "protocol"} for run in (one, other)]
    if known[0] != known[1]:
        said.append("The pixel metrics of the two runs were measured in different ways; see their metrics.json.")
    if not pixels and any(name[0] == "pixel" for name in one.numbers):
        said.append("Pixel metrics have no intervals: these need the maps of both runs (--export_maps mvtec) and their "
                    "reports.")
    if not one.pictures or not other.pictures:
        said.append("Pictures are missing where a run has no report.html.")
    return said
