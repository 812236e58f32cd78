"""Readers of a run folder: its method, its training options and its thresholds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dbad.calibration.thresholds import FORMAT, Calibration, read_calibration
from dbad.checkpoints.weights import load_pickle
from dbad.data.intensity import AS_BEFORE, Depth, Intensity, with_intensity
from dbad.declared import Types, check_declared, types_of
from dbad.errors import UserError
from dbad.families.family import Family
from dbad.families.registry import FAMILIES, family_of, recorded_method, script_of
from dbad.files.atomic import known_json, read_json
from dbad.files.names import CALIBRATION, CATEGORY_CALIBRATION, TRAIN_OPTIONS, last_file
from dbad.options.resolve import Named, check_bound, run_folder


class Read(Named, Protocol):
    """Options of a run that reads images."""

    @property
    def intensity(self) -> str | None: ...


class Resumable(Named, Protocol):
    """Options of a training that a later command can go on with."""

    @property
    def resume(self) -> bool: ...


R = TypeVar("R", bound=Read)

_TRAINED: Types = {"item": str | tuple[str, ...], "intensity_bits": Depth | None}       # checked for every reader


def trained_options(options: Named, *methods: str) -> dict[str, Any]:
    """The options that the run was trained with, by one of the `methods`; empty if it was not trained yet.

    A run of another method is a `UserError`: its files have the same names but another meaning. So is a value
    that does not match the declaration of the same name in `options`.
    """
    folder = run_folder(options)
    path = folder / TRAIN_OPTIONS
    trained = with_intensity(read_json(path)) if path.is_file() else {}
    found = recorded_method(trained, path)
    if found is not None and found not in methods:
        raise UserError(f"{folder}: a run of {script_of(found)}, not of {script_of(methods[0])}; expected another "
                        "--run_id")
    check_declared(trained, {**types_of(type(options)), **_TRAINED}, path)
    return trained


def begun_with(options: Resumable, phase: str, *methods: str) -> dict[str, Any]:
    """The option "intensity" of the run that a training resumes; empty for a new training.

    Until train_arg_config.json is written, it is read from the saved state of the `phase`. Runs older than the option
    give "intensity_bits" too, see `Intensity`. Otherwise the depth is taken from the images, which may have changed.
    """
    if not options.resume:
        return {}
    known, state = trained_options(options, *methods), run_folder(options) / last_file(phase)
    if not known and state.is_file():
        saved = load_pickle(state, peek=True)
        known = saved.get("settings", {}) if isinstance(saved, dict) else {}
        known = known if "intensity" in known else AS_BEFORE.settings()
    if Intensity.of(known) == AS_BEFORE:
        return AS_BEFORE.settings()
    return {"intensity": known["intensity"]} if "intensity" in known else {}


def keep_intensity(options: R, begun: Mapping[str, Any]) -> R:
    """The options with the intensity of the resumed training; another one is a `UserError`."""
    check_bound(options, begun)
    return replace(options, intensity=options.intensity or begun.get("intensity"))


def learnt_categories(trained: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """The categories that the run in a folder has learnt, from the options of its training."""
    check_declared(trained, {"item": str | tuple[str, ...]}, folder / TRAIN_OPTIONS, ("item",))
    return (trained["item"],) if isinstance(trained["item"], str) else tuple(trained["item"])


def family_in(folder: Path) -> Family | None:
    """The family of the run in a folder, as its training has recorded it; None where it is unknown."""
    path = folder / TRAIN_OPTIONS
    method = recorded_method(known_json(path), path)
    return FAMILIES.get(method or "")


# ------------------------------------------------------------------------------------------ thresholds

def calibration_file(folder: Path, category: str | None, learnt: Collection[str]) -> Path:
    """The thresholds of a category: its own if it is one of several that were learnt, else those of all together."""
    own = category in learnt and len(learnt) > 1
    return folder / (CATEGORY_CALIBRATION.format(category) if own else CALIBRATION)


def load_calibration(path: Path) -> Calibration:
    """Read calibration.json; a missing or foreign one is a `UserError` that says how to make it.

    In a file of an older format, a missing setting is newer than the file and takes its default; in one of the present
    format it is an error. For files without a format number, images are read as `AS_BEFORE` says.
    """
    if not path.is_file():
        family = family_in(path.parent)
        scripts = (family or FAMILIES["ddim"]).scripts
        by_hand = ", or give --pxl_threshold and --feature_threshold" * (scripts.extractor is not None)
        raise UserError(f"{path}: no such file; run {scripts.calibration} first{by_hand}")
    values = read_json(path)
    settings = values.get("settings")
    older = settings if isinstance(settings, dict) else {}
    method = values.get("method", older.get("method"))
    if method is None:      # the first calibrations were of ddim alone; a broken one is told as its run was trained
        known = None if isinstance(settings, dict) else family_in(path.parent)
        method = known.name if known else "ddim"
    family = family_of(method, path)
    number = values.get("format", 0)
    try:
        if isinstance(settings, dict) and number == 0:
            kept = {name: value for name, value in settings.items() if name != "method"}
            values |= {"format": FORMAT, "method": method, "settings": AS_BEFORE.settings() | kept}
        calibration = read_calibration(values)
        if number == FORMAT and (missing := family.settings.missing(calibration.settings)):
            raise UserError(f"settings lack {missing[0]}")
        known = family.settings.read(calibration.settings)
        calibration = replace(calibration, settings=known.record(), format=FORMAT)
    except UserError as error:
        raise UserError(f"{path}: not a calibration ({error}); run {family.scripts.calibration} again") from None
    return calibration
