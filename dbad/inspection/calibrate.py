"""The end of a training of one category or of several: thresholds for each, and a folder that is of one run only.

What a run writes under the names of its categories is known from the record of its options, so that the next run in the
folder removes the files of this one alone. The record says until the last file is written that the run is unfinished:
a folder in which the files of two runs are mixed never passes for one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dbad.calibration.digests import check_digests, digests
from dbad.calibration.thresholds import Calibration, calibrate, check_promise, load_calibration
from dbad.data.images import Sample, open_category, split_category
from dbad.data.intensity import with_intensity
from dbad.errors import UserError
from dbad.families.detector import Detector, calibration_file
from dbad.files.atomic import read_json, write_json
from dbad.files.names import (
    CATEGORY_CALIBRATION,
    CATEGORY_DISCRIMINATOR,
    CATEGORY_TUNING,
    DISCRIMINATOR,
    TRAIN_OPTIONS,
    TUNING,
    UNFINISHED,
)
from dbad.inspection.loop import walk
from dbad.options.declared import check_declared

# Options that say where and how, and not what; the bit depth follows from the images.
PLACED = frozenset({"diffusion_checkpoint_dir", "log_dir", "device", "num_workers", "dry_run", "resume",
                    "intensity_bits"})


def calibrate_all(detector: Detector, held_out: Mapping[str, Sequence[Sample]], settings: dict[str, Any], options: Any,
                  prepare: Callable[[str | None], dict[str, Any]] = lambda name: {}) -> dict[str | None, Calibration]:
    """The thresholds by held-out images: of all categories together and, where there are several, of each.

        held_out   the good images of every category that were not trained on
        settings   what the detector was made with, see `Calibration`
        options    pixel_quantile, false_alarm_rate and num_workers
        prepare    called for each of `with_thresholds`, brings the detector to the settings of its own that it has, and
                   returns them
    Their digests are missing; `finish_files` writes them.
    """
    known: dict[str, list[tuple[Path, dict[str, Tensor]]]] = {}
    found: dict[str | None, Calibration] = {}
    used: dict[str, Any] = {}
    for name in with_thresholds(held_out):
        before, used = used, settings | prepare(name)
        if used != before:
            known.clear()
        for category in [name] if name else held_out:
            if category not in known:
                known[category] = list(walk(detector, held_out[category], options.num_workers,
                                            f"calibrating {category}"))
        images = known[name] if name else [image for category in known.values() for image in category]
        paths, parts = zip(*images, strict=True)
        calibration = calibrate(detector.combine, parts, options.pixel_quantile, options.false_alarm_rate,
                                used["center_crop"], paths)
        found[name] = replace(calibration, settings=used)
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
    for name in sorted(_named_files(before) - kept):
        (folder / name).unlink(missing_ok=True)
    write_json(path, {**record, UNFINISHED: True})


def finish_files(folder: Path, record: Mapping[str, Any], thresholds: Mapping[str | None, Calibration]) -> None:
    """Write the thresholds of a run whose other files are there, and that it is finished."""
    for name, calibration in thresholds.items():
        calibration = replace(calibration, digests=digests(folder, calibration.settings))
        calibration.save(calibration_file(folder, name, record["item"]))
    write_json(folder / TRAIN_OPTIONS, record)


def _named_files(record: Mapping[str, Any]) -> set[str]:
    """What a run of these options may have written that a run of other categories, or another method, has not."""
    items = record.get("item", ())
    each = (CATEGORY_CALIBRATION, CATEGORY_DISCRIMINATOR, CATEGORY_TUNING) if len(items) > 1 else ()
    return {DISCRIMINATOR, TUNING, *(name.format(item) for name in each for item in items)} if items else set()


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
