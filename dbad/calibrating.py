"""The end of a training of one category or of several: thresholds for each, and whether all that is there already."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dbad.calibration import Calibration, calibrate, load_calibration
from dbad.config import TRAIN_OPTIONS
from dbad.data import Sample
from dbad.detectors import Detector, calibration_file, check_digests, digests
from dbad.errors import UserError
from dbad.evaluate import walk
from dbad.files import read_json

PLACED = frozenset({"diffusion_checkpoint_dir", "log_dir", "device", "num_workers", "dry_run", "resume"})


def calibrate_all(detector: Detector, held_out: Mapping[str, Sequence[Sample]], settings: dict[str, Any], options: Any,
                  folder: Path, prepare: Callable[[str | None], dict[str, Any]] = lambda name: {}) -> None:
    """Write the thresholds of held-out images: of all categories together and, where there are several, of each.

        held_out   the good images of every category that were not trained on
        settings   what the detector was made with, see `Calibration`
        options    pixel_quantile, false_alarm_rate and num_workers
        prepare    called for each of `with_thresholds`, brings the detector to the settings of its own that it has, and
                   returns them
    """
    known: dict[str, list[dict[str, Tensor]]] = {}
    found: dict[str | None, Calibration] = {}
    used: dict[str, Any] = {}
    for name in with_thresholds(held_out):
        before, used = used, settings | prepare(name)
        if used != before:
            known.clear()
        for category in [name] if name else held_out:
            if category not in known:
                known[category] = [parts for _, parts, _ in walk(
                    detector, held_out[category], options.num_workers, f"calibrating {category}")]
        images = known[name] if name else [parts for category in known.values() for parts in category]
        calibration = calibrate(detector.combine, images, options.pixel_quantile, options.false_alarm_rate,
                                used["center_crop"])
        found[name] = replace(calibration, settings=used, digests=digests(folder, used))
        print(f"{name or ('all' if len(held_out) > 1 else next(iter(held_out)))}: {len(calibration.scores)} held-out "
              f"good images; defective from a score of {calibration.image_threshold:.4g}, which promises at most "
              f"{calibration.false_alarm_rate:.1%} false alarms")
    for old in folder.glob("calibration-*.json"):       # of a run of other categories
        old.unlink()
    for name, calibration in found.items():
        calibration.save(calibration_file(folder, name, held_out))


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
            check_digests(load_calibration(path), folder, digests_of)
    except UserError:
        return False
    known, wanted = ({name: value for name, value in values.items() if name not in placed}
                     for values in (read_json(folder / TRAIN_OPTIONS), record))
    return known == wanted
