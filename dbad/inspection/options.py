"""The options of an inspection: the images, and the results to write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from dbad.data.categories import Source
from dbad.families.registry import Method
from dbad.fields import Given, opt
from dbad.options.resolve import Named
from dbad.options.shared import AnyRunOptions, RateOption, RunOptions


@dataclass(frozen=True, kw_only=True)
class DecisionOptions(RateOption):
    """The threshold of an inspection, where it is not that of the calibration."""

    heading: ClassVar[str] = "Thresholds"

    image_threshold: float | None = opt("score from which an image is called defective at this inspection, instead of "
                                        "the calibration's", None, above=0)

    @staticmethod
    def contradictions(given: Given) -> Iterator[str]:
        """Yield a message if the threshold is given twice."""
        if given.image_threshold is not None and given.false_alarm_rate is not None:
            yield "--image_threshold and --false_alarm_rate are both given: expected one of them"


@dataclass(frozen=True, kw_only=True)
class InspectionOptions(DecisionOptions):
    """Results."""

    heading: ClassVar[str] = "Results"

    item_states: tuple[str, ...] = opt("sub-folders of test/ to inspect, such as: good crack", ("all",),
                                       aliases=["--mvtec_item_states"], heading="Data", first=13)
    eval_resolution: Literal["network", "original"] = opt(
        "resolution for comparing maps with masks: the network's, or that of the original files", "network")
    masks: Literal["where_there_are", "required"] = opt(
        "defective test images without mask: leave them out of pixel metrics and say so, or refuse them "
        "(required)", "where_there_are", heading="Data")
    export_maps: Literal["none", "mvtec"] = opt(
        "also write the maps as float TIFF files for the evaluation program of MVTec AD; for MVTec AD 2, in the form "
        "of its evaluation server, with thresholded maps", "none")
    img_dir: Path = opt("parent folder of the result folders", Path("results"), first=15)
    plt_imgs: bool = opt("also show the figures on the screen, half a second each, if there is a screen", False)
    shuffle: bool = opt("with --plt_imgs: show the images in a random order", False)


@dataclass(frozen=True, kw_only=True)
class NewImageOptions:
    """New images without ground truth, instead of test images."""

    images: tuple[str, ...] | None = opt("new images: files, folders or quoted patterns such as 'camera/*.png'", None,
                                         first=4)
    recursive: bool = opt("with --images: also images in sub-folders", False)
    drift_check: bool = opt("with --images: test whether their scores as a whole match those of the good images of the "
                            "calibration; if not, the promised false-alarm rate does not hold", False, first=14)


@dataclass(frozen=True, kw_only=True)
class MethodOption:
    """The method of the run."""

    heading: ClassVar[str] = "Run"

    method: Method | None = opt(
        "method of the run; without --run_id it tells which run of the category is meant (default: as the run was "
        "trained)", None)


@dataclass(frozen=True, kw_only=True)
class AnyInspectionRun(AnyRunOptions, MethodOption, NewImageOptions, InspectionOptions):
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
