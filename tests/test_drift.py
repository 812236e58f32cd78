"""Drift: it is found where scores have moved, seldom where they have not, and never for a few defects."""

import dataclasses
import json
import math

import numpy as np
import pytest
from helpers import one_line
from scipy.stats import binom, ks_2samp, norm

from dbad.calibration.drift import TOLERATED_SHARE, Drift, drift, sentence
from dbad.calibration.thresholds import Calibration, conformal_threshold
from dbad.errors import UserError

NUM_RUNS = 200


def calibrated(scores) -> Calibration:
    rate = max(0.05, 1 / (len(scores) + 1))
    return Calibration({"pixel": 1.0}, 1.0, conformal_threshold(scores, rate), tuple(sorted(map(float, scores))),
                       false_alarm_rate=rate)


def share_found(num_good: int, num_new: int, draw_new, draw_good=np.random.Generator.normal, level=0.01) -> float:
    """In which share of repeated, independent runs drift is found."""
    random = np.random.default_rng(num_good * 10_000 + num_new)
    return np.mean([drift(calibrated(draw_good(random, size=num_good)), draw_new(random, size=num_new), level).drifted
                    for _ in range(NUM_RUNS)])


def at_most(level: float) -> float:
    """The share of `NUM_RUNS` that a probability of `level` exceeds once in a thousand times."""
    return binom.ppf(0.999, NUM_RUNS, level) / NUM_RUNS


def with_defects(share: float):
    """Normal scores, of which a share lies far above every good one."""
    def draw(random, size):
        return np.where(np.arange(size) < share * size, 100.0, random.normal(size=size))
    return draw


def coarse(random, size):
    """Scores with many ties."""
    return random.integers(0, 4, size).astype(float)


@pytest.mark.parametrize("num_good, num_new", [(5, 50), (20, 20), (50, 100)])
@pytest.mark.parametrize("level", [0.01, 0.1])
def test_without_drift_it_is_found_as_seldom_as_the_level_promises(num_good, num_new, level):
    assert share_found(num_good, num_new, np.random.Generator.normal, level=level) <= at_most(level)


def test_the_level_is_used_and_not_only_kept():
    assert share_found(50, 20, np.random.Generator.normal, level=0.4) > 0.15


def test_ties_do_not_make_it_less_careful():
    assert share_found(50, 100, coarse, coarse, level=0.1) <= at_most(0.1)
    assert not drift(calibrated([1.0] * 50), [1.0] * 100).drifted


@pytest.mark.parametrize("num_new, share", [(20, 0.05), (20, TOLERATED_SHARE), (100, 0.02), (100, TOLERATED_SHARE),
                                            (1000, TOLERATED_SHARE)])
def test_defects_up_to_a_tenth_are_no_drift(num_new, share):
    assert share_found(50, num_new, with_defects(share)) <= at_most(0.01)


def test_a_tenth_of_defects_is_no_drift_where_a_test_of_all_scores_would_say_so():
    good = norm.ppf(np.linspace(0.001, 0.999, 500))
    new = np.append(norm.ppf(np.linspace(0.001, 0.999, 900)), np.full(100, 100.0))
    assert ks_2samp(new, good).pvalue < 0.01
    assert not drift(calibrated(good), new).drifted


def test_a_folder_of_mostly_defects_is_told():
    assert share_found(50, 100, with_defects(0.6)) == 1


@pytest.mark.parametrize("shift, direction", [(1.0, "higher"), (-1.0, "lower")])
def test_a_shift_by_one_spread_is_found_and_named_either_way(shift, direction):
    random = np.random.default_rng(1)
    found = [drift(calibrated(random.normal(size=50)), random.normal(shift, 1, 200)) for _ in range(NUM_RUNS)]
    assert np.mean([f.drifted for f in found]) > 0.95
    assert {f.direction for f in found if f.drifted} == {direction}


def test_without_a_tenth_to_leave_out_both_directions_are_treated_alike():
    random = np.random.default_rng(2)
    for _ in range(50):
        good, new = random.normal(size=30), random.normal(random.normal(), 1, 9)
        one, other = drift(calibrated(good), new), drift(calibrated(-good), -new)
        assert (one.statistic, one.p_value, one.drifted) == (other.statistic, other.p_value, other.drifted)
        assert {one.direction, other.direction} in ({None}, {"higher", "lower"})


def test_a_gap_without_overlap_has_the_p_value_of_combinatorics():
    """Of all ways to order 20 and 5 scores, two have them apart."""
    good = np.arange(20.0)
    for new in (good[:5] + 100, good[:5] - 100):
        found = drift(calibrated(good), new)
        assert found.statistic == 1 and found.p_value == pytest.approx(2 / math.comb(25, 5))


def test_scores_that_never_overlap_are_drift_as_soon_as_the_numbers_can_tell():
    for num_good, num_new in [(50, 1), (50, 2), (3, 3), (4, 5), (5, 5), (99, 1), (199, 1), (2, 30)]:
        found = drift(calibrated(np.arange(num_good)), np.arange(num_new) - 1000.0)
        can_tell = math.comb(num_good + num_new, num_new) >= 200
        assert found.drifted == (found.detectable is not None) == can_tell
        assert ("Drift unknown" in sentence(found)) != can_tell


@pytest.mark.parametrize("num_good, num_new", [(20, 100), (50, 30), (50, 200), (100, 100)])
def test_the_gap_said_to_be_detectable_is_where_drift_begins(num_good, num_new):
    """New scores are those of the calibration, of which a growing share is moved below all others."""
    good = np.linspace(1, 2, num_good)
    found = [drift(calibrated(good), np.where(np.arange(num_new) < share * num_new, 0, np.linspace(1, 2, num_new)))
             for share in np.linspace(0, 1, 81)]
    first = next(f for f in found if f.drifted)
    assert first.detectable == pytest.approx(first.statistic, rel=0.15)


def test_shares_and_medians_are_of_all_scores():
    calibration = calibrated(np.arange(39.0))
    found = drift(calibration, [0.0, 10.0, 20.0, 1e3, 1e3])
    assert (found.num_new, found.num_calibration, found.median_new, found.median_calibration) == (5, 39, 20, 19)
    assert found.share_observed == 0.4 and found.share_expected == pytest.approx(0.05)
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_more_than_ten_thousand_scores_are_no_trouble():
    random = np.random.default_rng(0)
    good = random.normal(size=997)
    assert not drift(calibrated(good), random.normal(size=20_011)).drifted
    assert drift(calibrated(good), random.normal(0.3, 1, 9_001)).direction == "higher"


def test_without_scores_it_says_what_makes_them():
    with pytest.raises(UserError, match="run evaluation.py") as error:
        drift(Calibration({"pixel": 1.0}, 1.0, 1.0), [1.0])
    one_line(error)
    with pytest.raises(UserError, match="no new scores") as error:
        drift(calibrated([1.0, 2.0]), [])
    one_line(error)


@pytest.mark.parametrize("shift, begins, says", [
    (0, "No drift found in 200 new images against 50 good ones of the calibration", "With this number of images, only"),
    (3, "Drift: the scores of 200 new images are higher than those of 50 good ones", "false-alarm rate does not hold"),
    (-3, "Drift: the scores of 200 new images are lower than those of 50 good ones", "defects may be missed")])
def test_the_sentence_says_what_was_found_and_what_to_do(shift, begins, says):
    random = np.random.default_rng(3)
    found = drift(calibrated(random.normal(size=50)), random.normal(shift, 1, 200))
    words = sentence(found)
    assert words.startswith(begins) and says in words and "\n" not in words
    assert ("calibrate again with them" in words) == (shift != 0)
    assert f"median {found.median_new:.3g} against {found.median_calibration:.3g}" in words


def test_the_sentence_of_few_images_promises_nothing():
    words = sentence(drift(calibrated(np.arange(50.0)), [3.0]))
    assert words.startswith("Drift unknown: 1 new image and 50 good ones of the calibration are too few")
    full = Drift(0.5, 0.3, False, None, 1.0, 5, 5, 1.0, 1.0, 0.1, 0.0)
    assert "inf" not in sentence(full) and "of 1.00" in sentence(full)
