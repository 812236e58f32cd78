"""Test whether new images, as a whole, still look like the good images of the calibration.

If they do not, the promised false-alarm rate does not hold for them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import ks_2samp, norm

from dbad.calibration.thresholds import Calibration
from dbad.errors import UserError

TOLERATED_SHARE = 0.1   # share of the new images that may be defective without counting as drift


@dataclass(frozen=True)
class Drift:
    """The result of a Kolmogorov-Smirnov test of new scores against those of the calibration.

        statistic            largest gap between the two cumulative distributions, in [0, 1]
        p_value              upper bound on the chance of so large a gap without drift
        drifted              True if p_value is at most the level
        direction            direction in which the new scores differ; None without drift
        detectable           approximately the smallest gap that so many images can show; None if they are too few
        median_*             median of all scores
        share_expected       share of good images called defective if nothing has drifted
        share_observed       share of the new images called defective
    """

    statistic: float
    p_value: float
    drifted: bool
    direction: Literal["higher", "lower"] | None
    detectable: float | None
    num_new: int
    num_calibration: int
    median_new: float
    median_calibration: float
    share_expected: float
    share_observed: float


def drift(calibration: Calibration, new_scores: Sequence[float], level: float = 0.01,
          script: str = "evaluation.py") -> Drift:
    """Test whether the scores of new images have the same distribution as those of the calibration, made by a `script`.

    Production has defects, and they score high. So the test for higher scores leaves out the tenth of the new images
    that scores highest (`TOLERATED_SHARE`). The test for lower scores, which no defect can cause, keeps them. These are
    two one-sided two-sample Kolmogorov-Smirnov tests (exact for small samples; ties only make them more careful), each
    at half the level.

    Images without drift are then called drifted with at most the probability `level`. This holds for any distribution,
    as long as at most about a tenth of the images are defective. Measured at level 0.01 with 0, 2, 5 and 10 % of
    defects far above the threshold, 50 scores of the calibration and 20, 100 and 1000 new ones: at most 0.9 % in each
    case; a test of all scores reaches 4 %, and with 500 scores of the calibration 98 %. Far more defects do count as
    drift. The test assumes that images are independent: ten pictures of the same part count as one.
    """
    good, new = np.asarray(calibration.scores, np.float64), np.sort(np.asarray(new_scores, np.float64))
    if not len(good):
        raise UserError("--drift_check: thresholds set by hand have no calibration scores to compare with; run "
                        f"{script}, and do not set thresholds")
    if not len(new):
        raise UserError("--drift_check: no new scores; expected at least one image")
    body = new[:len(new) - int(TOLERATED_SHARE * len(new))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ks_2samp: Exact calculation")     # large: asymptotic
        higher = ks_2samp(body, good, alternative="less")           # "less" refers to the distribution function
        lower = ks_2samp(new, good, alternative="greater")
    direction, found = min(("higher", higher), ("lower", lower), key=lambda pair: pair[1].pvalue)
    p_value = min(1.0, 2 * float(found.pvalue))
    drifted, expected = p_value <= level, calibration.p_value(calibration.image_threshold)
    assert expected is not None         # there are scores
    return Drift(float(found.statistic), p_value, drifted, direction if drifted else None,
                 _detectable(len(body), len(good), level), len(new), len(good), float(np.median(new)),
                 float(np.median(good)), expected, float(np.mean(new >= calibration.image_threshold)))


def _detectable(num_new: int, num_good: int, level: float) -> float | None:
    """The gap at which Smirnov's approximation 2 exp(-2 D^2 n m / (n + m)) reaches the level; None if no gap does.

    The largest gap, 1, has the exact p-value 2 / binomial(n + m, n).
    """
    if math.comb(num_new + num_good, num_new) < 2 / level:
        return None
    return min(1.0, math.sqrt(-math.log(level / 2) / 2 * (num_new + num_good) / (num_new * num_good)))


def sentence(found: Drift) -> str:
    """The result in words, for those who run the production line."""
    new = f"{found.num_new} new image{'s' * (found.num_new != 1)}"
    good = f"{found.num_calibration} good one{'s' * (found.num_calibration != 1)} of the calibration"
    facts = (f"median {found.median_new:.3g} against {found.median_calibration:.3g}; called defective "
             f"{found.share_observed:.1%}, expected of good images {found.share_expected:.1%}")
    test = f"Kolmogorov-Smirnov p = {found.p_value:.1g}"
    if found.detectable is None:
        return f"Drift unknown: {new} and {good} are too few for a test ({facts})."
    if found.direction == "higher":
        return (f"Drift: the scores of {new} are higher than those of {good} ({test}; {facts}): the promised "
                "false-alarm rate does not hold for these images. Either many of them are defective, or lighting, "
                "position or material has changed: look at the lowest-scoring ones, and calibrate again with "
                "them if they are good.")
    if found.direction == "lower":
        return (f"Drift: the scores of {new} are lower than those of {good} ({test}; {facts}): defects may be missed, "
                "as they may score lower too. Lighting, focus, position or material has changed: look at some of them, "
                "and calibrate again with them if they are good.")
    shift = 2 * norm.ppf((1 + found.detectable) / 2)
    least = f", such as after a shift by about {shift:.1f} standard deviations" if math.isfinite(shift) else ""
    return (f"No drift found in {new} against {good} ({test}; {facts}). With this number of images, only a "
            f"Kolmogorov-Smirnov distance of {found.detectable:.2f} or more can be detected{least}.")
