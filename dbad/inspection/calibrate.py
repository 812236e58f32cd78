"""The end of a training: thresholds of all its categories, and a folder that holds the files of one run only.

The record of a run's options tells which files it has named after its categories, so that the next run in the folder
removes those files and no others. Until the last file is written, the record says that the run is unfinished: a folder
that mixes the files of two runs never passes for one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dbad.calibration.thresholds import Calibration, calibrate, check_promise
from dbad.data.categories import Source, category_of, split_category
from dbad.data.intensity import with_intensity
from dbad.declared import check_declared
from dbad.errors import UserError
from dbad.families.detector import Detector
from dbad.families.digests import check_digests, digests
from dbad.families.family import Family
from dbad.families.registry import FAMILIES, recorded_method
from dbad.families.runs import calibration_file, load_calibration
from dbad.families.settings import Settings
from dbad.files.atomic import atomic_write, read_json, write_json
from dbad.files.names import CATEGORY_CALIBRATION, EARLIER_CALIBRATION, TRAIN_OPTIONS, UNFINISHED
from dbad.inspection.loop import walk
from dbad.records import Sample

# Options about places and the machine, which do not shape the result; the bit depth follows from the images.
PLACED = frozenset({"diffusion_checkpoint_dir", "log_dir", "device", "num_workers", "dry_run", "resume",
                    "yes", "intensity_bits"})


class CalibrationOptions(Protocol):
    """The options of a calibration."""

    @property
    def pixel_quantile(self) -> float: ...

    @property
    def false_alarm_rate(self) -> float | None: ...

    @property
    def num_workers(self) -> int: ...


class PromiseOptions(Source, Protocol):
    """The options that a promised rate of false alarms depends on."""

    @property
    def false_alarm_rate(self) -> float | None: ...

    @property
    def holdout(self) -> float: ...

    @property
    def dry_run(self) -> bool: ...


def calibrate_all(family: Family, detector_of: Callable[[str | None], Detector],
                  held_out: Mapping[str, Sequence[Sample]], options: CalibrationOptions
                  ) -> dict[str | None, Calibration]:
    """The calibrations by held-out images: of all categories together and, if there are several, of each.

        detector_of   name, one of `with_thresholds` -> its detector with its settings
        held_out      the good images of every category that were not trained on
    They lack digests, which `finish_files` adds.
    """
    known: dict[str, list[tuple[Path, dict[str, Tensor]]]] = {}
    found: dict[str | None, Calibration] = {}
    used: Settings | None = None
    for name in with_thresholds(held_out):
        detector = detector_of(name)
        if detector.settings != used:
            known.clear()
        used = detector.settings
        for category in [name] if name else held_out:
            if category not in known:
                known[category] = list(walk(detector, held_out[category], options.num_workers,
                                            f"calibrating {category}"))
        images = known[name] if name else [image for category in known.values() for image in category]
        paths, parts = zip(*images, strict=True)
        calibration = calibrate(detector.combine, parts, options.pixel_quantile, options.false_alarm_rate,
                                used.center_crop, paths)
        found[name] = replace(calibration, settings=used.record(), method=family.name)
        print(f"{name or ('all' if len(held_out) > 1 else next(iter(held_out)))}: {len(calibration.scores)} held-out "
              f"good images; image threshold {calibration.image_threshold:.4g}, at most "
              f"{calibration.false_alarm_rate:.1%} false alarms promised")
    return found


@contextmanager
def keeping_earlier(path: Path) -> Iterator[None]:
    """Keep and report the calibration that the block replaces, as calibration.1.json and so on, unless it is equal."""
    if not path.is_file():
        yield
        return
    before = path.read_bytes()
    kept = next(new for n in count(1) if not (new := path.with_name(EARLIER_CALIBRATION.format(n=n))).exists())
    with atomic_write(kept) as temporary:
        temporary.write_bytes(before)
    try:
        yield
    finally:
        if path.read_bytes() == before:
            kept.unlink()
        else:
            print(f"{path} replaces an earlier one, which is kept as {kept.name}")


def begin_files(folder: Path, record: Mapping[str, Any], names: Collection[str]) -> None:
    """Record the run whose files `folder` holds from now on, as unfinished, and remove those of the run before.

        record   the options of the run, see `is_whole`
        names    its files that are named after categories, except the thresholds
    A file of the run before is removed only if its name follows from that run's record and this run does not write it.
    """
    path = folder / TRAIN_OPTIONS
    before = read_json(path) if path.is_file() else {}
    check_declared(before, {"item": str | tuple[str, ...]}, path)
    kept = {*names, *(calibration_file(folder, name, record["item"]).name for name in with_thresholds(record["item"]))}
    for name in sorted(_named_files(before, path) - kept):
        (folder / name).unlink(missing_ok=True)
    write_json(path, {**record, UNFINISHED: True})


def finish_files(folder: Path, record: Mapping[str, Any], thresholds: Mapping[str | None, Calibration]) -> None:
    """Write the thresholds of a run whose other files are there, then record it as finished."""
    for name, calibration in thresholds.items():
        family = FAMILIES[calibration.method]
        found = digests(folder, family, family.settings.read(calibration.settings))
        calibration = replace(calibration, digests=found)
        calibration.save(calibration_file(folder, name, record["item"]))
    write_json(folder / TRAIN_OPTIONS, record)


def _named_files(record: Mapping[str, Any], path: Path) -> set[str]:
    """The names of files that depend on a run's categories or method, from its `record` in the file `path`."""
    items, method = record.get("item", ()), recorded_method(record, path)
    if not items or method not in FAMILIES:
        return set()
    names = FAMILIES[method].by_category
    each = (CATEGORY_CALIBRATION, *(name for name in names if "{}" in name)) if len(items) > 1 else ()
    return {*(name for name in names if "{}" not in name), *(name.format(item) for name in each for item in items)}


def check_promises(options: PromiseOptions, items: Iterable[str]) -> None:
    """Raise `UserError` for a false-alarm rate that the held-out images of a category cannot promise.

    The images are counted, not read. On --dry_run demo data are not checked, since they would have to be drawn.
    """
    if options.false_alarm_rate is None or (options.dry_run and options.dataset_path is None):
        return
    for name in items:
        _, held_out = split_category(category_of(options, name), options.holdout)
        check_promise(options.false_alarm_rate, len(held_out), name)


def with_thresholds(items: Iterable[str]) -> list[str | None]:
    """The names that get thresholds: None for all categories together and, if there are several, each category."""
    names = list(items)
    return [*names, None] if len(names) > 1 else [None]


def is_whole(folder: Path, record: Mapping[str, Any], names: Iterable[str], placed: Collection[str] = PLACED) -> bool:
    """True if the folder holds a finished run of these options on these images, with its thresholds.

        record   the contents of its train_arg_config.json
        names    its other files
        placed   options that do not shape the result and may differ
    """
    files = [folder / name for name in (TRAIN_OPTIONS, *names)]
    thresholds = [calibration_file(folder, name, record["item"]) for name in with_thresholds(record["item"])]
    if not all(path.is_file() for path in files + thresholds):
        return False
    digests_of: dict[Path, str] = {}
    try:
        for path in thresholds:
            check_digests(load_calibration(path), path, digests_of)
    except UserError:
        return False
    known, wanted = ({name: value for name, value in values.items() if name not in placed}
                     for values in (with_intensity(read_json(folder / TRAIN_OPTIONS)), record))
    return known == wanted
