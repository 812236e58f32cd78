"""Detectors: images -> Prediction. The only place where the families of methods differ.

    detector = load_detector("checkpoints/hazelnut")
    prediction = detector("part.png")
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import UNet2DModel
from torch import Tensor

from dbad import maps as diffmaps
from dbad.calibration.digests import check_digests
from dbad.calibration.thresholds import Calibration, load_calibration
from dbad.checkpoints.trained import learnt_categories, script_for, trained_process
from dbad.checkpoints.weights import load_unet
from dbad.data.inputs import ImageLike, several, to_batch
from dbad.data.intensity import UNKNOWN, Intensity
from dbad.data.tiling import stitch, tile_batches
from dbad.diffusion.ddim import Conditioning, reconstruct_all, schedule
from dbad.errors import UserError
from dbad.families.combining import Settings
from dbad.families.ddim.normalise import Normalisation, load_normalisation
from dbad.files.atomic import read_json
from dbad.files.names import CALIBRATION, CATEGORY_CALIBRATION, NORMALISATION, TRAIN_OPTIONS, UNFINISHED
from dbad.finite import check_finite, naming
from dbad.networks.extractors import Extractor, load_extractor
from dbad.options.command_line import SETTING_NAMES, run_folder
from dbad.records import Prediction
from dbad.runtime.device import autocast, memory_format, pick_device, pick_precision


class Differences(NamedTuple):
    """What an image and its reconstruction differ in: (N, 3, H, W) in [-1, 1], (N, 1, H, W) and (N, layers, H, W)."""

    reconstruction: Tensor
    pixel: Tensor
    layers: Tensor


class Detector(Protocol):
    """What evaluation, reports and users rely on, whatever the family.

        size          side of the images it works on, in px
        patching      images come at their own size and are cut into tiles of that side
        batch_size    images or tiles that go through the networks at once
        counterpart   what is made beside the maps, as figures call it
        intensity     how images of more than 8 bits are brought to it
        calibration   None until it was measured
    """

    size: int
    patching: bool
    batch_size: int
    counterpart: str
    intensity: Intensity
    calibration: Calibration | None

    def parts(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """(N, 3, H, W) in [-1, 1] -> blurred difference maps by name, and the reconstruction; needs no calibration."""

    def combine(self, parts: dict[str, Tensor], scales: dict[str, float]) -> tuple[Tensor, Tensor]:
        """Parts -> anomaly map (N, 1, H, W) and score (N,)."""

    def predict(self, images: Tensor) -> Prediction:
        """(N, 3, H, W) in [-1, 1] -> all that is said of them; needs calibration."""

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Prediction: ...


class Calibrated:
    """What the families' detectors have in common: the way from any image to a prediction.

    `method` is that of the family, by which its scripts are known.
    """

    method: str
    size: int
    patching: bool
    counterpart = "reconstruction"
    intensity: Intensity
    calibration: Calibration | None

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Prediction:
        """Inspect one image or several: files, PIL images, (H, W[, 3]) uint8 or uint16 arrays, tensors in [-1, 1].

        Tensors are (3, H, W) or (N, 3, H, W). Without tiling every image is brought to the network's size. Of more than
        8 bits per channel black and white are those of the run; an image beyond them is a `UserError`.
        """
        pixels = to_batch(images, None if self.patching else self.size, self.intensity)
        with naming([image if isinstance(image, (str, Path)) else None for image in several(images)]):
            return self.predict(pixels)

    def predict(self, images: Tensor) -> Prediction:
        """See `Detector.predict`; a map or score that is not finite is a `NotFinite`."""
        calibration = self.calibration
        if calibration is None:
            raise UserError("this detector is not calibrated; run "
                            f"{script_for('calibration', self.method)} for its run folder")
        parts, reconstruction = self.parts(images)
        anomaly_map, score = self.combine(parts, calibration.scales)
        check_finite({"score": score})
        p_values = [calibration.p_value(float(s)) for s in score]
        return Prediction(anomaly_map, score, reconstruction, parts, score.double() >= calibration.image_threshold,
                          None if None in p_values else torch.tensor(p_values, dtype=torch.float64))


@dataclass(frozen=True)
class MapSettings(Settings):
    """From an image and its reconstruction to the anomaly map; the fields are those of `config.MapOptions`."""

    num_samples: int
    pixel_difference: str
    layer_weights: tuple[float, ...]
    map_norm: str
    top_share: float
    feature_smoothing_kernel: int
    blur_sigma: float
    tile_overlap: float
    center_crop: int
    pl_contrib: float
    fl_contrib: float

    def parts(self, differences: Differences, normalisation: Normalisation | None, side: int) -> dict[str, Tensor]:
        """Pixel and feature map, each (N, 1, H, W) >= 0, normalised and blurred; `side` is that of the network."""
        parts = self.plain_parts(differences)
        if normalisation is not None:
            parts = normalisation(parts, differences.reconstruction)
        sigma = self.blur_sigma * side / 256
        return {name: diffmaps.blur(part, sigma) for name, part in parts.items()}

    def plain_parts(self, differences: Differences) -> dict[str, Tensor]:
        """Pixel and feature map as they are measured."""
        weights = torch.tensor(self.layer_weights).expand(differences.layers.shape[1])
        feature = (differences.layers * weights.view(1, -1, 1, 1)).sum(dim=1, keepdim=True)
        return {"pixel": differences.pixel, "feature": feature}

    @property
    def contributions(self) -> dict[str, float]:
        """Of the pixel and the feature map."""
        return {"pixel": self.pl_contrib, "feature": self.fl_contrib}

    def score(self, anomaly_map: Tensor) -> Tensor:
        """See `Settings.score`."""
        return diffmaps.image_score(anomaly_map, self.top_share)


class DdimDetector(Calibrated):
    """Conditioned denoising with pixel and feature difference maps (arXiv:2305.15956)."""

    method = "ddim"

    def __init__(self, unet: UNet2DModel, extractor: Extractor, abar: Tensor, how: Conditioning, maps: MapSettings, *,
                 noise_kind: str, seed: int, patching: bool, batch_size: int, device: torch.device, precision: str,
                 calibration: Calibration | None = None, normalisation: Normalisation | None = None,
                 intensity: Intensity = UNKNOWN):
        self.unet = unet.to(device, memory_format=memory_format(device)).eval()
        self.extractor = extractor.to(device).eval()
        self.abar, self.how, self.maps, self.noise_kind, self.seed = abar, how, maps, noise_kind, seed
        self.patching, self.batch_size, self.device, self.precision = patching, batch_size, device, precision
        self.calibration, self.normalisation, self.intensity = calibration, normalisation, intensity
        self.size = int(unet.config.sample_size)

    def parts(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """See `Detector.parts`; works through the images in batches, on the CPU in and out."""
        found = self.differences(images)
        return self.maps.parts(found, self.normalisation, self.size), found.reconstruction

    @torch.no_grad()
    def differences(self, images: Tensor) -> Differences:
        """(N, 3, H, W) in [-1, 1] -> what they and their reconstructions differ in, neither normalised nor blurred."""
        if self.patching:
            found = [self._tiled(image) for image in images]
        else:
            found = [self._differences(batch) for batch in images.split(self.batch_size)]
        done = found[0] if len(found) == 1 else torch.cat(found)        # a large image is not copied
        return Differences(done[:, :3], done[:, 3:4], done[:, 4:])

    def combine(self, parts: dict[str, Tensor], scales: dict[str, float]) -> tuple[Tensor, Tensor]:
        """See `Detector.combine`."""
        return self.maps.combine(parts, scales)

    def _differences(self, y: Tensor) -> Tensor:
        """(n, 3, S, S) -> (n, 4 + layers, S, S): reconstruction, pixel map and feature maps; means over the samples."""
        return torch.stack([self._sample(y, number) for number in range(self.maps.num_samples)]).mean(dim=0)

    def _sample(self, y: Tensor, number: int) -> Tensor:
        x = reconstruct_all(self.unet, y, self.abar, self.how, noise_kind=self.noise_kind, seed=self.seed,
                            batch_size=self.batch_size, device=self.device, precision=self.precision, sample=number)
        with autocast(self.device, self.precision):
            features, others = self.extractor(y.to(self.device)), self.extractor(x.to(self.device))
        layers = diffmaps.feature_maps(features, others, tuple(y.shape[-2:]), self.maps.feature_smoothing_kernel)
        return torch.cat([x, diffmaps.pixel_map(y, x, self.maps.pixel_difference), layers.cpu()], dim=1)

    def _tiled(self, image: Tensor) -> Tensor:
        """(3, H, W) -> (1, 4 + layers, H, W), tile by tile."""
        tiles = tile_batches(image, self.size, self.batch_size, self.maps.tile_overlap)
        batches = ((places, self._differences(batch)) for places, batch in tiles)
        return stitch(batches, *image.shape[-2:], self.size)[None]


# ------------------------------------------------------------------------------------------ from a run folder

def build_ddim(folder: Path, checkpoint_name: str, settings: dict[str, Any], device: torch.device, precision: str,
               batch_size: int, calibration: Calibration | None = None) -> DdimDetector:
    """The detector of a trained run under `settings` (see `detector_settings`)."""
    unet = load_unet(folder, checkpoint_name)
    process = trained_process(folder)
    how = Conditioning(settings["conditioning"], settings["recon_weight"], settings["eta"],
                       settings["start_at_timestep"], settings["steps_to_regenerate"], settings["sampler"])
    if how.start > process.reachable:
        raise UserError(f"--start_at_timestep {how.start}: the network in {folder} was trained for timesteps up to "
                        f"{process.reachable}")
    maps = MapSettings.of(settings)
    extractor = load_extractor(folder / settings["extractor_path"])
    check_layer_weights(maps.layer_weights, len(extractor.layers), folder / settings["extractor_path"])
    normalised = maps.map_norm != "none" and calibration is not None    # evaluation.py has to measure it first
    return DdimDetector(
        unet, extractor, schedule(process.train_steps, process.beta_schedule), how, maps,
        noise_kind=process.noise_kind, seed=settings["seed"], patching=settings["patching"],
        batch_size=batch_size, device=device, precision=precision, calibration=calibration,
        normalisation=load_normalisation(folder / NORMALISATION) if normalised else None,
        intensity=Intensity.of(settings))


def check_layer_weights(weights: Sequence[float], num_layers: int, extractor: Path) -> None:
    """Raise `UserError` where there is neither one weight for all layers nor one for each."""
    if len(weights) not in (1, num_layers):
        raise UserError(f"--layer_weights {' '.join(map(str, weights))}: the extractor {extractor} has {num_layers} "
                        "layers; expected as many weights, or one for all")


def load_detector(folder: str | Path, device: str = "auto", precision: str = "auto", batch_size: int = 8,
                  category: str | None = None) -> Detector:
    """The calibrated detector of a run folder, such as checkpoints/hazelnut.

    `category` takes the thresholds, and the settings where they were chosen for each, of one category of a model for
    several; without it they are those of all together.
    """
    folder = Path(folder)
    path, trained = folder / CALIBRATION, folder / TRAIN_OPTIONS
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    if trained.is_file() and read_json(trained).get(UNFINISHED):
        raise UserError(f"{folder}: its training was stopped while it wrote the files of this run; give its command "
                        "again")
    if category is not None:
        learnt = learnt_categories(read_json(trained), folder)
        if category not in learnt:
            raise UserError(f"{folder}: has no thresholds of {category}; expected one of {', '.join(learnt)}, or none "
                            "for those of all together")
        path = calibration_file(folder, category, learnt)
    calibration = load_calibration(path)
    check_digests(calibration, path)
    where = pick_device(device)
    return build_detector(folder, calibration.settings, where, pick_precision(precision, where), batch_size,
                          calibration)


def build_detector(folder: Path, settings: dict[str, Any], device: torch.device, precision: str, batch_size: int,
                   calibration: Calibration | None = None) -> Detector:
    """The detector of a trained run of any family under `settings`, those of its calibration.json."""
    method = settings.get("method", "ddim")
    if method == "diad":
        from dbad.families.diad.detector import build_diad_detector
        return build_diad_detector(folder, settings, device, precision, batch_size, calibration)
    name = settings["diffusion_checkpoint_name"]
    if method == "ddim":
        return build_ddim(folder, name, settings, device, precision, batch_size, calibration)
    from dbad.families.lafite.detector import build_feature_detector
    return build_feature_detector(folder, name, settings, device, precision, batch_size, calibration)


def calibration_file(folder: Path, category: str | None, learnt: Collection[str]) -> Path:
    """The thresholds of a category: its own if it is one of several that were learnt, else those of all together."""
    own = category in learnt and len(learnt) > 1
    return folder / (CATEGORY_CALIBRATION.format(category) if own else CALIBRATION)


def detector_settings(options: Any, extractor_path: Path, intensity: Intensity) -> dict[str, Any]:
    """What shapes a prediction beside the weights, as plain values: the `settings` of calibration.json.

    The extractor's path is kept relative to the run folder, so that both can be moved together.
    """
    names = sorted(SETTING_NAMES - {"extractor_path"})
    return {name: getattr(options, name) for name in names} | intensity.settings() | {
        "extractor_path": os.path.relpath(extractor_path, run_folder(options))}
