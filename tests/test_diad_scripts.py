"""train_diad.py, inference_diad.py and --method diad of train_tune_eval.py, through their command lines."""

import io
import json
import os
import re
import shutil
import signal
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from deep_files import colours, deepen, forget_intensity, png
from helpers import complaint, drawn, everything, json_of, make_category, rows_of, stamps
from PIL import Image

from dbad.checkpoints.weights import load_pickle
from dbad.data.intensity import AS_BEFORE
from dbad.families.diad import autoencoder as autoencoders
from dbad.families.diad import model, training
from dbad.families.diad.model import Diad, Size
from dbad.families.diad.storage import load_part
from dbad.files.names import DIAD_FILES
from dbad.report.results import listing_digest
from dbad.training import loop

MACHINE = "--dataset_path data --precision fp32 --device cpu --num_workers 0".split()
STEPS = ("--steps_latent 4 --latent_batch_size 2 --latent_steps_back 2 --extractor_layers 1 2 --feature_resolution 64 "
         "--holdout 0.3 --no_restoration").split() + MACHINE
CHAIN = ["--method", "diad", "--size", "tiny", "--autoencoder_steps", "1", *STEPS]
BOTH = ["--item", "all"]
MODEL, RUN = Path("checkpoints/all-diad-model"), Path("checkpoints/all-diad")


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    """Few channels, for the scripts and for the tests: the modules are the same for both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(autoencoders.SIZES, "tiny", autoencoders.Size((8, 8, 8, 8), 1, 4))
        patch.setitem(model.SIZES, "tiny", Size(128, (32, 32, 32, 32), 8, "tiny", (8, 8, 8, 8), 2))
        yield


@pytest.fixture
def both(store, made_once, script):
    """To work in and to spoil: two categories, their model and its results, as train_tune_eval.py leaves them.

    One of them has images of 12 bits, the other one of another size.
    """
    def make():
        make_category(make_category(Path("data"), "bolt", 5, 32), "nut", 8, 32)
        deepen(Path("data/bolt/train"))
        deepen(Path("data/bolt/test"))
        Image.fromarray(drawn(7, (40, 48))).save("data/nut/train/good/007.png")
        with redirect_stdout(io.StringIO()) as said:
            script("train_tune_eval.py", *BOTH, *CHAIN)
        store["said"] = said.getvalue()

    return made_once(make, "events.*")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of all networks, by names that begin with that of the network."""
    return {f"{part}.{key}": value for part in ("autoencoder", "unet", "guide", "prompt")
            for key, value in load_part(folder / f"{part}.safetensors").items()}


def changes(one: Path, other: Path) -> set[str]:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


# ------------------------------------------------------------------------------------------ what a run leaves

def test_the_run_folder_holds_every_promised_file(both):
    assert sorted(path.name for path in RUN.iterdir()) == [
        "autoencoder.safetensors", "build_arg_config.json", "calibration-bolt.json", "calibration-nut.json",
        "calibration.json", "diad_last.pt", "guide.safetensors", "log.jsonl", "model_config.json", "prompt.safetensors",
        "samples", "train_arg_config.json", "unet.safetensors"]
    options = json_of(RUN / "train_arg_config.json")
    assert (options["item"], options["method"], options["train_unet"]) == (["bolt", "nut"], "diad", "whole")
    assert (options["latent_max_timestep"], options["latent_start"]) == (200, 200)
    for path in (RUN, MODEL, RUN.with_name("all-diad-autoencoder")):        # all see images in the same way
        record = json_of(path / ("build_arg_config.json" if path == MODEL else "train_arg_config.json"))
        assert (record["intensity"], record["intensity_bits"]) == ("auto", 12)
    last = json.loads((RUN / "log.jsonl").read_text().splitlines()[-1])
    assert last["phase"] == "diad" and last["step"] == 4 and 0 < last["val_loss"] < 10
    picture, = (RUN / "samples").iterdir()
    assert Image.open(picture).size == (4 * 132 + 4, 3 * 152)    # image, auto-encoder, sample of 4 held-out images
    assert list((both / "logs/all-diad").glob("events.out.tfevents.*"))


def test_each_category_is_decided_by_its_own_thresholds(both):
    thresholds = {}
    for name, held_out in (("bolt", 2), ("nut", 2)):
        folder, calibration = Path(f"results/all-diad-{name}"), json_of(RUN / f"calibration-{name}.json")
        assert calibration["num_images"] == held_out
        assert len(rows_of(folder)) == json_of(folder / "metrics.json")["num_images"] == 3
        for row in rows_of(folder):
            assert int(row["decision"]) == (float(row["score"]) >= calibration["image_threshold"])
        assert "DiAD" in (folder / "report.html").read_text(encoding="utf-8")
        thresholds[name] = calibration["image_threshold"]
    assert thresholds["bolt"] != thresholds["nut"] and json_of(RUN / "calibration.json")["num_images"] == 4


def test_five_pictures_of_every_test_image_are_written(both):
    for name in ("bolt", "nut"):
        folder = Path(f"results/all-diad-{name}/log_image")
        expected = {f"{image}-{kind}" for image in ("good_000", "crack_000", "crack_001") for kind in (
            "input.jpg", "reconstruction.jpg", "features.jpg", "samples.jpg", "heatmap.png")}
        assert {path.name for path in folder.iterdir()} == expected
        assert all(Image.open(path).size == (128, 128) for path in folder.iterdir())
    shown = np.array(Image.open(folder / "crack_000-input.jpg"), float)
    asked = Image.open("data/nut/test/crack/000.png").resize((128, 128), Image.Resampling.BILINEAR)
    assert np.abs(shown - np.array(asked)).mean() < 8
    parts = [np.array(Image.open(folder / f"crack_000-{kind}.jpg"), float) for kind in ("reconstruction", "samples")]
    assert np.abs(parts[0] - parts[1]).mean() > 1


def test_seven_metrics_of_every_category_and_their_mean_are_printed_and_saved(both, store):
    lines = store["said"].splitlines()
    place = next(number for number, line in enumerate(lines) if "Image AUROC" in line)
    assert re.split(r"\s{2,}", lines[place].strip()) == [
        "Image AUROC", "Image AP", "Image F1-max", "Pixel AUROC", "Pixel AP", "Pixel F1-max", "AUPRO 0.3"]
    rows = {line.split()[0]: [float(word) for word in line.split()[1:]] for line in lines[place + 1:place + 4]}
    assert rows.keys() == {"bolt", "nut", "mean"} and len(rows["mean"]) == 7
    for name in ("bolt", "nut"):
        found = json_of(f"results/all-diad-{name}/metrics.json")
        assert rows[name][0] == pytest.approx(100 * found["image"]["auroc"], abs=0.06)
        assert rows[name][6] == pytest.approx(100 * found["pixel"]["aupro_0.3"], abs=0.06)
    assert rows["mean"] == pytest.approx(np.mean([rows["bolt"], rows["nut"]], axis=0).tolist(), abs=0.11)
    assert [row["item"] for row in rows_of("results", "summary.csv")] == ["bolt", "nut"]


def test_images_of_several_sizes_are_resized_and_that_is_said(both, store):
    assert "nut: images of 32x32, 48x40 px are resized to 128x128 px, whatever their shape" in store["said"]
    assert "bolt: images of" not in store["said"]


# ------------------------------------------------------------------------------------------ training

def test_a_finished_run_is_not_repeated(both, script, capsys, monkeypatch):
    """Since the data have moved it is looked at once more, but nothing is trained again."""
    def never(*args):
        raise AssertionError("a finished run was trained on")

    with monkeypatch.context() as patch:
        patch.setattr(Diad, "forward", never)
        before = (RUN / "unet.safetensors").read_bytes()
        with pytest.raises(AssertionError):
            script("train_diad.py", *BOTH, *STEPS, "--model", MODEL, "--run_id", "new")
        patch.setattr(loop, "_loop", never)
        patch.setattr(training, "latent_loss", never)
        script("train_tune_eval.py", *BOTH, *CHAIN, "--skip_evaluation")
        assert (RUN / "unet.safetensors").read_bytes() == before
        capsys.readouterr()
        files = everything()
        script("train_tune_eval.py", *BOTH, *CHAIN, "--skip_evaluation")
        assert "checkpoints/all-diad is finished" in capsys.readouterr().out and everything() == files
    expected = (both / "results/all-diad-nut/scores.csv").read_bytes()
    script("inference_diad.py", "--item", "nut", "--resume_path", "checkpoints/all-diad/", *MACHINE)
    assert Path("results/all-diad-nut/scores.csv").read_bytes() == expected


def test_a_run_from_before_there_was_an_intensity_is_finished_too(both, script, capsys):
    """What it was built of had none either. Where the data lie is not what is asked here."""
    forget_intensity(*Path("checkpoints").rglob("*arg_config.json"), *RUN.glob("calibration*.json"))
    assert training.autoencoders(MODEL) == AS_BEFORE.settings()
    record = json_of(RUN / "train_arg_config.json")
    good = [path for item in ("bolt", "nut") for path in sorted(Path("data", item, "train/good").iterdir())]
    record["data"] = listing_digest([MODEL / name for name in (*DIAD_FILES, "model_config.json")] + good)
    (RUN / "train_arg_config.json").write_text(json.dumps(record))
    script("train_tune_eval.py", *BOTH, *CHAIN, "--skip_evaluation")
    assert "checkpoints/all-diad is finished" in capsys.readouterr().out
    (MODEL / "build_arg_config.json").unlink()
    assert training.autoencoders(MODEL) == {}


DECODER = [*BOTH, *STEPS, "--model", MODEL, "--train_unet", "decoder", "--latent_batch_size", 1, "--latent_accumulate",
           2, "--steps_latent", 3, "--run_id", "new"]
NEW = Path("checkpoints/new")


@pytest.fixture
def unbroken(both, script) -> Path:
    """A run in which the decoder of the U-Net has learnt, only to be read."""
    if not (both / "unbroken").exists():
        script("train_diad.py", *DECODER)
        shutil.move(NEW, both / "unbroken")
    return both / "unbroken"


def test_stopped_and_given_again_it_ends_with_the_weights_of_an_unbroken_run(unbroken, script, monkeypatch):
    """Stopped within the second step, which has two batches."""
    forward, seen = Diad.forward, []

    def interrupted(self, *inputs):
        seen.extend([1] * torch.is_grad_enabled())
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(Diad, "forward", interrupted)
        with pytest.raises(SystemExit):
            script("train_diad.py", *DECODER)
    assert load_pickle(NEW / "diad_last.pt")["step"] == 2 and not (NEW / "unet.safetensors").exists()
    script("train_diad.py", *DECODER)
    assert changes(NEW, unbroken) == set()
    for name in ("calibration.json", "calibration-nut.json"):
        assert json_of(NEW / name)["scores"] == json_of(unbroken / name)["scores"]


def test_only_the_guide_and_the_decoder_change_and_only_they_are_in_the_last_state(unbroken):
    changed = changes(unbroken, MODEL)
    learning = ("guide.", "unet.up_blocks.", "unet.conv_norm_out.", "unet.conv_out.")
    assert all(name.startswith(learning) for name in changed)
    for start in (*learning[1:], "guide.embedding.", "guide.fusion.", "guide.controlnet.controlnet_mid_block.",
                  "guide.controlnet.controlnet_down_blocks.11."):
        assert any(name.startswith(start) for name in changed), start
    state = load_pickle(unbroken / "diad_last.pt")
    assert changed <= state["model"].keys()
    assert {name for name in state["model"] if not name.startswith(learning)} == {"prompt"}
    assert len(state["ema"]["shadow_params"]) == len(state["optimizer"]["state"]) < len(state["model"])


def test_a_model_of_random_weights_learns_as_a_whole(both):
    changed = changes(RUN, MODEL)
    assert any(name.startswith("unet.down_blocks.") for name in changed)
    assert not any(name.startswith(("autoencoder.", "prompt.")) for name in changed)


def test_without_steps_a_model_is_calibrated_as_it_is(both, script):
    """As published weights are; the preset follows from the size of the networks."""
    script("train_diad.py", "--item", "nut", *STEPS, "--steps_latent", 0, "--model", MODEL, "--run_id", "new")
    assert changes(Path("checkpoints/new"), MODEL) == set()
    assert json_of("checkpoints/new/calibration.json")["num_images"] == 2
    assert json_of("checkpoints/new/train_arg_config.json")["preset"] == "demo"


def test_running_out_of_memory_names_what_to_change(both, script, capsys, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Diad, "forward", full)
    line = complaint(capsys, script, "train_diad.py", *BOTH, *STEPS, "--model", MODEL, "--run_id", "new")
    assert ("ran out of memory with --latent_batch_size 2, --latent_accumulate 1; try --latent_batch_size 1 "
            "--latent_accumulate 2, or --gradient_checkpointing, or --precision bf16, or a model of") in line


# ------------------------------------------------------------------------------------------ inspection

def test_a_category_that_was_not_learnt_is_decided_by_the_thresholds_of_all_and_a_warning_says_so(both, script, capsys):
    shutil.copytree("data/bolt", "data/screw")
    script("inference_diad.py", "--item", "screw", "--run_id", "all-diad", *MACHINE)
    assert "was not trained on screw, only on bolt, nut" in capsys.readouterr().err
    threshold = json_of(RUN / "calibration.json")["image_threshold"]
    assert all(int(row["decision"]) == (float(row["score"]) >= threshold) for row in rows_of("results/all-diad-screw"))


# ------------------------------------------------------------------------------------------ what a user gets wrong

def random_autoencoder():
    content = json_of(MODEL / "build_arg_config.json") | {"autoencoder": None}
    (MODEL / "build_arg_config.json").write_text(json.dumps(content))


ONE = f"{' '.join(CHAIN)} --item bolt"
MISTAKES = {
    "no model": ("train_diad.py", "--run_id new", "checkpoints/diad: has no model_config.json; build a model there"),
    "no auto-encoder": ("train_diad.py", "--run_id new --model checkpoints/all-diad-model",
                        "checkpoints/all-diad-model/autoencoder.safetensors: no such file",
                        lambda: (MODEL / "autoencoder.safetensors").unlink()),
    "an auto-encoder that was never trained": (
        "train_diad.py", "--run_id new --model checkpoints/all-diad-model", "its auto-encoder has random weights",
        random_autoencoder),
    "the model itself as the run": ("train_diad.py", "--run_id all-diad-model --model checkpoints/all-diad-model",
                                    "--model checkpoints/all-diad-model: is also the run folder"),
    "the run of another script": ("train_diad.py", "--run_id all-diad-autoencoder --model checkpoints/all-diad-model",
                                  "a run of finetune_autoencoder.py, not of train_diad.py"),
    "another length than before": ("train_diad.py", "--model checkpoints/all-diad-model --steps_latent 5",
                                   "was trained with --steps_latent 4, now it is 5"),
    "more noise than was trained": ("train_diad.py",
                                    "--run_id new --model checkpoints/all-diad-model --latent_start 201",
                                    "--latent_start 201: beyond the 200 timesteps of --latent_max_timestep"),
    "another intensity than the auto-encoder's": (
        "train_diad.py", "--run_id new --model checkpoints/all-diad-model --intensity full",
        "--intensity full: the auto-encoder of checkpoints/all-diad-model was trained with auto; expected the same"),
    "an image beyond the auto-encoder's": (
        "train_diad.py", "--run_id new --model checkpoints/all-diad-model",
        "data/nut/train/good/000.png: largest value 16383, but the run is trained on images of 12 bits",
        lambda: Path("data/nut/train/good/000.png").write_bytes(png(colours(14)))),
    "another intensity than the run's": (
        "inference_diad.py", "--item nut --run_id all-diad --intensity full",
        "--intensity full: the run checkpoints/all-diad was trained with"),
    "an image beyond the run's": (
        "inference_diad.py", "--item nut --run_id all-diad",
        "data/nut/test/good/000.png: largest value 16383, but the run is trained on images of",
        lambda: Path("data/nut/test/good/000.png").write_bytes(png(colours(14)))),
    "tiles": ("train_diad.py", "--patching --model checkpoints/all-diad-model",
              "--patching: latents are those of whole"),
    "a name for weights": ("train_diad.py", "--diffusion_checkpoint_name a.pt", "--diffusion_checkpoint_name a.pt: a "
                           "model of this family is several files"),
    "no such category": ("train_diad.py", "--item bold --model checkpoints/all-diad-model",
                         "--item bold: no such category"),
    "an unknown run": ("inference_diad.py", "--item nut --run_id new",
                       "checkpoints/new: no run of train_diad.py; train it first"),
    "an unknown path": ("inference_diad.py", "--resume_path val_ckpt", "--resume_path val_ckpt: no such folder"),
    "a published file": ("inference_diad.py", "--resume_path data/bolt/train/good/000.png",
                         "a file; expected a run folder of train_diad.py. For published weights, first run"),
    "two names of a run": ("inference_diad.py", "--run_id all-diad --resume_path checkpoints/all-diad",
                           "expected one of them"),
    "the run of an auto-encoder": ("inference_diad.py", "--resume_path checkpoints/all-diad-autoencoder",
                                   "a run of finetune_autoencoder.py, not of train_diad.py"),
    "a run of DiAD with LafitE's options": (
        "inference_lafite.py", "--item bolt --run_id all-diad --neighbours 3",
        "--neighbours 3: checkpoints/all-diad is a run of --method diad, which has no such option"),
    "no test images": ("inference_diad.py", "--item nut --run_id all-diad", "data/nut: no test images",
                       lambda: shutil.rmtree("data/nut/test")),
    "another blur than calibrated": ("inference_diad.py", "--item bolt --run_id all-diad --map_sigma 3",
                                     "all-diad/calibration-bolt.json was measured with 5.0; run train_diad.py"),
    "images of two categories": ("inference_diad.py", "--images data/nut/test/good", "--images: expected one --item"),
    "an option of another method": ("train_tune_eval.py", "--method diad --recon_weight 3",
                                    "--recon_weight: not an option of --method diad"),
    "an option of this method alone": ("train_tune_eval.py", "--size tiny", "--size: not an option of --method ddim"),
    "a promise that cannot be made": ("train_tune_eval.py", f"{ONE} --run_id new --false_alarm_rate 0.1",
                                      "held-out good images of bolt can promise no less than"),
    "an extractor that is none": ("train_tune_eval.py", f"{ONE} --run_id new --extractor nosuchnet",
                                  "--extractor nosuchnet: neither"),
    "a check of new images that are none": ("train_tune_eval.py", f"{ONE} --run_id new --drift_check --dry_run",
                                            "--drift_check: works only with --images"),
    "no Stable Diffusion": ("train_tune_eval.py", "--item nut --method diad --size sd15 --run_id new",
                            "--size sd15: expected --stable_diffusion with sd15"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line_and_leaves_all_as_it_was(both, script, capsys, name):
    which, flags, says, *spoil = MISTAKES[name]
    for change in spoil:
        change()
    before = everything()
    words = STEPS if which == "train_diad.py" else MACHINE
    assert says in complaint(capsys, script, which, *BOTH, *words, *flags.split())
    assert everything() == before


def test_a_model_that_was_built_otherwise_is_left_as_it_was(both, script, capsys):
    before = stamps("checkpoints")
    with pytest.raises(SystemExit) as stop:
        script("train_tune_eval.py", *BOTH, *CHAIN, "--autoencoder_steps", 2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert "2 of 2 runs failed: all-diad-bolt (checkpoints/all-diad-model: contains a model" in last
    assert stamps("checkpoints") == before


def test_a_category_that_cannot_be_inspected_spares_the_others(both, script, capsys):
    Path("data/nut/test/good/000.png").write_bytes(png(colours(14)))
    shutil.rmtree("results")
    with pytest.raises(SystemExit) as stop:
        script("inference_diad.py", *BOTH, *MACHINE)
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert "1 of 2 runs failed: all-diad-nut (data/nut/test/good/000.png: largest value 16383" in last
    assert len(rows_of("results/all-diad-bolt")) == 3 and not Path("results/all-diad-nut/scores.csv").exists()
    assert [row["item"] for row in rows_of("results", "summary.csv")] == ["bolt", "nut"]
