"""The summary of several runs, each one category and one seed: summary.csv, summary.md and index.html.

    summary.csv   one row per run, numbers exactly as in its metrics.json
    summary.md    one row per category, in the units of the field: means over seeds, with their spread
    index.html    the same as one page that opens without a network and links the reports of the runs
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import fmean
from urllib.parse import quote

from dbad.errors import UserError
from dbad.files.atomic import write_text
from dbad.files.names import PAGE, SUMMARY, SUMMARY_PAGE, SUMMARY_TABLE, SUMMARY_TEXT
from dbad.files.tables import read_table, write_table
from dbad.report.page import template
from dbad.report.published import NAMES, PUBLISHED, Published
from dbad.report.runs import COLUMNS, FINISHED, UNTESTED, Cell, Results, Run, cells, measured, metric_names, values_of

TILES = {"Image AUROC", "Pixel AUROC", "Pixel AP", "AUPRO 0.3", "Missed defects", "False alarms"}


@dataclass(frozen=True)
class Row:
    """One category of the table."""

    item: str
    num_seeds: str                              # "3", or "2 of 3" where a run has no results
    reports: list[tuple[int, str | None]]       # for every run its seed and the relative address of its report
    cells: list[Cell]


@dataclass(frozen=True)
class Comparison:
    """Our results beside published ones, as pairs of a cell and a number in percent."""

    published: Published
    titles: list[str]
    rows: dict[str, list[tuple[Cell, float]]]
    mean: list[tuple[Cell, float | None]]       # over the categories that have both numbers


@dataclass(frozen=True)
class Summary:
    """The content of both summary.md and index.html."""

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
    """Write summary.csv, summary.md and index.html into `img_dir` and return the path of index.html.

        runs        every run of the command, including those that have not started; each item and seed once
        about       facts of the command, as name -> text, in the order to show
        published   data set of dbad.report.published.PUBLISHED to compare with; None for no comparison
    An earlier summary there is kept if it has runs that are not among these: its files get a number in their names.
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


def keep_earlier(img_dir: Path, pairs: Collection[tuple[str, str]]) -> None:
    """Rename an earlier summary in `img_dir` if it has runs that are not among the `pairs` of item and seed."""
    path = img_dir / SUMMARY_TABLE
    if not path.is_file():
        return
    with suppress(UserError):       # a damaged one may have other runs
        if all((row.get("item"), row.get("seed")) in pairs for row in read_table(path)):
            return

    def numbered(number: int) -> list[Path]:
        return [old.with_stem(f"{old.stem}.{number}") for old in olds]
    olds = [img_dir / name for name in SUMMARY]
    news = next(found for found in map(numbered, count(1)) if not any(new.exists() for new in found))
    for old, new in zip(olds, news, strict=True):
        if old.exists():
            old.rename(new)
    print(f"{path} was the summary of other runs; it was moved to {news[0]}")


# The content of both documents


def summarise(img_dir: Path, results: Results, about: Mapping[str, str], published: Published | None) -> Summary:
    """The `Summary` of the runs, in their order."""
    items, seeds = list(dict.fromkeys(run.item for run in results)), {run.seed for run in results}
    columns = [cells(column, results) for column in COLUMNS]
    num_finished = sum(not found.trouble for found in results.values())
    others = ((UNTESTED, "without test images"), ("failed", "failed"), ("skipped", "not run"))
    ends = [f"{num_finished} of {_number(len(results), 'run', 'runs')} finished"] + [
        f"{number} {end}" for status, end in others
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
    """The row of a category, with links to the reports of its runs that exist."""
    reports: list[tuple[int, str | None]] = []
    runs = {run: found for run, found in results.items() if run.item == item}
    for run, found in runs.items():
        page = run.folder / PAGE
        there = not found.trouble and page.is_file()
        reports.append((run.seed, quote(Path(os.path.relpath(page, img_dir)).as_posix()) if there else None))
    finished = sum(not found.trouble for found in runs.values())
    return Row(item, f"{finished} of {len(runs)}" if finished < len(runs) else str(finished), reports, shown)


def notes(results: Results) -> list[str]:
    """Sentences that explain the numbers to a reader."""
    said = ["AUROC, AP, F1 and AUPRO are in percent. Missed defects and false alarms are numbers of images at the "
            "saved threshold. The last row has their sums over the categories, and the means of all other columns."]
    if len({run.seed for run in results}) > 1:
        said.append("Numbers are means over seeds; ± is the standard deviation over seeds (n − 1). The ± of the last "
                    "row is that of the means of single seeds, over the seeds that have every category.")
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
        said.append(f"The runs are from different commits: {', '.join(commits)}; summary.csv lists the commit of each.")
    return said


def compare(results: Results, published: Published) -> Comparison:
    """Our results beside the published ones, for the categories that have published results."""
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


def write_rows(path: Path, img_dir: Path, results: Results) -> None:
    """Write summary.csv: one row per run; numbers read back exactly, and an unknown value is an empty field."""
    names = metric_names()
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
        lines += ["", f"## Compared with the published results of {found.published.method}", "", *_table(
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
    """The text as one line of Markdown, escaped, also for use inside a table."""
    return " ".join(str(text).split()).replace("<", "&lt;").replace("|", "\\|")
