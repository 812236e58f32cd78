"""Latent diffusion guided by the image (DiAD, arXiv:2312.06607): one model for many categories."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dbad.families.diad.options import DiadSettings
from dbad.families.family import Family, Scripts
from dbad.files.names import DIAD_FILES

if TYPE_CHECKING:
    from dbad.families.diad.detector import DiadDetector
    from dbad.records import Pictures
    from dbad.runtime.device import Machine


def _files(settings: DiadSettings | None = None) -> dict[str, str]:
    return {name.removesuffix(".safetensors"): name for name in DIAD_FILES}


def _open(folder: Path, settings: DiadSettings, machine: Machine) -> DiadDetector:
    from dbad.families.diad.detector import open_diad  # it loads torch
    return open_diad(folder, settings, machine)


def _pictures(detector: DiadDetector, scale: float) -> Callable[[Path, str, Pictures], None]:
    from dbad.families.diad.log_images import write_log_images
    return partial(write_log_images, detector, scale)


DIAD = Family(
    name="diad", about="latent diffusion guided by the image (DiAD), feature differences", settings=DiadSettings,
    scripts=Scripts("train_diad.py", "train_diad.py", "inference_diad.py"),
    phases={"build_diad": "skip_train", "train_diad": "skip_train", "inference_diad": "skip_evaluation"},
    files=_files, open=_open, pictures=_pictures, sign="steps_latent", together=True)
AUTOENCODER_RUN = ("finetune_autoencoder.py", "discriminator_start")
