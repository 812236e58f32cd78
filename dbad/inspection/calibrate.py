"""The end of a training of one category or of several: thresholds for each, and a folder that is of one run only.

What a run writes under the names of its categories is known from the record of its options, so that the next run in the
folder removes the files of this one alone. The record says until the last file is written that the run is unfinished:
a folder in which the files of two runs are mixed never passes for one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dbad.calibration.thresholds import Calibration, calibrate, check_promise
from dbad.data.categories import open_category, split_category
from dbad.data.intensity import with_intensity
from dbad.declared import check_declared
from dbad.errors import UserError
from dbad.families.detector import Detector
from dbad.families.digests import check_digests, digests
from dbad.families.family import Family
from dbad.families.registry import FAMILIES, recorded_method
from dbad.families.runs import calibration_file, load_calibration
from dbad.families.settings import Settings
from dbad.files.atomic import read_json, write_json
from dbad.files.names import CATEGORY_CALIBRATION, TRAIN_OPTIONS, UNFINISHED
from dbad.inspection.loop import walk
from dbad.records import Sample

# Options that say where and how, and not what; the bit depth follows from the images.
PLACED = frozenset({"diffusion_checkpoint_dir", "log_dir", "device", "num_workers", "dry_run", "resume",
                    "intensity_bits"})


class CalibrationOptions(Protocol):
    """The options of a calibration."""

    pixel_quantile: float
    false_alarm_rate: float | None
    num_workers: int


def calibrate_all(family: Family, detector_of: Callable[[str | None], Detector],
                  held_out: Mapping[str, Sequence[Sample]], options: CalibrationOptions
                  ) -> dict[str | None, Calibration]:
    """The thresholds by held-out images: of all categories together and, where there are several, of each.

        detector_of   the detector of each of `with_thresholds`, under the settings that it has
        held_out      the good images of every category that were not trained on
    Their digests are missing; `finish_files` writes them.
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
              f"good images; defective from a score of {calibration.image_threshold:.4g}, which promises at most "
              f"{calibration.false_alarm_rate:.1%} false alarms")
    return found


def begin_files(folder: Path, record: Mapping[str, Any], names: Collection[str]) -> None:
    """Say that from now on the files in `folder` are those of a run, and remove what the run before left there.

        record   the options of the run, see `is_whole`
        names    its files that are named after categories, thresholds left out
    Of the run before, only files go whose names follow from what it recorded, and that this run does not write.
    """
    path = folder / TRAIN_OPTIONS
    before = read_json(path) if path.is_file() else {}
    check_declared(before, {"item": str | tuple[str, ...]}, path)
    kept = {*names, *(calibration_file(folder, name, record["item"]).name for name in with_thresholds(record["item"]))}
    for name in sorted(_named_files(before, path) - kept):
        (folder / name).unlink(missing_ok=True)
    write_json(path, {**record, UNFINISHED: True})


def finish_files(folder: Path, record: Mapping[str, Any], thresholds: Mapping[str | None, Calibration]) -> None:
    """Write the thresholds of a run whose other files are there, and that it is finished."""
    for name, calibration in thresholds.items():
        family = FAMILIES[calibration.method]
        found = digests(folder, family, family.settings.read(calibration.settings))
        calibration = replace(calibration, digests=found)
        calibration.save(calibration_file(folder, name, record["item"]))
    write_json(folder / TRAIN_OPTIONS, record)


def _named_files(record: Mapping[str, Any], path: Path) -> set[str]:
    """What a run of these options may have written that a run of other categories, or another method, has not."""
    items, method = record.get("item", ()), recorded_method(record, path)
    if not items or method not in FAMILIES:
        return set()
    names = FAMILIES[method].by_category
    each = (CATEGORY_CALIBRATION, *(name for name in names if "{}" in name)) if len(items) > 1 else ()
    return {*(name for name in names if "{}" not in name), *(name.format(item) for name in each for item in items)}


def check_promises(options: Any, items: Iterable[str]) -> None:
    """Raise `UserError` for a false-alarm rate that the held-out images of a category cannot promise.

    They are counted, not read. On --dry_run the demo data are not drawn for it.
    """
    if options.false_alarm_rate is None or (options.dry_run and options.dataset_path is None):
        return
    for name in items:
        _, held_out = split_category(open_category(replace(options, item=name)), options.holdout)
        check_promise(options.false_alarm_rate, len(held_out), name)


def with_thresholds(items: Iterable[str]) -> list[str | None]:
    """Whose thresholds there are: those of all categories together (None) and, where there are several, of each."""
    names = list(items)
    return [*names, None] if len(names) > 1 else [None]


def is_whole(folder: Path, record: Mapping[str, Any], names: Iterable[str], placed: Collection[str] = PLACED) -> bool:
    """Whether a run of these options on these images is there, with its thresholds.

        record   what its train_arg_config.json holds then
        names    its other files
        placed   options that say where and how, and not what
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
