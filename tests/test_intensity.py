"""Which values become black and white: in one picture, in a data set, in a run."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from deep_files import as_8_bit, colours, gradient, png, tiff
from helpers import drawn, one_line, save_drawn, tiny_detector
from PIL import Image

from dbad.checkpoints.weights import save_pickle
from dbad.data import depth
from dbad.data.depth import run_intensity
from dbad.data.images import check_readable, read_image, read_images, read_items
from dbad.data.inputs import to_input
from dbad.data.intensity import AS_BEFORE, DEPTHS, Intensity
from dbad.errors import UserError
from dbad.families.runs import begun_with
from dbad.files.atomic import write_json
from dbad.files.names import TRAIN_OPTIONS
from dbad.networks.extractors import EMBEDDED, build_extractor
from dbad.records import Sample

FORMS = {"PNG": png, "TIFF": tiff, "TIFF of the other order": lambda values: tiff(values, ">")}
DEEP = [bits for bits in DEPTHS if bits > 8]


@pytest.fixture
def save(tmp_path):
    """`save(name, data)`: write bytes, or values as PNG; returns the path."""
    def save(name: str, data: bytes | np.ndarray) -> Path:
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else png(data))
        return tmp_path / name
    return save


def pixels(path: Path, intensity: Intensity) -> np.ndarray:
    return np.asarray(read_image(path, intensity)).astype(int)


def found_in(*paths: Path, option: str = "auto", num_workers: int = 0, **more: bool) -> Intensity:
    """Of training images."""
    options = SimpleNamespace(intensity=option, num_workers=num_workers)
    return run_intensity(options, {}, [Sample(path, "bolt", "good") for path in paths], **more)


# ------------------------------------------------------------------------------------------ one picture

@pytest.mark.parametrize("bits", DEEP)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", [gradient, colours])
def test_a_picture_comes_out_as_its_8_bit_version(make, form, bits, save):
    values = make(bits)
    path = save("a", FORMS[form](values))
    found = pixels(path, found_in(path))
    assert np.abs(found - as_8_bit(values, bits)).max() <= 1
    assert len(np.unique(found)) == 256


@pytest.mark.parametrize("kind, places", [(np.uint16, 65535), (np.int32, 65535)])
def test_the_full_range_is_that_of_the_type_of_the_file(kind, places, save):
    values = gradient(12).astype(kind)
    path = save("a.tif", tiff(values, t339=2 if kind is np.int32 else 1))
    np.testing.assert_array_equal(pixels(path, Intensity("full"))[:, :, 0], np.rint(values * (255 / places)))


def test_a_window_is_what_is_seen_and_the_rest_is_clipped(save):
    for values, data in ((gradient(12), None), (colours(12), None), (colours(12) * 2.0 - 3000, None)):
        data = png(values) if values.dtype == np.uint16 else tiff(values[:, :, 0].astype(np.float32), t339=3)
        values = values if values.dtype == np.uint16 else values[:, :, :1]
        found = pixels(save("a", data), Intensity("window:-50.5,1000"))
        expected = np.clip(np.rint((values + 50.5) * (255 / 1050.5)), 0, 255)
        assert np.abs(found - (expected if expected.ndim == 3 else expected[:, :, None])).max() <= 1
        assert found.min() < 13 and found.max() == 255


def test_a_picture_of_8_bits_is_the_same_whatever_the_option_says(tmp_path):
    path = save_drawn(tmp_path / "a.png")
    for intensity in (Intensity(), Intensity("auto", 8), Intensity("auto", 16), Intensity("full"), AS_BEFORE,
                      Intensity("window:100,101")):
        np.testing.assert_array_equal(pixels(path, intensity), drawn())
        assert torch.equal(to_input(drawn(), None, intensity).pixels, to_input(path, None, intensity).pixels)


def test_a_deep_picture_is_turned_upright_as_its_exif_data_say(save):
    values = colours(12)
    turned = np.rot90(as_8_bit(values, 12), -1)
    np.testing.assert_array_equal(pixels(save("a.tif", tiff(values, t274=6)), Intensity("auto", 12)), turned)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values[:, :, 0]).save(save("a.png", b""), exif=exif)
    found = pixels(save("a.tif", b"").with_name("a.png"), Intensity("auto", 12))
    np.testing.assert_array_equal(found[:, :, 0], turned[:, :, 0])


BEYOND = {      # the file, the option, and what is said of it
    "not a number": (np.float32([[0.5, np.nan]]), Intensity("auto", 12), "(NaN)"),
    "infinite": (np.float32([[0.5, np.inf]]), Intensity("window:0,1"), "infinite"),
    "floats of 12 bits": (np.float32([[0, 4095]]), Intensity("auto", 12),
                          "floating-point pixels from 0 to 4095; expected 0 to 1, or --intensity window:LOW,HIGH"),
    "floats below 0": (np.float32([[-0.5, 1]]), Intensity("full"), "from -0.5 to 1"),
    "negative": (np.int32([[-7, 300]]), Intensity("auto", 12), "pixels from -7 to 300; expected none below 0"),
    "beyond the depth": (np.uint16([[0, 4096]]), Intensity("auto", 12),
                         "largest value 4096, but the run is trained on images of 12 bits, 0 to 4095"),
    "beyond 8 bits": (np.uint16([[0, 256]]), Intensity("auto", 8), "largest value 256"),
    "32 bits": (np.uint32([[0, 2 ** 32 - 1]]), Intensity("auto", 16), "largest value 4294967295"),
    "unknown": (np.uint16([[0, 9]]), Intensity(), "expected --intensity full or --intensity window:LOW,HIGH"),
}


@pytest.mark.parametrize("name", BEYOND)
def test_a_picture_that_the_option_does_not_cover_is_refused_by_name(name, save):
    values, intensity, says = BEYOND[name]
    path = save("a.tif", tiff(values, t339={"u": 1, "i": 2, "f": 3}[values.dtype.kind]))
    samples = [Sample(path, "bolt", "good")]
    for read in (lambda: read_image(path, intensity), lambda: read_images(samples, 8, 0, intensity),
                 lambda: read_items(samples, 8, 0, intensity), lambda: check_readable(samples, 0, intensity)):
        with pytest.raises(UserError) as error:
            read()
        assert one_line(error).startswith(f"{path}: ") and says in str(error.value)


@pytest.mark.parametrize("option", ["", "Auto", "8", "window", "window:", "window:1", "window:5,5", "window:9,1",
                                    "window:0,nan", "window:0,inf", "window:1,2,3", "full:1,2"])
def test_an_option_that_is_none_says_what_there_is(option):
    with pytest.raises(UserError, match=r"expected auto, full or window:LOW,HIGH") as error:
        Intensity(option)
    assert one_line(error).startswith(f"--intensity {option}: ")


# ------------------------------------------------------------------------------------------ a data set

def test_a_dark_picture_of_a_data_set_stays_dark(save):
    bright, dark = save("bright.png", gradient(12)), save("dark.png", gradient(12) // 100)
    intensity = found_in(bright, dark)
    assert intensity == Intensity("auto", 12)
    assert pixels(dark, intensity).max() == 2 and pixels(bright, intensity).max() == 255


@pytest.mark.parametrize("largest, bits", [(0, 8), (255, 8), (256, 10), (1023, 10), (1024, 12), (4095, 12), (4096, 14),
                                           (16384, 16), (65535, 16)])
def test_the_depth_is_the_smallest_that_holds_the_largest_value(largest, bits, save):
    paths = [save("a.png", np.uint16([[0, largest]])), save("b.tif", tiff(np.int32([[0, 0]]), t339=2))]
    assert found_in(*paths) == found_in(*paths[::-1], num_workers=2) == Intensity("auto", bits)


def test_the_depth_is_said_in_a_line_with_the_image_it_follows_from(save, capsys):
    bright = save("bright.png", colours(12))
    found_in(save("dark.png", gradient(10)), bright, save_drawn(bright.with_name("8.png")))
    assert capsys.readouterr().out == (f"images of 12 bits: the largest value of 3 training images is 4095 ({bright}); "
                                       "0 to 4095 become 0 to 255\n")
    found_in(bright, quiet=True)
    assert not capsys.readouterr().out


def test_of_8_bits_nothing_is_decoded_and_nothing_said(tmp_path, monkeypatch, capsys):
    paths = [save_drawn(tmp_path / f"a.{ending}") for ending in ("png", "jpg", "tif", "bmp")]
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    assert found_in(*paths) == Intensity("auto", 8)
    assert not capsys.readouterr().out


def test_floats_from_0_to_1_have_no_depth(save):
    assert found_in(save("a.tif", tiff(np.float32([[0, 1]]), t339=3)), save("b.png", np.uint16([[999]]))).bits == 10


@pytest.mark.parametrize("values, says", [
    (np.uint32([[70_000]]), "largest value 70000, above the 65535 of 16 bits"),
    (np.int32([[-1, 5]]), "pixels from -1 to 5"), (np.float32([[0, 255]]), "floating-point pixels from 0 to 255"),
    (np.float32([[np.nan]]), "NaN")])
def test_a_training_image_that_auto_does_not_cover_is_named(values, says, save):
    path = save("b.tif", tiff(values, t339={"u": 1, "i": 2, "f": 3}[values.dtype.kind]))
    with pytest.raises(UserError) as error:
        found_in(save("a.png", gradient(12)), path)
    assert one_line(error).startswith(f"{path}: ") and says in str(error.value)
    found_in(path, option="window:0,9")         # is looked at when it is read


def test_a_broken_training_image_is_named(save):
    path = save("a.png", png(gradient(12))[:300])
    with pytest.raises(UserError, match="truncated") as error:
        found_in(path)
    assert one_line(error).startswith(f"{path}: ")


# ------------------------------------------------------------------------------------------ a run

@dataclasses.dataclass
class Begun:
    """The options of a training that may go on."""

    diffusion_checkpoint_dir: Path
    run_id: str = "bolt"
    item: str = "bolt"
    resume: bool = True


def begun(options: Begun) -> dict:
    return begun_with(options, "features", "lafite", "knn")


def test_a_training_goes_on_with_the_option_that_it_was_begun_with(tmp_path):
    options, folder = Begun(tmp_path), tmp_path / "bolt"
    assert begun(options) == {}
    save_pickle({"settings": {"seed": 0, "intensity": "full"}}, folder / "features_last.pt")
    assert begun(options) == {"intensity": "full"}
    write_json(folder / TRAIN_OPTIONS, {"bank_mb": 1.0} | Intensity("auto", 12).settings())
    assert begun(options) == {"intensity": "auto"}      # and finds the depth again
    assert begun(dataclasses.replace(options, resume=False)) == {}


def test_a_training_from_before_the_option_goes_on_as_it_began(tmp_path, save):
    options, folder = Begun(tmp_path), tmp_path / "bolt"
    save_pickle({"settings": {"seed": 0}}, folder / "features_last.pt")
    assert Intensity.of(begun(options)) == AS_BEFORE
    write_json(folder / TRAIN_OPTIONS, {"bank_mb": 1.0})
    assert Intensity.of(begun(options)) == AS_BEFORE and AS_BEFORE.binding() == {}
    again = SimpleNamespace(intensity="full", num_workers=0)
    assert run_intensity(again, begun(options), []) == AS_BEFORE
    assert found_in(option="full") == Intensity("full") != AS_BEFORE


@pytest.mark.parametrize("form", FORMS)
def test_runs_from_before_the_option_see_what_they_saw(form, save):
    """Gray was scaled by its full range, and of colours Pillow gave the high byte."""
    path = save("a", FORMS[form](gradient(16)))
    np.testing.assert_array_equal(pixels(path, AS_BEFORE)[:, :, 0], np.rint(gradient(16) * (255 / 65535)))
    path = save("a", FORMS[form](colours(16)))
    np.testing.assert_array_equal(pixels(path, AS_BEFORE), colours(16) >> 8)
    assert np.abs(pixels(path, Intensity("full")) - (colours(16) >> 8)).max() <= 1


def test_what_is_known_of_a_run_is_not_looked_for(monkeypatch):
    monkeypatch.setattr(depth, "is_deep", lambda path: pytest.fail("looked"))
    sample = Sample(Path("nowhere.png"), "bolt", "good")
    for known in (Intensity("auto", 12), Intensity("window:0,9"), Intensity("full"), AS_BEFORE):
        options = SimpleNamespace(intensity=known.option, num_workers=0)
        assert run_intensity(options, known.settings(), [sample]) == known


# ------------------------------------------------------------------------------------------ from Python

@pytest.fixture(scope="module")
def detector():
    detector = tiny_detector(build_extractor(EMBEDDED, [1], 32), intensity="auto", intensity_bits=12)
    assert detector.intensity == Intensity("auto", 12)
    return detector


@pytest.mark.parametrize("make", [gradient, colours])
def test_a_detector_takes_deep_arrays_pictures_and_files_for_the_same(make, detector, save):
    values = make(12)
    expected = detector(as_8_bit(values, 12)).score
    forms = [values, save("a.png", values), save("a.tif", tiff(values)), values.astype(">u2")]
    if values.ndim == 2:
        forms += [Image.fromarray(values), Image.open(forms[1]), Image.open(forms[2])]
    for form in forms:
        assert detector(form).score == expected


def test_a_detector_refuses_what_is_beyond_its_run(detector, save):
    values = gradient(14)
    path = save("a.png", values)
    for form, name in ((values, "the image"), (Image.fromarray(values), "the image"), (path, str(path))):
        with pytest.raises(UserError, match="largest value 16383, but the run is trained on images of 12 bits") as e:
            detector([drawn(0), form])
        assert one_line(e).startswith(f"{name}: ")


def test_a_detector_refuses_a_picture_that_pillow_has_reduced(detector, save):
    with pytest.raises(UserError, match="more than 8 bits per channel") as error:
        detector(Image.open(save("a.png", colours(12))))
    assert one_line(error).startswith("the image: ")
