"""Conditioned denoising: an image is noised and denoised again, pulled towards itself (arXiv:2305.15956)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dbad.families.ddim.options import DdimSettings
from dbad.families.family import Family, Scripts
from dbad.files.names import EXTRACTOR, NORMALISATION

if TYPE_CHECKING:
    from dbad.families.ddim.detector import DdimDetector
    from dbad.runtime.device import Machine


def _files(settings: DdimSettings) -> dict[str, str]:
    normalisation = {"normalisation": NORMALISATION} if settings.map_norm != "none" else {}
    return {"unet": settings.diffusion_checkpoint_name,
            "extractor": str(settings.extractor_path or EXTRACTOR)} | normalisation


def _open(folder: Path, settings: DdimSettings, machine: Machine) -> DdimDetector:
    from dbad.families.ddim.detector import open_ddim  # it loads torch
    return open_ddim(folder, settings, machine)


def _facts(folder: Path) -> object:
    from dbad.families.ddim.process import training_facts
    return training_facts(folder)


DDIM = Family(
    name="ddim", about="conditioned denoising (DDIM), pixel and feature differences", settings=DdimSettings,
    scripts=Scripts("train_ddim.py", "evaluation.py", "inference_ddim.py", "train_extractor.py"),
    phases={"train_ddim": "skip_train", "train_extractor": "skip_extractor", "evaluation": "skip_threshold",
            "inference_ddim": "skip_evaluation"},
    files=_files, open=_open, facts=_facts, sign="noise_kind")
