"""Thresholds from good images: the promise they make, by algebra and by simulation, and the file they are kept in."""

import json
import math

import numpy as np
import pytest
from helpers import make_category, one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dbad.calibration.__main__ import main as calibration_module
from dbad.calibration.thresholds import FORMAT, Calibration, conformal_threshold, map_quantile, smallest_rate
from dbad.declared import types_of
from dbad.errors import UserError
from dbad.families.ddim.options import DdimSettings
from dbad.families.registry import FAMILIES
from dbad.families.runs import load_calibration

repeatable = settings(deadline=None, derandomize=True, max_examples=200)
good_scores = st.lists(st.floats(0, 1e6), min_size=1, max_size=60)


SETTINGS = DdimSettings.read({"extractor_path": "extractor.pt", "intensity_bits": 12}).record()


def calibrated(scores, rate: float = 0.1) -> Calibration:
    return Calibration({"pixel": 0.1, "feature": 0.5}, 1.1, conformal_threshold(scores, rate), tuple(sorted(scores)),
                       4096, 0.999, rate, SETTINGS, {"unet": "00ff"})


@pytest.mark.parametrize("distribution", ["normal", "exponential", "uniform", "ties"])
@pytest.mark.parametrize("count, rate", [(19, 0.05), (20, 0.05), (25, 0.1), (50, 0.05), (99, 0.01), (30, 0.25)])
def test_the_threshold_keeps_its_promise_and_is_not_much_stricter(distribution, count, rate):
    """Over many draws of n good scores, a new good score is called anomalous with at most the promised probability.

    Without ties the exact probability is floor(rate (n + 1)) / (n + 1).
    """
    random = np.random.default_rng(count)
    num_runs, num_new = 3000, 20
    draw = {"normal": random.normal, "exponential": random.exponential, "uniform": random.uniform,
            "ties": lambda size: random.integers(0, 5, size).astype(float)}[distribution]
    good, new = draw(size=(num_runs, count)), draw(size=(num_runs, num_new))
    thresholds = np.array([conformal_threshold(g, rate) for g in good])
    alarms = (new >= thresholds[:, None]).mean(axis=1)
    error = 4 * alarms.std() / num_runs ** 0.5
    exact = math.floor(rate * (count + 1) + 1e-9) / (count + 1)
    assert alarms.mean() <= rate + error
    assert alarms.mean() <= exact + error
    if distribution != "ties":
        assert alarms.mean() >= exact - error


@repeatable
@given(scores=good_scores, rate=st.floats(0.01, 0.99), others=st.lists(st.floats(0, 1e6), max_size=20))
def test_an_image_is_called_anomalous_exactly_where_its_p_value_is_at_most_the_rate(scores, rate, others):
    if rate < smallest_rate(len(scores)):
        return
    calibration = calibrated(scores, rate)
    edges = [float(np.nextafter(s, d)) for s in scores for d in (-np.inf, np.inf)]
    for score in (*scores, *edges, *others, calibration.image_threshold):
        assert calibration.decide(score) == int(calibration.p_value(score) <= rate)


@pytest.mark.parametrize("count", [1, 4, 19, 29, 59, 99, 999])
def test_a_rate_that_is_a_whole_number_of_good_images_is_met_exactly(count):
    scores = tuple(float(i) for i in range(count))
    for k in {1, 2, count // 2 + 1}:
        if k > count:
            continue
        calibration = calibrated(scores, k / (count + 1))
        assert sum(calibration.decide(s) for s in scores) == k - 1
        assert all(calibration.decide(s) == (calibration.p_value(s) <= k / (count + 1)) for s in scores)


@repeatable
@given(scores=good_scores, score=st.floats(-10, 2e6))
def test_the_p_value_is_a_share_of_good_images_and_falls_with_the_score(scores, score):
    calibration = Calibration({"pixel": 1.0}, 1.0, 1.0, tuple(sorted(scores)))
    p = calibration.p_value(score)
    assert 0 < p <= 1
    assert p == (1 + sum(s >= score for s in scores)) / (1 + len(scores))
    assert calibration.p_value(score + 1) <= p


def test_the_p_value_of_extremes():
    calibration = Calibration({"pixel": 1.0}, 1.0, 1.0, (1.0, 2.0, 3.0))
    assert calibration.p_value(-math.inf) == 1 and calibration.p_value(math.inf) == 0.25


@repeatable
@given(scores=good_scores, rate=st.floats(0.01, 0.99), other=st.floats(0.01, 0.99))
def test_another_rate_gives_the_calibration_that_it_would_have_given_at_once(scores, rate, other):
    if min(rate, other) < smallest_rate(len(scores)):
        return
    moved = calibrated(scores, rate).with_rate(other)
    assert moved == calibrated(scores, other)
    assert moved.with_rate(rate) == calibrated(scores, rate)


def test_a_rate_that_the_saved_scores_cannot_promise_is_refused_with_the_smallest_possible():
    with pytest.raises(UserError, match="9 held-out good images can promise no less than 0.100") as error:
        calibrated(range(9)).with_rate(0.05)
    one_line(error)
    with pytest.raises(UserError, match="--false_alarm_rate 0.05: needs the scores of a calibration"):
        Calibration({"pixel": 1.0}, 1.0, 1.0).with_rate(0.05)
    with pytest.raises(UserError, match="--false_alarm_rate 5: expected a number between 0 and 1"):
        calibrated(range(9)).with_rate(5)


def test_a_threshold_that_is_given_decides_and_promises_nothing():
    moved = calibrated(range(9)).with_threshold(3.5)
    assert [moved.decide(score) for score in (3.4, 3.5)] == [0, 1]
    assert moved.false_alarm_rate is None and moved.p_value(8) == calibrated(range(9)).p_value(8)
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="expected a number above 0"):
            moved.with_threshold(value)


def test_without_good_scores_there_is_no_p_value():
    assert Calibration({"pixel": 1.0}, 1.0, 1.0).p_value(3.0) is None


@pytest.mark.parametrize("count", [1, 2, 5, 12, 18, 29, 50, 123, 500])
def test_a_rate_that_so_few_images_cannot_promise_is_refused_with_one_that_they_can(count):
    scores = np.arange(float(count))
    with pytest.raises(UserError, match="--false_alarm_rate") as error:
        conformal_threshold(scores, 0.9 * smallest_rate(count))
    message = one_line(error)
    assert f" {count} held-out good images" in message
    named = float(message.split("no less than ")[1].split(";")[0])
    assert abs(named - smallest_rate(count)) < 0.001
    conformal_threshold(scores, named)          # what the message asks for must be accepted


@repeatable
@given(scores=good_scores, threshold=st.floats(1e-3, 1e3), others=st.lists(st.floats(0, 1e4), min_size=2, max_size=20))
def test_the_normalised_score_keeps_the_order_and_has_its_threshold_at_one_half(scores, threshold, others):
    calibration = Calibration({"pixel": 1.0}, 1.0, threshold, tuple(sorted(scores)))
    assert calibration.normalised(threshold) == 0.5 and calibration.normalised(0.0) == 0
    values = [calibration.normalised(s) for s in sorted(others)]
    assert values == sorted(values) and 0 <= values[0] and values[-1] < 1
    for score, value in zip(sorted(others), values, strict=True):
        assert (value > 0.5) <= (score > threshold) and (value >= 0.5) >= (score >= threshold)


# Map quantiles

def test_the_map_quantile_is_that_of_all_pixels_together():
    maps = [np.arange(50.0).reshape(5, 10), np.arange(50.0, 101.0).reshape(3, 17)]
    assert map_quantile(maps, 0.5) == 50 and map_quantile(maps, 0.99) == 99
    assert map_quantile(maps[::-1], 0.9) == map_quantile(maps, 0.9)


def test_the_map_quantile_of_empty_maps_is_still_above_0():
    assert 0 < map_quantile([np.zeros((4, 4))], 0.999) < 1e-30


# The file

def test_a_calibration_is_read_as_it_was_saved(tmp_path):
    calibration = calibrated([0.1, 0.30000000000000004, 1 / 3, 7.0] * 3, 0.2)
    calibration.save(tmp_path / "calibration.json")
    assert load_calibration(tmp_path / "calibration.json") == calibration
    assert json.loads((tmp_path / "calibration.json").read_text())["num_images"] == 12


def test_thresholds_given_by_hand_are_read_as_they_were_saved(tmp_path):
    calibration = Calibration({"pixel": 0.2, "feature": 0.3}, 1.0, 1.0, settings=SETTINGS)
    calibration.save(tmp_path / "calibration.json")
    assert load_calibration(tmp_path / "calibration.json") == calibration


def test_a_missing_calibration_says_how_to_make_it(tmp_path):
    with pytest.raises(UserError, match="run evaluation.py first") as error:
        load_calibration(tmp_path / "calibration.json")
    assert str(tmp_path / "calibration.json") in one_line(error)


DAMAGES = {
    "scales missing": lambda v: v.pop("scales"),
    "scores missing": lambda v: v.pop("scores"),
    "threshold missing": lambda v: v.pop("image_threshold"),
    "scales empty": lambda v: v.update(scales={}),
    "scale of 0": lambda v: v["scales"].update(pixel=0.0),
    "scale not a number": lambda v: v["scales"].update(pixel="wide"),
    "scales a list": lambda v: v.update(scales=[1.0]),
    "scores not sorted": lambda v: v.update(scores=[2.0, 1.0]),
    "scores null": lambda v: v.update(scores=None),
    "scores text": lambda v: v.update(scores=["a", "b"]),
    "image threshold text": lambda v: v.update(image_threshold="high"),
    "pixel threshold null": lambda v: v.update(pixel_threshold=None),
    "intensity a number": lambda v: v["settings"].update(intensity=5),
    "a depth that is none": lambda v: v["settings"].update(intensity_bits=[11]),
    "everything missing": lambda v: v.clear(),
    "a format to come": lambda v: v.update(format=2),
    "format text": lambda v: v.update(format="1"),
    "a setting that is none": lambda v: v["settings"].update(wheels=4),
    "settings of another method": lambda v: v.update(method="diad"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_calibration_is_refused_in_one_line_that_names_it(damage, tmp_path):
    path = tmp_path / "calibration.json"
    calibrated([0.1, 0.2, 0.3] * 4).save(path)
    values = json.loads(path.read_text())
    DAMAGES[damage](values)
    path.write_text(json.dumps(values))
    with pytest.raises(UserError) as error:
        load_calibration(path)
    assert str(path) in one_line(error)


@pytest.mark.parametrize("method", ["nosuch", ["ddim"], 3, ""])
def test_an_unknown_method_is_refused_with_the_known_ones(method, tmp_path):
    path = tmp_path / "calibration.json"
    calibrated([0.1, 0.2, 0.3] * 4).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"method": method}))
    with pytest.raises(UserError, match="expected one of ddim, lafite, knn, diad") as error:
        load_calibration(path)
    assert str(path) in one_line(error)


# Files from before there was a format, as they lie on disks: settings["method"] says the family.
OLDER = {
    "ddim": """{"scales": {"pixel": 0.1, "feature": 0.5}, "pixel_threshold": 1.1, "image_threshold": 2.0,
        "scores": [0.5, 1.0, 1.5], "num_pixels": 4096, "pixel_quantile": 0.999, "false_alarm_rate": 0.25,
        "settings": {"blur_sigma": 4.0, "center_crop": 0, "conditioning": "ddad", "diffusion_checkpoint_name":
        "final.pt", "eta": 0.0, "feature_smoothing_kernel": 3, "fl_contrib": 0.7, "layer_weights": [1.0], "map_norm":
        "contrast", "num_samples": 1, "patching": false, "pixel_difference": "max_square", "pl_contrib": 0.7,
        "recon_weight": 4.0, "sampler": "ddim", "seed": 3, "start_at_timestep": 250, "steps_to_regenerate": 2,
        "tile_overlap": 0.25, "top_share": 0.0, "extractor_path": "extractor.pt"},
        "digests": {"unet": "00ff"}, "num_images": 3}""",
    "lafite": """{"scales": {"discriminator": 0.5}, "pixel_threshold": 1.1, "image_threshold": 2.0,
        "scores": [0.5, 1.0, 1.5], "num_pixels": 4096, "pixel_quantile": 0.999, "false_alarm_rate": 0.25,
        "settings": {"blur_sigma": 4.0, "center_crop": 0, "context_power": 0.0, "denoise_contrib": 0.0,
        "discriminator_contrib": 1.0, "edit_contrib": 0.0, "editing": true, "feature_start": 600, "feature_steps_back":
        1, "inversion_contrib": 0.0, "knn_contrib": 0.0, "neighbours": 5, "seed": 3, "top_share": 0.0, "method":
        "lafite", "diffusion_checkpoint_name": "final.pt", "discriminator": "discriminator.pt"},
        "digests": {"unet": "00ff"}, "num_images": 3}""",
    "knn": """{"scales": {"knn": 0.5}, "pixel_threshold": 1.1, "image_threshold": 2.0,
        "scores": [0.5, 1.0, 1.5], "num_pixels": 4096, "pixel_quantile": 0.999, "false_alarm_rate": 0.25,
        "settings": {"blur_sigma": 4.0, "center_crop": 0, "context_power": 0.0, "denoise_contrib": 0.0,
        "discriminator_contrib": 0.0, "edit_contrib": 0.0, "editing": true, "feature_start": 600, "feature_steps_back":
        1, "inversion_contrib": 0.0, "knn_contrib": 1.0, "neighbours": 1, "seed": 3, "top_share": 0.0, "method": "knn",
        "diffusion_checkpoint_name": "final.pt", "discriminator": "", "intensity": "auto", "intensity_bits": 12},
        "digests": {"bank": "00ff"}, "num_images": 3}""",
    "diad": """{"scales": {"feature": 0.5}, "pixel_threshold": 1.1, "image_threshold": 2.0,
        "scores": [0.5, 1.0, 1.5], "num_pixels": 4096, "pixel_quantile": 0.999, "false_alarm_rate": 0.25,
        "settings": {"center_crop": 0, "feature_resolution": 256, "latent_start": 400, "latent_steps_back": 10,
        "map_sigma": 5.0, "paper_exact": false, "seed": 3, "method": "diad", "extractor": "efficientnet_lite0",
        "extractor_layers": [1, 2, 3], "extractor_weights": "00ff", "intensity": "full", "intensity_bits": null},
        "digests": {"unet": "00ff"}, "num_images": 3}""",
}


@pytest.mark.parametrize("method, depth", [("ddim", ("full", 8)), ("lafite", ("full", 8)), ("knn", ("auto", 12)),
                                           ("diad", ("full", None))])
def test_a_calibration_from_before_there_was_a_format_is_read_as_it_was_meant(method, depth, tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(OLDER[method])
    calibration, recorded = load_calibration(path), json.loads(OLDER[method])
    assert (calibration.method, calibration.image_threshold, calibration.scores) == (method, 2.0, (0.5, 1.0, 1.5))
    settings = FAMILIES[method].settings.read(calibration.settings)
    assert (settings.intensity, settings.intensity_bits) == depth and not settings.patching and settings.seed == 3
    found = settings.record()
    assert {name: found[name] for name in recorded["settings"] if name != "method"} == {
        name: value for name, value in recorded["settings"].items() if name != "method"}
    calibration.save(path)
    assert json.loads(path.read_text())["format"] == 1 and load_calibration(path) == calibration


# The settings of every family in format 1. A new setting raises FORMAT in dbad/calibration/thresholds.py, so that a
# file that lacks it is known to be older and not damaged; write the new list here.
SETTINGS_OF_FORMAT_1 = {
    "ddim": """blur_sigma center_crop conditioning diffusion_checkpoint_name eta extractor_path feature_smoothing_kernel
        fl_contrib intensity intensity_bits layer_weights map_norm num_samples patching pixel_difference
        pl_contrib recon_weight sampler seed start_at_timestep steps_to_regenerate tile_overlap top_share""",
    "lafite": """blur_sigma center_crop context_power denoise_contrib diffusion_checkpoint_name discriminator
        discriminator_contrib edit_contrib editing feature_start feature_steps_back intensity intensity_bits
        inversion_contrib knn_contrib neighbours patching seed top_share""",
    "diad": """center_crop diffusion_checkpoint_name extractor extractor_layers extractor_weights feature_resolution
        intensity intensity_bits latent_start latent_steps_back map_sigma paper_exact patching seed""",
}


@pytest.mark.parametrize("method", SETTINGS_OF_FORMAT_1)
def test_a_new_setting_comes_with_a_new_format(method):
    assert FORMAT == 1 and sorted(types_of(FAMILIES[method].settings)) == SETTINGS_OF_FORMAT_1[method].split()


def test_a_truncated_calibration_is_refused_at_any_length(tmp_path):
    path = tmp_path / "calibration.json"
    calibrated([0.1, 0.2, 0.3] * 4).save(path)
    content = path.read_bytes().rstrip()
    for length in range(0, len(content), 5):
        path.write_bytes(content[:length])
        with pytest.raises(UserError) as error:
            load_calibration(path)
        assert str(path) in one_line(error)


def test_the_module_shows_a_sheet_of_pseudo_anomalies(tmp_path, capsys):
    make_category(tmp_path, num_train=2, size=32)
    calibration_module(["--preview", "--item", "bolt", "--dataset_path", str(tmp_path), "--rows", "1", "--resolution",
                        "32", "--out", str(tmp_path / "sheet.png")])
    assert Image.open(tmp_path / "sheet.png").width > 192
    with pytest.raises(SystemExit):
        calibration_module([])
    assert "--preview --item NAME" in capsys.readouterr().err
