"""finetune_autoencoder.py, through its command line: what it writes, how it goes on, what it refuses."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers import json_of, make_category, one_line
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import finetune_autoencoder
from dbad.data.images import read_image, to_float, to_uint8
from dbad.errors import UserError
from dbad.families.diad import autoencoder as autoencoders
from dbad.families.diad.adversarial import AdversarialAutoencoder
from dbad.families.diad.autoencoder import (
    SIZES,
    Size,
    build_autoencoder,
    load_autoencoder,
    save_autoencoder,
    to_imagenet,
)
from dbad.options.command_line import parse

RUN = Path("checkpoints/autoencoder")
FLAGS = ("--item all --dataset_path data --size tiny --resolution 32 --batch_size 2 --accumulate 2 --num_steps 6 "
         "--epoch_steps 2 --discriminator_start 3 --perceptual none --holdout 0.3 --num_workers 0 --precision fp32 "
         "--device cpu").split()
NAME = "finetune_autoencoder.py"


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    """Few channels, for the script and for the tests: the module is the same for both."""
    for name in SIZES:
        monkeypatch.setitem(autoencoders.SIZES, name, Size((8, 8, 16, 16), 1, 4) if name != "middle" else
                            Size((8, 8, 8, 8), 1, 4))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with data of two categories, of 4 and 9 images, and a finished run on them; only to be read."""
    folder = tmp_path_factory.mktemp("autoencoder")
    make_category(folder / "data", "bolt", 4, 32)
    make_category(folder / "data", "nut", 9, 32)
    before, small = Path.cwd(), SIZES["tiny"]
    os.chdir(folder)
    SIZES["tiny"] = Size((8, 8, 16, 16), 1, 4)
    try:
        run()
    finally:
        os.chdir(before)
        SIZES["tiny"] = small
    return folder


@pytest.fixture
def place(finished, tmp_path, monkeypatch):
    """The data alone, in a folder to work in."""
    shutil.copytree(finished / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words) -> Path:
    """The script's `run` with the options of a command line; the last of two equal flags counts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return finetune_autoencoder.run(parse(finetune_autoencoder.Options, [*FLAGS, *map(str, words)]))
    finally:
        torch.set_num_threads(threads)


def log(folder: Path = RUN) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_weights(one: Path, other: Path) -> bool:
    return (one / "autoencoder.safetensors").read_bytes() == (other / "autoencoder.safetensors").read_bytes()


# What a run leaves

def test_the_command_line_trains_and_says_where_it_is(place, finished, script, capsys):
    """With the default perceptual network, which comes with its weights."""
    flags = [word for word in FLAGS if word not in ("--perceptual", "none")]
    script(NAME, *flags, "--num_steps", 2)
    said = capsys.readouterr().out
    assert "bolt nut from data; size tiny" in said and said.endswith(f"The auto-encoder is in {RUN}\n")
    assert "held-out reconstruction loss" in said and "mean difference of pixels 0." in said
    assert [line["perceptual"] > 0.1 for line in log()] == [True]
    load_autoencoder(RUN)


def test_the_run_folder_holds_every_promised_file(finished):
    folder = finished / RUN
    assert sorted(path.name for path in folder.iterdir()) == [
        "autoencoder.safetensors", "autoencoder_last.pt", "log.jsonl", "model_config.json", "report.json", "samples",
        "train_arg_config.json"]
    options = json_of(folder / "train_arg_config.json")
    assert options["item"] == ["bolt", "nut"] and options["perceptual_weight"] == 0 and options["size"] == "tiny"
    state = torch.load(folder / "autoencoder_last.pt", weights_only=True)
    assert state["step"] == 6 and state["settings"]["accumulate"] == 2
    assert "intensity" not in state["settings"]     # the images tell it, also of a training from before the option
    for epoch in range(4):
        assert Image.open(folder / "samples" / f"epoch_{epoch}.png").height > 2 * 128
    model = load_autoencoder(folder)
    assert model.config.sample_size == 32 and all(v.isfinite().all() for v in model.state_dict().values())


def test_the_report_says_how_well_held_out_images_are_reconstructed(finished):
    report, lines = json_of(finished / RUN / "report.json"), log(finished / RUN)
    assert report["val_loss"] == pytest.approx(min(line["val_loss"] for line in lines), rel=1e-5)
    assert report["val_loss"] < report["val_loss_before"] and report["last_epoch"] == 3
    assert set(report["categories"]) == {"bolt", "nut"}
    parts = [report["categories"][name]["mean_abs_error"] for name in ("bolt", "nut")]
    assert report["val_mean_abs_error"] == pytest.approx(sum(parts) / 2) and 0 < report["val_mean_abs_error"] < 1


def test_the_log_has_every_term_and_the_discriminator_from_its_step_on(finished):
    """It comes in at step 3 of 6; an epoch has two steps."""
    lines = log(finished / RUN)
    assert [(line["phase"], line["epoch"], line["step"]) for line in lines] == [
        ("autoencoder", 1, 2), ("autoencoder", 2, 4), ("autoencoder", 3, 6)]
    for name in ("adaptive_weight", "discriminator"):
        assert [line[name] > 0 for line in lines] == [False, True, True], name
    assert all(line["loss"] > line["kl"] * 1e-6 and 0 < line["l1"] < 3 for line in lines)
    assert [line["learning_rate"] < 2e-3 for line in lines] == [True] * 3 and lines[-1]["learning_rate"] == 0


def test_tensorboard_shows_the_terms_and_images_above_their_reconstructions(finished):
    shown: dict[str, list] = {}
    for file in sorted((finished / "logs" / "autoencoder").iterdir()):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"] + events.Tags()["images"]:
            shown[tag] = shown.get(tag, []) + (events.Scalars(tag) if tag in events.Tags()["scalars"]
                                               else events.Images(tag))
    assert {f"autoencoder/{term}" for term in ("l1", "kl", "generator", "discriminator", "val_loss")} <= shown.keys()
    assert sorted((image.step, image.height) for image in shown["autoencoder/samples"]) == [
        (0, 304), (2, 304), (4, 304), (6, 304)]


def test_scaled_latents_of_the_training_images_have_unit_variance(finished):
    """Their deviation is little, so that the means tell it; of the 13 images, the held-out ones count little too."""
    model = load_autoencoder(finished / RUN)
    files = sorted((finished / "data").glob("*/train/good/*.png"))
    images = torch.stack([to_float(to_uint8(read_image(file))) for file in files])
    with torch.no_grad():
        posterior = model.encode(to_imagenet(images)).latent_dist
    spread = (posterior.mean.var() + posterior.var.mean()).sqrt() * model.config.scaling_factor
    assert float(spread) == pytest.approx(1, rel=0.1)
    assert json_of(finished / RUN / "report.json")["latent_scale"] == model.config.scaling_factor


def test_dry_run_shows_the_options_and_writes_nothing(place, capsys):
    run("--dry_run")
    said = capsys.readouterr().out
    assert "accumulate = 2" in said and "checkpoints/autoencoder/autoencoder.safetensors" in said
    assert [path.name for path in place.iterdir()] == ["data"]


# Gone on with

@pytest.mark.parametrize("batch", [1, 4, 8])
def test_stopped_anywhere_and_given_again_it_ends_with_the_weights_of_an_unbroken_run(batch, place, finished,
                                                                                      monkeypatch):
    """Within a step, before the discriminator comes in, and after; Ctrl-C ends the step in progress."""
    forward, seen = AdversarialAutoencoder.forward, []

    def interrupted(self, inputs):
        seen.append(1)
        if len(seen) == batch:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, inputs)

    with monkeypatch.context() as patched:
        patched.setattr(AdversarialAutoencoder, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert torch.load(RUN / "autoencoder_last.pt", weights_only=True)["step"] == (batch + 1) // 2
    assert not (RUN / "model_config.json").exists()
    run()
    assert same_weights(RUN, finished / RUN)
    assert json_of(RUN / "report.json") == json_of(finished / RUN / "report.json")
    assert [line["step"] for line in log()] == [2, 4, 6]


def test_a_finished_run_is_not_repeated_and_other_options_are_refused(place, finished, monkeypatch):
    for name in ("checkpoints", "logs"):
        shutil.copytree(finished / name, name)

    def never(self, inputs):
        raise AssertionError("a finished run was trained on")

    monkeypatch.setattr(AdversarialAutoencoder, "forward", never)
    run("--gradient_checkpointing")         # says how, and not what
    assert same_weights(RUN, finished / RUN)
    with pytest.raises(UserError, match="was trained with --kl_weight 1e-06, now it is 0.5") as error:
        run("--kl_weight", 0.5)
    one_line(error)
    with pytest.raises(UserError, match="was trained with --item"):
        run("--item", "nut")


def test_a_training_begins_with_the_weights_of_a_run_folder(place, finished, monkeypatch):
    """Whose size need not be given."""
    shutil.copytree(finished / RUN, "first")
    monkeypatch.setitem(globals(), "FLAGS", [word for word in FLAGS if word not in ("--size", "tiny")])
    run("--start", "first", "--num_steps", 1)
    report = json_of(RUN / "report.json")
    assert report["val_loss_before"] == pytest.approx(json_of(Path("first/report.json"))["val_loss"], rel=1e-5)
    assert json_of(RUN / "train_arg_config.json")["size"] == "tiny"


def test_the_published_scale_is_kept(place):
    save_autoencoder(build_autoencoder("tiny", 32, scale=autoencoders.PUBLISHED_SCALE), Path("published"))
    run("--start", "published", "--num_steps", 1)
    assert load_autoencoder(RUN).config.scaling_factor == autoencoders.PUBLISHED_SCALE


def test_training_stops_when_the_held_out_loss_does_not_fall(place):
    """A learning rate that changes nothing: the weights from before training stay the best."""
    before = {key: value.clone() for key, value in first_weights().items()}
    run("--learning_rate", 1e-30, "--patience", 1, "--num_steps", 20)
    report = json_of(RUN / "report.json")
    assert (report["best_epoch"], report["last_epoch"]) == (0, 1)
    assert report["val_loss"] == pytest.approx(report["val_loss_before"])
    after = load_file(RUN / "autoencoder.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in after)


def first_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_autoencoder("tiny", 32).state_dict()


# What is refused

def foreign_run(place):
    RUN.mkdir(parents=True)
    (RUN / "train_arg_config.json").write_text('{"item": "bolt", "preset": "demo"}')


def broken_start(place):
    Path("model.ckpt").write_bytes(b"PK nothing")


def start_folder(place):
    save_autoencoder(build_autoencoder("middle", 32), Path("middle"))


def nothing(place):
    pass


@pytest.mark.parametrize("words, says, spoil", [
    ("--item bolt nuts", "--item nuts: no such category in data; did you mean nut?", nothing),
    ("--dataset_path nowhere", "--dataset_path nowhere: expected a folder, found nothing", nothing),
    ("--start model.ckpt", "--start model.ckpt: no such file or folder", nothing),
    ("--start model.ckpt", "model.ckpt: not a checkpoint, or a truncated one", broken_start),
    ("--start data", "data: no trained auto-encoder; train it first", nothing),
    ("--start middle", "--size tiny: --start middle is middle; expected the same, or no --size", start_folder),
    ("", f"--run_id autoencoder: {RUN} is the run of another script; expected a new name", foreign_run),
    ("--resolution 36", "--resolution 36: expected a multiple of 8, at least 32", nothing),
    ("--resolution 16", "--resolution 16: expected a multiple of 8, at least 32", nothing),
    ("--accumulate 0", "--accumulate 0: expected at least 1", nothing),
    ("--patience -1", "--patience -1: expected at least 0", nothing),
    ("--learning_rate 2", "--learning_rate 2.0: expected a number between 0 and 1", nothing),
    ("--batch_sise 4", "--batch_sise: no such option; did you mean --batch_size?", nothing),
    ("--perceptual lpips", "--perceptual lpips: the package lpips is not installed", nothing)])
def test_a_mistake_is_one_line_and_nothing_is_written(words, says, spoil, place, script, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    spoil(place)
    there = sorted(place.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        script(NAME, *FLAGS, *words.split())
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and says in lines[0], lines
    assert sorted(place.rglob("*")) == there


@pytest.mark.parametrize("words, says", [
    ("", "--batch_size 2, --accumulate 2, --resolution 32; try --batch_size 1 --accumulate 4, or "
         "--gradient_checkpointing, or --precision bf16, or a smaller --resolution"),
    ("--batch_size 1 --gradient_checkpointing", "--resolution 32; try --precision bf16, or a smaller --resolution")])
def test_running_out_of_memory_names_what_to_change(words, says, place, monkeypatch):
    def full(self, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AdversarialAutoencoder, "forward", full)
    with pytest.raises(UserError) as error:
        run(*words.split())
    assert says in one_line(error)


def test_checkpointing_changes_nothing_but_memory(place, finished):
    """Under a constant learning rate, as the log shows."""
    shorter = ("--num_steps", 3, "--epoch_steps", 1, "--schedule", "constant")
    run("--gradient_checkpointing", "--run_id", "with", *shorter)
    run("--run_id", "without", *shorter)
    assert [line["learning_rate"] for line in log(Path("checkpoints/with"))] == [2e-3] * 3
    one, other = (load_file(Path("checkpoints") / name / "autoencoder.safetensors") for name in ("with", "without"))
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-5)
