"""Maps for the evaluation programs of MVTec: trees, types and sizes."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import save_drawn, save_mask, tiny_detector
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from trees import mvtec_ad_2

from dbad.data.layouts.registry import open_dataset
from dbad.inspection.loop import inspect_samples
from dbad.metrics.protocol import resized_map
from dbad.networks.extractors import build_extractor
from dbad.records import Category, Sample
from dbad.report.export import MapExport

BITS, SAMPLE_FORMAT, OFFSET, HEIGHT, COMPRESSION = 258, 339, 273, 278, 259     # tags of TIFF


def category(*samples: Sample, layout: str = "mvtec") -> Category:
    return Category("bolt", Path("bolt"), (), samples, layout=layout)


@pytest.fixture
def pictures(tmp_path) -> Category:
    """A good and a defective image of 24 x 32 px."""
    return category(*(Sample(save_drawn(tmp_path / "test" / defect / "000.png", i, (24, 32)), "bolt", defect)
                      for i, defect in enumerate(("crack", "good"))))


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


def test_exported_maps_have_the_tree_the_type_and_the_size_that_mvtec_s_program_reads(pictures, tmp_path):
    values = np.random.default_rng(0).random((4, 4), np.float32)
    export = MapExport(tmp_path / "out", pictures, 0.5)
    for number in range(2):
        export.write(number, values, (24, 32))
    files = written(tmp_path / "out")
    assert files == ["anomaly_maps/bolt/test/crack/000.tiff", "anomaly_maps/bolt/test/good/000.tiff"]
    with Image.open(tmp_path / "out" / files[0]) as tiff:
        assert (tiff.format, tiff.mode, tiff.size) == ("TIFF", "F", (32, 24))
        assert tiff.tag_v2[BITS] == (32,) and tiff.tag_v2[SAMPLE_FORMAT] == (3,)        # IEEE floating point
        np.testing.assert_array_equal(np.asarray(tiff), resized_map(values, (24, 32)))


def test_images_of_one_name_get_a_map_each(tmp_path):
    """In sub-folders of one name as well, and with two suffixes."""
    names = ["a/x/000.png", "b/x/000.png", "c/x/000.png", "c/x/000.bmp"]
    samples = [Sample(save_drawn(tmp_path / name, i, 8), "bolt", "crack") for i, name in enumerate(names)]
    export = MapExport(tmp_path / "out", category(*samples), 0.5)
    for value in reversed(range(4)):
        export.write(value, np.full((8, 8), value, np.float32), (8, 8))
    base = tmp_path / "out/anomaly_maps/bolt/test/crack"
    assert [np.asarray(Image.open(base / name)).max() for name in (
        "a/x/000.tiff", "b/x/000.tiff", "c/x/000.tiff", "c/x/000.bmp.tiff")] == [0, 1, 2, 3]
    assert len(written(tmp_path / "out")) == 4


def test_what_is_exported_is_what_was_inspected(pictures, tmp_path):
    """From the file through the detector to the TIFF: at the network's size again, it is the anomaly map."""
    detector = tiny_detector(build_extractor("efficientnet_lite0", None, 32))
    export = MapExport(tmp_path / "out", pictures, 0.5)
    with ThreadPoolExecutor(1) as pool:
        found = list(inspect_samples(detector, pictures.test, tmp_path, pool))
    for number, image in enumerate(found):
        export.write(number, image.pictures().anomaly_map, image.decoded.size)
    exported = np.asarray(Image.open(tmp_path / "out/anomaly_maps/bolt/test/good/000.tiff"))
    np.testing.assert_array_equal(exported, resized_map(found[1].prediction.anomaly_map[0, 0].numpy(), (24, 32)))


def half_tiff(path: Path) -> np.ndarray:
    """The pixels of an uncompressed TIFF of 16-bit floats, which Pillow writes and does not read."""
    content = path.read_bytes()
    tags = ImageFileDirectory_v2(content[:8])
    with open(path, "rb") as file:
        file.seek(int.from_bytes(content[4:8], "little"))
        tags.load(file)
    assert (tags[BITS], tags[SAMPLE_FORMAT], tags[COMPRESSION]) == ((16,), (3,), 1)
    width, height = tags[256], tags[257]
    assert tags[HEIGHT] >= height                                       # all in one strip
    return np.frombuffer(content, "<f2", width * height, tags[OFFSET][0]).reshape(height, width)


def test_maps_of_mvtec_ad_2_are_as_its_server_reads_them(tmp_path):
    data = open_dataset(mvtec_ad_2(tmp_path / "data")).category("can")
    for sample in data.test:
        save_drawn(sample.path, size=(12, 20))
    values = np.linspace(0, 3, 12, dtype=np.float32).reshape(3, 4)
    export = MapExport(tmp_path / "out", data, 1.5)
    for number in range(len(data.test)):
        export.write(number, values * (1e6 if number == 0 else 1), (12, 20))        # beyond what 16 bits can say
    places = ["can/test_public/bad/000_regular", "can/test_public/bad/001_shift_1", "can/test_public/good/000_regular"]
    assert written(tmp_path / "out") == [f"anomaly_images/{place}.tiff" for place in places] + [
        f"anomaly_images_thresholded/{place}.png" for place in places]
    expected = resized_map(values, (12, 20))
    np.testing.assert_allclose(half_tiff(tmp_path / f"out/anomaly_images/{places[1]}.tiff"), expected, 1e-3, 1e-6)
    assert half_tiff(tmp_path / f"out/anomaly_images/{places[0]}.tiff").max() == np.finfo(np.float16).max
    with Image.open(tmp_path / f"out/anomaly_images_thresholded/{places[1]}.png") as binary:
        assert (binary.mode, binary.size) == ("L", (20, 12))
        np.testing.assert_array_equal(np.asarray(binary), np.where(expected >= 1.5, 255, 0))


def test_masks_are_not_needed(tmp_path):
    sample = Sample(save_drawn(tmp_path / "000.png"), "bolt", "crack", save_mask(tmp_path / "m.png"))
    export = MapExport(tmp_path / "out", category(replace(sample, mask=None)), 0.5)
    export.write(0, np.ones((4, 4), np.float32), (16, 16))
    assert written(tmp_path / "out") == ["anomaly_maps/bolt/test/crack/000.tiff"]
