"""The name of every file and folder that the project writes into a run folder or a folder of results.

`run_file` declares each name here, and the modules that write the files use these names. So the list is complete, and
`check_names` can refuse a user's file name that is one of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from dbad.errors import UserError

_DECLARED: list[re.Pattern[str]] = []


def run_file(name: str) -> str:
    """Declare a name and return it; {} in it stands for a text that is filled in later, {n} for a number."""
    pattern = re.escape(name.casefold()).replace(r"\{n\}", r"\d+").replace(r"\{\}", ".*")
    _DECLARED.append(re.compile(pattern, re.DOTALL))
    return name


def is_declared(name: str) -> bool:
    """True if the project may use this file name; ignores upper and lower case, as some file systems do."""
    return any(pattern.fullmatch(name.casefold()) for pattern in _DECLARED)


# Of every run.
MODEL_CONFIG = run_file("model_config.json")            # the arguments that build the network
TRAIN_OPTIONS = run_file("train_arg_config.json")       # the options of the training
CALIBRATION = run_file("calibration.json")              # scales, thresholds, and the settings they belong to
EARLIER_CALIBRATION = run_file("calibration.{n}.json")  # those that a later calibration has replaced
LAST = run_file("last.pt")                              # everything that resuming a training needs
PHASE_LAST = run_file("{}_last.pt")                     # the same for a phase other than the diffusion model's
LOG = run_file("log.jsonl")                             # one line per epoch
SAMPLES = run_file("samples")                           # pictures that show the progress of a training
RESTORATION = run_file("restoration.json")              # how much damage reconstructions remove
UNFINISHED = "unfinished"       # true in TRAIN_OPTIONS while the folder may still have files of another run
TUNING, TUNING_PLOT = run_file("tuning.csv"), run_file("tuning.png")        # settings that were tried

# Of the ddim family.
EPOCH = run_file("epoch_{n}{}")                         # weights after an epoch, with the ending of the final ones
EXTRACTOR = run_file("extractor.pt")                    # the adapted feature extractor
NORMALISATION = run_file("normalisation.safetensors")   # statistics of good images at every place
TUNED = run_file("tuned.json")                          # the chosen settings and the weights they belong to

# Of the lafite family.
SPACE, BANK = run_file("features.pt"), run_file("bank.pt")
DISCRIMINATOR = run_file("discriminator.pt")

# Of one category, for a model of several categories.
CATEGORY_CALIBRATION = run_file("calibration-{}.json")
CATEGORY_DISCRIMINATOR = run_file("discriminator-{}.pt")
CATEGORY_TUNING = run_file("tuning-{}.csv")

# Of the diad family and its auto-encoder.
NETWORKS = ("autoencoder", "unet", "guide")
DIAD_FILES = (*(run_file(f"{name}.safetensors") for name in NETWORKS), run_file("prompt.safetensors"))
AUTOENCODER = DIAD_FILES[0]                             # the same name in a run folder of its own
BUILD_OPTIONS = run_file("build_arg_config.json")       # the parts that a model was built from
REPORT = run_file("report.json")                        # the reconstruction quality of an auto-encoder

# Of results, which an option may place with the runs.
OPTIONS, FINISHED = run_file("options.json"), run_file("finished.json")
SCORES, UNREADABLE = run_file("scores.csv"), run_file("unreadable.csv")
METRICS, METRICS_TABLE = run_file("metrics.json"), run_file("metrics.csv")
DRIFT = run_file("drift.json")
PAGE, OVERVIEW, CURVES = run_file("report.html"), run_file("overview.png"), run_file("curves.png")
PANELS, OVERLAYS = run_file("images"), run_file("overlays")
ANOMALY_MAPS, LOG_IMAGE = run_file("anomaly_maps"), run_file("log_image")
ANOMALY_IMAGES, THRESHOLDED_IMAGES = run_file("anomaly_images"), run_file("anomaly_images_thresholded")
# The results of test images, the scores first.
TEST_RESULTS = (SCORES, METRICS, METRICS_TABLE, PAGE, OVERVIEW, CURVES, PANELS, ANOMALY_MAPS, LOG_IMAGE, ANOMALY_IMAGES,
                THRESHOLDED_IMAGES)

# Of several runs, beside their folders of results.
SUMMARY_TABLE, SUMMARY_TEXT, SUMMARY_PAGE = (
    run_file("summary.csv"), run_file("summary.md"), run_file("index.html"))
SUMMARY = (SUMMARY_TABLE, SUMMARY_TEXT, SUMMARY_PAGE)


def epoch_file(epoch: int, name: str) -> str:
    """The file name of the weights after an epoch if the final weights are called `name`."""
    return EPOCH.format(Path(name).suffix, n=epoch)


def epoch_of(name: str) -> int | None:
    """The epoch whose weights have this file name, None for another name."""
    found = re.fullmatch(r"epoch_(\d+)(\..*)?", name.casefold(), re.DOTALL)
    return int(found[1]) if found else None


def last_file(phase: str) -> str:
    """The file name of the state from which a phase resumes; for the diffusion model the name has no prefix."""
    return LAST if phase == "diffusion" else PHASE_LAST.format(phase)


# ------------------------------------------------------------------------------------------ names that a user gives

class FileNames(Protocol):
    """The options that files and folders are called after."""

    @property
    def item(self) -> str | tuple[str, ...]: ...

    @property
    def run_id(self) -> str | None: ...

    @property
    def diffusion_checkpoint_name(self) -> str: ...


def check_names(options: FileNames, trained: Mapping[str, Any] | None = None) -> None:
    """Raise `UserError` for a file or a run whose name the project uses for another file.

    `trained` has the options of the training that a later script builds on, None for a training: the name of the
    weights that it wrote is allowed. Names of epochs are allowed here; the training that writes them checks them.
    """
    name = options.diffusion_checkpoint_name
    free = epoch_of(name) is not None or (trained or {}).get("diffusion_checkpoint_name") == name
    if not free and (is_declared(name) or name.startswith(".")):
        raise UserError(f"--diffusion_checkpoint_name {name}: this name is reserved for another file of the run; "
                        "expected a name such as final.pt")
    if options.run_id is not None and options.run_id.casefold() in SUMMARY:
        raise UserError(f"--run_id {options.run_id}: this name is reserved for a file of the summary of several runs; "
                        "expected another name")
    if not isinstance(options.item, str):
        check_categories(options.item)


def check_categories(names: Iterable[str]) -> None:
    """Raise `UserError` for categories whose names differ in upper and lower case only.

    Their files would be the same file on a file system that ignores case.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise UserError(f"--item {other} {name}: names that differ only in case, so their files in one model "
                            "collide; expected other names, or a model for each")


def check_written(option: str, path: Path, name: str) -> None:
    """Raise `UserError` where `path`, a file that an option names and a script writes, would replace another file.

    `name` is its default name. In any folder, it must not have another name of this project.
    """
    if path.is_dir():
        raise UserError(f"--{option} {path}: a folder; expected a file such as {path / name}")
    if path.name.casefold() != name and (is_declared(path.name) or path.name.startswith(".")):
        raise UserError(f"--{option} {path}: this name is reserved for another file of a run; expected a name such as "
                        f"{name}")
