"""What a run folder says of itself: its method, its training, and which script makes which of its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dbad.files.atomic import known_json, read_json
from dbad.files.names import TRAIN_OPTIONS
from dbad.options.command_line import opt
from dbad.options.declared import check_declared, types_of

# The scripts that make the model, the adapted extractor and the calibration of a run.
_SCRIPTS = {"ddim": ("train_ddim.py", "train_extractor.py", "evaluation.py"), "lafite": ("train_lafite.py",) * 3,
            "knn": ("train_lafite.py",) * 3, "diad": ("train_diad.py",) * 3}
NOISE_OPTIONS = ("train_steps", "beta_schedule", "noise_kind")      # of the training, read by the ddim detector


@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """The diffusion process that the network learns to reverse."""

    train_steps: int = opt("timesteps of the diffusion process", 1000)
    max_timestep: int = opt("train on timesteps up to this one only, as inspection visits no others; 0 for all",
                            by_preset=True)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = opt("noise schedule", "linear")
    noise_kind: Literal["gaussian", "simplex"] = opt("kind of noise, in training and at inspection", "gaussian")

    @property
    def reachable(self) -> int:
        """The last timestep that the network was trained for."""
        return self.max_timestep or self.train_steps


def script_for(part: Literal["model", "extractor", "calibration"], method: Any) -> str:
    """The script that makes this part of a run; of an unknown method, that of ddim."""
    scripts = _SCRIPTS.get(method if isinstance(method, str) else "ddim", _SCRIPTS["ddim"])
    return scripts[("model", "extractor", "calibration").index(part)]


def method_of(folder: Path) -> str:
    """The method of the run in a folder, as its training has noted it; "ddim" where there is no note."""
    method = known_json(folder / TRAIN_OPTIONS).get("method")
    return method if method in tuple(_SCRIPTS) else "ddim"


def trained_process(folder: Path) -> ProcessOptions:
    """The diffusion process of a run of train_ddim.py."""
    path = folder / TRAIN_OPTIONS
    trained = read_json(path)
    check_declared(trained, types_of(ProcessOptions), path, NOISE_OPTIONS)
    return ProcessOptions(**{field.name: trained[field.name] for field in fields(ProcessOptions)
                             if field.name in trained})


def learnt_categories(trained: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """The categories that the run in a folder has learnt, from the options of its training."""
    check_declared(trained, {"item": str | tuple[str, ...]}, folder / TRAIN_OPTIONS, ("item",))
    return (trained["item"],) if isinstance(trained["item"], str) else tuple(trained["item"])
