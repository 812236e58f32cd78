"""The list of families. A new one needs a folder beside this file and its name and record here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dbad.errors import UserError
from dbad.families.ddim import DDIM
from dbad.families.diad import AUTOENCODER_RUN, DIAD
from dbad.families.family import Family
from dbad.families.lafite import KNN, LAFITE

Method = Literal["ddim", "lafite", "knn", "diad"]       # their names, for options
FAMILIES: dict[str, Family] = {family.name: family for family in (DDIM, LAFITE, KNN, DIAD)}
# Trainings that produce no detector: the script and the sign of each, see `Family.sign`.
_OTHER_RUNS: dict[str, tuple[str, str]] = {"autoencoder": AUTOENCODER_RUN}


def register(family: Family) -> None:
    """Make a family known by its name."""
    FAMILIES[family.name] = family


def family_of(name: Any, where: object) -> Family:
    """The family of that name; an unknown one is a `UserError` that begins with `where` and lists the known ones."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{where}: method {name!r}; expected one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def script_of(method: str) -> str:
    """The script that trains runs of a method."""
    return _OTHER_RUNS[method][0] if method in _OTHER_RUNS else FAMILIES[method].scripts.model


def recorded_method(trained: Mapping[str, Any], path: Path) -> str | None:
    """The method of a run, from its training options in the file `path`; None where they do not tell.

    Older runs that did not record their method are identified by an option that no other training has. An unknown
    method is a `UserError`.
    """
    signs = {family.sign: name for name, family in reversed(FAMILIES.items())} | {
        sign: name for name, (_, sign) in _OTHER_RUNS.items()}
    found = trained.get("method")
    if found is None:
        return next((name for sign, name in signs.items() if sign and sign in trained), None)
    return found if found in tuple(_OTHER_RUNS) else family_of(found, path).name


def trained_alike(method: str) -> tuple[str, ...]:
    """The methods whose runs are trained by the same script, the given one first."""
    script = FAMILIES[method].scripts.model
    return (method, *(name for name, family in FAMILIES.items() if family.scripts.model == script and name != method))
