"""The detector: a prediction depends on the image, the model and the seed, and on nothing else."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SETTINGS, drawn, one_line, random_images, tiny_detector, tiny_unet, with_settings
from PIL import Image

import dbad
from dbad.calibration.thresholds import Calibration, conformal_threshold
from dbad.checkpoints.weights import model_config, save_weights
from dbad.errors import UserError
from dbad.families.ddim import DDIM
from dbad.families.ddim.options import DdimSettings, MapOptions, Reconstruction
from dbad.families.detector import load_detector
from dbad.families.digests import digests
from dbad.files.atomic import write_json
from dbad.files.names import CALIBRATION, MODEL_CONFIG, TRAIN_OPTIONS
from dbad.maps import blur
from dbad.networks.extractors import EMBEDDED, build_extractor, save_extractor


@pytest.fixture(scope="module")
def extractor():
    return build_extractor(EMBEDDED, (1, 2), resolution=32)


def assert_same(one, other, rtol: float = 1e-4):
    torch.testing.assert_close(one.score, other.score, rtol=rtol, atol=0)
    torch.testing.assert_close(one.anomaly_map, other.anomaly_map, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one.reconstruction, other.reconstruction, rtol=1e-3, atol=1e-4)


# What a prediction depends on

@pytest.mark.parametrize("kind", ["gaussian", "simplex"])
def test_the_batch_size_does_not_change_a_prediction(kind, extractor):
    images = random_images(8)
    alone = tiny_detector(extractor, batch_size=1, noise_kind=kind)(images)
    together = tiny_detector(extractor, batch_size=8, noise_kind=kind)(images)
    assert_same(alone, together)
    assert_same(tiny_detector(extractor, batch_size=3, noise_kind=kind)(images), together)


def test_the_same_detector_says_the_same_twice_whatever_the_global_random_state(extractor):
    images, detector = random_images(3), tiny_detector(extractor)
    torch.manual_seed(1)
    first = detector(images)
    torch.manual_seed(2)
    second = detector(images)
    assert torch.equal(first.score, second.score) and torch.equal(first.anomaly_map, second.anomaly_map)
    other = tiny_detector(extractor, seed=1)(images)
    assert not torch.allclose(first.score, other.score, rtol=1e-3)


def test_the_anomaly_map_is_the_weighted_sum_of_its_scaled_parts(extractor):
    prediction = tiny_detector(extractor)(random_images(2))
    expected = 0.7 * prediction.maps["pixel"] / 0.01 + 0.7 * prediction.maps["feature"] / 0.1
    torch.testing.assert_close(prediction.anomaly_map, expected)


def test_the_blur_is_given_for_256_px_and_scales_with_the_image(extractor):
    images, detector = random_images(1, 32), tiny_detector(extractor, size=32)
    sharp = with_settings(detector, blur_sigma=0.0)
    blurred, plain = detector.parts(images)[0]["pixel"], sharp.parts(images)[0]["pixel"]
    torch.testing.assert_close(blurred, blur(plain, 4.0 * 32 / 256))
    assert (blurred - plain).abs().max() > 0


# Images of every kind

def test_the_same_image_has_the_same_score_in_whatever_form_it_comes(extractor, tmp_path):
    pixels = drawn(1)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png"), pixels, tensor,
             np.asfortranarray(pixels), tensor.double()]
    detector = tiny_detector(extractor)
    expected = pytest.approx(float(detector(tensor[None]).score), rel=1e-4)
    assert all(detector(form).score == expected for form in forms)
    assert [found.score for several in ([pixels], (tensor,), [tmp_path / "a.png"]) for found in detector(several)] == (
        [expected] * 3)
    mixed = detector([tmp_path / "a.png", drawn(2), tensor])
    assert [mixed[0].score, mixed[2].score] == [expected, expected]


def test_an_image_of_another_size_is_resized_alike_from_a_file_and_from_memory(extractor, tmp_path):
    pixels = drawn(1, (40, 24))
    Image.fromarray(pixels).save(tmp_path / "a.png")
    detector = tiny_detector(extractor)
    predictions = [detector(form) for form in (tmp_path / "a.png", Image.open(tmp_path / "a.png"), pixels)]
    assert len({prediction.score for prediction in predictions}) == 1
    assert all(prediction.anomaly_map.shape == (40, 24) for prediction in predictions)


@pytest.mark.parametrize("shape", [(32, 32), (40, 24), (17, 19)])
def test_a_tensor_of_another_size_is_brought_to_the_networks_too(shape, extractor):
    pixels = drawn(1, shape)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
    detector = tiny_detector(extractor)
    expected = detector(pixels)
    found, batch = detector(tensor), detector(tensor[None])
    assert found.anomaly_map.shape == shape and batch.anomaly_map.shape == (1, 1, 16, 16)
    assert np.abs(found.reconstruction.astype(int) - expected.reconstruction).mean() < 40
    assert found.score == pytest.approx(float(batch.score), rel=1e-4)


@pytest.mark.parametrize("mode", ["L", "RGBA", "1", "P", "LA", "I;16"])
def test_an_image_of_any_mode_has_the_same_score_opened_and_by_its_path(mode, extractor, tmp_path):
    image = Image.fromarray(drawn(1)[:, :, 0].astype(np.uint16) * 257) if mode == "I;16" else (
        Image.fromarray(drawn(1)).convert(mode))
    image.save(tmp_path / "a.png")
    detector = tiny_detector(extractor, intensity="full")
    assert detector(Image.open(tmp_path / "a.png")).score == detector(tmp_path / "a.png").score


def test_an_image_that_exif_turns_has_the_same_score_opened_and_by_its_path(extractor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(drawn(1)).save(tmp_path / "a.png", exif=exif)
    detector = tiny_detector(extractor)
    assert detector(Image.open(tmp_path / "a.png")).score == detector(tmp_path / "a.png").score


def test_a_grey_array_is_the_grey_picture(extractor):
    grey = drawn(1)[:, :, 0]
    detector = tiny_detector(extractor)
    assert detector(grey).score == detector(np.repeat(grey[:, :, None], 3, axis=2)).score


@pytest.mark.parametrize("shape, kind", [((16, 16, 3), np.float32), ((16, 16), bool), ((16, 16, 1), np.uint8),
                                         ((16,), np.uint8), ((16, 16), np.int16), ((0, 0), np.uint16)])
def test_an_array_that_is_no_picture_is_refused(shape, kind, extractor):
    array = np.zeros(shape, kind)
    with pytest.raises(UserError, match=r"expected uint8 or uint16 pixels \(H, W\) or \(H, W, 3\)") as error:
        tiny_detector(extractor)(array)
    one_line(error)


def test_a_missing_file_is_named(extractor, tmp_path):
    with pytest.raises(UserError, match="no such file") as error:
        tiny_detector(extractor)([drawn(0), tmp_path / "missing.png"])
    assert str(tmp_path / "missing.png") in one_line(error)


# Tiles

def test_on_an_image_of_the_networks_size_tiling_changes_nothing(extractor):
    images = random_images(3)
    assert_same(tiny_detector(extractor, patching=True)(images), tiny_detector(extractor)(images), rtol=1e-3)


@pytest.mark.parametrize("shape", [(16, 40), (45, 33), (9, 30), (7, 5)])
def test_a_large_or_small_image_keeps_its_size_when_it_is_tiled(shape, extractor):
    prediction = tiny_detector(extractor, patching=True)(drawn(1, shape))
    assert prediction.anomaly_map.shape == shape and prediction.reconstruction.shape == (*shape, 3)
    assert np.isfinite(prediction.anomaly_map).all() and prediction.anomaly_map.min() >= 0


def test_the_batch_size_does_not_change_a_tiled_prediction(extractor):
    image = torch.from_numpy(drawn(1, (45, 33))).permute(2, 0, 1)[None] / 127.5 - 1
    assert_same(tiny_detector(extractor, patching=True, batch_size=1)(image),
                tiny_detector(extractor, patching=True, batch_size=8)(image))


def test_a_defect_shows_in_the_tiles_that_hold_it_and_nowhere_else(extractor):
    good = drawn(1, (16, 80))
    bad = good.copy()
    bad[4:9, 60:65] = 255 - bad[4:9, 60:65]
    detector = tiny_detector(extractor, patching=True)
    maps = [torch.from_numpy(detector(image).anomaly_map) for image in (good, bad)]
    assert torch.equal(maps[0][:, :30], maps[1][:, :30]) and not torch.equal(maps[0][:, 50:], maps[1][:, 50:])


def test_a_list_may_hold_images_of_several_sizes_with_tiles_too(extractor):
    for patching in (False, True):
        found = tiny_detector(extractor, patching=patching)([drawn(1, (16, 40)), drawn(2, (20, 40))])
        assert [prediction.anomaly_map.shape for prediction in found] == [(16, 40), (20, 40)]


# Calibration

def test_a_detector_that_is_not_calibrated_refuses_to_decide_but_gives_its_parts(extractor):
    detector = tiny_detector(extractor, calibration=None)
    with pytest.raises(UserError, match="not calibrated; run evaluation.py") as error:
        detector(random_images(1))
    one_line(error)
    parts, reconstruction = detector.parts(random_images(2))
    assert parts.keys() == {"pixel", "feature"} and reconstruction.shape == (2, 3, 16, 16)


def test_decisions_and_p_values_are_those_of_the_calibration(extractor):
    scores = sorted(tiny_detector(extractor)(random_images(19, seed=1)).score.tolist())
    calibration = Calibration({"pixel": 0.01, "feature": 0.1}, 1.0, conformal_threshold(scores, 0.4), tuple(scores),
                              19 * 256, 0.999, 0.4)
    prediction = tiny_detector(extractor, calibration=calibration)(random_images(12, seed=2))
    for score, decision, p in zip(prediction.score, prediction.decision, prediction.p_value, strict=True):
        assert bool(decision) == bool(calibration.decide(float(score))) == (float(p) <= 0.4)
        assert float(p) == calibration.p_value(float(score))
    assert prediction.p_value.dtype == torch.float64 and 0 < prediction.decision.sum() < 12


# From a run folder

RECORD = dataclasses.replace(SETTINGS, extractor_path=Path("extractor.pt")).record()


@pytest.fixture
def run_folder(extractor, tmp_path):
    """What training and calibrating leave, of the networks of `tiny_detector`."""
    folder = tmp_path / "bolt"
    unet = tiny_unet()
    save_weights(unet.state_dict(), folder / "final.pt")
    write_json(folder / MODEL_CONFIG, model_config(unet))
    write_json(folder / TRAIN_OPTIONS, {"train_steps": 1000, "max_timestep": 400, "beta_schedule": "linear",
                                        "noise_kind": "gaussian", "preset": "demo", "item": "bolt"})
    save_extractor(extractor, folder / "extractor.pt")
    calibrate(folder)
    return folder


def calibrate(folder, **settings):
    Calibration({"pixel": 0.01, "feature": 0.1}, 1.0, 2.0, settings=RECORD | settings,
                digests=digests(folder, DDIM, DdimSettings.read(RECORD))).save(folder / CALIBRATION)


def test_the_detector_of_a_run_folder_is_the_one_that_was_calibrated(run_folder, extractor):
    images = random_images(3)
    detector = load_detector(run_folder, device="cpu", precision="fp32")
    assert_same(detector(images), tiny_detector(extractor)(images))
    assert torch.equal(dbad.load_detector(str(run_folder), device="cpu", precision="fp32")(images).score,
                       detector(images).score)


def test_a_run_folder_can_be_moved(run_folder, tmp_path):
    before = load_detector(run_folder, "cpu", "fp32")(random_images(1)).score
    run_folder.rename(tmp_path / "elsewhere")
    assert torch.equal(load_detector(tmp_path / "elsewhere", "cpu", "fp32")(random_images(1)).score, before)


@pytest.mark.parametrize("setting, value", [
    ("recon_weight", 0.0), ("eta", 1.0), ("start_at_timestep", 100), ("seed", 5), ("conditioning", "blend"),
    ("pl_contrib", 0.1), ("blur_sigma", 16.0), ("feature_smoothing_kernel", 1), ("steps_to_regenerate", 5),
    ("center_crop", 32), ("num_samples", 2), ("pixel_difference", "mean_abs"), ("layer_weights", [1.0, 0.0]),
    ("top_share", 0.1)])
def test_every_setting_of_the_calibration_shapes_the_prediction(setting, value, run_folder):
    images = random_images(2)
    before = load_detector(run_folder, "cpu", "fp32")(images).score
    calibrate(run_folder, **{setting: value})
    assert not torch.allclose(load_detector(run_folder, "cpu", "fp32")(images).score, before, rtol=1e-3)


def test_weights_of_layers_that_the_extractor_has_not_are_an_error(run_folder):
    calibrate(run_folder, layer_weights=[1.0, 0.0, 1.0])
    with pytest.raises(UserError) as error:
        load_detector(run_folder, "cpu")
    assert "--layer_weights 1.0 0.0 1.0" in one_line(error) and "2 layers" in one_line(error)


@pytest.mark.parametrize("name, message", [(CALIBRATION, "run evaluation.py first"), ("final.pt", "no such file"),
                                           ("extractor.pt", "no such file"), (MODEL_CONFIG, "no such file"),
                                           (TRAIN_OPTIONS, "no such file")])
def test_a_missing_file_of_the_run_folder_is_named(name, message, run_folder):
    (run_folder / name).unlink()
    with pytest.raises(UserError, match=message) as error:
        load_detector(run_folder, "cpu")
    assert str(run_folder / name) in one_line(error)


def test_a_start_that_the_network_was_not_trained_for_is_refused(run_folder):
    calibrate(run_folder, start_at_timestep=401)
    with pytest.raises(UserError, match="--start_at_timestep 401: .* trained for timesteps up to 400") as error:
        load_detector(run_folder, "cpu")
    one_line(error)


def test_a_calibration_without_its_settings_is_refused(run_folder):
    values = json.loads((run_folder / CALIBRATION).read_text())
    values.pop("settings")
    write_json(run_folder / CALIBRATION, values)
    with pytest.raises(UserError) as error:
        load_detector(run_folder, "cpu")
    assert CALIBRATION in one_line(error)


@pytest.mark.parametrize("missing", ["train_steps", "beta_schedule", "noise_kind"])
def test_training_options_of_something_else_are_refused(missing, run_folder):
    values = json.loads((run_folder / TRAIN_OPTIONS).read_text())
    values.pop(missing)
    write_json(run_folder / TRAIN_OPTIONS, values)
    with pytest.raises(UserError) as error:
        load_detector(run_folder, "cpu")
    assert TRAIN_OPTIONS in one_line(error)


def test_the_settings_of_a_calibration_are_the_options_of_the_scripts():
    names = {f.name for group in (Reconstruction, MapOptions) for f in dataclasses.fields(group)}
    assert names <= RECORD.keys() == {f.name for f in dataclasses.fields(DdimSettings)}
    assert DdimSettings.read(json.loads(json.dumps(RECORD))) == DdimSettings.read(RECORD)
