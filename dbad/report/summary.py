"""The summary of several runs, each one category and one seed: summary.csv, summary.md and index.html.

    summary.csv   one row per run, numbers exactly as in its metrics.json
    summary.md    one row per category, in the field's units: means over seeds, with their spread
    index.html    the same as one page that opens without a network and links the reports of the runs
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import fmean, stdev
from urllib.parse import quote

from dbad.declared import check_declared, check_types
from dbad.errors import UserError
from dbad.files.atomic import read_json, write_text
from dbad.files.names import METRICS, OPTIONS, PAGE, SUMMARY, SUMMARY_PAGE, SUMMARY_TABLE, SUMMARY_TEXT
from dbad.files.tables import read_table, write_table
from dbad.report.page import flatten, template
from dbad.report.published import NAMES, PUBLISHED, Published

FINISHED = ("done", "finished before")


@dataclass(frozen=True)
class Run:
    """One category with one seed; where its results lie, and how it went."""

    item: str
    seed: int
    folder: Path                    # the results folder of this run: metrics.json, options.json, report.html
    status: str                     # "done", "finished before", "failed", "skipped" (its turn has not come)
    error: str | None = None        # why it failed, one line
    seconds: float | None = None    # how long this command worked on it


@dataclass(frozen=True)
class Column:
    """A metric as tables show it: `name` as in metrics.csv; a count is shown with the `rest` of what was counted."""

    title: str
    name: str
    factor: int = 100
    rest: str | None = None


COLUMNS = (
    Column("Image AUROC", "image.auroc"), Column("Image AP", "image.ap"), Column("Image F1-max", "image.f1_max"),
    Column("Pixel AUROC", "pixel.auroc"), Column("Pixel AP", "pixel.ap"), Column("Pixel F1-max", "pixel.f1_max"),
    Column("AUPRO 0.3", "pixel.aupro_0.3"), Column("AUPRO 0.05", "pixel.aupro_0.05"),
    Column("Missed defects", "image_rates.fn", 1, "image_rates.tp"),
    Column("False alarms", "image_rates.fp", 1, "image_rates.tn"),
    Column("ms per image", "seconds_per_image", 1000),
)
TILES = {"Image AUROC", "Pixel AUROC", "Pixel AP", "AUPRO 0.3", "Missed defects", "False alarms"}


@dataclass(frozen=True)
class Cell:
    """A number as it is shown: a mean over seeds, its standard deviation, and the whole that a count is part of."""

    value: float | None = None
    spread: float | None = None
    whole: float | None = None
    digits: int = 1

    def __str__(self) -> str:
        return self.number + self.deviation + self.rest

    @property
    def number(self) -> str:
        return "–" if self.value is None else f"{self.value:.{self.digits}f}"

    @property
    def deviation(self) -> str:
        return "" if self.spread is None else f" ± {self.spread:.{self.digits}f}"

    @property
    def rest(self) -> str:
        return "" if self.whole is None else f" of {self.whole:g}"


@dataclass(frozen=True)
class Measured:
    """What a run left: its metrics by dotted name, how they were measured, and by which code."""

    numbers: Mapping[str, float | None] = field(default_factory=dict)
    protocol: str = "unknown"
    reason: str | None = None       # why some metrics are missing
    commit: str | None = None
    trouble: str | None = None      # why there is nothing


Results = Mapping[Run, Measured]


@dataclass(frozen=True)
class Row:
    """One category of the table."""

    item: str
    num_seeds: str                              # "3", or "2 of 3" where a run has no results
    reports: list[tuple[int, str | None]]       # for every run its seed and the relative address of its report
    cells: list[Cell]


@dataclass(frozen=True)
class Comparison:
    """Ours beside published results, as pairs of a cell and percent."""

    published: Published
    titles: list[str]
    rows: dict[str, list[tuple[Cell, float]]]
    mean: list[tuple[Cell, float | None]]       # over the categories that have both numbers


@dataclass(frozen=True)
class Summary:
    """What summary.md and index.html both say."""

    title: str
    headline: str
    about: Mapping[str, str]
    several_seeds: bool
    titles: list[str]
    rows: list[Row]
    mean: list[Cell]
    notes: list[str]
    comparison: Comparison | None
    troubles: list[tuple[str, int, str]]        # item, seed, why it has no results
    protocols: list[str]


def dataset_of(names: Collection[str]) -> str | None:
    """The data set with published results that has all these categories: "MVTec AD", "VisA" or None."""
    return next((dataset for dataset, table in PUBLISHED.items() if names and set(names) <= table.rows.keys()), None)


def write_summary(img_dir: Path, runs: Sequence[Run], about: Mapping[str, str], published: str | None = None) -> Path:
    """Write summary.csv, summary.md and index.html into `img_dir`; returns the path of index.html.

        runs        every run of the command, also those whose turn has not come; each item and seed once
        about       facts of the command, as name -> text, in the order to show
        published   data set of dbad.report.published.PUBLISHED whose published results are to stand beside ours
    A summary that lies there and has runs which are not among these is kept: its files get a number in their names.
    """
    img_dir = Path(img_dir)
    results = {run: measured(run) for run in runs}
    summary = summarise(img_dir, results, about, PUBLISHED[published] if published else None)
    tiles = [(title, mean) for title, mean in zip(summary.titles, summary.mean, strict=True) if title in TILES]
    keep_earlier(img_dir, {(run.item, str(run.seed)) for run in runs})
    write_rows(img_dir / SUMMARY_TABLE, img_dir, results)
    write_text(img_dir / SUMMARY_TEXT, markdown(summary))
    write_text(img_dir / SUMMARY_PAGE, template("index.html").render(summary=summary, tiles=tiles))
    return img_dir / SUMMARY_PAGE


def measured(run: Run) -> Measured:
    """Read the results of a run; those of one that failed are not its own, and unreadable ones are told, not raised."""
    if run.status not in FINISHED:
        why = f"failed: {run.error}" if run.error else "failed"
        return Measured(trouble=why if run.status == "failed" else "not run")
    try:
        metrics = read_json(run.folder / METRICS)
        options = read_json(run.folder / OPTIONS)
        numbers = {".".join(name): value for name, value in flatten(metrics).items() if not isinstance(value, str)}
        check_types(metrics, {"protocol": str | dict[str, str], "reason": str | None}, run.folder / METRICS)
        check_declared(numbers, dict.fromkeys(_names(), float | None), run.folder / METRICS)
        check_types(options, {"commit": str | None}, run.folder / OPTIONS)
    except UserError as error:
        return Measured(trouble=str(error))
    protocol = metrics.get("protocol", "unknown")
    if isinstance(protocol, dict):
        protocol = "; ".join(f"{name}: {text}" for name, text in protocol.items())
    return Measured(numbers, protocol, metrics.get("reason"), options.get("commit"))


def keep_earlier(img_dir: Path, pairs: Collection[tuple[str, str]]) -> None:
    """Rename the summary that lies in `img_dir` if it has other runs than `pairs` of item and seed."""
    path = img_dir / SUMMARY_TABLE
    if not path.is_file():
        return
    with suppress(UserError):       # a damaged one has other runs, for all that is known
        if all((row.get("item"), row.get("seed")) in pairs for row in read_table(path)):
            return

    def numbered(number: int) -> list[Path]:
        return [old.with_stem(f"{old.stem}.{number}") for old in olds]
    olds = [img_dir / name for name in SUMMARY]
    news = next(found for found in map(numbered, count(1)) if not any(new.exists() for new in found))
    for old, new in zip(olds, news, strict=True):
        if old.exists():
            old.rename(new)
    print(f"{path} was the summary of other runs; it is kept in {news[0]}")


# Numbers


def over_seeds(values: Collection[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (n - 1); None where there are no values, or fewer than two."""
    return fmean(values) if values else None, stdev(values) if len(values) > 1 else None


def over_categories(by_item: Mapping[str, Mapping[int, float]], combine: Callable[[Iterable[float]], float]
                    ) -> tuple[float | None, float | None]:
    """`combine`, fmean or sum, of the categories' means over seeds, and the spread of what it gives for one seed.

    {item: {seed: value}}; categories without a value are left out. The spread is taken over the seeds for which all
    others have one: it shall not show which categories a seed lacks.
    """
    present = [values for values in by_item.values() if values]
    if not present:
        return None, None
    whole = set.intersection(*(set(values) for values in present))
    _, spread = over_seeds([combine([values[seed] for values in present]) for seed in sorted(whole)])
    return combine([fmean(values.values()) for values in present]), spread


def values_of(results: Results, *names: str) -> dict[str, dict[int, float]]:
    """The metric, or the sum of several, as {item: {seed: value}}; seeds without it are missing."""
    values: dict[str, dict[int, float]] = {run.item: {} for run in results}
    for run, found in results.items():
        numbers = [found.numbers.get(name) for name in names]
        if None not in numbers:
            values[run.item][run.seed] = sum(numbers)
    return values


def cells(column: Column, results: Results) -> tuple[dict[str, Cell], Cell]:
    """The column's cell for every item, and that of all categories: their mean, or their sum for counts."""
    values, combine = values_of(results, column.name), sum if column.rest else fmean
    wholes = values_of(results, column.name, column.rest) if column.rest else dict.fromkeys(values, {})

    def cell(found: tuple[float | None, float | None], whole: tuple[float | None, float | None]) -> Cell:
        value, spread = (None if number is None else column.factor * number for number in found)
        exact = column.rest and value is not None and float(value).is_integer() and spread is None
        rough = column.factor == 1000 and value is not None and value >= 100
        return Cell(value, spread, whole[0], 0 if exact or rough else 1)
    by_item = {item: cell(over_seeds(values[item].values()), over_seeds(wholes[item].values())) for item in values}
    return by_item, cell(over_categories(values, combine), over_categories(wholes, combine))


# What both documents show


def summarise(img_dir: Path, results: Results, about: Mapping[str, str], published: Published | None) -> Summary:
    """All that is said of the runs, in the order in which they came."""
    items, seeds = list(dict.fromkeys(run.item for run in results)), {run.seed for run in results}
    columns = [cells(column, results) for column in COLUMNS]
    num_finished = sum(not found.trouble for found in results.values())
    ends = [f"{num_finished} of {_number(len(results), 'run', 'runs')} finished"] + [
        f"{number} {end}" for status, end in (("failed", "failed"), ("skipped", "not run"))
        if (number := sum(run.status == status for run in results))]
    protocols: dict[str, list[str]] = {}
    for run, found in results.items():
        if not found.trouble:
            protocols.setdefault(found.protocol, []).append(run.item)
    return Summary(
        title=f"Summary: {_number(len(items), 'category', 'categories')}, {_number(len(seeds), 'seed', 'seeds')}",
        headline=", ".join(ends), about=about, several_seeds=len(seeds) > 1,
        titles=[column.title for column in COLUMNS],
        rows=[row(img_dir, results, item, [by_item[item] for by_item, _ in columns]) for item in items],
        mean=[mean for _, mean in columns],
        notes=notes(results), comparison=compare(results, published) if published else None,
        troubles=[(run.item, run.seed, found.trouble) for run, found in results.items() if found.trouble],
        protocols=[text + (f" ({', '.join(dict.fromkeys(users))})" if len(protocols) > 1 else "")
                   for text, users in protocols.items()],
    )


def row(img_dir: Path, results: Results, item: str, shown: list[Cell]) -> Row:
    """The row of a category, with links to those reports that are of its runs and exist."""
    reports: list[tuple[int, str | None]] = []
    runs = {run: found for run, found in results.items() if run.item == item}
    for run, found in runs.items():
        page = run.folder / PAGE
        there = not found.trouble and page.is_file()
        reports.append((run.seed, quote(Path(os.path.relpath(page, img_dir)).as_posix()) if there else None))
    finished = sum(not found.trouble for found in runs.values())
    return Row(item, f"{finished} of {len(runs)}" if finished < len(runs) else str(finished), reports, shown)


def notes(results: Results) -> list[str]:
    """What a reader must know of the numbers, in sentences."""
    said = ["Areas and F1 are in percent. Missed defects and false alarms are images at the saved threshold; the last "
            "row has their sum over the categories, and the mean of everything else."]
    if len({run.seed for run in results}) > 1:
        said.append("Numbers are means over seeds; ± is the standard deviation over seeds (n − 1), in the last row "
                    "that of the seeds' own means, over the seeds that have every category.")
    present = {column.title: values_of(results, column.name) for column in COLUMNS}
    for total in sorted({sum(map(bool, values.values())) for values in present.values()}, reverse=True):
        titles = [title for title, values in present.items() if sum(map(bool, values.values())) == total]
        num_items = len(present[titles[0]])
        if total < num_items:
            which = "All means" if len(titles) == len(COLUMNS) else f"Means of {', '.join(titles)}"
            said.append(f"{which} are over {total} of {num_items} categories; the others have no value.")
    said += dict.fromkeys(f"{run.item}: {found.reason}." for run, found in results.items() if found.reason)
    commits = dict.fromkeys(found.commit or "unknown" for found in results.values() if not found.trouble)
    if len(commits) > 1:
        said.append(f"The runs are of different commits: {', '.join(commits)}; summary.csv has that of each.")
    return said


def compare(results: Results, published: Published) -> Comparison:
    """Ours beside the published results, for the categories that were published."""
    rows: dict[str, list[tuple[Cell, float]]] = {run.item: [] for run in results if run.item in published.rows}
    mean: list[tuple[Cell, float | None]] = []
    chosen = [column for name in NAMES for column in COLUMNS if column.name == name]
    for index, column in enumerate(chosen):
        ours, ours_mean = cells(column, {run: found for run, found in results.items() if run.item in rows})
        for item in rows:
            rows[item].append((ours[item], published.rows[item][index]))
        both = [theirs for cell, theirs in (pairs[index] for pairs in rows.values()) if cell.value is not None]
        mean.append((ours_mean, fmean(both) if both else None))
    return Comparison(published, [column.title for column in chosen], rows, mean)


def _number(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


# Files


def _names() -> list[str]:
    """The metrics that are shown."""
    return list(dict.fromkeys(name for column in COLUMNS for name in (column.name, column.rest) if name))


def write_rows(path: Path, img_dir: Path, results: Results) -> None:
    """Write summary.csv: one row per run; numbers read back exactly, and what is unknown is an empty field."""
    names = _names()
    rows = []
    for run, found in results.items():
        numbers = (found.numbers.get(name) for name in ("num_images", *names))
        error = found.trouble if run.status in FINISHED else run.error
        rows.append((run.item, run.seed, run.status, error, *numbers, run.seconds, found.commit,
                     Path(os.path.relpath(run.folder, img_dir)).as_posix()))
    columns = ("item", "seed", "status", "error", "num_images", *names, "run_seconds", "commit", "folder")
    write_table(path, columns, rows)


def markdown(summary: Summary) -> str:
    """The text of summary.md."""
    seeds = summary.several_seeds
    lines = [f"# {summary.title}", "", f"{summary.headline}.", ""]
    lines += [f"- {_text(name)}: {_text(fact)}" for name, fact in summary.about.items()] + [""]
    lines += _table(
        ["Category", *["Seeds"] * seeds, *summary.titles],
        [[_text(row.item), *[row.num_seeds] * seeds, *map(str, row.cells)] for row in summary.rows]
        + [["**Mean**", *[""] * seeds, *map(str, summary.mean)]])
    lines += [line for note in summary.notes for line in ("", _text(note))]
    if summary.comparison:
        found = summary.comparison
        rows = {_text(item): pairs for item, pairs in found.rows.items()} | {"**Mean**": found.mean}
        lines += ["", f"## Beside {found.published.method} as published", "", *_table(
            ["Category", *(head for title in found.titles for head in (title, found.published.method))],
            [[name, *(str(cell) for ours, theirs in pairs for cell in (ours, Cell(theirs)))]
             for name, pairs in rows.items()])]
        lines += ["", f"{found.published.source}. {found.published.caveat} Means are over the categories that have "
                  "both numbers."]
    if summary.troubles:
        lines += ["", "## Without results", ""]
        lines += [f"- {_text(item)}, seed {seed}: {_text(why)}" for item, seed, why in summary.troubles]
    if summary.protocols:
        lines += ["", "## Protocol of the pixel metrics", "", *(f"- {_text(text)}" for text in summary.protocols)]
    return "\n".join(lines) + "\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---", *["---:"] * (len(heads) - 1)], *rows)]


def _text(text: str) -> str:
    """One line of Markdown in which the text stands for itself, also inside a table."""
    return " ".join(str(text).split()).replace("<", "&lt;").replace("|", "\\|")
