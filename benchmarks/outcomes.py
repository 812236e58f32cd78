"""What two runs of the same are compared by: files to the byte, scores to a tolerance."""

from __future__ import annotations

import csv
import math
from pathlib import Path

TOLERANCE = 1e-3            # of a score, between two devices or two batches
LATEST = "*last.pt"         # holds times


class Failed(Exception):
    """A check has not come out as it must."""


def same_files(one: Path, other: Path) -> str:
    """Raise `Failed` unless weights, calibrations and scores of two folders are equal to the byte."""
    names = sorted(str(path.relative_to(one)) for pattern in ("checkpoints/*/*", "results/*/scores.csv")
                   for path in one.glob(pattern) if path.is_file() and not path.match(LATEST)
                   and (path.suffix in (".pt", ".safetensors", ".csv") or path.name.startswith("calibration")))
    different = [name for name in names if not (other / name).is_file()
                 or (one / name).read_bytes() != (other / name).read_bytes()]
    if different or not names:
        raise Failed(f"{len(different)} of {len(names)} files differ: {', '.join(different)}"[:300])
    return f"{len(names)} files are equal"


def scores(folder: Path) -> dict[str, float]:
    """By path, of the scores.csv in a folder of results or below it."""
    with open(next(iter(sorted(folder.rglob("scores.csv")))), newline="", encoding="utf-8") as file:
        return {row["path"]: float(row["score"]) for row in csv.DictReader(file)}


def agreement(expected: dict[str, float], found: dict[str, float]) -> str:
    """Raise `Failed` where a score is off by more than `TOLERANCE` of what was expected."""
    if expected.keys() != found.keys() or not found:
        raise Failed(f"{len(found)} images were inspected, expected {len(expected)}")
    worst = max(abs(found[path] - score) / abs(score) if score else math.inf for path, score in expected.items())
    if not worst <= TOLERANCE:
        raise Failed(f"a score differs by {worst:.2g} of it")
    return f"{len(found)} scores differ by at most {worst:.1g} of them"
