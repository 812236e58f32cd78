"""The run to inspect with: its name and its method, as its folder has recorded it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from dbad.errors import UserError
from dbad.families.registry import FAMILIES
from dbad.families.runs import family_in
from dbad.fields import Declared, default_of, fields_of, shown
from dbad.inspection.options import AnyInspectionRun
from dbad.options.resolve import run_folder, run_name
from dbad.options.shared import SeveralItems

T = TypeVar("T", bound=AnyInspectionRun)
D = TypeVar("D", bound=Declared)


def recognised(options: T, *own: str) -> T:
    """The options with the name and the method of the run that they mean.

        own    methods of the calling script, the preferred one first
    Without --run_id it is NAME, NAME-lafite, NAME-knn or NAME-diad: the first that exists of the script's own methods,
    else the only one of the others; several of these are a `UserError`. A run of another method than --method is one
    too.
    """
    methods = (options.method,) if options.method else own
    name, method = (options.run_id, methods[0]) if options.run_id else _found(options, methods)
    options = replace(options, run_id=name)
    recorded = family_in(run_folder(options))
    if recorded and options.method not in (None, recorded.name):
        raise UserError(f"--method {options.method}: {run_folder(options)} is a run of --method {recorded.name}")
    return replace(options, method=recorded.name if recorded else method)


def _found(options: AnyInspectionRun, methods: tuple[str, ...]) -> tuple[str | None, str]:
    """The name of a run and the method that runs of this name have; the first of the `methods` if there is no run."""
    names = {method: _name(options, method) for method in (*methods, *FAMILIES)}
    for method in methods:
        if _folder(options, names[method]).is_dir():
            return names[method], method
    others = {} if options.method else {
        method: name for method, name in names.items()
        if method not in methods and name and family_in(_folder(options, name))}
    if len(others) > 1:
        runs = ", ".join(str(_folder(options, name)) for name in others.values())
        raise UserError(f"--item {shown(options.item)}: no run of {' or '.join(methods)}, but {len(others)} of other "
                        f"methods: {runs}; expected --run_id or --method")
    method = next(iter(others), methods[0])
    return names[method], method


def _name(options: AnyInspectionRun, method: str) -> str | None:
    """The name that a run of these categories has by default; None if the method has no model of several categories."""
    if FAMILIES[method].together:
        return run_name(options, method)
    items = (options.item,) if isinstance(options.item, str) else options.item
    return items[0] if len(items) == 1 else None


def _folder(options: AnyInspectionRun, name: str | None) -> Path:
    return options.diffusion_checkpoint_dir / (name or "")


def handed_over(options: AnyInspectionRun, cls: type[D]) -> D:
    """The options as `cls`, the options of the script for the method of the run.

    An option that was given and that this method does not have is a `UserError`.
    """
    known, values = fields_of(cls), {}
    for name, field in fields_of(type(options)).items():
        value = getattr(options, name)
        if name in known:
            values[name] = value
        elif field.metadata["flag"] and value != default_of(field):
            raise UserError(f"--{name} {shown(value)}: {run_folder(options)} is a run of --method {options.method}, "
                            "which has no such option")
    item: Any = (options.item,) if isinstance(options.item, str) and issubclass(cls, SeveralItems) else options.item
    return cls(**values | {"item": item})


def script_for(options: AnyInspectionRun) -> str:
    """The name of the script, as a module, that inspects with runs of the options' method."""
    assert options.method is not None, "see `recognised`"
    return FAMILIES[options.method].scripts.inspection.removesuffix(".py")
