"""The first hour of a new user: the commands of the README, word by word, in its order, at a tiny size."""

import re
import shlex
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from helpers import json_of, rows_of, save_drawn

from dbad.data.demo import draw
from dbad.families.ddim.options import DdimTraining
from dbad.fields import default_of, fields_of

README = (ROOT / "README.md").read_text(encoding="utf-8")
# What makes a command tiny is all that is added to it.
SMALL = {"ddim": [*TINY, "--epochs_extractor", 0],
         "knn": ("--preset demo --feature_resolution 32 --grid 4 --extractor_layers 0 1 --bank_mb 0.01 --no_tune "
                 "--feature_cache cache").split()}
FEW = "--steps_features 2 --feature_channels 32 --components 8 --feature_batch_size 4".split()
MACHINE = ["--device", "cpu", "--precision", "fp32", "--num_workers", "0"]


def commands(heading: str) -> list[list[str]]:
    """The words of the script commands that a chapter of the README gives, in their order, without `python`."""
    chapter = README.split(f"\n## {heading}\n")[1].split("\n## ")[0].replace("\\\n", " ")
    lines = re.findall(r"^    (?:.*&& )?python ([a-z_]+\.py .*)$", chapter, re.MULTILINE)
    return [shlex.split(line.split("  (")[0]) for line in lines]


@pytest.fixture
def place(tmp_path, monkeypatch, script):
    """An empty folder; the demo data are tiny. Gives a function that runs a command of the README there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DBAD_DEMO_DIR", str(tmp_path / "demo"))
    monkeypatch.setattr(draw, "write_demo", partial(draw.write_demo, size=16, num_train=8, num_test_good=2,
                                                    num_per_defect=1))

    def run(words: list[str], *more: object) -> None:
        script(*words, *more, *MACHINE)
    return run


def test_the_demo_ends_with_what_the_readme_shows(place, capsys):
    first, knn, lafite = commands("Start")
    assert first == ["train_tune_eval.py", "--item", "hazelnut"]
    assert knn == [*first, "--method", "knn"] and lafite == [*first, "--method", "lafite"]
    place(first, *SMALL["ddim"])
    place(knn, *SMALL["knn"])
    said = capsys.readouterr().out.splitlines()
    shown = re.findall(r"^    (hazelnut.*|Everything.*)$", README.split("\n## Start\n")[1].split("\n## ")[0], re.M)
    assert len(shown) == 3
    for line in shown:      # the numbers are another training's
        form = re.sub(r"\d+(\\\.\d+)?", r"[\\d.]+", re.escape(line))
        assert any(re.fullmatch(form, each) for each in said), line
    for name in ("hazelnut", "hazelnut-knn"):
        assert Path("results", name, "report.html").is_file()


def test_thirty_photographs_are_inspected_and_the_threshold_is_moved(place, capsys):
    for number in range(30):
        save_drawn(Path("photos") / f"IMG_{number:04}.jpg", number, 32)
    for number in range(4):
        save_drawn(Path("new") / f"{number}.jpg", 50 + number, 32)
    train, inspect, again, *_ = commands("Your data")
    place(train, *SMALL["knn"])
    said = capsys.readouterr().out
    assert "python " + shlex.join(inspect).replace("--images new", "--images PATH") in said
    place(inspect)
    before = [float(row["score"]) for row in rows_of("results/bolt-knn-images")]
    place(again)
    after = [float(row["score"]) for row in rows_of("results/bolt-knn-images")]
    assert before == after and len(after) == 4
    assert json_of("results/bolt-knn-images/options.json")["options"]["false_alarm_rate"] == 0.4
    decisions = sum(row["decision"] == "1" for row in rows_of("results/bolt-knn-images"))
    assert decisions >= sum(row["decision"] == "1" for row in rows_of("results/bolt-knn-images.1"))
    assert "4 images: " in capsys.readouterr().out


@pytest.mark.parametrize("method", ["ddim", "lafite"])
def test_two_photographs_are_enough_for_a_search_too(method, place, capsys):
    """One to train and to tune on, one to calibrate with."""
    for number in range(2):
        save_drawn(Path("photos") / f"{number}.jpg", number, 32)
    small = SMALL[method] if method == "ddim" else [*SMALL["knn"], *FEW]
    place(["train_tune_eval.py", "--item", "bolt", "--dataset_path", "photos", "--method", method],
          *[word for word in small if word not in ("--no_tune", "--no_restoration")], "--tune_minutes", 0.01)
    said = capsys.readouterr().out
    assert "tuned on " in said and "1 held-out good images; image threshold" in said


def test_the_settings_beneath_the_picture_are_those_of_the_preset():
    px, steps, batch = map(int, re.search(
        r"preset `demo`: (\d+) px, (\d+) training steps\s+of batch (\d+), seed 0", README).groups())
    fields = fields_of(DdimTraining)
    assert [default_of(fields[name], "demo") for name in ("resolution", "steps_diffusion", "batch_size")] == [
        px, steps, batch]


def test_every_command_of_the_readme_names_options_that_there_are():
    """Whatever the command does: its flags are those of the script."""
    import importlib

    import train_tune_eval
    from dbad.families.registry import FAMILIES
    from dbad.options.command_line import flag_value, flags_of, given_flags
    found = 0
    for heading in re.findall(r"^## (.*)$", README, re.MULTILINE):
        for name, *words in commands(heading):
            if name == "train_tune_eval.py":
                options = train_tune_eval.options_of(FAMILIES[flag_value(words, "--method") or "ddim"])
            else:
                options = importlib.import_module(name.removesuffix(".py")).Options
            assert set(given_flags(words)) <= flags_of(options), (name, words)
            found += 1
    assert found > 12
