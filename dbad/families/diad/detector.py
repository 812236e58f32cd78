"""The detector of the DiAD family: an image against its sample from the guided latent diffusion, by features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbad.calibration.thresholds import Calibration
from dbad.data.intensity import UNKNOWN, Intensity
from dbad.diffusion.noise import image_stream
from dbad.errors import UserError
from dbad.families.combining import Settings
from dbad.families.detector import Calibrated
from dbad.families.diad.model import Diad
from dbad.families.diad.reconstruction import anomaly_map, image_score, reconstruct
from dbad.families.diad.storage import load_diad
from dbad.networks.extractors import Extractor, build_extractor
from dbad.networks.features import weights_digest
from dbad.networks.packing import ready
from dbad.options.command_line import RunOptions
from dbad.runtime.device import autocast

PART = "feature"        # the one map there is


@dataclass(frozen=True)
class DiadSettings(Settings):
    """From an image to its anomaly map; the fields are those of `config.DiadMapOptions`."""

    latent_start: int
    latent_steps_back: int
    paper_exact: bool
    map_sigma: float
    center_crop: int

    @property
    def contributions(self) -> dict[str, float]:
        """Of the one map there is."""
        return {PART: 1.0}

    def score(self, anomaly_map: Tensor) -> Tensor:
        """See `Settings.score`."""
        return image_score(anomaly_map)


class DiadDetector(Calibrated):
    """Reconstruction by latent diffusion, difference of pretrained features (arXiv:2312.06607).

    The model becomes the detector's own, see `packing.ready`.
    """

    method = "diad"
    patching = False

    def __init__(self, model: Diad, extractor: Extractor, settings: DiadSettings, *, seed: int, batch_size: int,
                 device: torch.device, precision: str, calibration: Calibration | None = None,
                 intensity: Intensity = UNKNOWN):
        self.model = ready(model, device, precision)
        self.extractor, self.settings, self.seed = extractor.to(device).eval(), settings, seed
        self.batch_size, self.device, self.precision, self.calibration = batch_size, device, precision, calibration
        self.size, self.intensity = model.resolution, intensity

    def parts(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """See `Detector.parts`; the reconstruction is the sample. The noise of an image follows from its pixels."""
        maps, samples = [], []
        for batch in images.split(self.batch_size):
            y, chosen = batch.to(self.device), self.settings
            x = reconstruct(self.model, y, [image_stream(self.seed, image) for image in batch], chosen.latent_start,
                            chosen.latent_steps_back, chosen.paper_exact, self.precision)
            maps.append(anomaly_map(self.extractor, y, x, chosen.map_sigma, self.precision).cpu())
            samples.append(x.cpu())
        return {PART: torch.cat(maps)}, torch.cat(samples)

    def combine(self, parts: dict[str, Tensor], scales: dict[str, float]) -> tuple[Tensor, Tensor]:
        """See `Detector.combine`."""
        return self.settings.combine(parts, scales)

    @torch.no_grad()
    def autoencoded(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) in [-1, 1] -> what the auto-encoder alone makes of them, without diffusion; on the CPU."""
        done = []
        for batch in images.split(self.batch_size):
            with autocast(self.device, self.precision):
                done.append(self.model.decode(self.model.encode(batch.to(self.device))).cpu())
        return torch.cat(done)


def check_foreign(options: RunOptions) -> None:
    """Raise `UserError` for options of every script that this family has no use for."""
    if options.patching:
        raise UserError("--patching: latents are those of whole images; expected --no_patching")
    name = options.diffusion_checkpoint_name
    if name != RunOptions.diffusion_checkpoint_name:
        raise UserError(f"--diffusion_checkpoint_name {name}: a model of this family is several files, whose names are "
                        "fixed; expected no such option")


def extractor_settings(extractor: Extractor) -> dict[str, Any]:
    """What `build_diad_detector` needs to have the same extractor again, as plain values."""
    return {"extractor": extractor.name, "extractor_layers": list(extractor.layers),
            "extractor_weights": weights_digest(extractor), "feature_resolution": extractor.resolution}


def build_diad_detector(folder: Path, settings: dict[str, Any], device: torch.device, precision: str, batch_size: int,
                        calibration: Calibration | None = None) -> DiadDetector:
    """The detector of a run of train_diad.py under `settings`; the backbone has to have the weights it had then."""
    model = load_diad(folder, torch.bfloat16 if precision == "bf16" else None)      # at once: half the memory
    extractor = build_extractor(settings["extractor"], settings["extractor_layers"], settings["feature_resolution"])
    if weights_digest(extractor) != settings["extractor_weights"]:
        raise UserError(f"{folder}: was calibrated with other weights of {extractor.name} than are installed; run "
                        "train_diad.py again")
    return DiadDetector(model, extractor, DiadSettings.of(settings), seed=settings["seed"], batch_size=batch_size,
                        device=device, precision=precision, calibration=calibration, intensity=Intensity.of(settings))
