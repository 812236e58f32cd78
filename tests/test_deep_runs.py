"""Runs on images of 12 bits, through the scripts: they are those on the same images of 8 bits."""

import json
from pathlib import Path

import numpy as np
import pytest
from deep_files import colours, deepen, forget_intensity, png
from helpers import complaint, json_of, rows_of

from dbad.checkpoints.weights import load_pickle
from dbad.data.intensity import AS_BEFORE, Intensity
from dbad.errors import UserError
from dbad.families.detector import load_detector

RUN, TRAIN = Path("checkpoints/hazelnut"), Path("data/hazelnut/train/good")
INSPECT = ["--item", "hazelnut", "--dataset_path", "data", "--precision", "fp32", "--device", "cpu"]


@pytest.fixture
def deep(made_once, draw_category, script, tiny, store, capsys):
    """To work in and to spoil: the `finished` run, on images of 12 bits."""
    def make():
        draw_category(Path("data"))
        for split in ("train", "test"):
            deepen(Path("data/hazelnut", split))
        capsys.readouterr()
        script("train_tune_eval.py", *tiny)
        store["said"] = capsys.readouterr().out

    return made_once(make, "logs", "epoch_*.pt")


def test_a_run_on_12_bits_is_that_on_the_same_images_of_8_bits(deep, store, finished):
    lines = [line for line in store["said"].splitlines() if line.startswith("images of ")]
    assert len(lines) == 1 and lines[0].startswith("images of 12 bits: the largest value of 12 training images is ")
    assert lines[0].endswith("); 0 to 4095 become 0 to 255")
    recorded = json_of(RUN / "train_arg_config.json"), json_of(RUN / "calibration.json")["settings"]
    assert [(each["intensity"], each["intensity_bits"]) for each in recorded] == [("auto", 12)] * 2
    assert rows_of("results/hazelnut") == rows_of(finished / "results/hazelnut")
    settings = json_of(finished / RUN / "calibration.json")["settings"]
    assert (settings["intensity"], settings["intensity_bits"]) == ("auto", 8)


def test_what_is_beyond_the_training_images_is_refused_before_the_training(workplace, script, tiny, capsys):
    deepen(TRAIN)
    path = Path("data/hazelnut/test/good/000.png")
    path.write_bytes(png(colours(14, (16, 16))))
    says = f"{path}: largest value 16383, but the run is trained on images of 12 bits"
    assert complaint(capsys, script, "train_tune_eval.py", *tiny).startswith(says)
    assert not Path("checkpoints").exists()


def test_an_image_beyond_the_depth_of_the_run_is_refused_or_skipped_by_name(deep, script, capsys):
    path = Path("data/hazelnut/test/good/000.png")
    path.write_bytes(png(colours(14, (16, 16))))
    says = f"{path}: largest value 16383, but the run is trained on images of 12 bits"
    assert complaint(capsys, script, "inference_ddim.py", *INSPECT).startswith(says)
    assert complaint(capsys, script, "train_tune_eval.py", *INSPECT, "--skip_train").startswith(says)
    script("inference_ddim.py", *INSPECT, "--images", path.parent)
    said = capsys.readouterr()
    assert f"{path}: left out: largest value 16383" in said.err and "4 images: " in said.out
    assert said.out.splitlines()[-2].endswith(", 1 unreadable")
    row, = rows_of("results/hazelnut-images", "unreadable.csv")
    assert row["path"] == str(path) and "16383" in row["reason"]


def test_another_intensity_than_the_run_was_trained_with_is_an_error(deep, script, capsys):
    for name in ("train_extractor.py", "evaluation.py", "inference_ddim.py", "train_ddim.py"):
        says = complaint(capsys, script, name, *INSPECT, "--intensity", "full")
        assert says == f"--intensity full: the run {RUN} was trained with auto"
    script("inference_ddim.py", *INSPECT, "--intensity", "auto")
    script("inference_ddim.py", *INSPECT, "--pxl_threshold", 0.1, "--feature_threshold", 0.1)   # without calibration


def test_from_python_the_run_takes_its_images_and_no_others(deep):
    detector = load_detector(RUN)
    assert detector.intensity == Intensity("auto", 12)
    scores = {row["path"]: float(row["score"]) for row in rows_of("results/hazelnut")}
    path = "hazelnut/test/crack/000.png"
    close = 1e-4 if detector.machine.precision == "fp32" else 1e-2      # bf16 rounds otherwise in another batch size
    assert detector(Path("data", path)).score == pytest.approx(scores[path], rel=close)
    with pytest.raises(UserError, match="largest value 4096"):
        detector(np.full((16, 16), 4096, np.uint16))


def test_a_run_from_before_the_option_scales_by_the_full_range(deep, script, tiny):
    forget_intensity(RUN / "train_arg_config.json", RUN / "calibration.json")
    detector = load_detector(RUN)
    assert detector.intensity == AS_BEFORE
    detector(np.full((16, 16), 65535, np.uint16))
    script("inference_ddim.py", *INSPECT, "--intensity", "full")
    script("evaluation.py", *INSPECT, "--no_tune")
    assert json_of(RUN / "calibration.json")["settings"]["intensity_bits"] == 8


def test_a_training_from_before_the_option_goes_on(deep, script, tiny_flags, capsys):
    """It has seen other images than those of today's default: dark ones."""
    flags = tiny_flags("train_ddim.py")
    begun = Path("checkpoints/old/train_arg_config.json")
    begun.parent.mkdir()
    begun.write_text(json.dumps(json_of(RUN / "train_arg_config.json")))
    forget_intensity(begun)
    script("train_ddim.py", *flags, "--run_id", "old")
    images = load_pickle(begun.with_name("last.pt"))["settings"]["images"]
    assert images != load_pickle(RUN / "last.pt")["settings"]["images"]
    forget_intensity(begun)
    script("train_ddim.py", *flags, "--run_id", "old")          # the same state is gone on with
    assert load_pickle(begun.with_name("last.pt"))["settings"]["images"] == images
    assert "images of 12 bits" not in capsys.readouterr().out
    script("train_ddim.py", *flags, "--run_id", "old", "--no_resume", "--dry_run")
