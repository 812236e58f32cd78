"""Fingerprints of the files that a calibration belongs to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dbad.calibration.thresholds import Calibration
from dbad.errors import UserError
from dbad.families.family import Family
from dbad.families.registry import family_of
from dbad.families.settings import Settings
from dbad.files.names import MODEL_CONFIG, TRAIN_OPTIONS
from dbad.files.special import check_no_special


def digests(folder: Path, family: Family, settings: Settings | None) -> dict[str, str]:
    """Fingerprints of the files of a run that shape its predictions, and of further facts of its training."""
    found = {name: _digest(folder / file, name, family) for name, file in family.files(settings).items()}
    if family.facts:
        found["training"] = _text_digest(family.facts(folder))
    return found


def check_digests(calibration: Calibration, path: Path, known: dict[Path, str] | None = None) -> None:
    """Raise `UserError` where the files have changed since they were calibrated; `path` is that of the calibration.

    `known` remembers fingerprints from one calibration of a folder to the next.
    """
    known, folder = {} if known is None else known, path.parent
    family = family_of(calibration.method, path)
    for name, place in family.files(family.settings.read(calibration.settings)).items():
        file = folder / place
        if file not in known:
            known[file] = _digest(file, name, family)
        if name in calibration.digests and calibration.digests[name] != known[file]:
            raise UserError(f"{file}: differs from the file that {path} was measured with; run "
                            f"{family.scripts.calibration} again")
    training = calibration.digests.get("training")      # older ones have none
    if training and family.facts and training != _text_digest(family.facts(folder)):
        raise UserError(f"{folder / TRAIN_OPTIONS} and {MODEL_CONFIG}: from another training than the one that {path} "
                        f"was measured with; repeat that training, or run {family.scripts.calibration} again")


def _text_digest(facts: Any) -> str:
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _digest(path: Path, name: str, family: Family) -> str:
    check_no_special(path)
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while part := file.read(2 ** 24):       # weights may be larger than the memory
                digest.update(part)
        return digest.hexdigest()
    except FileNotFoundError:
        scripts = {"extractor": family.scripts.extractor, "normalisation": family.scripts.calibration}
        raise UserError(f"{path}: no such file; run {scripts.get(name) or family.scripts.model} first") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
