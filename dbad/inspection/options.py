"""The options of an inspection: the images, and the results to write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from dbad.data.categories import Source
from dbad.fields import opt
from dbad.options.resolve import Named
from dbad.options.shared import AnyRunOptions, RunOptions


@dataclass(frozen=True, kw_only=True)
class InspectionOptions:
    """Results."""

    item_states: tuple[str, ...] = opt("folders of test/ to inspect, such as: good crack", ("all",),
                                       aliases=["--mvtec_item_states"])
    eval_resolution: Literal["network", "original"] = opt(
        "where maps are compared with masks: at the network's resolution, or at the size of the files", "network")
    masks: Literal["where_there_are", "required"] = opt(
        "defective test images without mask: left out of pixel metrics, which is said, or refused", "where_there_are")
    export_maps: Literal["none", "mvtec"] = opt(
        "also write the maps as float TIFF files, as the evaluation program of MVTec AD reads them; with the data of "
        "MVTec AD 2 as its evaluation server does, and thresholded ones beside them", "none")
    img_dir: Path = opt("folder in which every run has a folder of results", Path("results"))
    plt_imgs: bool = opt("also show the figures on the screen, half a second each, where there is one", False)
    shuffle: bool = opt("with --plt_imgs: show the images in a random order", False)


@dataclass(frozen=True, kw_only=True)
class NewImageOptions:
    """Images without ground truth, instead of the test images of a data set."""

    images: tuple[str, ...] | None = opt("files, folders or quoted patterns such as 'camera/*.png'", None)
    recursive: bool = opt("with --images: also those in sub-folders", False)
    drift_check: bool = opt("with --images: test whether, as a whole, they still look like the good images of the "
                            "calibration; if not, its promise is void", False)


@dataclass(frozen=True, kw_only=True)
class AnyInspectionRun(AnyRunOptions, NewImageOptions, InspectionOptions):
    """The options of a run that inspects, of one category or of several."""


@dataclass(frozen=True, kw_only=True)
class InspectionRun(RunOptions, AnyInspectionRun):
    """The options of a run that inspects one category."""


class ChainRun(Named, Source, Protocol):
    """The options of all phases of a method together, as `train_tune_eval.py` makes them of those of its scripts."""

    @property
    def method(self) -> str | None: ...

    @property
    def seeds(self) -> tuple[int, ...] | None: ...

    @property
    def seed(self) -> int: ...

    @property
    def img_dir(self) -> Path: ...

    @property
    def images(self) -> tuple[str, ...] | None: ...

    @property
    def resume(self) -> bool: ...

    @property
    def dry_run(self) -> bool: ...

    @property
    def skip_train(self) -> bool: ...

    @property
    def skip_evaluation(self) -> bool: ...
