"""Runs, each of one category with one seed, and their numbers: means over seeds and categories, with their spread."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from dbad.declared import check_declared, check_types
from dbad.errors import UserError
from dbad.files.atomic import read_json
from dbad.files.names import METRICS, OPTIONS
from dbad.report.page import flatten

FINISHED = ("done", "finished before")
UNTESTED = "no test images"


@dataclass(frozen=True)
class Run:
    """A run of one category with one seed: its results folder and its status."""

    item: str
    seed: int
    folder: Path                    # the results folder of this run: metrics.json, options.json, report.html
    status: str                     # "done", "finished before", UNTESTED, "failed", "skipped" (its turn has not come)
    error: str | None = None        # why it failed, one line
    seconds: float | None = None    # how long this command worked on it


@dataclass(frozen=True)
class Column:
    """A metric as tables show it: `name` as in metrics.csv; a count is shown as part of a whole, count + `rest`."""

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
    """The results of a run: its metrics by dotted name, their protocol, and the commit of the code."""

    numbers: Mapping[str, float | None] = field(default_factory=dict)
    protocol: str = "unknown"
    reason: str | None = None       # why some metrics are missing
    commit: str | None = None
    trouble: str | None = None      # why there are no results


Results = Mapping[Run, Measured]


def measured(run: Run) -> Measured:
    """Read the results of a run. A failed run has none; unreadable ones are recorded as `trouble`, not raised."""
    if run.status == UNTESTED:
        return Measured(trouble=UNTESTED)
    if run.status not in FINISHED:
        why = f"failed: {run.error}" if run.error else "failed"
        return Measured(trouble=why if run.status == "failed" else "not run")
    try:
        metrics = read_json(run.folder / METRICS)
        options = read_json(run.folder / OPTIONS)
        numbers = {".".join(name): value for name, value in flatten(metrics).items() if not isinstance(value, str)}
        check_types(metrics, {"protocol": str | dict[str, str], "reason": str | None}, run.folder / METRICS)
        check_declared(numbers, dict.fromkeys(metric_names(), float | None), run.folder / METRICS)
        check_types(options, {"commit": str | None}, run.folder / OPTIONS)
    except UserError as error:
        return Measured(trouble=str(error))
    protocol = metrics.get("protocol", "unknown")
    if isinstance(protocol, dict):
        protocol = "; ".join(f"{name}: {text}" for name, text in protocol.items())
    return Measured(numbers, protocol, metrics.get("reason"), options.get("commit"))


def over_seeds(values: Collection[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (n - 1); None where there are no values, or fewer than two."""
    return fmean(values) if values else None, stdev(values) if len(values) > 1 else None


def over_categories(by_item: Mapping[str, Mapping[int, float]], combine: Callable[[Iterable[float]], float]
                    ) -> tuple[float | None, float | None]:
    """The `combine` (fmean or sum) of the categories' means over seeds, and its standard deviation over seeds.

    `by_item` is {item: {seed: value}}; categories without a value are left out. The deviation is taken over the seeds
    that have a value in every other category: missing values must not add to it.
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
        numbers = [number for name in names if (number := found.numbers.get(name)) is not None]
        if len(numbers) == len(names):
            values[run.item][run.seed] = sum(numbers)
    return values


def cells(column: Column, results: Results) -> tuple[dict[str, Cell], Cell]:
    """The column's cell for every item, and the cell of all categories: their mean, or their sum for counts."""
    values, combine = values_of(results, column.name), sum if column.rest else fmean
    wholes = values_of(results, column.name, column.rest) if column.rest else dict.fromkeys(values, {})

    def cell(found: tuple[float | None, float | None], whole: tuple[float | None, float | None]) -> Cell:
        value, spread = (None if number is None else column.factor * number for number in found)
        exact = column.rest and value is not None and float(value).is_integer() and spread is None
        rough = column.factor == 1000 and value is not None and value >= 100
        return Cell(value, spread, whole[0], 0 if exact or rough else 1)
    by_item = {item: cell(over_seeds(values[item].values()), over_seeds(wholes[item].values())) for item in values}
    return by_item, cell(over_categories(values, combine), over_categories(wholes, combine))


def metric_names() -> list[str]:
    """The names of the metrics that tables show."""
    return list(dict.fromkeys(name for column in COLUMNS for name in (column.name, column.rest) if name))
