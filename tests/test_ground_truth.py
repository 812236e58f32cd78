"""What the scripts make of test images whose masks are missing, soft, empty or beside them, and of MVTec AD 2."""

import shutil
from pathlib import Path

import pytest
from helpers import json_of, rows_of, save_drawn, save_mask
from PIL import Image

from dbad.runtime.failures import say_once

CATEGORY, RESULTS = Path("data/hazelnut"), Path("results/hazelnut")
CRACKS, MASKS = CATEGORY / "test/crack", CATEGORY / "ground_truth/crack"
INSPECT = ("--item", "hazelnut", "--dataset_path", "data", "--device", "cpu", "--precision", "fp32")


@pytest.fixture(autouse=True)
def unsaid():
    """Nothing has been said yet."""
    say_once.cache_clear()


def headline(capsys) -> str:
    return next(line for line in capsys.readouterr().out.splitlines() if "image AUROC" in line)


def test_masks_that_are_missing_are_said_and_the_others_measured(trained, script, capsys):
    (MASKS / "001_mask.png").unlink()
    script("inference_ddim.py", *INSPECT, "--eval_resolution", "original")
    said = "no mask for 1 of 3 defective images, which pixel metrics leave out (hazelnut/test/crack/001.png)"
    assert headline(capsys).endswith(said) and said in (RESULTS / "report.html").read_text()
    partly = json_of(RESULTS / "metrics.json")
    assert partly["masks"]["missing"] == ["hazelnut/test/crack/001.png"] and partly["num_images"] == 7
    assert partly["protocol"]["images"] == "6 of 7, without the defective ones that have no mask"

    (CRACKS / "001.png").unlink()       # without that image pixel metrics are the same, image metrics are not
    script("inference_ddim.py", *INSPECT, "--eval_resolution", "original")
    wholly = json_of(RESULTS / "metrics.json")
    assert wholly["pixel"] == partly["pixel"] and wholly["pixel_rates"] == partly["pixel_rates"]
    assert wholly["image"]["num_defective"] == 2 and wholly["protocol"]["images"] == "all"


@pytest.mark.parametrize("left", ["an empty folder", "none"])
def test_without_masks_images_alone_are_measured(trained, script, capsys, left):
    shutil.rmtree(CATEGORY / "ground_truth")
    if left == "an empty folder":
        (CATEGORY / "ground_truth").mkdir()
    script("inference_ddim.py", *INSPECT)
    assert headline(capsys).endswith("no pixel metrics: no mask of a defective test image")
    assert json_of(RESULTS / "metrics.json")["protocol"]["images"] == "none" and len(rows_of(RESULTS)) == 7


def test_soft_and_empty_masks_and_notes_are_said_once_in_a_run(trained, script, tiny, capsys):
    """Masks are read three times here: to check them, to inspect, and to measure at their own size."""
    for name in ("000", "001"):
        Image.open(MASKS / f"{name}_mask.png").save(MASKS / f"{name}_mask.jpg", quality=50)
        (MASKS / f"{name}_mask.png").unlink()
    save_mask(MASKS / "002_mask.png", value=0)
    save_mask(CRACKS / "002_mask.png")
    script("train_tune_eval.py", *tiny, "--skip_train", "--skip_extractor", "--eval_resolution", "original")
    out = capsys.readouterr().out
    assert out.count("2 masks with gray levels, cut in the middle of their range (hazelnut/test/crack/000.png, ") == 1
    assert out.count("hazelnut: 1 mask among the images left out, as the ground truth has its own (test/crack/0") == 1
    assert out.count("1 defective image with an empty mask (hazelnut/test/crack/002.png)") == 1
    found = json_of(RESULTS / "metrics.json")
    assert found["masks"] == {
        "num_found": 3, "num_missing": 0, "num_empty": 1, "num_cut": 2, "missing": [],
        "empty": ["hazelnut/test/crack/002.png"], "cut": [f"hazelnut/test/crack/00{i}.png" for i in range(2)]}
    assert found["pixel_rates"]["tp"] + found["pixel_rates"]["fn"] == 50        # two squares of 25 px, as drawn


def test_results_of_images_in_sub_folders_stand_side_by_side(trained, script):
    (CRACKS / "day1").mkdir()
    shutil.copy(CRACKS / "000.png", CRACKS / "day1/000.png")
    save_mask(MASKS / "day1/000.png")
    script("inference_ddim.py", *INSPECT, "--export_maps", "mvtec")
    assert {"hazelnut/test/crack/000.png", "hazelnut/test/crack/day1/000.png"} < {row["path"] for row in
                                                                                 rows_of(RESULTS)}
    assert len(list((RESULTS / "images").iterdir())) == 8
    maps = RESULTS / "anomaly_maps/hazelnut/test/crack"
    assert sorted(path.relative_to(maps).as_posix() for path in maps.rglob("*.*")) == [
        "000.tiff", "001.tiff", "002.tiff", "day1/000.tiff"]


def test_mvtec_ad_2_is_calibrated_on_its_own_images_and_exported_for_its_server(trained, script, capsys):
    (CATEGORY / "test").rename(CATEGORY / "test_public")
    (CATEGORY / "test_public/crack").rename(CATEGORY / "test_public/bad")
    (CATEGORY / "ground_truth").rename(CATEGORY / "test_public/ground_truth")
    (CATEGORY / "test_public/ground_truth/crack").rename(CATEGORY / "test_public/ground_truth/bad")
    for i in range(5):
        save_drawn(CATEGORY / f"validation/good/{i:03}_regular.png", i)
    save_drawn(CATEGORY / "test_private/000_mixed.png")
    script("evaluation.py", *INSPECT)
    assert json_of("checkpoints/hazelnut/calibration.json")["num_images"] == 5
    script("inference_ddim.py", *INSPECT, "--export_maps", "mvtec")
    assert "hazelnut: test_private: 1 image without label, not in the test; --images" in capsys.readouterr().out
    assert json_of(RESULTS / "metrics.json")["pixel"]["num_pixels"] == 7 * 256
    for kind, suffix in (("anomaly_images", "tiff"), ("anomaly_images_thresholded", "png")):
        names = sorted(p.relative_to(RESULTS / kind).as_posix() for p in (RESULTS / kind).rglob("*.*"))
        assert names == [f"hazelnut/test_public/{name}.{suffix}" for name in (
            *(f"bad/{i:03}" for i in range(3)), *(f"good/{i:03}" for i in range(4)))]
