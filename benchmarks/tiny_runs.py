"""Tiny runs of every method: the commands that make them, what an unbroken training leaves, and comparisons of runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dbad.data.demo import draw

MACHINE = ["--device", "cpu", "--precision", "fp32", "--num_workers", "0"]
DATA = ["--dataset_path", "data"]
FEATURES = ("--preset demo --feature_resolution 32 --grid 4 --extractor_layers 0 1 --bank_mb 0.01 --components 8 "
            "--feature_channels 32 --steps_features 12 --feature_batch_size 4 --holdout 0.25 --feature_cache cache "
            "--no_tune --discriminator_contrib 0 --edit_contrib 1 --denoise_contrib 0.5").split()
PIXELS = ("--preset demo --resolution 16 --channels 32 32 --steps_diffusion 6 --save_n_epochs 1 --epochs_extractor 1 "
          "--feature_resolution 32 --steps_to_regenerate 2 --holdout 0.25 --no_tune").split()
ENCODER = ("--size tiny --resolution 32 --num_steps 8 --epoch_steps 4 --batch_size 4 --holdout 0.25 --perceptual none "
           "--patience 0").split()
LATENTS = ("--method diad --size tiny --autoencoder_steps 1 --steps_latent 2 --latent_batch_size 2 "
           "--latent_steps_back 2 --extractor_layers 1 2 --feature_resolution 64 --holdout 0.25").split()


def without(words: Sequence[str], *names: str) -> list[str]:
    """The words without these options and their values."""
    kept, skipping = [], False
    for word in words:
        skipping = word in names or (skipping and not word.startswith("--"))
        if not skipping:
            kept.append(word)
    return kept


# What leaves finished runs, and what is done with them, each a command that succeeds.
HAZELNUT = ["--item", "hazelnut", *DATA, *MACHINE]
FINISH = {
    "ddim": ["train_tune_eval.py", *HAZELNUT, *PIXELS],
    "lafite": ["train_tune_eval.py", "--method", "lafite", *HAZELNUT, *FEATURES],
    "knn": ["train_tune_eval.py", "--method", "knn", *HAZELNUT, *without(
        FEATURES, "--components", "--feature_channels", "--steps_features", "--feature_batch_size",
        "--discriminator_contrib", "--denoise_contrib", "--edit_contrib")],
    "encoder": ["finetune_autoencoder.py", *HAZELNUT, *ENCODER],
    "diad": ["train_tune_eval.py", *HAZELNUT, *LATENTS],
}
COMMANDS = {
    "ddim": [["train_ddim.py", *HAZELNUT, *without(PIXELS, "--epochs_extractor", "--no_tune", "--feature_resolution")],
             ["train_extractor.py", *HAZELNUT, "--epochs_extractor", "1", "--feature_resolution", "32"],
             ["evaluation.py", *HAZELNUT], ["inference_ddim.py", *HAZELNUT],
             ["inference_ddim.py", *HAZELNUT, "--images", "data/hazelnut/test/good"], FINISH["ddim"]],
    "lafite": [["train_lafite.py", "--method", "lafite", *HAZELNUT, *FEATURES],
               ["inference_lafite.py", *HAZELNUT, "--run_id", "hazelnut-lafite"],
               ["inference_lafite.py", *HAZELNUT, "--run_id", "hazelnut-lafite", "--images", "data/hazelnut/test/good"],
               FINISH["lafite"]],
    "knn": [["inference_lafite.py", *HAZELNUT, "--run_id", "hazelnut-knn"], FINISH["knn"]],
    "encoder": [FINISH["encoder"]],
    "diad": [["inference_diad.py", *HAZELNUT], FINISH["diad"],
             ["build_diad.py", "--random", "--size", "tiny", "--autoencoder", "checkpoints/autoencoder", "--out",
              "checkpoints/other"]],
}
FOLDERS = {"ddim": ["hazelnut"], "lafite": ["hazelnut-lafite"], "knn": ["hazelnut-knn"], "encoder": ["autoencoder"],
           "diad": ["hazelnut-diad", "hazelnut-diad-model", "hazelnut-diad-autoencoder"]}


class Unbroken(NamedTuple):
    """A training that nobody disturbed: where it lies, and how long it took."""

    folder: Path
    seconds: float


TRAININGS = (COMMANDS["lafite"][0], FINISH["encoder"])
_unbroken: dict[int, Unbroken] = {}


def prepare(folder: Path, run: Callable) -> Path:
    """Draw a tiny data set and finish a run of every method on it, once for all cases; returns the folder."""
    done = folder / "done"
    if not done.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        draw.write_demo(folder / "data", ("hazelnut",), 32, 12, 4, 1)
        for name, words in FINISH.items():
            print("preparing", name, flush=True)
            ended = run(words, folder)
            if ended.status != 0:
                raise SystemExit(f"{' '.join(words)} failed: {ended.lines}")
        done.touch()
    for number, words in enumerate(TRAININGS):
        place = folder.parent / f"unbroken-{number}"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder / "data", place / "data")
        ended = run(words, place)
        _unbroken[number] = Unbroken(place, ended.seconds)
    return folder


def copy(prepared: Path, work: Path) -> None:
    """What a case may spoil: links to the files would be spoilt with them."""
    for name in ("data", "checkpoints", "results", "cache"):
        if (prepared / name).is_dir():
            shutil.copytree(prepared / name, work / name)


def training(number: int, prepared: Path) -> tuple[list[str], Unbroken]:
    """The command of a training that is killed, and how it ended undisturbed."""
    which = number % len(TRAININGS)
    return TRAININGS[which], _unbroken[which]


def differences(one: Path, other: Path) -> list[str]:
    """Files of a training that differ: weights to the byte, the log but for times."""
    found = []
    for path in sorted(one.glob("checkpoints/*/*")):
        twin = other / path.relative_to(one)
        if path.suffix in (".pt", ".safetensors") and "last" not in path.name or path.name.startswith("calibration"):
            same = twin.is_file() and path.read_bytes() == twin.read_bytes()
        elif path.name == "log.jsonl":
            same = twin.is_file() and _untimed(path) == _untimed(twin)
        else:
            continue
        found += [path.name] * (not same)
    return found


def scores_differ(prepared: Path, work: Path) -> bool:
    """Whether the test images of a run have other scores than they had undisturbed."""
    return any(path.read_bytes() != (prepared / path.relative_to(work)).read_bytes()
               for path in work.glob("results/*/scores.csv") if (prepared / path.relative_to(work)).is_file())


def _untimed(path: Path) -> list[dict]:
    return [{name: value for name, value in json.loads(line).items() if name not in ("seconds", "outside_network")}
            for line in path.read_text(encoding="utf-8").splitlines()]
