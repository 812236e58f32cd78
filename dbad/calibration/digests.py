"""Fingerprints of the files that a calibration belongs to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dbad.calibration.thresholds import Calibration
from dbad.checkpoints.trained import NOISE_OPTIONS, script_for
from dbad.errors import UserError
from dbad.files.atomic import read_json
from dbad.files.names import BANK, DIAD_FILES, MODEL_CONFIG, NORMALISATION, SPACE, TRAIN_OPTIONS
from dbad.files.special import check_no_special


def digests(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Fingerprints of the files that a calibration belongs to and, of the ddim family, of how its network was trained.

    A detector of that family reads its noise from the options of the training, which are written when it begins.
    """
    found = {name: _digest(path, name, settings) for name, path in _files(folder, settings).items()}
    if settings.get("method", "ddim") == "ddim":
        found["training"] = _training_digest(folder)
    return found


def _training_digest(folder: Path) -> str:
    trained = read_json(folder / TRAIN_OPTIONS)
    facts = [read_json(folder / MODEL_CONFIG), *(trained.get(name) for name in NOISE_OPTIONS)]
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _files(folder: Path, settings: dict[str, Any]) -> dict[str, Path]:
    if settings.get("method") == "diad":
        return {name.removesuffix(".safetensors"): folder / name for name in DIAD_FILES}
    unet = {"unet": folder / settings["diffusion_checkpoint_name"]}
    if settings.get("method", "ddim") != "ddim":
        files = {"features": folder / SPACE, "bank": folder / BANK} | (unet if settings["method"] == "lafite" else {})
        judge = settings["discriminator"]
        return files | ({"discriminator": folder / judge} if judge else {})
    files = unet | {"extractor": folder / settings["extractor_path"]}
    return files | ({"normalisation": folder / NORMALISATION} if settings["map_norm"] != "none" else {})


def check_digests(calibration: Calibration, path: Path, known: dict[Path, str] | None = None) -> None:
    """Raise `UserError` where the files have changed since they were calibrated; `path` is that of the calibration.

    `known` remembers fingerprints from one calibration of a folder to the next.
    """
    known, folder = {} if known is None else known, path.parent
    for name, file in _files(folder, calibration.settings).items():
        if file not in known:
            known[file] = _digest(file, name, calibration.settings)
        if name in calibration.digests and calibration.digests[name] != known[file]:
            script = script_for("calibration", calibration.settings.get("method", "ddim"))
            raise UserError(f"{file}: is not the file that {path} was measured with; run {script} again")
    training = calibration.digests.get("training")      # older ones have none
    if training and training != _training_digest(folder):
        raise UserError(f"{folder / TRAIN_OPTIONS} and {MODEL_CONFIG}: of another training than the one that {path} "
                        "was measured with; give the command of that training again, or run evaluation.py again")


def _digest(path: Path, name: str, settings: dict[str, Any]) -> str:
    check_no_special(path)
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while part := file.read(2 ** 24):       # weights may be larger than the memory
                digest.update(part)
        return digest.hexdigest()
    except FileNotFoundError:
        part = {"extractor": "extractor", "normalisation": "calibration"}.get(name, "model")
        raise UserError(f"{path}: no such file; run {script_for(part, settings.get('method', 'ddim'))} first") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
