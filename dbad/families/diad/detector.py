"""The detector of the DiAD family: an image against its sample from the guided latent diffusion, by features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbad.diffusion.noise import image_stream
from dbad.errors import UserError
from dbad.families.detector import Detector
from dbad.families.diad.model import Diad
from dbad.families.diad.options import DiadSettings
from dbad.families.diad.reconstruction import anomaly_map, image_score, reconstruct
from dbad.families.diad.storage import load_diad
from dbad.networks.extractors import Extractor, build_extractor
from dbad.networks.features import weights_digest
from dbad.networks.packing import ready
from dbad.runtime.device import Machine, autocast, place

PART = "feature"        # the one map there is


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DiadDetector(Detector):
    """Reconstruction by latent diffusion, difference of pretrained features (arXiv:2312.06607).

    The model is ready to infer on the machine, see `packing.ready`.
    """

    family = "diad"

    settings: DiadSettings
    model: Diad
    extractor: Extractor

    def __post_init__(self):
        """Move the extractor to the machine, in place."""
        place(self.extractor, self.machine.device)

    @property
    def size(self) -> int:
        """See `Detector`."""
        return self.model.resolution

    @property
    def patching(self) -> bool:
        """False: latents are those of whole images."""
        return False

    def parts(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """See `Detector.parts`; the reconstruction is the sample. The noise of an image follows from its pixels."""
        maps, samples, settings, machine = [], [], self.settings, self.machine
        for batch in images.split(machine.batch_size):
            y = batch.to(machine.device)
            x = reconstruct(self.model, y, [image_stream(settings.seed, image) for image in batch],
                            settings.latent_start, settings.latent_steps_back, settings.paper_exact, machine.precision)
            maps.append(anomaly_map(self.extractor, y, x, settings.map_sigma, machine.precision).cpu())
            samples.append(x.cpu())
        return {PART: torch.cat(maps)}, torch.cat(samples)

    def score(self, anomaly_map: Tensor) -> Tensor:
        """See `Detector.score`."""
        return image_score(anomaly_map)

    @torch.no_grad()
    def autoencoded(self, images: Tensor) -> Tensor:
        """The images (N, 3, S, S) in [-1, 1] encoded and decoded without diffusion, likewise; on the CPU."""
        done = []
        for batch in images.split(self.machine.batch_size):
            with autocast(self.machine.device, self.machine.precision):
                done.append(self.model.decode(self.model.encode(batch.to(self.machine.device))).cpu())
        return torch.cat(done)


def extractor_settings(extractor: Extractor) -> dict[str, Any]:
    """The settings from which `open_diad` builds the same extractor again."""
    return {"extractor": extractor.name, "extractor_layers": tuple(extractor.layers),
            "extractor_weights": weights_digest(extractor), "feature_resolution": extractor.resolution}


def open_diad(folder: Path, settings: DiadSettings, machine: Machine) -> DiadDetector:
    """The detector of a run of train_diad.py under `settings`; the backbone must have the same weights as then."""
    model = load_diad(folder, torch.bfloat16 if machine.precision == "bf16" else None)      # at once: half the memory
    extractor = build_extractor(settings.extractor, settings.extractor_layers, settings.feature_resolution)
    if weights_digest(extractor) != settings.extractor_weights:
        raise UserError(f"{folder}: calibrated with weights of {extractor.name} that differ from the installed ones; "
                        "run train_diad.py again")
    return DiadDetector(settings=settings, machine=machine, extractor=extractor,
                        model=ready(model, machine.device, machine.precision))
