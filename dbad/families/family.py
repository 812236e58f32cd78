"""A family of methods: all that the rest of the project knows of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbad.families.settings import Settings

if TYPE_CHECKING:
    from dbad.families.detector import Detector
    from dbad.records import Pictures
    from dbad.runtime.device import Machine


@dataclass(frozen=True)
class Scripts:
    """The scripts that make the parts of a run, and the one that inspects with it."""

    model: str
    calibration: str
    inspection: str
    extractor: str | None = None


@dataclass(frozen=True)
class Family:
    """What a family brings with it.

        name          as --method has it, and as every run records it
        about         one line for reports and for the help
        scripts       by which messages send users to the right one
        phases        the scripts that train_tune_eval.py chains, in order, each with the option that skips it
        settings      flags, settings of the detector and record of the calibration in one dataclass
        files         settings -> the files in the run folder that a calibration belongs to, by what they are
        open          run folder, settings, machine -> detector, not calibrated yet
        sign          option by which trainings are known that did not record their method yet
        together      one model for several categories
        by_category   names of files, {} being a category, that a model of several categories writes beside thresholds
        facts         run folder -> what of the training shapes a prediction beside files and settings
        on_gpu        the preset that real data take on CUDA
        pictures      detector, scale of the map's colours -> what writes pictures of a test image besides, called with
                      the folder of the results, the image's name and its `Pictures`
    """

    name: str
    about: str
    scripts: Scripts
    settings: type[Settings]
    files: Callable[[Any], Mapping[str, str]]
    open: Callable[[Path, Any, Machine], Detector]
    phases: Mapping[str, str] = field(default_factory=dict)
    sign: str = ""
    together: bool = False
    by_category: tuple[str, ...] = ()
    facts: Callable[[Path], Any] | None = None
    on_gpu: str = "base"
    pictures: Callable[[Any, float], Callable[[Path, str, Pictures], None]] | None = None
