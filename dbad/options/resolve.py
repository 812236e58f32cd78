"""From the options that were given to all of them: as the run was trained, else as the preset says."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dbad.data.categories import Source
from dbad.errors import UserError, printable
from dbad.fields import EACH_PRESET, Declared, check, default_of, shown
from dbad.files.names import check_names
from dbad.options.shared import AnyRunOptions

R = TypeVar("R", bound=AnyRunOptions)
D = TypeVar("D", bound=Declared)

LONGEST_NAME = 120      # bytes; results are called after run and category together, and file systems take 255
_LENGTHS = ("epochs_diffusion", "steps_diffusion")      # one replaces the other
_BINDING = ("item", "holdout", "patching", "resolution", "intensity")  # what later scripts cannot change
# Options that are not said to differ from the preset.
_NOT_SAID = ("item", "preset", "dry_run", "run_id", "method", "dataset_path", "images", "yes")


@dataclasses.dataclass
class Chain:
    """The options of a run's phases together, and whether its header was printed."""

    options: Declared
    said: bool = False


_chain: ContextVar[Chain | None] = ContextVar("chain", default=None)


class Named(Declared, Protocol):
    """Options that name a run."""

    @property
    def item(self) -> str | tuple[str, ...]: ...

    @property
    def run_id(self) -> str | None: ...

    @property
    def diffusion_checkpoint_dir(self) -> Path: ...


def resolve(options: R, trained: Mapping[str, Any] | None = None) -> R:
    """Fill in every option that was not given.

    `trained` are the options of a training that later scripts build on, None for a training. The preset is the given
    one, else that of the training, else `default_preset`. Raises `UserError` for values out of range and for those that
    contradict the training.
    """
    training, trained = trained, trained or {}
    preset = options.preset or trained.get("preset") or default_preset(options.dataset_path, options.device)
    length_given = any(getattr(options, name, None) is not None for name in _LENGTHS)
    changes: dict[str, Any] = {"preset": preset, "run_id": options.run_id or options.item}
    check_bound(options, trained)
    for field in dataclasses.fields(options):
        given = getattr(options, field.name) is not None or (length_given and field.name in _LENGTHS)
        if EACH_PRESET in field.metadata and not given:
            value = trained.get(field.name, default_of(field, preset))
            changes[field.name] = tuple(value) if isinstance(value, list) else value
    resolved = dataclasses.replace(options, **changes)
    check_options(resolved)
    check_names(resolved, training)
    return resolved


def check_options(options: Declared) -> None:
    """Raise `UserError` for values out of range, and for names that no file can have."""
    check(options)
    check_plain_names({field.name: getattr(options, field.name) for field in dataclasses.fields(options)})


def check_plain_names(values: Mapping[str, Any]) -> None:
    """Raise `UserError` where an option of `values` that files are called after is no plain name."""
    for name in ("item", "run_id", "diffusion_checkpoint_name"):
        for text in [values[name]] if isinstance(values.get(name), str) else values.get(name) or ():
            if len(os.fsencode(text)) > LONGEST_NAME:
                raise UserError(f"--{name} {text[:20]}...: expected a name of at most {LONGEST_NAME} bytes")
            if Path(text).name != text or text in ("", "..") or text != printable(text):
                raise UserError(f"--{name} {text!r}: expected a plain name, without folders or line breaks")
    folder = str(values.get("log_dir") or "")
    if folder.encode("utf-8", "replace") != os.fsencode(folder):
        raise UserError(f"--log_dir {folder}: expected a name in UTF-8, as TensorBoard does")


def check_bound(options: Named, trained: Mapping[str, Any]) -> None:
    """Raise `UserError` for options that later scripts cannot change and that were given otherwise than in training."""
    for name in _BINDING:
        value = getattr(options, name, None)
        if value is not None and value != trained.get(name, value):
            raise UserError(f"--{name} {value}: the run {run_folder(options)} was trained with {trained[name]}")


def default_preset(dataset_path: Path | None, device: str, on_gpu: str = "base") -> str:
    """The preset where none is given and none was trained with: demo for the demo data, else as the machine is.

    Real data take small on a CPU, where a step of base takes minutes, and `on_gpu` on CUDA. `device` is what --device
    says.
    """
    from dbad.runtime.device import pick_device  # it loads torch, which reading a command line does without
    if dataset_path is None:
        return "demo"
    return on_gpu if pick_device(device).type == "cuda" else "small"


def run_folder(options: Named) -> Path:
    """The folder in which the run keeps its weights and calibration."""
    return options.diffusion_checkpoint_dir / name_of(options)


def name_of(options: Named) -> str:
    """The name of the run: the given one, else that of its only category."""
    if options.run_id is None and not isinstance(options.item, str):
        raise ValueError(f"a run of {options.item}: expected a name")
    return options.run_id or str(options.item)


def run_name(options: Named, method: str) -> str:
    """The name of a run of any number of categories: the given one, else one of the categories and the method."""
    names = (options.item,) if isinstance(options.item, str) else options.item
    return options.run_id or ("-".join(names) if len(names) < 4 else f"{len(names)}-categories") + f"-{method}"


@contextmanager
def one_header(chain: Chain) -> Iterator[None]:
    """Run a phase of the chain in the block: the first one to `announce` prints the header, with all options given."""
    token = _chain.set(chain)
    try:
        yield
    finally:
        _chain.reset(token)


def announce(options: AnyRunOptions, *writes: Path | str) -> bool:
    """Say which preset is in force and what differs from it; on `--dry_run` also all options and what would be written.

    Returns whether the script is to go on. Within `one_header` the first line is printed once.
    """
    chain, values = _chain.get(), changed(options)
    if chain:
        given = {name: value for name, value in plain(chain.options).items() if value is not None}
        own = changed(dataclasses.replace(chain.options, preset=options.preset))
        values |= {name: given[name] for name in own.keys() & given.keys()}
    different = ", ".join(f"{name} {shown(value)}" for name, value in values.items() if name not in _NOT_SAID)
    if not (chain and chain.said):
        print(printable(f"{shown(options.item)} from {data_of(options)}; preset {options.preset}{_why_small(options)}"
                        + f" with {different}" * bool(different)))
    if chain:
        chain.said = True
    if options.dry_run:
        say_all(options, *writes)
    return not options.dry_run


def say_all(options: Declared, *writes: Path | str) -> None:
    """Print every option, and what would be written."""
    flags = {field.name for field in dataclasses.fields(options) if field.metadata["flag"]}
    print("\n".join(f"  {name} = {shown(value)}" for name, value in plain(options).items() if name in flags))
    print("would write:", *writes, sep="\n  ")


def _why_small(options: AnyRunOptions) -> str:
    """Why the preset is not the largest one, which a GPU would get."""
    if options.dataset_path is None or options.preset != "small":
        return ""
    on_cpu = default_preset(options.dataset_path, options.device) == "small"
    return " (the default for real data without a CUDA GPU)" * on_cpu


def data_of(options: Source) -> str:
    """The source of the images, in words."""
    if images := getattr(options, "images", None):
        return " ".join(images)
    return str(options.dataset_path or "built-in demo data (drawn, not photographed)")


def subset(cls: type[D], options: Declared) -> D:
    """The options of `cls` out of a larger set that has them all."""
    return cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(cls)})


def plain(options: Declared) -> dict[str, Any]:
    """The options as JSON values: paths as strings, tuples as lists."""
    return {field.name: _json_value(getattr(options, field.name)) for field in dataclasses.fields(options)}


def _json_value(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def changed(options: Declared) -> dict[str, Any]:
    """The options that differ from their defaults, as JSON values; presets count as defaults."""
    values, preset = plain(options), getattr(options, "preset", None)
    return {field.name: values[field.name] for field in dataclasses.fields(options)
            if field.metadata["flag"] and values[field.name] != _json_value(default_of(field, preset))}
