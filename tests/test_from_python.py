"""From Python: one image gives arrays at its own size, several a list; wrong input says what to give instead."""

import pydoc
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import drawn, json_of, one_line, random_images, save_drawn, tiny_detector
from PIL import Image

import dbad
import evaluation
import inference_ddim
from dbad.calibration.thresholds import Calibration
from dbad.data.images import to_pixels
from dbad.errors import UserError
from dbad.families import user_images
from dbad.families.detector import Detector, load_detector
from dbad.inspection.calibrate import keeping_earlier
from dbad.metrics.protocol import resized_map
from dbad.networks.extractors import EMBEDDED, build_extractor
from dbad.records import ImagePrediction, Prediction


@pytest.fixture(scope="module")
def detector() -> Detector:
    scores = (0.5, 1.0, 1.5)
    return tiny_detector(build_extractor(EMBEDDED, (1, 2), resolution=32), batch_size=2,
                         calibration=Calibration({"pixel": 0.01, "feature": 0.1}, 1.0, 2.0, scores))


# What comes back

def test_one_image_gives_arrays_at_its_own_size_and_plain_numbers(detector, tmp_path):
    path = save_drawn(tmp_path / "part.png", 1, (40, 24))
    found = detector(path)
    assert type(found) is ImagePrediction
    assert type(found.score) is float and type(found.decision) is bool and type(found.p_value) is float
    assert (found.threshold, found.pixel_threshold) == (2.0, 1.0) and found.decision == (found.score >= 2.0)
    for values in (found.anomaly_map, *found.maps.values()):
        assert isinstance(values, np.ndarray) and values.shape == (40, 24) and values.dtype == np.float32
    assert found.maps.keys() == {"pixel", "feature"}
    assert found.reconstruction.shape == (40, 24, 3) and found.reconstruction.dtype == np.uint8
    assert found.reconstruction.flags.writeable


def test_the_maps_are_those_of_the_detector_resized_as_exported_ones_are(detector):
    pixels = drawn(1, (40, 24))
    found = detector(pixels)
    small = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BILINEAR)
    batch = detector.predict(torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float() / 127.5 - 1)
    np.testing.assert_array_equal(found.anomaly_map, resized_map(batch.anomaly_map[0, 0].numpy(), (40, 24)))
    for name, part in batch.maps.items():
        np.testing.assert_array_equal(found.maps[name], resized_map(part[0, 0].numpy(), (40, 24)))
    np.testing.assert_array_equal(detector(np.array(small)).reconstruction, to_pixels(batch.reconstruction[0]))


def test_an_image_that_exif_turns_has_maps_of_its_upright_size(detector, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(drawn(1, (40, 24))).save(tmp_path / "a.png", exif=exif)
    for form in (tmp_path / "a.png", Image.open(tmp_path / "a.png")):
        assert detector(form).anomaly_map.shape == (24, 40)


def test_a_list_gives_a_list_and_a_tensor_of_images_a_batch_of_tensors(detector):
    images = random_images(3)
    batch = detector(images)
    assert type(batch) is Prediction and batch.anomaly_map.shape == (3, 1, 16, 16)
    for several in (list(images), tuple(images), [drawn(1, (9, 7)), *images]):
        found = detector(several)
        assert type(found) is list and len(found) == len(several)
    assert [one.score for one in found[1:]] == pytest.approx(batch.score.tolist(), rel=1e-4)


def test_other_iterables_are_inspected_as_they_go(detector):
    """At most one batch is read ahead: memory does not grow with the number of images."""
    read = []

    def camera():
        for number in range(7):
            read.append(number)
            yield drawn(number)

    results = detector(camera())
    assert not read
    next(results)
    assert read == [0, 1]
    assert len(list(results)) == 6 and read == list(range(7))
    assert list(detector(iter([]))) == []


def test_a_prediction_is_told_in_one_line():
    blank = np.zeros((512, 768), np.float32)
    found = ImagePrediction(3.214, 2.5, True, 0.0099, blank, 1.0, {}, None)
    assert repr(found) == str(found) == "defective: score 3.21, threshold 2.5, p 0.0099, map 512x768"
    good = ImagePrediction(1.0, 2.5, False, None, blank, 1.0, {}, None)
    assert repr(good) == "good: score 1, threshold 2.5, map 512x768"


def test_a_detector_is_told_in_one_line(detector):
    assert repr(detector) == ("ddim detector: 16 px, image threshold 2, pixel threshold 1; cpu, fp32")
    assert "not calibrated" in repr(tiny_detector(detector.extractor, calibration=None))


# Progress

def test_a_long_list_has_a_bar_that_can_be_switched_off(detector, capsys, monkeypatch):
    monkeypatch.setattr(user_images, "FEW", 2)
    detector(list(random_images(2)))
    detector(list(random_images(3)), progress=False)
    list(detector(iter(random_images(3))))
    assert not capsys.readouterr().err
    detector(list(random_images(3)))
    assert "inspecting: 100%" in capsys.readouterr().err


# Wrong input

@pytest.mark.parametrize("images, message", [
    ([], "no images: the list is empty; expected at least one"),
    (torch.zeros(0, 3, 16, 16), "no images; expected at least one"),
    ("nosuch.png", "nosuch.png: no such file; expected an image file"),
    ("photos/*.png", r"list the files: sorted\(glob.glob\('photos/\*.png'\)\)"),
    ("photos", r"photos: a folder; expected a file; .* sorted\(Path\('photos'\).glob\('\*.jpg'\)\)"),
    ("empty", r"empty: a folder; .*glob\('\*.png'\)"),
    (Path("photos"), "photos: a folder"), (["photos"], "photos: a folder"),
    (None, "NoneType: not an image; expected a file name"), (5, "int: not an image"), (b"part.png", "bytes: not an"),
    ({"a": 1}, "dict: not an image"), (np.zeros((2, 16, 16, 3), np.uint8), "expected uint8 or uint16 pixels")])
def test_what_is_no_image_is_refused_with_what_to_give_instead(images, message, detector, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_drawn(tmp_path / "photos" / "a.jpg")
    Path("empty").mkdir()
    with pytest.raises(UserError, match=message) as error:
        detector(images)
    one_line(error)


def test_a_run_that_is_not_there_is_refused_with_the_nearest_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("checkpoints/hazelnut").mkdir(parents=True)
    for name, words in (("hazelnut", "did you mean checkpoints/hazelnut?"), ("nosuch", "expected a folder that"),
                        ("checkpoints/hazlenut", "did you mean checkpoints/hazelnut?")):
        with pytest.raises(UserError, match="no such run folder") as error:
            load_detector(name)
        assert words in one_line(error)


def test_an_image_that_is_not_finite_is_named_by_its_place_in_the_list(detector):
    broken = torch.full((3, 16, 16), torch.nan)
    with pytest.raises(UserError, match="image 4: "):
        detector([*random_images(3), broken])


# Help and types

def test_help_shows_how_to_load_a_detector():
    page = pydoc.plain(pydoc.render_doc(dbad))
    assert "load_detector(" in page and "The calibrated detector of a run folder" in page
    assert 'detector = load_detector("checkpoints/hazelnut")' in page


def test_type_checkers_find_the_types_of_the_package():
    assert Path(dbad.__file__).with_name("py.typed").is_file()


# Scripts

def test_an_earlier_file_is_kept_and_told_unless_it_is_the_same(tmp_path, capsys):
    path = tmp_path / "calibration.json"
    for text in "aab":
        with keeping_earlier(path):
            path.write_text(text)
    assert capsys.readouterr().out == f"{path} replaces an earlier one, which is kept as calibration.1.json\n"
    assert path.read_text() == "b" and (tmp_path / "calibration.1.json").read_text() == "a"
    with keeping_earlier(path):
        path.write_text("c")
    assert sorted(kept.name for kept in tmp_path.iterdir()) == [
        "calibration.1.json", "calibration.2.json", "calibration.json"]
    with pytest.raises(OSError), keeping_earlier(path):
        raise OSError("the disk is full")
    assert len(list(tmp_path.iterdir())) == 3


def test_an_inspection_returns_the_metrics_and_a_calibration_keeps_the_earlier_one(trained, capsys):
    words = {"item": "hazelnut", "dataset_path": Path("data"), "precision": "fp32", "device": "cpu"}
    inspected = inference_ddim.run(inference_ddim.Options(**words))
    assert inspected.metrics == json_of("results/hazelnut/metrics.json") and inspected.metrics["num_images"] == 7
    assert str(inspected) == f"{inspected}" == "results/hazelnut" and inspected.folder == Path("results/hazelnut")
    assert inference_ddim.run(inference_ddim.Options(**words, dry_run=True)).metrics is None
    new = inference_ddim.run(inference_ddim.Options(**words, images=("data/hazelnut/test/crack/000.png",)))
    assert new == (Path("results/hazelnut-images"), None)
    capsys.readouterr()
    path = evaluation.run(evaluation.Options(**words, holdout=0.25, pixel_quantile=0.9))
    assert f"{path} replaces an earlier one, which is kept as calibration.1.json" in capsys.readouterr().out
    assert json_of(path.with_name("calibration.1.json"))["pixel_quantile"] == 0.999
