"""The records that packages pass to one another: files of a data set, a decoded image, results of an inspection."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One image file of a category, not read yet.

        defect      name of the defect, or "good"
        mask        file with the ground truth, or folder of several files that together form it (MVTec LOCO); None for
                    good images and if no ground truth exists
        group       images of one group must stay on one side of every split; None: the image belongs to no group
    """

    path: Path
    category: str
    defect: str
    mask: Path | None = None
    group: str | None = None

    @property
    def label(self) -> int:
        """1 defective, 0 good."""
        return int(self.defect != "good")


@dataclass(frozen=True)
class Category:
    """The files of one category: good ones to train on, and those of the test.

    Paths are reported relative to the parent of `root`.

        held_out    good images that the data set itself keeps for validation; empty if they must be taken from `train`
        unmasked    the defective test images without mask, as samples; their `mask`, if any, is the file that is
                    missing
        notes       lines about files that were left out and other surprises
        layout      name of the data set's layout on disk
    """

    name: str
    root: Path
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    held_out: tuple[Sample, ...] = ()
    unmasked: tuple[Sample, ...] = ()
    notes: tuple[str, ...] = ()
    layout: str = ""

    @property
    def good(self) -> tuple[Sample, ...]:
        """The good images that a training may read: those to train on, and those that are held out."""
        return self.train + self.held_out


class Item(NamedTuple):
    """One image. Train and test items have the same fields."""

    image: Tensor           # (3, H, W) float32 in [-1, 1]
    mask: Tensor            # (1, H, W) float32 in {0, 1}, 1 on the defect; all 0 for a good image, or without a mask
    label: int              # 0 good, 1 defective
    category: str
    defect: str             # name of the defect's folder, or "good"
    path: Path              # the file the image came from
    cut: bool = False       # True if the mask's file has shades, see dbad.data.masks


@dataclass(frozen=True)
class Prediction:
    """The results of a detector for N images. The result for an image depends on the image, the model and the seed.

        anomaly_map      (N, 1, H, W) float32 >= 0
        score            (N,) float32, higher is worse
        reconstruction   (N, 3, H, W) float32 in [-1, 1], or None for families that make none
        maps             the parts of the anomaly map by name, each (N, 1, H, W) float32 >= 0
        decision         (N,) bool, score at or above the calibrated image threshold; None without calibration
        p_value          (N,) float64, see `Calibration.p_value`; None without calibration scores
    """

    anomaly_map: Tensor
    score: Tensor
    reconstruction: Tensor | None
    maps: dict[str, Tensor]
    decision: Tensor | None = None
    p_value: Tensor | None = None

    def of(self, number: int) -> Prediction:
        """The results for one of the images, N = 1."""
        one = slice(number, number + 1)
        reconstruction, decision, p_value = (None if values is None else values[one] for values in (
            self.reconstruction, self.decision, self.p_value))
        return Prediction(self.anomaly_map[one], self.score[one], reconstruction,
                          {name: part[one] for name, part in self.maps.items()}, decision, p_value)


@dataclass(frozen=True, eq=False, repr=False)
class ImagePrediction:
    """The result for one image, as NumPy arrays at the image's own size (H, W), upright.

        score              higher is worse
        threshold          calibrated image threshold
        decision           True for defective: the score is at or above the threshold
        p_value            share of good calibration images that score at least as high; None without their scores
        anomaly_map        (H, W) float32 >= 0
        pixel_threshold    a pixel of the anomaly map is defective at or above it
        maps               the parts of the anomaly map by name, each (H, W) float32 >= 0
        reconstruction     (H, W, 3) uint8, or None for families that make none
    """

    score: float
    threshold: float
    decision: bool
    p_value: float | None
    anomaly_map: np.ndarray
    pixel_threshold: float
    maps: dict[str, np.ndarray]
    reconstruction: np.ndarray | None

    def __repr__(self) -> str:
        p_value = "" if self.p_value is None else f", p {self.p_value:.2g}"
        height, width = self.anomaly_map.shape
        return (f"{'defective' if self.decision else 'good'}: score {self.score:.3g}, threshold {self.threshold:.3g}"
                f"{p_value}, map {height}x{width}")


class RunResults(NamedTuple):
    """The results of an inspection; as a text, their folder.

        folder     scores, pictures and report
        metrics    the contents of metrics.json, for several categories by their names; None for new images and on
                   --dry_run
    """

    folder: Path
    metrics: dict[str, Any] | None = None

    def __str__(self) -> str:
        return str(self.folder)


class Origin(NamedTuple):
    """The facts about an image before its inspection: the first columns of `ScoreRow`."""

    path: str
    category: str
    defect: str | None
    label: int | None


class ScoreRow(NamedTuple):
    """One image in the tables, a line of scores.csv: small enough to keep for every image of a run.

        path          file, relative to the data set (or as the user gave it)
        category      such as "hazelnut"
        defect        folder name of the defect, "good", or None if no ground truth exists
        label         1 defective, 0 good, None if no ground truth exists
        score         raw anomaly score of the image; higher is worse
        p_value       share of good calibration images that score at least as high, in (0, 1]; None if not calibrated
        normalised    the score scaled to [0, 1], 0.5 at the image threshold; None if not calibrated
        decision      1 if the score is at or above the image threshold, else 0; None if not calibrated
    """

    path: str
    category: str
    defect: str | None
    label: int | None
    score: float
    p_value: float | None
    normalised: float | None
    decision: int | None


@dataclass(frozen=True)
class Pictures:
    """The arrays of one inspected image, from which its pictures are drawn; freed once they are drawn.

        image            (H, W, 3) uint8, as the detector received it
        reconstruction   (H, W, 3) uint8, the defect-free version; None for families that have none
        anomaly_map      (H, W) float32 >= 0
        parts            named maps that the anomaly map was made of ("pixel", "feature"), each (H, W) float32 >= 0
        mask             (H, W) bool ground truth, empty for a good image; None if there is none
        counterpart      name of `reconstruction` in the pictures
    """

    image: np.ndarray
    reconstruction: np.ndarray | None
    anomaly_map: np.ndarray
    parts: dict[str, np.ndarray] = field(default_factory=dict)
    mask: np.ndarray | None = None
    counterpart: str = "reconstruction"
