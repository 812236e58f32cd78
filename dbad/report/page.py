"""Scores and metrics as files, and the report: one HTML file that opens without a network."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

from dbad.files.atomic import write_json, write_text
from dbad.files.names import METRICS, METRICS_TABLE
from dbad.files.tables import write_table
from dbad.metrics import verdicts
from dbad.metrics.verdicts import Curves, Thresholds
from dbad.records import Inspection
from dbad.report import figures

SCORE_COLUMNS = ("path", "category", "defect", "label", "score", "p_value", "normalised", "decision")
IMAGE_BYTES = 50_000  # for all pictures of one image; base64 adds a third, so 200 images stay below 15 MB
PICTURE_SIDE = 256  # pixels, the longer side at most
ACRONYMS = {"auroc": "AUROC", "aupro": "AUPRO", "ap": "AP", "f1": "F1", "pro": "PRO"}
PERCENTAGES = {"rate", "share", "accuracy", "precision", "recall"}


def write_scores(path: Path | str, inspections: Sequence[Inspection]) -> Path:
    """Write one line per image, in the order given, see `tables.write_table`.

        path, category, defect    texts: one that a spreadsheet would take for a formula begins with a single quote
        label, decision           1 defective, 0 good
        score, p_value, normalised    numbers that read back exactly
    What is unknown is an empty field.
    """
    return write_table(path, SCORE_COLUMNS, ([plain(getattr(inspection, name)) for name in SCORE_COLUMNS]
                                             for inspection in inspections))


def write_metrics(folder: Path | str, metrics: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write metrics.json, as nested as given, and metrics.csv, one line per number with its dotted name.

    What is not finite becomes null in JSON and an empty field in CSV, since neither format has a common word for it.
    """
    json_path, csv_path = Path(folder, METRICS), Path(folder, METRICS_TABLE)
    write_json(json_path, plain(metrics))
    write_table(csv_path, ("metric", "value"), ((".".join(name), value) for name, value in flatten(metrics).items()))
    return json_path, csv_path


def plain(value: Any) -> Any:
    """The value in JSON's types: NumPy and torch scalars and arrays become numbers and lists, not-finite ones None."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flatten(metrics: Mapping[str, Any], above: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """{"image": {"auroc": 0.9}} -> {("image", "auroc"): 0.9}; the entries of a list are numbered, its texts joined."""
    flat = {}
    for name, value in plain(metrics).items():
        if isinstance(value, list) and value and all(isinstance(entry, str) for entry in value):
            value = "; ".join(value)
        value = {str(index): entry for index, entry in enumerate(value)} if isinstance(value, list) else value
        flat |= flatten(value, (*above, name)) if isinstance(value, Mapping) else {(*above, name): value}
    return flat


def readable_name(name: tuple[str, ...]) -> str:
    """("image", "auroc") -> Image AUROC; ("image_rates", "f1") -> Image F1; ("a", "b", "f1_max") -> A, b F1 max."""
    last = " ".join(ACRONYMS.get(word, word) for word in name[-1].split("_"))
    words = ", ".join(above.removesuffix("_rates") for above in name[:-1]) + " " * (len(name) > 1) + last
    return words[:1].upper() + words[1:]


def readable_value(name: tuple[str, ...], value: Any) -> str:
    """Rates in percent, areas and the like with four digits after the point, other numbers with four significant."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    if PERCENTAGES & set(name[-1].split("_")):
        return f"{100 * value:.1f} %"
    return f"{value:.4f}" if _is_quality(name) else f"{value:.4g}"


def _is_quality(name: tuple[str, ...]) -> bool:
    """Whether a metric is one of those by which detectors are compared, and not a count, threshold or duration."""
    words = set(name[-1].split("_"))
    return bool(words & (PERCENTAGES | ACRONYMS.keys())) and "threshold" not in words


# Pictures


def _encode(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def pictures(inspection: Inspection, scale: float, side: int = PICTURE_SIDE) -> dict[str, str | None]:
    """The pictures of one image as data URIs, together at most `IMAGE_BYTES` before encoding: None where there is none.

    Photographs are JPEG; quality, and for the busiest images the size, give way until the sum fits. The mask is PNG.
    """
    truth = verdicts.ground_truth(inspection)
    photographs = {"input": inspection.image, "reconstruction": inspection.reconstruction,
                   "map": figures.heat(inspection.anomaly_map, scale),
                   "overlay": figures.overlay(inspection.image, inspection.anomaly_map, scale)}
    for quality, shrink in ((82, 1), (72, 1), (60, 1), (45, 1), (40, 0.75), (30, 0.5), (20, 0.25)):
        small = max(16, round(side * shrink))
        files = {name: None if pixels is None else
                 _encode(figures.tile(pixels, small, enlarge=False), "JPEG", quality=quality, optimize=True)
                 for name, pixels in photographs.items()}
        mask = None if truth is None else _encode(
            figures.tile(truth, small, enlarge=False).convert("1", dither=Image.Dither.NONE), "PNG", optimize=True)
        if sum(len(file) for file in (*files.values(), mask) if file) <= IMAGE_BYTES:
            break
    return {name: _data_uri("jpeg", file) for name, file in files.items()} | {"truth": _data_uri("png", mask)}


def _data_uri(kind: str, file: bytes | None) -> str | None:
    return None if file is None else f"data:image/{kind};base64,{base64.b64encode(file).decode('ascii')}"


# The report


@lru_cache
def template(name: str) -> Template:
    """A page of dbad/templates; what it is given is escaped, and a name that it lacks is an error."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                       lstrip_blocks=True).get_template(name)


def write_report(path: Path | str, inspections: Sequence[Inspection], metrics: Mapping[str, Any],
                 summary: Mapping[str, str], thresholds: Thresholds, found: Curves | None = None) -> Path:
    """Write the report of a run as one HTML file without outside resources; below 15 MB for 200 images.

        inspections   in any order; the report sorts by score
        metrics       numbers, may be nested: the outer areas and rates are shown large, all numbers in a table
        summary       what the run was, as name -> text, in the order to show
        thresholds    where the draggable threshold starts, and the middle of the maps' colours
        found         the curves, if they were computed before
    More than 200 images get smaller pictures, so that the file grows slowly.
    """
    found = verdicts.curves(inspections) if found is None else found
    flat = flatten(metrics)
    data = _report_data(inspections, thresholds, found)
    tiles = [name for name in flat if len(name) <= 2 and _is_quality(name)]
    page = template("report.html").render(
        title=", ".join(sorted({i.category for i in inspections})),
        tiles=[(readable_name(name), readable_value(name, flat[name])) for name in tiles],
        table=[(readable_name(name), readable_value(name, value)) for name, value in flat.items()],
        summary=dict(summary), notes=found.notes, data=data,
    )
    write_text(path, page)
    return Path(path)


def _report_data(inspections: Sequence[Inspection], thresholds: Thresholds, found: Curves) -> dict[str, Any]:
    """What the script in the report works on, in JSON's types."""
    side = max(64, round(PICTURE_SIDE * min(1.0, (200 / max(1, len(inspections))) ** 0.5)))
    scale = figures.map_scales(inspections, thresholds.pixel).get("anomaly map", 0.0)
    images = [{
        "path": i.path, "kind": kind, "label": i.label, "score": float(i.score), "shape": i.image.shape[:2],
        "p_value": i.p_value, "normalised": i.normalised,
        "pictures": pictures(i, scale, side),
    } for i, kind in zip(inspections, verdicts.kinds(inspections), strict=True)]
    scores = [float(i.score) for i in inspections]
    return plain({
        "images": images, "threshold": thresholds.image, "logarithmic": verdicts.spans_decades(scores),
        "roc": found.roc and np.stack(found.roc[:2], 1).round(5),
        "pro": found.pro and np.stack(found.pro[:2], 1).round(5),
        "pro_mark": verdicts.point_at(found.pro, thresholds.pixel),
        "counterpart": next((i.counterpart for i in inspections if i.reconstruction is not None), None),
    })
