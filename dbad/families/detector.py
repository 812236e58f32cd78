"""Detectors: images -> Prediction. The only place where the families of methods differ.

    detector = load_detector("checkpoints/hazelnut")
    prediction = detector("part.png")
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from dbad import maps
from dbad.calibration.thresholds import Calibration
from dbad.data.inputs import ImageLike, several, to_batch
from dbad.data.intensity import Intensity
from dbad.errors import UserError
from dbad.families.digests import check_digests
from dbad.families.registry import FAMILIES, family_of
from dbad.families.runs import calibration_file, learnt_categories, load_calibration
from dbad.families.settings import Settings
from dbad.files.atomic import read_json
from dbad.files.names import CALIBRATION, TRAIN_OPTIONS, UNFINISHED
from dbad.finite import check_finite, naming
from dbad.records import Prediction
from dbad.runtime.device import Machine


@dataclass(frozen=True, eq=False, kw_only=True)
class Detector(ABC):
    """The interface of the detectors of all families.

        settings      settings that shape a prediction beside the weights
        machine       where the networks compute, and how many images or tiles go through them at once
        calibration   None until it is measured
        size          side of the images it works on, in px
    A detector never changes; `dataclasses.replace` makes another one with other settings.
    """

    family: ClassVar[str]                           # name of the family
    counterpart: ClassVar[str] = "reconstruction"   # name in figures of the image made beside the maps

    settings: Settings
    machine: Machine
    calibration: Calibration | None = None

    @property
    @abstractmethod
    def size(self) -> int: ...

    @abstractmethod
    def parts(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Blurred difference maps by name, and the reconstruction, of (N, 3, H, W) in [-1, 1]; needs no calibration."""

    def score(self, anomaly_map: Tensor) -> Tensor:
        """The highest value of each map: (N, 1, H, W) -> (N,)."""
        return maps.image_score(anomaly_map, 0.0)

    @property
    def patching(self) -> bool:
        """True if images keep their own size and are cut into tiles of `size`."""
        return self.settings.patching

    @property
    def intensity(self) -> Intensity:
        """The conversion of images of more than 8 bits to 8 bits."""
        return Intensity(self.settings.intensity, self.settings.intensity_bits)

    def combine(self, parts: dict[str, Tensor], scales: dict[str, float]) -> tuple[Tensor, Tensor]:
        """The anomaly map (N, 1, H, W) and the score (N,) of parts, each (N, 1, H, W), and their scales.

        A value that is not finite is a `NotFinite`: below every threshold, it would make the image good.
        """
        weights = self.settings.contributions
        check_finite({f"{name} map": part for name, part in parts.items() if weights[name]})
        anomaly_map = maps.cropped(maps.fuse(parts, scales, weights), self.settings.center_crop)
        score = self.score(anomaly_map)
        check_finite({"anomaly map": anomaly_map, "score": score})
        return anomaly_map, score

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Prediction:
        """Inspect one image or several: files, PIL images, (H, W[, 3]) uint8 or uint16 arrays, tensors in [-1, 1].

        Tensors are (3, H, W) or (N, 3, H, W). Without tiling every image is resized to the network's size. For more
        than 8 bits per channel, black and white are those of the run; an image beyond them is a `UserError`.
        """
        self.calibrated()       # before anything is read
        batch = to_batch(images, None if self.patching else self.size, self.intensity)
        with naming([image if isinstance(image, (str, Path)) else None for image in several(images)]):
            return self.predict(batch)

    def calibrated(self) -> Calibration:
        """The calibration; a `UserError` if it is not measured yet."""
        if self.calibration is None:
            raise UserError(f"this detector is not calibrated; run {FAMILIES[self.family].scripts.calibration} on its "
                            "run folder")
        return self.calibration

    def predict(self, images: Tensor) -> Prediction:
        """The prediction for (N, 3, H, W) in [-1, 1], of any size with tiling, else of the detector's.

        A map or score that is not finite is a `NotFinite`.
        """
        calibration = self.calibrated()
        parts, reconstruction = self.parts(images)
        anomaly_map, score = self.combine(parts, calibration.scales)
        check_finite({"score": score})
        p_values = [calibration.p_value(float(s)) for s in score]
        return Prediction(anomaly_map, score, reconstruction, parts, score.double() >= calibration.image_threshold,
                          None if None in p_values else torch.tensor(p_values, dtype=torch.float64))


# ------------------------------------------------------------------------------------------ from a run folder

def load_detector(folder: str | Path, device: str = "auto", precision: str = "auto", batch_size: int = 8,
                  category: str | None = None) -> Detector:
    """The calibrated detector of a run folder, such as checkpoints/hazelnut.

    `category` names one category of a model for several. Its own thresholds are taken then, and its own settings if
    they were chosen by category. Without it the thresholds and settings of all categories together are taken.
    """
    folder = Path(folder)
    path, trained = folder / CALIBRATION, folder / TRAIN_OPTIONS
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    if trained.is_file() and read_json(trained).get(UNFINISHED):
        raise UserError(f"{folder}: its training was stopped while writing the files of this run; run its command "
                        "again")
    if category is not None:
        learnt = learnt_categories(read_json(trained), folder)
        if category not in learnt:
            raise UserError(f"{folder}: no thresholds for {category}; expected one of {', '.join(learnt)}, or no "
                            "category for the common thresholds")
        path = calibration_file(folder, category, learnt)
    calibration = load_calibration(path)
    check_digests(calibration, path)
    return open_detector(folder, calibration, Machine.of(device, precision, batch_size))


def open_detector(folder: Path, calibration: Calibration, machine: Machine) -> Detector:
    """The detector of a run of any family under the settings of its calibration."""
    family = family_of(calibration.method, folder)
    return replace(family.open(folder, family.settings.read(calibration.settings), machine), calibration=calibration)
