"""Scores and metrics as files, and the report: one HTML file that opens without a network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from dbad.files.atomic import atomic_write, write_json
from dbad.files.names import METRICS, METRICS_TABLE
from dbad.files.tables import write_table
from dbad.metrics import verdicts
from dbad.metrics.verdicts import Curves, Thresholds
from dbad.records import ScoreRow
from dbad.report.again import Again
from dbad.report.colours import colour_stops
from dbad.report.curves import PRO_LIMIT
from dbad.report.gallery import Gallery
from dbad.report.sentences import chance_note, figures, result_sentence

ACRONYMS = {"auroc": "AUROC", "aupro": "AUPRO", "ap": "AP", "f1": "F1", "pro": "PRO"}
PERCENTAGES = {"rate", "share", "accuracy", "precision", "recall"}
COMPLEMENTS = {"true_negative_rate", "false_negative_rate"}     # 1 less another rate, which is shown


def write_scores(path: Path | str, rows: Iterable[ScoreRow]) -> Path:
    """Write one line per image, in the order given, see `tables.write_table`.

        path, category, defect    texts: one that a spreadsheet would take for a formula begins with a single quote
        label, decision           1 defective, 0 good
        score, p_value, normalised    numbers that read back exactly
    An unknown value is an empty field.
    """
    return write_table(path, ScoreRow._fields, (plain(row) for row in rows))


def write_metrics(folder: Path | str, metrics: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write metrics.json, as nested as given, and metrics.csv, one line per number with its dotted name.

    A number that is not finite becomes null in JSON and an empty field in CSV, as neither format has a common word.
    """
    json_path, csv_path = Path(folder, METRICS), Path(folder, METRICS_TABLE)
    write_json(json_path, plain(metrics))
    write_table(csv_path, ("metric", "value"), ((".".join(name), value) for name, value in flatten(metrics).items()))
    return json_path, csv_path


def plain(value: Any) -> Any:
    """The value in JSON's types: NumPy and torch scalars and arrays become numbers and lists, non-finite ones None."""
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
    """Rates, areas and other shares of 1 in percent, other numbers with four significant digits."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{100 * value:.2f} %" if is_share(name) else f"{value:.4g}"


def is_share(name: tuple[str, ...]) -> bool:
    """True if a metric lies in [0, 1], and is not a count, threshold or duration."""
    words = set(name[-1].split("_"))
    return bool(words & (PERCENTAGES | ACRONYMS.keys())) and "threshold" not in words


# The report


@lru_cache
def template(name: str) -> Template:
    """A template of dbad/report/templates. The values are escaped; a missing value is an error."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                       lstrip_blocks=True).get_template(name)


def write_report(path: Path | str, rows: Sequence[ScoreRow], gallery: Gallery, metrics: Mapping[str, Any],
                 summary: Mapping[str, str], thresholds: Thresholds, found: Curves, again: Again | None = None) -> Path:
    """Write the report of a run as one HTML file without outside resources; below 15 MB for 200 images.

        rows          of all images, in any order; the report sorts by score
        gallery       the pictures of the images by their place in `rows`; a line says so if some have none
        metrics       numbers, may be nested: the outer areas and rates are shown large, all numbers in a table
        summary       facts of the run, as name -> text, in the order to show
        thresholds    the start of the draggable threshold, and the middle of the maps' colours
        found         the curves
        again         how to inspect again with another threshold; None if that cannot be told
    """
    flat, promised = flatten(metrics), again.calibration.false_alarm_rate if again else None
    limit = f"Pictures of the {len(gallery.shown)} highest-scoring of {len(rows)} images; numbers cover all images."
    page = template("report.html").stream(
        title=", ".join(sorted({row.category for row in rows})), sentence=result_sentence(rows, flat, promised),
        tiles=figures(flat), note=chance_note(flat, promised),
        table=[(readable_name(name), readable_value(name, value)) for name, value in flat.items()
               if name[-1] not in COMPLEMENTS],
        summary=dict(summary), notes=found.notes, limit=limit if len(gallery.shown) < len(rows) else None,
        colours=colour_stops(), data=_report_data(rows, gallery, thresholds, found, again),
        images=_report_images(rows, gallery),
    )
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        page.dump(file, "utf-8", "backslashreplace")        # in pieces: the whole page would need too much memory
    return Path(path)


def _report_data(rows: Sequence[ScoreRow], gallery: Gallery, thresholds: Thresholds, found: Curves,
                 again: Again | None) -> dict[str, Any]:
    """What the script in the report works on, beside the images, in JSON's types."""
    return plain({
        "threshold": thresholds.image, "pixel_threshold": thresholds.pixel, "pro_limit": PRO_LIMIT,
        "again": again and again.as_dict(), "logarithmic": verdicts.spans_decades([row.score for row in rows]),
        "roc": found.roc and np.stack(found.roc[:2], 1).round(5),
        "pro": found.pro and np.stack(found.pro[:2], 1).round(5),
        "pro_mark": verdicts.point_at(found.pro, thresholds.pixel),
        "counterpart": next((shown.counterpart for shown in gallery.shown.values() if shown.files["reconstruction"]),
                            None),
    })


def _report_images(rows: Sequence[ScoreRow], gallery: Gallery) -> Iterator[dict[str, Any]]:
    """Yield the data of the script in the report for every image, in JSON's types."""
    for number, (row, kind) in enumerate(zip(rows, verdicts.kinds(rows), strict=True)):
        shown = gallery.shown.get(number)
        yield plain({
            "path": row.path, "kind": kind, "label": row.label, "score": float(row.score), "p_value": row.p_value,
            "normalised": row.normalised, "shape": shown and shown.shape, "input_side": shown and shown.input_side,
            "pictures": shown and shown.uris()})
