"""A family of methods, as the rest of the project sees it."""

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
    """The parts of a family.

        name          value of --method, which every run records
        about         one line for reports and for the help
        scripts       names of its scripts, for messages
        phases        the scripts that train_tune_eval.py chains, in order, each with the option that skips it
        settings      dataclass of flags, detector settings and calibration record in one
        files         settings -> the files in the run folder that a calibration belongs to, by their role
        open          run folder, settings, machine -> detector, not calibrated yet
        sign          option that identifies older trainings, which did not record their method
        together      one model serves several categories
        by_category   files that a model of several categories writes beside thresholds; {} stands for a category
        facts         run folder -> facts of the training that shape a prediction beside files and settings
        on_gpu        preset for real data on CUDA
        pictures      detector, scale of the map's colours -> function that writes further pictures of a test image; it
                      gets the folder of the results, the image's name and its `Pictures`
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
