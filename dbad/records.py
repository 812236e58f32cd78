"""What was found in one image: the record that evaluation fills and the report shows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Inspection:
    """One inspected image and everything the detector said about it.

        path            file, relative to the data set (or as the user gave it)
        category        such as "hazelnut"
        defect          folder name of the defect, "good", or None where no ground truth exists
        label           1 defective, 0 good, None where no ground truth exists
        score           how anomalous the image is, raw; higher is worse
        p_value         share of good calibration images that score at least as high, in (0, 1]; None if not calibrated
        normalised      the score brought to [0, 1], 0.5 at the image threshold; None if not calibrated
        decision        1 where the score is at or above the image threshold, else 0; None if not calibrated
        image           (H, W, 3) uint8, as the detector saw it
        reconstruction  (H, W, 3) uint8, the defect-free version; None for families that have none
        anomaly_map     (H, W) float32 >= 0
        parts           named maps that the anomaly map was made of ("pixel", "feature"), each (H, W) float32 >= 0
        mask            (H, W) bool ground truth; None where there is none
        cut             the file of the mask has shades, which were cut in the middle of their range
        counterpart     what `reconstruction` is to be called
    """

    path: str
    category: str
    defect: str | None
    label: int | None
    score: float
    p_value: float | None
    normalised: float | None
    decision: int | None
    image: np.ndarray
    reconstruction: np.ndarray | None
    anomaly_map: np.ndarray
    parts: dict[str, np.ndarray] = field(default_factory=dict)
    mask: np.ndarray | None = None
    cut: bool = False
    counterpart: str = "reconstruction"
