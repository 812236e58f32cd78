"""Calibration on good images: map scales, the pixel threshold, the image threshold, p-values.

Everything here uses held-out good images, which neither training nor the test has used.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dbad.declared import check_declared, types_of
from dbad.errors import UserError
from dbad.files.atomic import write_json
from dbad.finite import NotFinite, check_finite, naming
from dbad.maps import central_window

# Number of calibration.json's format; files without a number are older. It rises with every new setting of a family,
# so that a file that should have the setting and lacks it is known to be damaged.
FORMAT = 1
OPEN_SHARE = {"between": (0, 1)}        # a range, see `fields.opt`


@dataclass(frozen=True)
class Calibration:
    """The contents of calibration.json.

        scales             per part ("pixel", "feature"), the difference that counts as 1 in the anomaly map
        pixel_threshold    a pixel of the anomaly map is anomalous at or above it
        image_threshold    an image is anomalous if its score is at or above it
        scores             sorted scores of the good images used; empty if thresholds were given by hand
        num_pixels         number of good pixels used
        pixel_quantile     quantile of the good pixels, for scales and pixel_threshold
        false_alarm_rate   promised share of good images that are called anomalous; None if `image_threshold` was
                           given by hand
        settings           settings of the detector used, as JSON values
        digests            digests of the files it belongs to
        method             name of the detector's family
        format             number of the file's format
    """

    scales: dict[str, float]
    pixel_threshold: float
    image_threshold: float
    scores: tuple[float, ...] = ()
    num_pixels: int = 0
    pixel_quantile: float | None = field(default=None, metadata=OPEN_SHARE)
    false_alarm_rate: float | None = field(default=None, metadata=OPEN_SHARE)
    settings: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    method: str = "ddim"
    format: int = FORMAT

    def p_value(self, score: float) -> float | None:
        """Share of the good images, including this one, that score at least as high; None without scores.

        For a good image it is at most alpha with probability at most alpha (split conformal prediction, Vovk et al.).
        """
        if not self.scores:
            return None
        at_least = len(self.scores) - int(np.searchsorted(self.scores, score, side="left"))
        return (at_least + 1) / (len(self.scores) + 1)

    def normalised(self, score: float) -> float:
        """The score scaled to [0, 1), with the threshold at 0.5; keeps the order of scores."""
        return score / (score + self.image_threshold) if score > 0 else 0.0

    def decide(self, score: float) -> int:
        """1 if an image with this score is called anomalous, else 0; a score that is not finite is a `NotFinite`."""
        if not math.isfinite(score):
            raise NotFinite("score", 0)
        return int(score >= self.image_threshold)

    def with_threshold(self, image_threshold: float) -> Calibration:
        """This calibration with another image threshold, which promises no rate of false alarms."""
        if not (math.isfinite(image_threshold) and image_threshold > 0):
            raise UserError(f"image threshold {image_threshold}: expected a number above 0")
        return dataclasses.replace(self, image_threshold=float(image_threshold), false_alarm_rate=None)

    def with_rate(self, false_alarm_rate: float) -> Calibration:
        """This calibration with the image threshold of another promised rate of false alarms, from its `scores`.

        A rate that so few scores cannot promise is a `UserError` with the smallest possible one.
        """
        if not 0 < false_alarm_rate < 1:
            raise UserError(f"--false_alarm_rate {false_alarm_rate}: expected a number between 0 and 1")
        if not self.scores:
            raise UserError(f"--false_alarm_rate {false_alarm_rate}: needs the scores of a calibration; the thresholds "
                            "were set by hand")
        threshold = conformal_threshold(self.scores, false_alarm_rate)
        return dataclasses.replace(self, image_threshold=threshold, false_alarm_rate=float(false_alarm_rate))

    def as_dict(self) -> dict[str, Any]:
        """The contents of calibration.json."""
        return dataclasses.asdict(self) | {"num_images": len(self.scores)}

    def save(self, path: Path) -> None:
        write_json(path, self.as_dict())


def read_calibration(values: dict[str, Any]) -> Calibration:
    """The calibration from the contents of a file; wrong contents are a `UserError` that does not name the file."""
    declared = types_of(Calibration)
    check_declared(values, declared, "values", tuple(declared))
    if not 1 <= values["format"] <= FORMAT:
        raise UserError(f"format {values['format']}: expected {' to '.join(map(str, sorted({1, FORMAT})))}")
    fields = {name: values[name] for name in declared}
    scales = {name: float(scale) for name, scale in fields["scales"].items()}
    thresholds = {name: float(fields[name]) for name in ("pixel_threshold", "image_threshold")}
    scores = tuple(float(score) for score in fields["scores"])
    if not scales or not min(*scales.values(), *thresholds.values()) > 0:
        raise UserError("scales and thresholds: expected numbers above 0")
    if list(scores) != sorted(scores):
        raise UserError("scores: expected them sorted")
    checked: dict[str, Any] = fields | thresholds | {"scales": scales, "scores": scores}
    return Calibration(**checked)


def calibrate(combine: Callable[[dict[str, Tensor], dict[str, float]], tuple[Tensor, Tensor]],
              parts: Sequence[dict[str, Tensor]], pixel_quantile: float, false_alarm_rate: float | None = None,
              center_crop: int = 0, names: Sequence[object] = ()) -> Calibration:
    """Measure scales and thresholds on good images, given their parts, each (1, 1, H, W).

        combine            `Detector.combine`
        pixel_quantile     share of good pixels below the scales and the pixel threshold
        false_alarm_rate   promised for images; None for 0.05, or for the rate that so many images can promise
        names              names of the images for the error of a map that is not finite; without them, numbers
    The caller adds settings and digests.
    """
    def inside(maps: Tensor) -> np.ndarray:
        return maps[(..., *central_window(maps.shape[-2:], center_crop))].numpy()

    # Scales first, since the anomaly map needs them; then the thresholds on that map.
    for number, found in enumerate(parts):
        with naming(names, number):
            check_finite({f"{name} map": part for name, part in found.items()})
    scales = {name: map_quantile([inside(p[name]) for p in parts], pixel_quantile) for name in parts[0]}
    combined = []
    for number, found in enumerate(parts):
        with naming(names, number):
            combined.append(combine(found, scales))
    maps, scores = [inside(m) for m, _ in combined], sorted(float(score[0]) for _, score in combined)
    rate = false_alarm_rate or max(0.05, smallest_rate(len(scores)))
    return Calibration(scales, map_quantile(maps, pixel_quantile), conformal_threshold(scores, rate), tuple(scores),
                       sum(m.size for m in maps), pixel_quantile, rate)


def map_quantile(maps: Sequence[np.ndarray], quantile: float) -> float:
    """The `quantile` of all pixels of all maps, never 0: scales and thresholds must be above 0."""
    values = np.concatenate([np.asarray(m, np.float32).ravel() for m in maps])
    return max(float(np.quantile(values, quantile)), float(np.finfo(np.float32).tiny))


def conformal_threshold(scores: Sequence[float], false_alarm_rate: float) -> float:
    """The threshold that a new good image reaches with probability at most `false_alarm_rate`.

    Split conformal: with n good scores it lies just above the ceil((n + 1) (1 - rate))-th smallest. This keeps the
    promise for any distribution if new good images are drawn like these. A rate below `smallest_rate(n)` is refused.
    """
    check_promise(false_alarm_rate, len(scores))
    rank = _rank(false_alarm_rate, len(scores))
    return float(np.nextafter(np.sort(np.asarray(scores, np.float64))[rank - 1], np.inf))


def _rank(false_alarm_rate: float, count: int) -> int:
    return math.ceil((count + 1) * (1 - false_alarm_rate) - 1e-9)


def check_promise(false_alarm_rate: float, count: int, category: str | None = None) -> None:
    """Raise `UserError` for a rate that `count` held-out good images cannot promise; names the `category` if given."""
    if _rank(false_alarm_rate, count) > count:
        least = math.ceil(smallest_rate(count) * 1000) / 1000
        of = f" of {category}" if category else ""
        raise UserError(f"--false_alarm_rate {false_alarm_rate}: {count} held-out good images{of} can promise no less "
                        f"than {least:.3f}; expected at least that, or a larger --holdout")


def smallest_rate(num_images: int) -> float:
    """The smallest false-alarm rate that so many good images can promise."""
    return 1 / (num_images + 1)
