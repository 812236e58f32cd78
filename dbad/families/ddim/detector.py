"""The detector of the ddim family: an image against its conditioned reconstruction, by pixels and by features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dbad import maps
from dbad.checkpoints.weights import load_unet
from dbad.data.tiling import stitch, tile_batches
from dbad.diffusion.ddim import schedule
from dbad.errors import UserError
from dbad.families.ddim.normalise import Normalisation, load_normalisation
from dbad.families.ddim.options import DdimSettings
from dbad.families.ddim.process import trained_process
from dbad.families.ddim.reconstruct import Denoiser, reconstruct_all
from dbad.families.detector import Detector
from dbad.files.names import EXTRACTOR, NORMALISATION
from dbad.networks.extractors import Extractor, load_extractor
from dbad.runtime.device import Machine, autocast, memory_format, place


class Differences(NamedTuple):
    """Reconstruction (N, 3, H, W) in [-1, 1], pixel map (N, 1, H, W) and feature maps (N, layers, H, W)."""

    reconstruction: Tensor
    pixel: Tensor
    layers: Tensor


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DdimDetector(Detector):
    """Conditioned denoising with pixel and feature difference maps (arXiv:2305.15956).

        denoiser        the U-Net with its diffusion process
        normalisation   statistics of good images, in whose units maps are; None for plain differences
    """

    family = "ddim"

    settings: DdimSettings
    denoiser: Denoiser
    extractor: Extractor
    normalisation: Normalisation | None = None

    def __post_init__(self):
        """Move the networks to the machine, in place."""
        device = self.machine.device
        place(self.denoiser.unet, device, memory_format(device))
        place(self.extractor, device)

    @property
    def size(self) -> int:
        """See `Detector`."""
        return int(self.denoiser.unet.config["sample_size"])

    def parts(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """See `Detector.parts`; works through the images in batches, on the CPU in and out."""
        found = self.differences(images)
        return self.parts_of(found), found.reconstruction

    def parts_of(self, differences: Differences) -> dict[str, Tensor]:
        """Pixel and feature map, each (N, 1, H, W) >= 0, normalised and blurred."""
        parts = plain_parts(differences, self.settings.layer_weights)
        if self.normalisation is not None:
            parts = self.normalisation(parts, differences.reconstruction)
        sigma = self.settings.blur_sigma * self.size / 256
        return {name: maps.blur(part, sigma) for name, part in parts.items()}

    def score(self, anomaly_map: Tensor) -> Tensor:
        """See `Detector.score`."""
        return maps.image_score(anomaly_map, self.settings.top_share)

    @torch.no_grad()
    def differences(self, images: Tensor) -> Differences:
        """The differences of images (N, 3, H, W) in [-1, 1] from their reconstructions, not normalised or blurred."""
        if self.patching:
            found = [self._tiled(image) for image in images]
        else:
            found = [self._differences(batch) for batch in images.split(self.machine.batch_size)]
        done = found[0] if len(found) == 1 else torch.cat(found)        # a large image is not copied
        return Differences(done[:, :3], done[:, 3:4], done[:, 4:])

    def _differences(self, y: Tensor) -> Tensor:
        """(n, 3, S, S) -> (n, 4 + layers, S, S): reconstruction, pixel map and feature maps; means over the samples."""
        return torch.stack([self._sample(y, number) for number in range(self.settings.num_samples)]).mean(dim=0)

    def _sample(self, y: Tensor, number: int) -> Tensor:
        device, precision, _ = self.machine
        x = reconstruct_all(self.denoiser, y, self.settings, self.machine, self.settings.seed, number)
        with autocast(device, precision):
            features, others = self.extractor(y.to(device)), self.extractor(x.to(device))
        layers = maps.feature_maps(features, others, (y.shape[-2], y.shape[-1]), self.settings.feature_smoothing_kernel)
        return torch.cat([x, maps.pixel_map(y, x, self.settings.pixel_difference), layers.cpu()], dim=1)

    def _tiled(self, image: Tensor) -> Tensor:
        """(3, H, W) -> (1, 4 + layers, H, W), tile by tile."""
        tiles = tile_batches(image, self.size, self.machine.batch_size, self.settings.tile_overlap)
        batches = ((places, self._differences(batch)) for places, batch in tiles)
        return stitch(batches, *image.shape[-2:], self.size)[None]


def plain_parts(differences: Differences, layer_weights: Sequence[float]) -> dict[str, Tensor]:
    """The pixel and the feature map without normalisation, each (N, 1, H, W)."""
    weights = torch.tensor(layer_weights).expand(differences.layers.shape[1])
    feature = (differences.layers * weights.view(1, -1, 1, 1)).sum(dim=1, keepdim=True)
    return {"pixel": differences.pixel, "feature": feature}


# ------------------------------------------------------------------------------------------ from a run folder

def open_ddim(folder: Path, settings: DdimSettings, machine: Machine, measured: bool = True) -> DdimDetector:
    """The detector of a trained run; with `measured` False the normalisation is still to be measured."""
    denoiser = open_denoiser(folder, settings.diffusion_checkpoint_name)
    if settings.start_at_timestep > denoiser.reachable:
        raise UserError(f"--start_at_timestep {settings.start_at_timestep}: the network in {folder} was trained for "
                        f"timesteps up to {denoiser.reachable}")
    path = folder / (settings.extractor_path or EXTRACTOR)
    extractor = load_extractor(path)
    check_layer_weights(settings.layer_weights, len(extractor.layers), path)
    normalised = settings.map_norm != "none" and measured
    return DdimDetector(settings=settings, machine=machine, denoiser=denoiser, extractor=extractor,
                        normalisation=load_normalisation(folder / NORMALISATION) if normalised else None)


def open_denoiser(folder: Path, name: str) -> Denoiser:
    """The trained U-Net of a run, in the file `name`, with the process that it was trained for."""
    unet, process = load_unet(folder, name), trained_process(folder)
    return Denoiser(unet, schedule(process.train_steps, process.beta_schedule), process.noise_kind, process.reachable,
                    process.prediction)


def check_layer_weights(weights: Sequence[float], num_layers: int, extractor: Path) -> None:
    """Raise `UserError` unless there is one weight for all layers or one for each."""
    if len(weights) not in (1, num_layers):
        raise UserError(f"--layer_weights {' '.join(map(str, weights))}: the extractor {extractor} has {num_layers} "
                        "layers; expected as many weights, or one for all")
