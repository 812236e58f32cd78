"""Result folders: their records and their names; results of other options are never overwritten."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import torch

from dbad.calibration.thresholds import Calibration
from dbad.data.finding import counted
from dbad.files.atomic import cannot_be_written, check_folders, ensure_folders, known_json, write_json
from dbad.files.names import OPTIONS, SCORES, TEST_RESULTS
from dbad.files.temporary import remove_abandoned, temporary_folder
from dbad.options.resolve import changed, data_of, plain
from dbad.options.shared import AnyRunOptions, RunOptions


def results_folder(folder: Path, options: RunOptions, inputs: str | None = None) -> Path:
    """Make the results folder with its options.json and return it.

    Results of the same options, and of the same `inputs` if given, are overwritten. Other results in its place are
    kept: their folder gets a number behind its name.
    """
    record = {"options": plain(options)} | ({"inputs": inputs} if inputs else {})
    path = folder / OPTIONS
    known = known_json(path)        # empty if it is broken: the results may be of any options
    if path.is_file() and record != {name: known.get(name) for name in record}:
        kept = folder.rename(numbered(folder))
        print(f"{folder} had results of other options{' or images' * bool(inputs)}; they were moved to {kept}")
    ensure_folders(img_dir=folder)
    write_json(path, record | {"versions": versions(), "commit": commit()})
    return folder


@contextmanager
def whole_results(folder: Path, options: RunOptions) -> Iterator[Path]:
    """Give a hidden folder beside `folder`; once the block has succeeded, its contents are the results in `folder`.

    If the block fails or is stopped, the results that lie in `folder` stay as they are: files of two runs never mix.
    Hidden folders of killed processes are removed.
    """
    check_folders(img_dir=folder)
    ensure_folders(img_dir=folder.parent)
    remove_abandoned(folder.parent, below=False)
    with temporary_folder(folder) as hidden:
        yield hidden
        results_folder(folder, options)
        with cannot_be_written(folder):
            for old in (folder / name for name in TEST_RESULTS):        # the scores first: a kill here leaves none
                if old.is_dir() and not old.is_symlink():
                    shutil.rmtree(old)
                else:
                    old.unlink(missing_ok=True)
            for new in sorted(hidden.iterdir(), key=lambda path: path.name == SCORES):
                shutil.move(new, folder / new.name)     # which a link to another disk allows too


def numbered(path: Path) -> Path:
    """The path with the lowest number behind its name that does not exist yet: results -> results.1."""
    return next(new for n in count(1) if not (new := path.with_name(f"{path.name}.{n}")).exists())


def listing_digest(paths: Iterable[Path]) -> str:
    """A short text that changes when files come, go, or are written again."""
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        try:
            facts = path.stat()
            text = f"{path.absolute()} {facts.st_size} {facts.st_mtime_ns}\n"
        except OSError as error:        # a link to nowhere
            text = f"{path.absolute()} {error.strerror}\n"
        digest.update(text.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def run_summary(options: RunOptions, calibration: Calibration, num_images: int, method: str) -> dict[str, str]:
    """The facts of a run for its report, as name -> text in reading order; `method` is in words."""
    elsewhere = ("item", "preset", "dataset_path", "run_id", "method", "images")       # on lines of their own
    promise = "none; thresholds were set by hand"
    if calibration.false_alarm_rate is not None:
        promise = (f"at most {calibration.false_alarm_rate:.1%} of good images, from {len(calibration.scores)} "
                   "held-out ones")
    return {
        "Category": options.item,
        "Data": data_of(options),
        "Images": str(num_images),
        "Method": method,
        "False alarms promised": promise,
        "Preset": str(options.preset),
        "Changed from the preset": listed({name: value for name, value in changed(options).items()
                                         if name not in elsewhere}),
        "Seed": str(options.seed),
        "Commit": commit() or "unknown",
        "Versions": listed(versions()),
    }


def listed(values: dict[str, Any]) -> str:
    """{"seed": 1, "flip": True} -> "seed 1, flip True"; {} -> "nothing"."""
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "nothing"


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that shape results."""
    return {"python": platform.python_version(), "torch": torch.__version__} | {
        name: version(name) for name in ("torchvision", "diffusers", "timm", "numpy")}


def commit() -> str | None:
    """The commit of this code, with + behind it where files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        name = subprocess.run(["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=here, check=True,
                              capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return name


def headline(item: str, metrics: dict[str, Any], drawn: bool) -> str:
    """The result in one line."""
    parts = [f"{item}{' (drawn demo data)' if drawn else ''}: {metrics['num_images']} images"]
    if metrics["image"]:
        rates = metrics["image_rates"]
        parts += [f"image AUROC {metrics['image']['auroc']:.4f}",
                  f"missed {rates['fn']} of {rates['fn'] + rates['tp']} defective",
                  f"false alarms {rates['fp']} of {rates['fp'] + rates['tn']} good"]
    if metrics["pixel"]:
        parts += [f"pixel AUROC {metrics['pixel']['auroc']:.4f}", f"pixel AP {metrics['pixel']['ap']:.4f}",
                  f"AUPRO {metrics['pixel']['aupro_0.3']:.4f}"]
    if "reason" in metrics:
        parts.append(metrics["reason"])
    return ", ".join(parts + mask_words(metrics["masks"], ("missing", "empty") if metrics["pixel"] else ("empty",)))


def mask_words(masks: dict[str, Any], kinds: Sequence[str] = ("missing", "empty", "cut")) -> list[str]:
    """Phrases about missing and unusual masks, see `Measurement.masks`; none if every defective image has a usual one.

    Each phrase names at most three images.
    """
    number = {kind: len(masks[kind]) for kind in kinds}
    total = counted(masks["num_found"] + masks["num_missing"], "defective image")
    said = {"missing": f"no mask for {masks['num_missing']} of {total}, which pixel metrics leave out",
            "empty": f"{counted(masks['num_empty'], 'defective image')} with an empty mask",
            "cut": f"{counted(masks['num_cut'], 'mask')} with gray levels, cut in the middle of their range"}
    return [f"{said[kind]} ({', '.join(masks[kind][:3])}{f' and {n - 3} more' * (n > 3)})"
            for kind, n in number.items() if n]


def set_summary(options: AnyRunOptions, runs: Sequence[Any]) -> dict[str, str]:
    """The facts of several runs (`runs.Run`) for their summary, as `run_summary` has them for one."""
    known = [known_json(run.folder / OPTIONS).get("options") for run in runs]
    presets = [str(each["preset"]) for each in known if isinstance(each, dict) and "preset" in each]
    different = {name: value for name, value in changed(options).items()
                 if name not in ("item", "seeds", "seed", "preset", "dataset_path", "run_id")}
    return {
        "Data": data_of(options),
        "Categories": ", ".join(dict.fromkeys(run.item for run in runs)),
        "Seeds": ", ".join(map(str, getattr(options, "seeds", None) or (options.seed or 0,))),
        "Preset": options.preset or ", ".join(dict.fromkeys(presets)) or "-",
        "Changed from the preset": listed(different),
        "Commit": commit() or "unknown",
        "Versions": listed(versions()),
    }
