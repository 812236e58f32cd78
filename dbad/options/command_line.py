"""The command line of a dataclass of options: one flag per field, in groups called after the classes that declare them.

Loads no torch, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from dbad.fields import EACH_PRESET, Declared, shown
from dbad.options.resolve import check_options
from dbad.runtime import parsing
from dbad.runtime.failures import one_line_failures

T = TypeVar("T", bound=Declared)
R = TypeVar("R", bound="Runnable")


class Runnable(Declared, Protocol):
    """Options of a script."""

    @property
    def dry_run(self) -> bool: ...

FIRST = "Main options"                                  # the heading of the flags that matter first
LAST = ("Data", "Run", "Hardware")                      # those of the flags that most scripts share


def parse(cls: type[T], argv: Sequence[str] | None = None, description: str | None = None) -> T:
    """Read the command line of the dataclass `cls`: one flag per field, `--a_b` or `--a-b`."""
    required = [f"--{field.name} {'NAME' if field.name == 'item' else 'PATH'}" for field in dataclasses.fields(cls)
                if field.default is dataclasses.MISSING]
    usage = f"%(prog)s {' '.join(required)} [options]"
    parser = parsing.Parser(description=description, usage=usage, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(cls)
    groups: dict[str, Any] = {}
    for title, field in _fields_by_title(cls):
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_argument(groups[title], field, hints[field.name])
    words = sys.argv[1:] if argv is None else [str(word) for word in argv]
    found = vars(parser.parse_args([_with_underscores(word) for word in words]))
    for name in [name for name, value in found.items() if isinstance(value, list)]:
        parser.error(f"argument --{name}: expected a value, found --")      # which argparse takes for none at all
    return cls(**found)


def main(cls: type[R], run: Callable[[R], str], description: str, argv: Sequence[str] | None = None) -> None:
    """Parse, run, print what `run` returns; a user's mistake ends in one line and status 2."""
    with one_line_failures():
        options = parse(cls, argv, description)
        print_end(options, run)


def print_end(options: R, run: Callable[[R], str]) -> None:
    """Check the options, run, and print what `run` returns, unless it is a dry run."""
    check_options(options)
    if not options.dry_run and (device := getattr(options, "device", None)):
        from dbad.runtime.device import pick_device  # it loads torch, which reading a command line does without
        pick_device(device)         # one that is not there is found now, and not after the long work
    found = run(options)
    if not options.dry_run:
        print(found)


def _add_argument(group: Any, field: dataclasses.Field, hint: Any) -> None:
    flags = [f"--{field.name}", *field.metadata["aliases"]]
    required = field.default is dataclasses.MISSING
    text = textwrap.dedent(field.metadata["help"]).replace("%", "%%")
    if EACH_PRESET in field.metadata:
        values = {name: shown(value) for name, value in field.metadata[EACH_PRESET].items()}
        same = len(set(values.values())) == 1
        text += f" (default: {values['base'] if same else ', '.join(f'{k} {v}' for k, v in values.items())})"
    elif not required and field.default is not None:
        text += f" (default: {shown(field.default)})"
    keywords: dict[str, Any] = {"dest": field.name, "help": text, "default": None if required else field.default}
    kind, choices, many = _kind(hint)
    if kind is bool:
        group.add_argument(*flags, f"--no_{field.name}", action=_OnOff, nargs=0, **keywords)
        return
    if many:
        keywords["nargs"] = "+"
        keywords["action"] = _AsTuple
    group.add_argument(*flags, type=_CONVERTERS.get(kind, kind), choices=choices, required=required,
                       metavar=None if choices else _METAVARS.get(kind, "TEXT"), **keywords)


class _AsTuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


class _OnOff(argparse.Action):
    """--flag sets it, --no_flag unsets it."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not str(option_string).startswith("--no_"))


_CONVERTERS = {str: parsing.text, Path: parsing.path}
_METAVARS = {int: "N", float: "X", Path: "PATH", str: "TEXT"}


def _kind(hint: Any) -> tuple[type, list[str] | None, bool]:
    """An annotation as (type of one value, choices, whether several are taken)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        kind, choices, _ = _kind(typing.get_args(hint)[0])
        return kind, choices, True
    if typing.get_origin(hint) is Literal:
        return str, list(typing.get_args(hint)), False
    return hint, None, False


def _with_underscores(word: str) -> str:
    """--run-id -> --run_id, as both are in use; values stay as they are."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def _fields_by_title(cls: type[Declared]) -> list[tuple[str, dataclasses.Field]]:
    """Fields with the heading that they stand under: those that matter first, then group by group.

    A group is what classes of one `heading` declare; a class without has the first line of its docstring. Groups stand
    in the order of the bases, those of shared options last.
    """
    order = [base for base in cls.__mro__ if dataclasses.is_dataclass(base)]
    headings = {base: vars(base).get("heading") or (base.__doc__ or "").strip().splitlines()[0].rstrip(".")
                for base in order}
    places = {heading: place for place, heading in reversed(list(enumerate([*headings.values(), *LAST])))}
    places |= {heading: len(order) + place for place, heading in enumerate(LAST)}
    found = []
    for number, field in enumerate(field for field in dataclasses.fields(cls) if field.metadata["flag"]):
        owner = next(base for base in reversed(order) if field.name in base.__dict__.get("__annotations__", {}))
        first = field.metadata["first"]
        heading = FIRST if first else headings[owner]
        found.append((0 if first else 1 + places[heading], first or number, heading, field))
    return [(heading, field) for _, _, heading, field in sorted(found, key=lambda entry: entry[:2])]


def flags_of(cls: type[Declared]) -> set[str]:
    """Every spelling of the flags of the dataclass `cls`."""
    hints = typing.get_type_hints(cls)
    found = set()
    for field in dataclasses.fields(cls):
        if field.metadata["flag"]:
            found |= {f"--{field.name}", *field.metadata["aliases"]}
            found |= {f"--no_{field.name}"} if _kind(hints[field.name])[0] is bool else set()
    return found


def given_flags(words: Sequence[str]) -> list[str]:
    """The flags among the words of a command line, spelled with underscores and without values."""
    return [_with_underscores(word).partition("=")[0] for word in words if word.startswith("--")]


def flag_value(words: Sequence[str], flag: str) -> str | None:
    """The last value that the words of a command line give to a flag; None where there is none."""
    found = None
    for word, following in zip(words, [*words[1:], None], strict=True):
        name, equals, value = _with_underscores(word).partition("=")
        if name == flag:
            found = value if equals else following
    return found
