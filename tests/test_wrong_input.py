"""What a user can get wrong: one line that names the option or file, exit status 2, and nothing half-written."""
import errno
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import complaint
from PIL import Image

RUN, CATEGORY = Path("checkpoints/hazelnut"), Path("data/hazelnut")
INSPECT = ["--item", "hazelnut", "--dataset_path", "data", "--precision", "fp32", "--device", "cpu"]
TOUCH = "executed"      # the file that a malicious checkpoint would make


class Evil:
    """Unpickling it runs code."""

    def __reduce__(self):
        return open, (TOUCH, "w")


class Mistake(NamedTuple):
    """A wrong command or a spoilt file, and what the line says of it."""

    script: str
    flags: str | list[str]
    says: tuple[str, ...]
    spoil: Callable[[], object] = lambda: None


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))}


def assert_refused(capsys, script, mistake: Mistake, flags: list[str]) -> None:
    mistake.spoil()
    before = tree(Path())
    line = complaint(capsys, script, mistake.script, *flags)
    assert [part for part in mistake.says if part not in line] == [], line
    assert tree(Path()) == before
    assert not Path(TOUCH).exists()


def replaced(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def truncated(path: Path) -> None:
    content = path.read_bytes()
    replaced(path, content[:len(content) // 2])


def with_code(path: Path) -> None:
    """A checkpoint in torch's own format that would run code when it is unpickled."""
    torch.save({"conv_in.weight": Evil()}, path)


def spoilt(path: Path) -> None:
    """One weight becomes a not-a-number."""
    state = torch.load(path, weights_only=True)
    state["conv_out.bias"][0] = float("nan")
    torch.save(state, path)


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def with_a_wrong_bit(path: Path) -> None:
    """In the middle of the largest part."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda part: part.file_size)
        data = archive.read(largest)
    content = bytearray(path.read_bytes())
    content[content.index(data) + len(data) // 2] ^= 1
    replaced(path, content)


def edited(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ------------------------------------------------------------------------------------------ before anything is trained

FIRST_GOOD, FIRST_CRACK = CATEGORY / "train/good/000.png", CATEGORY / "test/crack/000.png"
FIRST_MASK = CATEGORY / "ground_truth/crack/000_mask.png"

UNTRAINED = {
    # the data
    "no such data set": Mistake("train_ddim.py", "--dataset_path nowhere", ("--dataset_path nowhere", "nothing")),
    "a file as data set": Mistake("train_ddim.py", f"--dataset_path {FIRST_GOOD}", ("--dataset_path", "a file")),
    "a misspelt category": Mistake("train_ddim.py", "--item hazlenut", ("--item hazlenut", "did you mean hazelnut?")),
    "a category unlike all": Mistake("train_ddim.py", "--item zipper", ("--item zipper", "there are: hazelnut")),
    "the category's folder as data set": Mistake(
        "train_ddim.py", f"--dataset_path {CATEGORY}", ("--dataset_path data --item hazelnut",)),
    "a demo category that is none": Mistake("train_ddim.py", ["--item", "carpett"], ("--item carpett", "carpet?")),
    "no train/good": Mistake("train_ddim.py", "", (f"{CATEGORY}/train/good: no such folder",),
                             lambda: shutil.rmtree(CATEGORY / "train/good")),
    "an empty train/good": Mistake("train_ddim.py", "", (f"{CATEGORY}/train/good: no images",),
                                   lambda: emptied(CATEGORY / "train/good")),
    "one good image only": Mistake(
        "train_ddim.py", "", ("train/good: 1 image", "at least 2"),
        lambda: [path.unlink() for path in sorted((CATEGORY / "train/good").iterdir())[1:]]),
    "a text called image": Mistake("train_ddim.py", "", (f"{FIRST_GOOD}: not an image",),
                                   lambda: FIRST_GOOD.write_text("to do")),
    "an empty image file": Mistake("train_ddim.py", "", (str(FIRST_GOOD),), lambda: FIRST_GOOD.write_bytes(b"")),
    "a truncated image": Mistake("train_ddim.py", "", (f"{FIRST_GOOD}: truncated",), lambda: truncated(FIRST_GOOD)),
    "a link to nowhere": Mistake("train_ddim.py", "", (f"{FIRST_GOOD}: a link to a file that is not there",),
                                 lambda: (FIRST_GOOD.unlink(), FIRST_GOOD.symlink_to("nowhere.png"))),
    "a link to itself": Mistake("train_ddim.py", "", (f"{FIRST_GOOD}: cannot be read",),
                                lambda: (FIRST_GOOD.unlink(), FIRST_GOOD.symlink_to(FIRST_GOOD.name))),
    "two folders of good images": Mistake("train_ddim.py", "", ("train: folders OK and good both stand for good",),
                                          lambda: (CATEGORY / "train/OK").mkdir()),
    "a defect without the required mask": Mistake("train_tune_eval.py", "--masks required", (
        str(FIRST_CRACK), str(FIRST_MASK), "--masks where_there_are"), FIRST_MASK.unlink),
    "a mask with pixels that are no numbers": Mistake(
        "train_tune_eval.py", "", (f"{FIRST_MASK.with_suffix('.tif')}: a mask with pixels that are infinite",),
        lambda: (FIRST_MASK.unlink(), Image.fromarray(np.full((16, 16), np.nan, np.float32)).save(
            FIRST_MASK.with_suffix(".tif")))),
    "a line break in a category": Mistake("train_ddim.py", ["--item", "hazel\nnut"], (r"--item 'hazel\nnut'", "plain")),
    "a data set of too long a name": Mistake("train_ddim.py", f"--dataset_path {'x' * 300}", ("--dataset_path xxx",
                                                                                          "found nothing")),
    # the network and its training
    "a size that cannot be halved": Mistake("train_ddim.py", "--resolution 17", ("--resolution 17", "multiple of 2")),
    "channels that are no multiple": Mistake("train_ddim.py", "--channels 32 40", ("--channels 32 40", "32")),
    "a network larger than any memory": Mistake(
        "train_ddim.py", "--resolution 1024 --layers_per_block 16 --channels 4096 4096 4096 4096",
        ("--channels 4096 4096 4096 4096", "e+10 parameters", "at most 3e+09")),
    "images larger than any memory": Mistake("train_ddim.py", "--resolution 1000000", ("--resolution 1000000",
                                                                                       "at most 4096")),
    "a network of 40 levels": Mistake("train_ddim.py", ["--channels", *["32"] * 40], ("--channels", "1 to 10 numbers")),
    "attention on a level that is not there": Mistake("train_ddim.py", "--attention_levels 2", ("--attention_levels 2",
                                                                                              "0 to 1")),
    "negative epochs": Mistake("train_ddim.py", ["--epochs_diffusion", "-1"], ("--epochs_diffusion -1", "at least 0")),
    "no epochs": Mistake("train_ddim.py", ["--epochs_diffusion", "0"], ("--epochs_diffusion 0", "--skip_train")),
    "epochs and steps": Mistake("train_ddim.py", "--epochs 1", ("--epochs_diffusion", "--steps_diffusion", "both")),
    "an empty batch": Mistake("train_ddim.py", "--batch_size 0", ("--batch_size 0", "at least 1")),
    "a number that is none": Mistake("train_ddim.py", "--eta nan", ("--eta nan",)),
    "a word for a number": Mistake("train_ddim.py", "--seed lucky", ("--seed", "lucky")),
    "eta above 1": Mistake("train_ddim.py", "--eta 1.5", ("--eta 1.5", "from 0", "to 1")),
    "a start beyond the diffusion": Mistake(
        "train_ddim.py", "--start_at_timestep 250 --train_steps 200",
        ("--start_at_timestep 250", "200", "--train_steps")),
    "a start beyond what is trained": Mistake(
        "train_ddim.py", "--start_at_timestep 300", ("--start_at_timestep 300", "250", "--max_timestep")),
    "more steps than timesteps": Mistake(
        "train_ddim.py", "--start_at_timestep 5 --steps_to_regenerate 6", ("--steps_to_regenerate 6", "5")),
    "one decay rate for two": Mistake("train_ddim.py", "--adam_betas 0.9", ("--adam_betas 0.9",)),
    "a decay rate above 1": Mistake("train_ddim.py", "--adam_betas 0.9 2", ("--adam_betas 0.9 2",)),
    "a seed beyond 64 bits": Mistake("train_ddim.py", "--seed 99999999999999999999", ("--seed 99999999999999999999",)),
    "an endless turn": Mistake("train_ddim.py", "--rotate inf", ("--rotate inf",)),
    "an endless change of colours": Mistake("train_ddim.py", "--color_jitter inf", ("--color_jitter inf",)),
    "an endless pull": Mistake("train_ddim.py", "--recon_weight inf", ("--recon_weight inf",)),
    "weights called like the training state": Mistake(
        "train_ddim.py", "--diffusion_checkpoint_name last.pt", ("--diffusion_checkpoint_name", "last.pt")),
    "weights called like the settings": Mistake(
        "train_ddim.py", "--diffusion_checkpoint_name model_config.json",
        ("--diffusion_checkpoint_name", "model_config.json")),
    "weights called like the extractor": Mistake(
        "train_ddim.py", "--diffusion_checkpoint_name extractor.pt", ("--diffusion_checkpoint_name", "extractor.pt")),
    "weights called like those of an epoch before": Mistake(
        "train_ddim.py", "--checkpoint_name epoch_1.pt", ("--diffusion_checkpoint_name epoch_1.pt", "epoch 1 of 2")),
    "a run with a very long name": Mistake("train_ddim.py", ["--run_id", "x" * 300], ("--run_id xxxx", "at most 120")),
    "results in a folder with a very long name": Mistake(
        "inference_ddim.py", ["--pxl_threshold", "1", "--fl_threshold", "1", "--img_dir", "x" * 300],
        ("xxxx", os.strerror(errno.ENAMETOOLONG))),
    "a run called like the summary": Mistake("train_ddim.py", "--run_id Summary.CSV", ("--run_id Summary.CSV",)),
    "a share of all": Mistake("train_ddim.py", "--holdout 1", ("--holdout 1",)),
    "a folder as run's name": Mistake("train_ddim.py", "--run_id ../x", ("--run_id '../x'", "plain name")),
    "a choice that is none": Mistake("train_ddim.py", "--noise_kind pink", ("--noise_kind", "pink", "simplex")),
    "a device that is none": Mistake("train_ddim.py", "--device toaster", ("--device toaster", "cpu")),
    "an intensity that is none": Mistake("train_ddim.py", "--intensity 12", ("--intensity 12", "window:LOW,HIGH")),
    "an empty window": Mistake("train_lafite.py", "--intensity window:9,9", ("--intensity window:9,9", "0,4095")),
    "a misspelt flag": Mistake("train_ddim.py", "--resoluton 16", ("--resoluton", "did you mean --resolution?")),
    "a flag unlike all": Mistake("train_ddim.py", "--qqqq 16", ("--qqqq", "--help")),
    # the extractor
    "an extractor that is none": Mistake("train_extractor.py", "--extractor wide_resnet_50",
                                         ("--extractor wide_resnet_50",)),
    "a layer that is not there": Mistake("train_extractor.py", "--extractor_layers 1 9",
                                         ("--extractor_layers 9", "efficientnet_lite0")),
    "an extractor called like the training state": Mistake(
        "train_extractor.py", f"--extractor_path {RUN}/last.pt", (f"--extractor_path {RUN}/last.pt", "extractor.pt")),
    "an extractor called like the weights": Mistake(
        "train_extractor.py", f"--save_to {RUN}/final.pt", (f"--extractor_path {RUN}/final.pt", "diffusion model")),
    "an extractor in place of an image": Mistake(
        "train_extractor.py", f"--extractor_path {FIRST_GOOD}", (f"--extractor_path {FIRST_GOOD}", "not an extractor")),
    "an extractor in place of a folder": Mistake(
        "train_extractor.py", "--extractor_path data", ("--extractor_path data: a folder",)),
    "reconstructions of an untrained run": Mistake("train_extractor.py", "--extractor_use_diff",
                                                   (f"{RUN}: no such run folder", "train_ddim.py")),
    # places
    "a file as run folder": Mistake("train_ddim.py", "", ("--diffusion_checkpoint_dir", str(RUN), "a file"),
                                    lambda: (RUN.parent.mkdir(), RUN.write_text(""))),
    "a run folder below a file": Mistake("train_ddim.py", f"--diffusion_checkpoint_dir {FIRST_GOOD}",
                                         ("--diffusion_checkpoint_dir", str(FIRST_GOOD), "a file")),
    "a log folder below a file": Mistake("train_ddim.py", f"--log_dir {FIRST_GOOD}", ("--log_dir", str(FIRST_GOOD))),
    "an extractor below a file": Mistake(
        "train_extractor.py", ["--extractor_path", f"{FIRST_GOOD}/e.pt", "--epochs_extractor", "0"],
        (f"{FIRST_GOOD}/e.pt",)),
    "a log folder where nothing can be": Mistake("train_ddim.py", "--log_dir /proc/nowhere", ("--log_dir",)),
    "a run folder where nothing can be": Mistake("train_ddim.py", "--diffusion_checkpoint_dir /proc/nowhere",
                                                 ("--diffusion_checkpoint_dir /proc/nowhere", "not writable")),
    # the order of the scripts
    "tuning before training": Mistake("evaluation.py", "", (f"{RUN}: no such run folder", "train_ddim.py")),
    "inspection before training": Mistake("inference_ddim.py", "", (str(RUN), "evaluation.py")),
    "inspection by given thresholds before training": Mistake(
        "inference_ddim.py", "--pxl_threshold 1 --feature_threshold 1", (f"{RUN}: no such run folder",)),
    "results among the runs": Mistake("inference_ddim.py", "--img_dir checkpoints --pxl_threshold 1 --fl_threshold 1",
                                      ("--img_dir checkpoints", str(RUN), "run folder")),
    "skipped training that never was": Mistake("train_tune_eval.py", "--skip_train --skip_extractor",
                                               (f"{RUN}: no such run folder",)),
}


@pytest.mark.parametrize("name", UNTRAINED)
def test_a_mistake_before_training_is_told_in_one_line_and_leaves_nothing(workplace, script, tiny_flags, capsys,
                                                                          monkeypatch, name):
    monkeypatch.setenv("DBAD_DEMO_DIR", str(workplace))
    if name.endswith("nothing can be") and not Path("/proc/self").exists():
        pytest.skip("this system has no /proc")
    mistake = UNTRAINED[name]
    flags = mistake.flags.split() if isinstance(mistake.flags, str) else mistake.flags
    base = tiny_flags(mistake.script)
    if name.startswith("a demo category"):
        base = base[:2] + base[4:]                                                  # no --dataset_path
    if flags[:1] == ["--epochs_diffusion"]:
        place = base.index("--steps_diffusion")
        base = base[:place] + base[place + 2:]
    assert_refused(capsys, script, mistake, [*base, *flags])


# What only a later phase reads, and what it would say after hours.
LATE = {
    "--false_alarm_rate 5": ("--false_alarm_rate 5.0", "between 0 and 1"),
    "--false_alarm_rate 0.1": ("--false_alarm_rate 0.1", "3 held-out good images", "0.25"),
    "--pixel_quantile 5": ("--pixel_quantile 5.0", "between 0 and 1"),
    "--extractor nosuchnet": ("--extractor nosuchnet",),
    "--extractor_layers 1 9": ("--extractor_layers 9",),
    "--center_crop 500": ("--center_crop 500", "256"),
    "--num_samples 0": ("--num_samples 0", "at least 1"),
    "--layer_weights 1 2": ("--layer_weights 1.0 2.0", "3 layers"),
    "--tune_minutes -1": ("--tune_minutes -1.0", "at least 0"),
    "--map_norm location --patching": ("--map_norm location", "tiles"),
    "--drift_check": ("--drift_check", "--images"),
    "--images data/hazelnut/test --recursive --eval_resolution original": ("--eval_resolution", "--images"),
    "--images nowhere": ("--images nowhere",),
    "--skip_threshold --pxl_threshold 1": ("--feature_threshold: missing",),
    "--start_at_timestep 300": ("--start_at_timestep 300", "--max_timestep"),
    "--extractor_path checkpoints/hazelnut/log.jsonl": ("--extractor_path checkpoints/hazelnut/log.jsonl",),
    "--skip_extractor": ("checkpoints/hazelnut/extractor.pt: no such checkpoint",),
}


@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]], ids=["run", "dry_run"])
@pytest.mark.parametrize("flags", LATE)
def test_what_a_late_phase_would_refuse_is_refused_before_the_first_one(workplace, script, tiny, capsys, flags,
                                                                        dry_run):
    if flags == "--skip_extractor" and dry_run:
        pytest.skip("a dry run may come before the files are there")
    assert_refused(capsys, script, Mistake("train_tune_eval.py", [], LATE[flags]), [*tiny, *flags.split(), *dry_run])


def test_weights_of_an_extractor_that_cannot_be_had_are_missed_before_the_training(workplace, script, tiny, capsys,
                                                                                  monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "cache")
    monkeypatch.setattr(os, "makedirs", lambda *args, **kwargs: None)
    assert_refused(capsys, script, Mistake("train_tune_eval.py", [], ("--extractor resnet18", "put the file there")),
                   [*tiny, "--extractor", "resnet18"])


def test_a_device_that_this_machine_lacks_is_refused(workplace, script, tiny_flags, capsys):
    beyond = f"cuda:{torch.cuda.device_count()}"
    mistake = Mistake("train_ddim.py", [], (f"--device {beyond}", "--device cpu"))
    assert_refused(capsys, script, mistake, [*tiny_flags("train_ddim.py"), "--device", beyond])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_refused_without_one(workplace, script, tiny_flags, capsys):
    mistake = Mistake("train_ddim.py", [], ("--device cuda", "0 CUDA devices", "--device cpu"))
    assert_refused(capsys, script, mistake, [*tiny_flags("train_ddim.py"), "--device", "cuda"])


def test_weights_that_cannot_be_downloaded_name_the_file_and_both_ways_out(workplace, script, tiny_flags, capsys,
                                                                           monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "cache")
    monkeypatch.setattr(os, "makedirs", lambda *args, **kwargs: None)       # torch.hub makes its cache first
    mistake = Mistake("train_extractor.py", [], (
        "--extractor resnet18", "cache/checkpoints/resnet18-", "put the file there", "--extractor efficientnet_lite0"))
    assert_refused(capsys, script, mistake, [*tiny_flags("train_extractor.py"), "--extractor", "resnet18"])


# ------------------------------------------------------------------------------------------ after training

TRAINED = {
    # checkpoints
    "a checkpoint that is not there": Mistake(
        "evaluation.py", "--diffusion_checkpoint_name epoch_7.pt",
        (f"{RUN}/epoch_7.pt: no such checkpoint", "final.pt")),
    "a truncated checkpoint": Mistake("evaluation.py", "", (f"{RUN}/final.pt", "truncated"),
                                      lambda: truncated(RUN / "final.pt")),
    "an empty checkpoint": Mistake("evaluation.py", "", (f"{RUN}/final.pt", "truncated"),
                                   lambda: replaced(RUN / "final.pt", b"")),
    "a text called checkpoint": Mistake("evaluation.py", "", (f"{RUN}/final.pt", "not a checkpoint"),
                                        lambda: replaced(RUN / "final.pt", b"to do")),
    "a text called safetensors": Mistake(
        "evaluation.py", "--diffusion_checkpoint_name a.safetensors", (f"{RUN}/a.safetensors", "not a safetensors"),
        lambda: (RUN / "a.safetensors").write_text("to do")),
    "a checkpoint with code": Mistake("evaluation.py", "", (f"{RUN}/final.pt", "refused"),
                                      lambda: with_code(RUN / "final.pt")),
    "a plain pickle with code": Mistake("evaluation.py", "", (f"{RUN}/final.pt",),
                                        lambda: replaced(RUN / "final.pt", pickle.dumps({"a": Evil()}, protocol=2))),
    "an extractor with code": Mistake("evaluation.py", "", (f"{RUN}/extractor.pt", "refused"),
                                      lambda: with_code(RUN / "extractor.pt")),
    "a training state with code": Mistake("train_ddim.py", "", (f"{RUN}/last.pt", "refused"),
                                          lambda: with_code(RUN / "last.pt")),
    "a training state that is none": Mistake("train_ddim.py", "", (f"{RUN}/last.pt", "--no_resume"),
                                             lambda: torch.save({"a": torch.ones(1)}, RUN / "last.pt")),
    "a truncated training state": Mistake(
        "train_ddim.py", "", (f"{RUN}/last.pt", "truncated"),
        lambda: (shutil.copy(RUN / "final.pt", RUN / "last.pt"), truncated(RUN / "last.pt"))),
    "weights of another architecture": Mistake(
        "evaluation.py", "", (f"{RUN}/final.pt", "another architecture"),
        lambda: edited(RUN / "model_config.json", block_out_channels=[32, 64])),
    "a model_config.json that describes nothing": Mistake(
        "evaluation.py", "", (f"{RUN}/model_config.json",), lambda: edited(RUN / "model_config.json", wheels=4)),
    "a broken train_arg_config.json": Mistake("evaluation.py", "", (f"{RUN}/train_arg_config.json", "JSON"),
                                              lambda: (RUN / "train_arg_config.json").write_text("{")),
    "a foreign extractor": Mistake("evaluation.py", "", (f"{RUN}/extractor.pt", "train_extractor.py"),
                                   lambda: shutil.copy(RUN / "final.pt", RUN / "extractor.pt")),
    "no extractor": Mistake("evaluation.py", "", (f"{RUN}/extractor.pt", "no such"), (RUN / "extractor.pt").unlink),
    "a not-a-number among the weights, at the calibration": Mistake(
        "evaluation.py", "", (f"{CATEGORY}/train/good/", "not finite", "weights"), lambda: spoilt(RUN / "final.pt")),
    "a not-a-number among the weights, with thresholds by hand": Mistake(
        "inference_ddim.py", "--pxl_threshold 0.1 --feature_threshold 0.1",
        (f"{CATEGORY}/test/", "not finite", "weights"), lambda: spoilt(RUN / "final.pt")),
    "a threshold that is not a number": Mistake(
        "inference_ddim.py", "--pxl_threshold nan --feature_threshold 1", ("--pxl_threshold nan", "finite")),
    # options that contradict the training
    "another share held out": Mistake("evaluation.py", "--holdout 0.5", ("--holdout 0.5", "0.25")),
    "another category": Mistake("evaluation.py", "--item screw --run_id hazelnut", ("--item screw", "hazelnut")),
    "tiles for a whole-image run": Mistake("evaluation.py", "--patching", ("--patching", "False")),
    "a start that was not trained": Mistake("evaluation.py", "--start_at_timestep 300", ("--start_at_timestep 300",
                                                                                        "250")),
    "a promise that cannot be made": Mistake("evaluation.py", "--false_alarm_rate 0.01",
                                             ("--false_alarm_rate 0.01", "0.25", "--holdout")),
    "an endless blur": Mistake("evaluation.py", "--blur_sigma inf", ("--blur_sigma inf",)),
    "an endless contribution": Mistake("evaluation.py", "--pl_contrib inf", ("--pl_contrib inf",)),
    "endless thresholds": Mistake("inference_ddim.py", "--pxl_threshold inf --feature_threshold inf",
                                  ("--pxl_threshold inf",)),
    # the calibration
    "weights changed after calibration": Mistake(
        "inference_ddim.py", "", (f"{RUN}/final.pt", f"{RUN}/calibration.json", "evaluation.py"),
        lambda: torch.save({}, RUN / "final.pt")),
    "extractor changed after calibration": Mistake(
        "inference_ddim.py", "", (f"{RUN}/extractor.pt", f"{RUN}/calibration.json", "evaluation.py"),
        lambda: torch.save({}, RUN / "extractor.pt")),
    "no calibration": Mistake("inference_ddim.py", "", (f"{RUN}/calibration.json: no such file", "evaluation.py"),
                              (RUN / "calibration.json").unlink),
    "a broken calibration": Mistake("inference_ddim.py", "", (f"{RUN}/calibration.json", "JSON"),
                                    lambda: truncated(RUN / "calibration.json")),
    "a calibration without scales": Mistake("inference_ddim.py", "", (f"{RUN}/calibration.json", "evaluation.py"),
                                            lambda: edited(RUN / "calibration.json", scales={})),
    "another weight than calibrated": Mistake("inference_ddim.py", "--recon_weight 8",
                                              ("--recon_weight 8", "calibration.json", "evaluation.py")),
    "another seed than calibrated": Mistake("inference_ddim.py", "--seed 1", ("--seed 1", "calibration.json")),
    "another checkpoint than calibrated": Mistake(
        "inference_ddim.py", "--diffusion_checkpoint_name copy.pt", ("--diffusion_checkpoint_name copy.pt", "final.pt"),
        lambda: shutil.copy(RUN / "final.pt", RUN / "copy.pt")),
    "another extractor than calibrated": Mistake(
        "inference_ddim.py", "--extractor_path copy.pt", ("--extractor_path copy.pt", "extractor.pt"),
        lambda: shutil.copy(RUN / "extractor.pt", "copy.pt")),
    "only the pixel threshold": Mistake("inference_ddim.py", "--pxl_threshold 0.1", ("--feature_threshold: missing",)),
    "only the feature threshold": Mistake("inference_ddim.py", "--fl_threshold 0.1", ("--pxl_threshold: missing",)),
    "a threshold of nothing": Mistake("inference_ddim.py", "--pxl_threshold 0 --feature_threshold 1",
                                      ("--pxl_threshold 0",)),
    "another noise than calibrated": Mistake(
        "inference_ddim.py", "", (f"{RUN}/train_arg_config.json", "another training", "evaluation.py"),
        lambda: edited(RUN / "train_arg_config.json", noise_kind="simplex")),
    "a network for another size than calibrated": Mistake(
        "inference_ddim.py", "", (f"{RUN}/train_arg_config.json", "another training"),
        lambda: edited(RUN / "model_config.json", sample_size=32)),
    "a damaged extractor": Mistake("evaluation.py", "", (f"{RUN}/extractor.pt: damaged", "checksum"),
                                   lambda: with_a_wrong_bit(RUN / "extractor.pt")),
    "a damaged checkpoint": Mistake("evaluation.py", "", (f"{RUN}/final.pt: damaged", "checksum"),
                                    lambda: with_a_wrong_bit(RUN / "final.pt")),
    # the test images
    "a defect that is not there": Mistake("inference_ddim.py", "--item_states good hole",
                                          ("--item_states hole", "all crack good")),
    "no test images": Mistake("inference_ddim.py", "", (f"{CATEGORY}/test", "no test images"),
                              lambda: shutil.rmtree(CATEGORY / "test")),
    "a truncated test image": Mistake("inference_ddim.py", "", (f"{FIRST_CRACK}: truncated",),
                                      lambda: truncated(FIRST_CRACK)),
    "a truncated mask": Mistake("inference_ddim.py", "", (f"{FIRST_MASK}: truncated",), lambda: truncated(FIRST_MASK)),
    "a defect that lost its required mask": Mistake("inference_ddim.py", "--masks required",
                                                    (str(FIRST_CRACK), str(FIRST_MASK)), FIRST_MASK.unlink),
    "a mask of another size": Mistake(
        "inference_ddim.py", "", (str(FIRST_MASK), str(FIRST_CRACK), "8x8", "16x16"),
        lambda: Image.fromarray(np.zeros((8, 8), np.uint8)).save(FIRST_MASK)),
    # places
    "a file as results": Mistake("inference_ddim.py", "--img_dir elsewhere", ("--img_dir elsewhere", "a file"),
                                 lambda: Path("elsewhere").write_text("")),
    "results where nothing can be": Mistake("inference_ddim.py", "--img_dir /proc/nowhere",
                                            ("--img_dir /proc/nowhere", "not writable")),
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_mistake_after_training_is_told_in_one_line_and_leaves_all_as_it_was(trained, script, tiny_flags, capsys,
                                                                               name):
    if name.endswith("nothing can be") and not Path("/proc/self").exists():
        pytest.skip("this system has no /proc")
    mistake = TRAINED[name]
    flags = mistake.flags.split() if isinstance(mistake.flags, str) else mistake.flags
    base = tiny_flags("train_ddim.py") if mistake.script == "train_ddim.py" else INSPECT
    assert_refused(capsys, script, mistake, [*base, *flags])


def test_a_run_is_not_resumed_under_other_options(trained, finished, script, tiny_flags, capsys):
    shutil.copy(finished / RUN / "last.pt", RUN / "last.pt")
    mistake = Mistake("train_ddim.py", [], (f"{RUN}/last.pt", "--seed 0", "1", "--no_resume", "--run_id"))
    assert_refused(capsys, script, mistake, [*tiny_flags("train_ddim.py"), "--seed", "1"])


def test_a_run_is_not_resumed_on_other_images(trained, finished, script, tiny_flags, capsys):
    """Another data set under the same name must not pass for the one that the model knows."""
    shutil.copy(finished / RUN / "last.pt", RUN / "last.pt")
    for path in Path("data/hazelnut/train/good").iterdir():
        Image.open(path).rotate(90).save(path)
    mistake = Mistake("train_ddim.py", [], (f"{RUN}/last.pt", "other images", "--no_resume", "--run_id"))
    assert_refused(capsys, script, mistake, tiny_flags("train_ddim.py"))


def test_a_results_folder_that_cannot_be_made_is_told_before_the_training(workplace, script, tiny, capsys):
    Path("results").write_text("a file")
    assert_refused(capsys, script, Mistake("train_tune_eval.py", [], ("--img_dir results", "found a file")), tiny)


# ------------------------------------------------------------------------------------------ the disk

WRITERS = {"train_ddim.py": RUN / "final.pt", "train_extractor.py": RUN / "extractor.pt",
           "evaluation.py": RUN / "calibration.json", "inference_ddim.py": Path("results/hazelnut/scores.csv")}


def no_halves(folder: Path) -> None:
    """Every file that has its final name can be read to its end, and no temporary one is left."""
    for path in folder.rglob("*"):
        assert not path.name.startswith("."), path
        if path.suffix == ".pt":
            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            Image.open(path).load()


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_full_at_the_end_of_a_file_is_told_and_old_files_stay(trained, script, tiny_flags, capsys,
                                                                             monkeypatch, name):
    """The rename is the last step of writing; here it fails, and what was there before is still there."""
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(os, "replace", full)
    flags = INSPECT if name in ("evaluation.py", "inference_ddim.py") else tiny_flags(name)
    before = WRITERS[name].read_bytes()
    line = complaint(capsys, script, name, *flags)
    assert re.match(rf"(checkpoints|results)/\S+: cannot be written \({os.strerror(errno.ENOSPC)}\)", line), line
    assert WRITERS[name].read_bytes() == before
    no_halves(Path("checkpoints"))


@pytest.mark.parametrize("name, limit", [("train_ddim.py", 100_000), ("train_extractor.py", 3_000_000),
                                         ("evaluation.py", 300), ("inference_ddim.py", 600)])
def test_a_disk_that_gets_full_within_a_file_is_told_and_no_half_is_left(trained, script, tiny_flags, capsys, name,
                                                                         limit):
    """The system's limit on the size of files stands for the full disk: writing fails with some bytes written."""
    resource = pytest.importorskip("resource")
    flags = INSPECT if name in ("evaluation.py", "inference_ddim.py") else tiny_flags(name)
    before = WRITERS[name].read_bytes()
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))
    try:
        line = complaint(capsys, script, name, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert re.search(r"(checkpoints|results)/\S+: cannot be written", line), line
    assert WRITERS[name].read_bytes() == before
    no_halves(Path("checkpoints"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind the superuser")
@pytest.mark.parametrize("name, folder", [("train_ddim.py", RUN), ("inference_ddim.py", Path("results/hazelnut"))])
def test_a_folder_without_permission_is_told(trained, script, tiny_flags, capsys, name, folder):
    folder.chmod(0o500)
    try:
        line = complaint(capsys, script, name, *(INSPECT if name == "inference_ddim.py" else tiny_flags(name)))
    finally:
        folder.chmod(0o700)
    assert str(folder) in line and ("not writable" in line or "cannot be written" in line)
