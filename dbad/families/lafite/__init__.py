"""Diffusion of patch features (LafitE), and the memory bank of good patches alone (knn)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dbad.families.family import Family, Scripts
from dbad.families.lafite.options import FeatureSettings
from dbad.files.names import BANK, CATEGORY_DISCRIMINATOR, CATEGORY_TUNING, DISCRIMINATOR, SPACE, TUNING

if TYPE_CHECKING:
    from dbad.families.lafite.detector import FeatureDetector
    from dbad.runtime.device import Machine

_SCRIPTS = Scripts("train_lafite.py", "train_lafite.py", "inference_lafite.py")


def _bank_files(settings: FeatureSettings) -> dict[str, str]:
    return {"features": SPACE, "bank": BANK}


def _files(settings: FeatureSettings) -> dict[str, str]:
    judge = {"discriminator": settings.discriminator} if settings.discriminator else {}
    return _bank_files(settings) | {"unet": settings.diffusion_checkpoint_name} | judge


def _open(folder: Path, settings: FeatureSettings, machine: Machine) -> FeatureDetector:
    from dbad.families.lafite.run_folder import open_features  # it loads torch
    return open_features(folder, settings, machine)


LAFITE = Family(
    name="lafite", about="diffusion in feature space (LafitE), nearest good patches", scripts=_SCRIPTS,
    phases={"train_lafite": "skip_train", "inference_lafite": "skip_evaluation"}, settings=FeatureSettings,
    files=_files, open=_open, sign="bank_mb", together=True, on_gpu="small",
    by_category=(DISCRIMINATOR, TUNING, CATEGORY_DISCRIMINATOR, CATEGORY_TUNING))
KNN = replace(LAFITE, name="knn", about="distance to the nearest good patches, without diffusion", files=_bank_files)
