"""Detectors: images -> predictions. The only place where the families of methods differ.

    detector = load_detector("checkpoints/hazelnut")
    prediction = detector("part.png")
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar, cast, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dbad import maps
from dbad.calibration.thresholds import Calibration
from dbad.data.finding import subfolders
from dbad.data.inputs import ImageLike
from dbad.data.intensity import Intensity
from dbad.errors import UserError
from dbad.families.digests import check_digests
from dbad.families.registry import FAMILIES, family_of
from dbad.families.runs import calibration_file, learnt_categories, load_calibration
from dbad.families.settings import Settings
from dbad.families.user_images import as_batch, one_by_one
from dbad.files.atomic import known_json, read_json
from dbad.files.names import CALIBRATION, TRAIN_OPTIONS, UNFINISHED
from dbad.finite import check_finite
from dbad.records import ImagePrediction, Prediction
from dbad.runtime.device import Machine


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Detector(ABC):
    """The interface of the detectors of all families.

        settings      settings that shape a prediction beside the weights
        machine       where the networks compute, and how many images or tiles go through them at once
        calibration   None until it is measured
        category      of which it has the thresholds, several in one text; None if that is not known
        size          side of the images it works on, in px
    A detector never changes; `dataclasses.replace` makes another one with other settings.
    """

    family: ClassVar[str]                           # name of the family
    counterpart: ClassVar[str] = "reconstruction"   # name in figures of the image made beside the maps

    settings: Settings
    machine: Machine
    calibration: Calibration | None = None
    category: str | None = None

    def __repr__(self) -> str:
        found = self.calibration
        method = found.method if found else self.family     # knn is a lafite without its network
        name = f"{method} detector" + (f" of {self.category}" if self.category else "")
        size = f"{self.size} px{' tiles' * self.patching}"
        thresholds = "not calibrated" if found is None else (
            f"image threshold {found.image_threshold:.4g}, pixel threshold {found.pixel_threshold:.4g}")
        return f"{name}: {size}, {thresholds}; {self.machine.device}, {self.machine.precision}"

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

    @overload
    def __call__(self, images: str | Path | Image.Image | np.ndarray, progress: bool = True) -> ImagePrediction: ...

    @overload
    def __call__(self, images: Tensor, progress: bool = True) -> ImagePrediction | Prediction: ...

    @overload
    def __call__(self, images: list | tuple, progress: bool = True) -> list[ImagePrediction]: ...

    @overload
    def __call__(self, images: Iterable[ImageLike], progress: bool = True) -> Iterator[ImagePrediction]: ...

    def __call__(self, images: ImageLike | Iterable[ImageLike], progress: bool = True
                 ) -> ImagePrediction | list[ImagePrediction] | Iterator[ImagePrediction] | Prediction:
        """Inspect one image or several: files, PIL images, (H, W[, 3]) uint8 or uint16 arrays, tensors in [-1, 1].

            one image; a tensor (3, H, W)    an `ImagePrediction`, with arrays at the image's own size
            list, tuple                      a list of them; the images may differ in kind and size
            any other iterable               an iterator that inspects as it goes: memory stays flat
            tensor (N, 3, H, W)              a `Prediction`, with tensors at the size that the detector works at
        A list of more than a few images has a progress bar; `progress=False` switches it off. Without tiling every
        image is resized to the network's size. For more than 8 bits per channel, black and white are those of the run;
        an image beyond them is a `UserError`.
        """
        self.calibrated()       # before anything is read
        if isinstance(images, Tensor) and images.ndim == 4:
            return as_batch(self, images)
        if isinstance(images, (list, tuple)):
            if not images:
                raise UserError(f"no images: the {type(images).__name__} is empty; expected at least one file name, "
                                "PIL image, array or tensor")
            return list(one_by_one(self, images, progress))
        if isinstance(images, Iterable) and not isinstance(
                images, (str, Image.Image, np.ndarray, Tensor, bytes, Mapping)):
            return one_by_one(self, images, progress)
        return next(one_by_one(self, [cast(ImageLike, images)]))

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

        detector = load_detector("checkpoints/hazelnut")
        prediction = detector("part.png")                   # see `Detector.__call__` for other images
        print(prediction)                                   # defective: score 3.21, threshold 2.5, p 0.01, map 512x768
        plt.imshow(prediction.anomaly_map)

    `category` names one category of a model for several. Its own thresholds are taken then, and its own settings if
    they were chosen by category. Without it the thresholds and settings of all categories together are taken.
    `batch_size` is the number of images or tiles that go through the networks at once.
    """
    folder = Path(folder)
    path, trained = folder / CALIBRATION, folder / TRAIN_OPTIONS
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; {_nearest(folder)}")
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
    found = open_detector(folder, calibration, Machine.of(device, precision, batch_size))
    return replace(found, category=category or _categories(known_json(trained).get("item")))


def _nearest(folder: Path) -> str:
    """Where the run folder may be that was meant, in words."""
    if Path("checkpoints", folder).is_dir():
        return f"did you mean {Path('checkpoints', folder)}?"
    beside = [path.name for path in subfolders(folder.parent)]
    if near := get_close_matches(folder.name, beside, 1):
        return f"did you mean {folder.with_name(near[0])}?"
    return "expected a folder that train_tune_eval.py has written, such as checkpoints/hazelnut"


def _categories(item: object) -> str | None:
    """The categories that a run has recorded, in one text."""
    return ", ".join(map(str, item)) if isinstance(item, list) else item if isinstance(item, str) else None


def open_detector(folder: Path, calibration: Calibration, machine: Machine) -> Detector:
    """The detector of a run of any family under the settings of its calibration."""
    family = family_of(calibration.method, folder)
    return replace(family.open(folder, family.settings.read(calibration.settings), machine), calibration=calibration)
