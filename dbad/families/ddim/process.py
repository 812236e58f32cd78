"""The diffusion process of a trained run, read from the options of its training."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from dbad.declared import check_declared, types_of
from dbad.families.ddim.options import ProcessOptions
from dbad.files.atomic import read_json
from dbad.files.names import MODEL_CONFIG, TRAIN_OPTIONS

NOISE_OPTIONS = ("train_steps", "beta_schedule", "noise_kind")      # of the training, which have to be there


def trained_process(folder: Path) -> ProcessOptions:
    """The diffusion process of a run of train_ddim.py."""
    path = folder / TRAIN_OPTIONS
    trained = read_json(path)
    check_declared(trained, types_of(ProcessOptions), path, NOISE_OPTIONS)
    return ProcessOptions(**{field.name: trained[field.name] for field in fields(ProcessOptions)
                             if field.name in trained})


def training_facts(folder: Path) -> list[Any]:
    """The facts that shape a prediction beside weights and settings: the network's description and its noise."""
    trained = read_json(folder / TRAIN_OPTIONS)
    prediction = trained.get("prediction", "epsilon")       # runs of before it could be chosen have none
    return [read_json(folder / MODEL_CONFIG), *(trained.get(name) for name in NOISE_OPTIONS),
            *([prediction] if prediction != "epsilon" else [])]
