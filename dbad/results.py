"""Result folders: what they hold beside the results, and that none is written over."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dbad.calibration import Calibration
from dbad.config import RunOptions, plain
from dbad.files import ensure_folders, read_json, write_json


def results_folder(img_dir: Path, options: RunOptions) -> Path:
    """Make `<img_dir>/<run_id>/` with options.json in it, and return it.

    Results of the same options in the same place are written again. Results of other options that lie there are kept:
    their folder gets a number behind its name.
    """
    folder = Path(img_dir) / options.run_id
    values = plain(options)
    path = folder / "options.json"
    if path.is_file() and read_json(path).get("options") != values:
        number = next(n for n in range(1, 10_000) if not folder.with_name(f"{folder.name}.{n}").exists())
        kept = folder.rename(folder.with_name(f"{folder.name}.{number}"))
        print(f"{folder} held results of other options; they are kept in {kept}")
    ensure_folders(img_dir=folder)
    write_json(path, {"options": values, "versions": versions(), "commit": commit()})
    return folder


def run_summary(options: RunOptions, calibration: Calibration, num_images: int,
                different: dict[str, Any]) -> dict[str, str]:
    """What a report says of how it came about, as names and texts in reading order."""
    drawn = options.dataset_path is None
    promise = "none; thresholds were given by hand"
    if calibration.false_alarm_rate is not None:
        promise = (f"at most {calibration.false_alarm_rate:.1%} of good images, from {len(calibration.scores)} "
                   "held-out ones")
    return {
        "Category": options.item,
        "Data": "built-in demo data: drawn, not photographed" if drawn else str(options.dataset_path),
        "Images": str(num_images),
        "Method": "conditioned denoising (DDIM), pixel and feature differences",
        "False alarms promised": promise,
        "Preset": options.preset,
        "Other than the preset": ", ".join(f"{k} {v}" for k, v in different.items()
                                           if k not in ("item", "preset", "dataset_path", "run_id")) or "nothing",
        "Seed": str(options.seed),
        "Commit": commit() or "unknown",
        "Versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that shape results."""
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
