"""A tiny category, a run that was trained on it, and the scripts as a user starts them.

Nothing here needs a network, a GPU or a screen, and nothing is written outside pytest's temporary folders.
"""
import dataclasses
import importlib
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")       # processes with several threads each wait for one another

# A network and a training as small as the scripts take them; the rest is the preset demo.
TINY = ("--preset demo --resolution 16 --channels 32 32 --batch_size 4 --steps_diffusion 6 --save_n_epochs 1 "
        "--epochs_extractor 1 --feature_resolution 32 --steps_to_regenerate 2 --holdout 0.25 --precision fp32 "
        "--device cpu --no_tune --no_restoration").split()


def _draw_category(root: Path, item: str = "hazelnut", width: int = 16, height: int = 16) -> Path:
    """Draw 12 good training images, 4 good test images and 3 cracks with masks; returns `root`."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    for split, kind, count in (("train", "good", 12), ("test", "good", 4), ("test", "crack", 3)):
        for index in range(count):
            waves = [np.sin(x / 3 + channel + 0.3 * random.normal()) for channel in range(3)]
            image = 120 + 60 * np.stack(waves, axis=2) + 10 * random.normal(size=(height, width, 3))
            mask = np.zeros((height, width), bool)
            if kind != "good":
                mask[4:9, 5 + index:10 + index] = True
                image[mask] = (250, 30, 30)
                _save(root / item / "ground_truth" / kind / f"{index:03d}_mask.png", mask * 255)
            _save(root / item / split / kind / f"{index:03d}.png", image)
    return root


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def _run_script(name: str, *words: object) -> None:
    """Run a script of the project through its own command line, as `python name words...` does in this folder.

    It runs inside this process, since a new one would spend seconds on importing torch. A failure is a SystemExit.
    """
    import torch
    threads, argv = torch.get_num_threads(), sys.argv
    torch.set_num_threads(1)            # tiny tensors gain nothing from more
    sys.argv = [name, *map(str, words)]
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
        sys.argv = argv


@contextmanager
def _inside(folder: Path):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard():
    """Also where the tests run in the background, which Ctrl-C is kept from: else they, and what they start, ignore it.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def draw_category() -> Callable[..., Path]:
    """`_draw_category(root, item, width, height)`."""
    return _draw_category


@pytest.fixture
def script() -> Callable[..., None]:
    """`_run_script(name, *words)`."""
    return _run_script


def _tiny_flags(name: str = "train_tune_eval.py") -> list[str]:
    known = {field.name for field in dataclasses.fields(importlib.import_module(name.removesuffix(".py")).Options)}
    words = ["--item", "hazelnut", "--dataset_path", "data", *TINY]
    starts = [i for i, word in enumerate(words) if word.startswith("--")] + [len(words)]
    flags = [words[a:b] for a, b in zip(starts, starts[1:], strict=False)]
    return [word for flag in flags if flag[0].removeprefix("--").removeprefix("no_") in known for word in flag]


@pytest.fixture
def tiny_flags() -> Callable[..., list[str]]:
    """`tiny_flags(name)`: the flags that the script `name` knows of those of a tiny run on ./data."""
    return _tiny_flags


@pytest.fixture
def tiny() -> list[str]:
    """The flags of a tiny run of train_tune_eval.py on ./data."""
    return _tiny_flags()


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A folder with data, checkpoints, logs and results, as train_tune_eval.py leaves it; only to be read."""
    folder = tmp_path_factory.mktemp("finished")
    _draw_category(folder / "data")
    with _inside(folder):
        _run_script("train_tune_eval.py", *_tiny_flags())
    return folder


@pytest.fixture
def workplace(tmp_path):
    """An empty folder to work in, with the drawn category in ./data; removed afterwards, as weights are large."""
    _draw_category(tmp_path / "work" / "data")
    with _inside(tmp_path / "work") as folder:
        yield folder
    shutil.rmtree(folder)


@pytest.fixture
def work_in_copy(tmp_path):
    """`work_in_copy(folder, *left_out)`: go into a copy, to spoil it, without the files of these patterns."""
    with ExitStack() as stack:
        def work_in_copy(folder: Path, *left_out: str) -> Path:
            copy = shutil.copytree(folder, tmp_path / "work", ignore=shutil.ignore_patterns(*left_out))
            stack.callback(shutil.rmtree, copy)
            return stack.enter_context(_inside(copy))
        yield work_in_copy


@pytest.fixture
def trained(finished, work_in_copy) -> Path:
    """A copy of the finished folder to work in and to spoil, without what only resuming a training needs."""
    return work_in_copy(finished, "*last.pt", "epoch_*.pt", "logs")


@pytest.fixture(scope="module")
def store() -> dict:
    """What the tests of a module keep for those after them."""
    return {}


@pytest.fixture
def made_once(store, tmp_path_factory, work_in_copy) -> Callable[..., Path]:
    """`made_once(make, *left_out)`: `work_in_copy` of the folder in which a module called `make`, which is returned."""
    def made_once(make: Callable[[], None], *left_out: str) -> Path:
        if "folder" not in store:
            with _inside(tmp_path_factory.mktemp("made")) as folder:
                make()
            store["folder"] = folder
        work_in_copy(store["folder"], *left_out)
        return store["folder"]
    return made_once
