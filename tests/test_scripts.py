"""The scripts, each through its command line on a category of 16x16 pictures: what they promise to a user."""
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import json_of, rows_of, stamp
from PIL import Image
from safetensors.torch import load_file

import train_tune_eval
from dbad import metrics
from dbad.data.demo import draw
from dbad.families.detector import load_detector
from dbad.files.temporary import machine
from dbad.options.command_line import parse
from dbad.report import page as report
from dbad.training import progress

ROOT = Path(__file__).parent.parent
SCRIPTS = ["train_ddim.py", "train_extractor.py", "evaluation.py", "inference_ddim.py", "train_lafite.py",
           "inference_lafite.py", "train_diad.py", "inference_diad.py", "train_tune_eval.py"]
RUN, RESULTS = Path("checkpoints/hazelnut"), Path("results/hazelnut")
ON_DISK = ["--skip_train", "--skip_extractor"]


def values_of(rows: list[dict[str, str]]) -> np.ndarray:
    return np.array([float(row["score"]) for row in rows])


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = (torch.load(path, weights_only=True) for path in (one, other))
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ------------------------------------------------------------------------------------------ what a run leaves

def test_the_run_folder_holds_every_promised_file(finished):
    run = finished / RUN
    from dbad.checkpoints.weights import load_unet
    unet = load_unet(run, "final.pt")
    assert unet.config.sample_size == 16 and tuple(unet.config.block_out_channels) == (32, 32)
    assert all(torch.isfinite(value).all() for value in unet.state_dict().values())
    options = json_of(run / "train_arg_config.json")
    assert options["item"] == "hazelnut" and options["steps_diffusion"] == 6 and options["preset"] == "demo"
    assert {"name", "layers", "resolution", "state_dict"} == set(torch.load(run / "extractor.pt", weights_only=True))
    assert torch.load(run / "last.pt", weights_only=True)["step"] == 6
    calibration = json_of(run / "calibration.json")
    assert calibration["num_images"] == 3 and set(calibration["scales"]) == {"pixel", "feature"}
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["epoch"], line["step"]) for line in lines] == [
        ("diffusion", 1, 3), ("diffusion", 2, 6), ("extractor", 1, 3)]
    assert all(np.isfinite(line["loss"]) and np.isfinite(line.get("val_loss", 0)) for line in lines)
    for picture in run.glob("samples/*.png"):
        assert Image.open(picture).size == (3 * 132 + 4, 2 * 152)     # three images above their reconstructions
    assert len(list(run.glob("samples/*.png"))) == len(list(run.glob("epoch_*.pt"))) == 2
    assert all(list((finished / "logs/hazelnut" / phase).glob("events.out.tfevents.*"))
               for phase in ("diffusion", "extractor"))


def test_the_results_folder_holds_every_promised_file(finished):
    results = finished / RESULTS
    options = json_of(results / "options.json")
    assert options["options"]["steps_to_regenerate"] == 2 and "torch" in options["versions"] and "commit" in options
    for picture in (*results.glob("images/*.png"), results / "overview.png", results / "curves.png"):
        Image.open(picture).load()
    assert len(list(results.glob("images/*.png"))) == len(rows_of(results)) == 7
    rows = {row["metric"]: row["value"] for row in rows_of(results, "metrics.csv")}
    assert float(rows["image.auroc"]) == json_of(results / "metrics.json")["image"]["auroc"]
    page = (results / "report.html").read_text(encoding="utf-8")
    assert "hazelnut/test/crack/002.png" in page and page.rstrip().endswith("</html>")
    assert sorted(p.name for p in results.iterdir()) == [
        "curves.png", "images", "metrics.csv", "metrics.json", "options.json", "overview.png", "report.html",
        "scores.csv"]


def test_no_temporary_file_is_left_anywhere(finished):
    assert [path for path in finished.rglob(".*")] == []


def test_scores_csv_has_a_line_per_test_image_and_decides_by_the_calibrated_threshold(finished):
    rows = rows_of(finished / RESULTS)
    images = sorted(p.relative_to(finished / "data").as_posix() for p in (finished / "data").glob("*/test/*/*.png"))
    assert [row["path"] for row in rows] == images
    calibration = json_of(finished / RUN / "calibration.json")
    for row in rows:
        score = float(row["score"])
        assert int(row["decision"]) == (score >= calibration["image_threshold"])
        assert (float(row["normalised"]) >= 0.5) == (score >= calibration["image_threshold"])
        at_least = sum(good >= score for good in calibration["scores"])
        assert float(row["p_value"]) == (at_least + 1) / (len(calibration["scores"]) + 1)
        assert row["defect"] == row["path"].split("/")[2] and int(row["label"]) == (row["defect"] != "good")


def test_metrics_json_agrees_with_the_scores(finished):
    rows, found = rows_of(finished / RESULTS), json_of(finished / RESULTS / "metrics.json")
    labels, scores = np.array([int(row["label"]) for row in rows]), values_of(rows)
    for name, value in metrics.image_metrics(labels, scores).items():
        assert found["image"][name] == pytest.approx(value), name
    pairs = [(int(row["label"]), int(row["decision"])) for row in rows]
    for name, pair in {"tp": (1, 1), "fp": (0, 1), "tn": (0, 0), "fn": (1, 0)}.items():
        assert found["image_rates"][name] == pairs.count(pair)
    assert found["num_images"] == 7 and found["seconds_per_image"] > 0
    assert found["pixel"]["num_pixels"] == 7 * 16 * 16
    assert found["pixel_rates"]["tp"] + found["pixel_rates"]["fn"] == 3 * 25       # three cracks of 5x5 px


# ------------------------------------------------------------------------------------------ the same again

def test_two_trainings_write_the_same_bytes(trained, finished, script, tiny_flags):
    """A calibration knows its weights by a fingerprint of the file, so equal weights must be equal files."""
    script("train_ddim.py", *tiny_flags("train_ddim.py"))       # there is no last.pt: it begins again
    assert_same_weights(RUN / "final.pt", finished / RUN / "final.pt")
    assert (RUN / "final.pt").read_bytes() == (finished / RUN / "final.pt").read_bytes()


def test_the_same_command_again_trains_nothing_and_writes_the_same_scores(trained, finished, script, tiny):
    """Whole states are in last.pt, so they are copied here too."""
    for name in ("last.pt", "extractor_last.pt"):
        shutil.copy(finished / RUN / name, RUN / name)
    kept = [stamp(RUN / name) for name in ("last.pt", "extractor_last.pt")]
    files = {name: (finished / RESULTS / name).read_bytes() for name in ("scores.csv", "options.json")}
    log = (RUN / "log.jsonl").read_bytes()
    script("train_tune_eval.py", *tiny)
    assert [stamp(RUN / name) for name in ("last.pt", "extractor_last.pt")] == kept
    assert (RUN / "log.jsonl").read_bytes() == log
    assert_same_weights(RUN / "final.pt", finished / RUN / "final.pt")
    assert {name: (RESULTS / name).read_bytes() for name in files} == files
    assert files_in(Path("results")) == files_in(finished / "results")


def test_training_a_finished_run_again_leaves_its_calibration_valid(trained, finished, script, tiny_flags, capsys):
    """Neither the weights nor their fingerprints change, so that inspection goes on."""
    shutil.copy(finished / RUN / "last.pt", RUN / "last.pt")
    script("train_ddim.py", *tiny_flags("train_ddim.py"))
    script("inference_ddim.py", "--item", "hazelnut", "--dataset_path", "data", "--precision", "fp32", "--device",
           "cpu")
    assert values_of(rows_of(RESULTS)).tolist() == values_of(rows_of(finished / RESULTS)).tolist()


def test_results_of_other_options_are_kept_under_a_number(trained, script, tiny, capsys):
    first = (RESULTS / "scores.csv").read_bytes()
    for number, flag in enumerate(("--eta 0.5", "--eta 1"), start=1):
        script("train_tune_eval.py", *tiny, *ON_DISK, *flag.split())
        assert f"moved to results/hazelnut.{number}" in capsys.readouterr().out
    assert Path("results/hazelnut.1/scores.csv").read_bytes() == first
    etas = [json_of(Path("results", name, "options.json"))["options"]["eta"]
            for name in ("hazelnut.1", "hazelnut.2", "hazelnut")]
    assert etas == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("flags", ["--batch_size 1", "--batch_size 8", "--shuffle", "--num_workers 0"])
def test_batch_size_order_and_workers_do_not_change_scores(trained, script, flags):
    script("inference_ddim.py", "--item", "hazelnut", "--dataset_path", "data", "--precision", "fp32", "--device",
           "cpu", *flags.split())
    before, after = (rows_of(Path("results", name)) for name in ("hazelnut.1", "hazelnut"))
    assert [row["path"] for row in after] == [row["path"] for row in before]
    np.testing.assert_allclose(values_of(after), values_of(before), rtol=1e-4)
    if "batch_size" not in flags:
        assert Path("results/hazelnut.1/scores.csv").read_bytes() == (RESULTS / "scores.csv").read_bytes()


def test_two_processes_train_what_one_does(workplace, finished, tiny_flags):
    """They share the batch, so that the mean loss of every epoch is the same up to rounding."""
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "train_ddim.py"),
                    *tiny_flags("train_ddim.py")], check=True, capture_output=True, timeout=120,
                   env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "MASTER_PORT": "29511",
                                     "TMPDIR": str(workplace)})       # the launcher leaves its folder behind
    together, alone = (
        [line["loss"] for line in map(json.loads, (folder / RUN / "log.jsonl").read_text().splitlines())
         if line["phase"] == "diffusion"] for folder in (Path(), finished))
    assert together == pytest.approx(alone, rel=1e-3) and len(together) == 2
    a, b = (torch.load(folder / RUN / "final.pt", weights_only=True) for folder in (Path(), finished))
    assert max(float((a[name] - b[name]).abs().mean()) for name in a) < 1e-3


# ------------------------------------------------------------------------------------------ skipping phases

PHASES = {"--skip_train": RUN / "final.pt", "--skip_extractor": RUN / "extractor.pt",
          "--skip_threshold": RUN / "calibration.json", "--skip_evaluation": RESULTS / "scores.csv"}


@pytest.mark.parametrize("skipped", PHASES)
def test_a_skipped_phase_does_not_run_and_the_others_do(trained, script, tiny, skipped):
    """What the other phases make is deleted and comes back; what the skipped one made is used as it is."""
    for flag, path in PHASES.items():
        if flag != skipped:
            path.unlink()
    kept = stamp(PHASES[skipped])
    script("train_tune_eval.py", *tiny, skipped)
    assert stamp(PHASES[skipped]) == kept
    assert [path for path in PHASES.values() if not path.is_file()] == []


def test_with_skip_threshold_the_given_thresholds_count_and_decide(trained, script, tiny):
    scores = {}
    for size, decision in (("1e-9", "1"), ("1e9", "0")):
        script("train_tune_eval.py", *tiny, *ON_DISK, "--skip_threshold", "--pxl_threshold", size,
               "--feature_threshold", size)
        scores[size] = values_of(rows_of(RESULTS))
        assert {row["decision"] for row in rows_of(RESULTS)} == {decision}
        assert {row["p_value"] for row in rows_of(RESULTS)} == {""}          # no good images were measured
    np.testing.assert_allclose(scores["1e-9"] / scores["1e9"], 1e18, rtol=1e-4)


def test_without_skip_threshold_given_thresholds_are_said_not_to_count(trained, finished, script, tiny, capsys):
    script("train_tune_eval.py", *tiny, *ON_DISK, "--pxl_threshold", "1e-9", "--feature_threshold", "1e-9")
    assert "--pxl_threshold and --feature_threshold are not used" in capsys.readouterr().out
    assert (RESULTS / "scores.csv").read_bytes() == (finished / RESULTS / "scores.csv").read_bytes()


# ------------------------------------------------------------------------------------------ command lines

def test_the_long_command_runs_without_a_screen(workplace, tiny):
    """The command that users of the predecessor know, word for word, with flags that make it small."""
    command = ("train_tune_eval.py --diffusion_checkpoint_dir checkpoints/hazelnut --run_id hazelnut "
               "--diffusion_checkpoint_name epoch_1000.pt --extractor_path checkpoints/hazelnut_01.pt --item hazelnut "
               "--dataset_path data --plt_imgs --recon_weight .1 --eta .1 --pxl_threshold 0.029 "
               "--feature_threshold 0.33").split()
    screens = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    env = {name: value for name, value in os.environ.items() if name not in screens} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, ROOT / command[0], *command[1:], *tiny[4:]], env=env, text=True,
                          capture_output=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "Everything is in results/hazelnut"
    assert Path("checkpoints/hazelnut/hazelnut/epoch_1000.pt").is_file()
    assert Path("checkpoints/hazelnut_01.pt").is_file()
    options = json_of(RESULTS / "options.json")["options"]
    assert (options["recon_weight"], options["eta"], options["plt_imgs"]) == (0.1, 0.1, True)
    assert len(rows_of(RESULTS)) == 7


ALIASES = {
    "--mvtec_item": ("item", "hazelnut"), "--run_name": ("run_id", "x"), "--checkpoint_dir":
    ("diffusion_checkpoint_dir", "x"), "--checkpoint_name": ("diffusion_checkpoint_name", "x.pt"),
    "--patch_imgs": ("patching", None), "--crop": ("patching", None),
    "--reconstruction_weight": ("recon_weight", "2"), "--num_inference_steps": ("steps_to_regenerate", "3"),
    "-fsk": ("feature_smoothing_kernel", "5"), "--epochs": ("epochs_diffusion", "2"),
    "--save_to": ("extractor_path", "x.pt"), "--use_diffusion_model": ("extractor_use_diff", None),
    "--mvtec_item_states": ("item_states", "crack"), "--pl_threshold": ("pxl_threshold", "0.1"),
    "--fl_threshold": ("feature_threshold", "0.2"),
}


@pytest.mark.parametrize("alias", ALIASES)
def test_another_spelling_means_the_same_option(alias):
    name, value = ALIASES[alias]
    item = [] if name == "item" else ["--item", "hazelnut"]
    values = [] if value is None else [value]
    spelled = [parse(train_tune_eval.Options, [*item, flag, *values])
               for flag in (alias, f"--{name}", "--" + name.replace("_", "-"))]
    assert spelled[0] == spelled[1] == spelled[2]
    if name != "item":
        assert spelled[0] != parse(train_tune_eval.Options, item)


def test_every_alias_in_the_options_is_tested():
    aliases = [alias for field in dataclasses.fields(train_tune_eval.Options) for alias in field.metadata["aliases"]]
    assert sorted(set(aliases)) == sorted(ALIASES)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_dry_run_prints_the_options_and_writes_nothing(workplace, script, tiny_flags, capsys, name):
    """Also before anything was trained: that is when one wants to know."""
    thresholds = ["--pxl_threshold", "1", "--feature_threshold", "1"] if name == "inference_ddim.py" else []
    before = files_in(workplace)
    script(name, *tiny_flags(name), *thresholds, "--dry_run")
    printed = capsys.readouterr().out
    assert "  item = hazelnut\n" in printed and "  holdout = 0.25\n" in printed and "would write:" in printed
    assert files_in(workplace) == before


def test_all_phases_have_one_header_with_all_that_was_given(workplace, script, tiny, capsys):
    script("train_tune_eval.py", *tiny, "--blur_sigma", 3, "--dry_run")
    line, = (line for line in capsys.readouterr().out.splitlines() if "; preset demo" in line)
    assert line.startswith("hazelnut from data; ") and "steps_diffusion 6" in line and "blur_sigma 3.0" in line


def test_tensorboard_shows_what_the_network_makes_of_held_out_images(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(finished / "logs/hazelnut"), size_guidance={"images": 0}).Reload()
    shown = events.Images("diffusion/samples")
    assert [each.step for each in shown] == [3, 6]
    assert [(each.width, each.height) for each in shown] == 2 * [(3 * 132 + 4, 2 * 152)]        # three held-out images


def test_importing_a_script_does_nothing(tmp_path):
    code = "; ".join(f"import {name.removesuffix('.py')}" for name in SCRIPTS)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert files_in(tmp_path) == []


# ------------------------------------------------------------------------------------------ kinds of runs

TRAININGS = ["--noise_kind simplex", "--flip", "--rotate 20", "--color_jitter 0.2"]
INSPECTIONS = ["--conditioning blend", "--eta 1", "--recon_weight 8", "--feature_smoothing_kernel 1", "--blur_sigma 0"]


@pytest.mark.parametrize("flags", TRAININGS)
def test_an_option_of_training_changes_the_weights_and_the_run_ends_well(workplace, finished, script, tiny, flags):
    script("train_tune_eval.py", *tiny, "--epochs_extractor", 0, *flags.split())
    assert len(rows_of(RESULTS)) == 7 and np.isfinite(values_of(rows_of(RESULTS))).all()
    with pytest.raises(AssertionError):
        assert_same_weights(RUN / "final.pt", finished / RUN / "final.pt")


@pytest.mark.parametrize("flags", INSPECTIONS)
def test_an_option_of_inspection_changes_the_scores_and_the_run_ends_well(trained, script, tiny, flags):
    script("train_tune_eval.py", *tiny, *ON_DISK, *flags.split())
    before, after = (values_of(rows_of(Path("results", name))) for name in ("hazelnut.1", "hazelnut"))
    assert np.isfinite(after).all() and (after != before).any()


def test_patching_inspects_images_larger_than_the_network_at_their_own_size(tmp_path, workplace, script, tiny,
                                                                             draw_category):
    draw_category(Path("wide"), width=26, height=20)
    flags = [*tiny[:3], "wide", *tiny[4:], "--patching", "--epochs_extractor", 1]
    script("train_tune_eval.py", *flags)
    assert json_of(RESULTS / "metrics.json")["pixel"]["num_pixels"] == 7 * 26 * 20
    prediction = load_detector(RUN, device="cpu", precision="fp32")(Path("wide/hazelnut/test/crack/000.png"))
    assert prediction.anomaly_map.shape == (20, 26) and prediction.reconstruction.shape == (20, 26, 3)
    assert prediction.score == pytest.approx(values_of(rows_of(RESULTS))[0], rel=1e-4)


def test_the_extractor_can_learn_from_reconstructions(trained, script, tiny):
    """It then learns something else than from the images themselves."""
    before = torch.load(RUN / "extractor.pt", weights_only=True)["state_dict"]
    script("train_tune_eval.py", *tiny, "--skip_train", "--extractor_use_diff", "--extractor_path", "other.pt")
    after = torch.load("other.pt", weights_only=True)["state_dict"]
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    assert len(rows_of(RESULTS)) == 7


def test_a_checkpoint_called_safetensors_is_one(workplace, finished, script, tiny):
    script("train_tune_eval.py", *tiny, "--epochs_extractor", 0, "--diffusion_checkpoint_name", "weights.safetensors")
    weights = load_file(RUN / "weights.safetensors")
    expected = torch.load(finished / RUN / "final.pt", weights_only=True)
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)
    assert len(rows_of(RESULTS)) == 7


def test_a_checkpoint_may_have_a_name_without_an_ending(workplace, finished, script, tiny_flags):
    script("train_ddim.py", *tiny_flags("train_ddim.py"), "--diffusion_checkpoint_name", "weights")
    assert_same_weights(RUN / "weights", finished / RUN / "final.pt")


def test_item_states_limit_the_test_to_some_folders(trained, script):
    flags = ["--item", "hazelnut", "--dataset_path", "data", "--precision", "fp32", "--device", "cpu"]
    script("inference_ddim.py", *flags, "--item_states", "crack")
    assert {row["defect"] for row in rows_of(RESULTS)} == {"crack"} and len(rows_of(RESULTS)) == 3
    assert json_of(RESULTS / "metrics.json")["reason"] == "the test has no good images"
    script("inference_ddim.py", *flags, "--item_states", "good", "crack")
    assert values_of(rows_of(RESULTS)).tolist() == values_of(rows_of("results/hazelnut.1")).tolist()


def test_without_a_data_set_the_demo_is_drawn_and_said_to_be(workplace, script, tiny, capsys, monkeypatch):
    monkeypatch.setenv("DBAD_DEMO_DIR", str(workplace / "demo"))
    monkeypatch.setattr(draw, "write_demo", partial(draw.write_demo, size=16, num_train=8, num_test_good=2,
                                                    num_per_defect=1))
    script("train_tune_eval.py", "--item", "hazelnut", *tiny[4:], "--epochs_extractor", 0)
    assert "drawn, not photographed" in capsys.readouterr().out
    assert "drawn, not photographed" in (RESULTS / "report.html").read_text(encoding="utf-8")
    assert len(list(Path("demo").glob("*/hazelnut/train/good/*.png"))) == 8
    assert len(rows_of(RESULTS)) == 2 + len(draw.CATEGORIES["hazelnut"])


# ------------------------------------------------------------------------------------------ from Python

@pytest.mark.parametrize("moved", [False, True], ids=["where it was made", "moved elsewhere"])
def test_load_detector_gives_the_scores_of_scores_csv(trained, tmp_path, moved):
    folder = trained
    if moved:
        folder = tmp_path / "elsewhere"
        shutil.copytree(trained, folder)
        shutil.rmtree(trained / "checkpoints")
    from dbad import load_detector as exported
    detector = exported(folder / RUN, device="cpu", precision="fp32")
    row = rows_of(folder / RESULTS)[2]
    prediction = detector(folder / "data" / row["path"])
    assert prediction.score == pytest.approx(float(row["score"]), rel=1e-5)
    assert prediction.decision is bool(int(row["decision"]))
    assert prediction.p_value == float(row["p_value"])
    assert prediction.anomaly_map.shape == (16, 16) and set(prediction.maps) == {"pixel", "feature"}


def test_a_detector_takes_files_pictures_arrays_and_tensors_alike(finished):
    detector = load_detector(finished / RUN, device="cpu", precision="fp32")
    path = finished / "data/hazelnut/test/crack/001.png"
    pixels = np.array(Image.open(path))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
    scores = [detector(image).score for image in (path, str(path), Image.open(path), pixels, tensor)]
    assert scores == pytest.approx([scores[0]] * 5, rel=1e-5)
    assert [found.score for found in detector([path] * 3)] == pytest.approx([scores[0]] * 3, rel=1e-4)


# ------------------------------------------------------------------------------------------ stopping and going on

def interrupted_at(step: int, with_signal: int, monkeypatch=None) -> None:
    """Make training send a signal to its own process in the middle of a step, and save its state after each."""
    from dbad.diffusion import batches
    calls = iter(range(1, 10_000))
    loss = batches.denoising_loss

    def interrupting(*args):
        if torch.is_grad_enabled() and next(calls) == step:        # else it is a validation
            os.kill(os.getpid(), with_signal)
        return loss(*args)

    patch = monkeypatch.setattr if monkeypatch else setattr
    patch(batches, "denoising_loss", interrupting)
    patch(progress, "SAVE_EVERY_S", 0)


def test_a_killed_training_goes_on_as_if_it_had_not_been(workplace, finished, script, tiny_flags):
    code = (f"import sys, signal, runpy; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
            "import test_scripts; test_scripts.interrupted_at(5, signal.SIGKILL)\n"
            "sys.argv[0] = 'train_ddim.py'\n"
            f"runpy.run_path({str(ROOT / 'train_ddim.py')!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code, *tiny_flags("train_ddim.py")], text=True,
                          timeout=120, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert torch.load(RUN / "last.pt", weights_only=True)["step"] == 4 and not (RUN / "final.pt").exists()
    left = RUN / f".last-{machine()}-{2 ** 22 + 1}-abcd1234.pt"
    left.write_bytes(b"half of a sta")          # as a kill in the middle of saving leaves it
    script("train_ddim.py", *tiny_flags("train_ddim.py"))
    assert_same_weights(RUN / "final.pt", finished / RUN / "final.pt")
    resumed, unbroken = (
        [[line[name] for name in ("epoch", "step", "loss", "val_loss", "learning_rate")] for line in map(
            json.loads, (folder / RUN / "log.jsonl").read_text().splitlines()) if line["phase"] == "diffusion"]
        for folder in (Path(), finished))
    assert resumed == unbroken and len(resumed) == 2
    assert not [path for path in RUN.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_training_ends_with_one_line_and_goes_on(workplace, finished, script, tiny_flags, capsys, number):
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupted_at(4, number, monkeypatch)
        with pytest.raises(SystemExit) as stop:
            script("train_ddim.py", *tiny_flags("train_ddim.py"))
    assert stop.value.code == 130
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1].startswith("train_ddim.py: stopped; finished parts are kept")
    assert "Traceback" not in printed
    assert torch.load(RUN / "last.pt", weights_only=True)["step"] == 4 and not (RUN / "final.pt").exists()
    script("train_ddim.py", *tiny_flags("train_ddim.py"))
    assert_same_weights(RUN / "final.pt", finished / RUN / "final.pt")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_inspection_that_is_stopped_at_its_report_ends_like_a_training_and_keeps_the_scores(trained, script, capsys,
                                                                                             monkeypatch, number):
    def stopped(*args, **kwargs):
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(report, "write_report", stopped)
    with pytest.raises(SystemExit) as stop:
        script("inference_ddim.py", "--item", "hazelnut", "--precision", "fp32", "--device", "cpu", "--images",
               "data/hazelnut/test/crack")
    assert stop.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("inference_ddim.py: stopped; finished parts are kept")
    assert len(rows_of(Path("results/hazelnut-images"))) == 3
    assert not list(Path().rglob(".*"))


def test_a_calibration_of_before_the_training_was_noted_still_counts(trained, finished, script):
    path = RUN / "calibration.json"
    calibration = json_of(path)
    assert calibration["digests"].pop("training")
    path.write_text(json.dumps(calibration))
    script("inference_ddim.py", "--item", "hazelnut", "--dataset_path", "data", "--precision", "fp32", "--device",
           "cpu")
    assert (RESULTS / "scores.csv").read_bytes() == (finished / RESULTS / "scores.csv").read_bytes()


def test_settings_that_were_chosen_before_the_training_was_noted_still_count(trained, script, tiny_flags, capsys):
    flags = tiny_flags("evaluation.py")
    flags.remove("--no_tune")
    calibration = json_of(RUN / "calibration.json")
    digests = {name: value for name, value in calibration["digests"].items() if name != "training"}
    tuned = {"settings": calibration["settings"] | {"recon_weight": 5.0}}
    for known, weight in (({}, 2.0), (digests | {"unet": "another"}, 2.0), (digests, 5.0)):
        (RUN / "tuned.json").write_text(json.dumps(tuned | {"digests": known}))
        script("evaluation.py", *flags)
        assert json_of(RUN / "calibration.json")["settings"]["recon_weight"] == weight


def test_no_resume_begins_again(workplace, finished, script, tiny_flags):
    RUN.mkdir(parents=True)
    shutil.copy(finished / RUN / "last.pt", RUN / "last.pt")
    script("train_ddim.py", *tiny_flags("train_ddim.py"), "--no_resume", "--seed", 1)
    with pytest.raises(AssertionError):
        assert_same_weights(RUN / "final.pt", finished / RUN / "final.pt")
    assert torch.load(RUN / "last.pt", weights_only=True)["settings"]["seed"] == 1
