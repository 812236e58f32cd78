"""Several categories and seeds in one command. One failure does not stop the others; a summary is always written."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dbad.data.categories import category_names, open_category
from dbad.data.splits import files_of
from dbad.errors import UserError, printable
from dbad.files.atomic import known_json, write_json
from dbad.files.names import FINISHED
from dbad.inspection.options import AnyInspectionRun, InspectionRun
from dbad.options.resolve import plain
from dbad.records import RunResults
from dbad.report import summary
from dbad.report.results import listing_digest, set_summary
from dbad.report.runs import UNTESTED, Run
from dbad.runtime.output import output_is_closed


@dataclass(frozen=True)
class Job:
    """A model, and the inspections with it.

        options    options of every inspection, by category
        folders    folder of the results of each, by category
        check      called with the options of an inspection; refuses those that would make a phase fail
        train      makes the model; None where it exists
        inspect    options of an inspection -> its results, None if there are no test images; None for no inspection
        resume     skip inspections that are finished
    """

    options: dict[str, Any]
    folders: dict[str, Path]
    check: Callable[[Any], None]
    train: Callable[[], None] | None
    inspect: Callable[[Any], RunResults | None] | None
    resume: bool = False


def run_one(job: Job) -> RunResults | None:
    """Run a job of one inspection, whose failure ends the command; returns the results, if any."""
    (options,) = job.options.values()
    job.check(options)
    if job.train:
        job.train()
    return job.inspect(options) if job.inspect else None


def run_jobs(jobs: Sequence[Job], summarise: Callable[[Sequence[Run]], None]) -> list[Run]:
    """Run the jobs in turn and return all runs. Finished ones are skipped, and failures are recorded.

    `summarise` is called in any case. Several failures end in a `UserError` that names each.
    """
    runs = {(number, item): Run(item, job.options[item].seed or 0, folder, "skipped")
            for number, job in enumerate(jobs) for item, folder in job.folders.items()}
    try:
        for number, job in enumerate(jobs):
            print(printable(f"--- {number + 1} of {len(jobs)}: {', '.join(f.name for f in job.folders.values())}"))
            _run_job(job, number, runs)
    finally:
        summarise(list(runs.values()))
    failed = [run for run in runs.values() if run.status == "failed"]
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: "
                        + "; ".join(f"{run.folder.name} ({run.error})" for run in failed))
    return list(runs.values())


def _run_job(job: Job, number: int, runs: dict[tuple[int, str], Run]) -> None:
    """Train, unless every inspection is finished, and inspect; the outcome goes into `runs`."""
    left: dict[str, dict[str, Any] | None] = {}
    for item, options in job.options.items():
        key = number, item
        record, runs[key] = _attempt(runs[key], lambda options=options: _record(options))
        if runs[key].status == "failed":
            continue
        if record and job.resume and _given(known_json(job.folders[item] / FINISHED)) == _given(record):
            print(f"{item}: finished before")
            runs[key] = replace(runs[key], status="finished before")
            continue
        _, runs[key] = _attempt(runs[key], lambda options=options: job.check(options))
        if runs[key].status != "failed":
            left[item] = record
    begun = time.monotonic()
    if left and job.train:
        first = next(iter(left))
        _, trained = _attempt(runs[number, first], job.train)
        if trained.status == "failed":
            for item in left:
                runs[number, item] = replace(runs[number, item], status="failed", error=trained.error)
            return
    for item, record in left.items():
        key, options = (number, item), job.options[item]
        if inspect := job.inspect:
            results, runs[key] = _attempt(runs[key], lambda options=options: inspect(options))
            if runs[key].status == "failed":
                continue
            if results is None:
                runs[key] = replace(runs[key], status=UNTESTED, seconds=time.monotonic() - begun)
                begun = time.monotonic()
                continue
            runs[key] = replace(runs[key], folder=results.folder)
            if record and not options.dry_run:
                write_json(results.folder / FINISHED, record)
        runs[key] = replace(runs[key], status="done", seconds=time.monotonic() - begun)
        begun = time.monotonic()


def _attempt(run: Run, act: Callable[[], Any]) -> tuple[Any, Run]:
    """The result of `act`, and the run; a failure is recorded in the run, and the others go on."""
    try:
        return act(), run
    except UserError as error:
        print(f"failed: {error}", file=sys.stderr)
        return None, replace(run, status="failed", error=str(error))
    except Exception as error:      # a program or machine error in one category must not stop the others
        if isinstance(error, BrokenPipeError) and output_is_closed():
            raise                   # the user has left, as with | head
        traceback.print_exc()
        return None, replace(run, status="failed", error=f"{type(error).__name__}: {error}".splitlines()[0])


def _record(options: InspectionRun) -> dict[str, Any]:
    """The options and files that shape an inspection; an equal record shows that it is finished."""
    category = open_category(options, options.item_states)
    files = [path for sample in category.good + category.test for path in files_of(sample)]
    return {"options": plain(options), "data": listing_digest(files)}


def _given(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a run without the options that were not given, since an older record may have fewer, and --yes."""
    options = record.get("options")
    options = options if isinstance(options, dict) else {}      # a damaged file may hold anything
    return record | {"options": {name: value for name, value in options.items()
                                 if value is not None and name != "yes"}}


def write_set_summary(options: AnyInspectionRun, runs: Sequence[Run]) -> None:
    """Write the summary of several runs, beside published results if it has all categories of a data set."""
    if options.dry_run:
        return
    about = set_summary(options, runs)
    whole = options.dataset_path is not None and options.item_states == ("all",)
    known = summary.dataset_of(category_names(options)) if whole else None
    print(f"The summary is {summary.write_summary(options.img_dir, runs, about, known)}")
