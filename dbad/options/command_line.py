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

FIRST, NUM_FIRST = "First of all", 10                   # the heading of the flags that matter first, and their number
LAST = ("Data", "Run", "Hardware")                      # those of the flags that most scripts share


def parse(cls: type[T], argv: Sequence[str] | None = None, description: str | None = None) -> T:
    """Read the command line of the dataclass `cls`: one flag per field, `--a_b` or `--a-b`.

    --help shows the flags that matter first, --help_all all of them.
    """
    words = [_with_underscores(str(word)) for word in (sys.argv[1:] if argv is None else argv)]
    whole = "--help_all" in words
    required = [f"--{field.name} {'NAME' if field.name == 'item' else 'PATH'}" for field in dataclasses.fields(cls)
                if field.default is dataclasses.MISSING]
    usage = f"%(prog)s {' '.join(required)} [options]"
    parser = parsing.Parser(description=description, usage=usage, allow_abbrev=False, add_help=False,
                            epilog=None if whole else "all options: --help_all", formatter_class=_Format)
    hints = typing.get_type_hints(cls)
    groups: dict[str, Any] = {}
    for title, field in _fields_by_title(cls):
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_argument(groups[title], field, hints[field.name], whole or title == FIRST)
    group = parser.add_argument_group("Help")
    group.add_argument("-h", "--help", action="help", help="show the options that matter first")
    group.add_argument("--help_all", action="help", help="show all options")
    found = vars(parser.parse_args(words))
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


class _Format(argparse.RawDescriptionHelpFormatter):
    """Shows the value of a flag once, behind all of its spellings."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


def _default_in_words(field: dataclasses.Field) -> str | None:
    """The default of a flag for its help, that of each preset if they differ; None if there is none to tell."""
    presets = field.metadata.get(EACH_PRESET, {"": None if field.default is dataclasses.MISSING else field.default})
    values = {name: _readable(value) for name, value in presets.items() if value is not None}
    if len(values) == len(presets) and len(set(values.values())) == 1:
        return next(iter(values.values()))
    return ", ".join(f"{name} {value}" for name, value in values.items()) or None


def _readable(value: Any) -> str:
    """A default value in the help: 0.001, 1 2 3, on, none."""
    if isinstance(value, tuple):
        return " ".join(map(_readable, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else shown(value)


def _add_argument(group: Any, field: dataclasses.Field, hint: Any, listed: bool) -> None:
    flags = [f"--{field.name}", *field.metadata["aliases"]]
    required = field.default is dataclasses.MISSING
    text = textwrap.dedent(field.metadata["help"]).replace("%", "%%")
    if default := _default_in_words(field):
        text += f" (default: {default})"
    keywords: dict[str, Any] = {"dest": field.name, "help": text if listed else argparse.SUPPRESS,
                                "default": None if required else field.default}
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

    The first ones are the `NUM_FIRST` with the lowest `first`. A group is what classes of one `heading` declare; a
    class without has the first line of its docstring, and a field may have a heading of its own. Groups stand in the
    order of the bases, those of shared options last.
    """
    order = [base for base in cls.__mro__ if dataclasses.is_dataclass(base)]
    headings = {base: vars(base).get("heading") or (base.__doc__ or "").strip().splitlines()[0].rstrip(".")
                for base in order}
    places: dict[str, float] = {heading: place for place, heading in reversed(list(enumerate(headings.values())))}
    places |= {heading: len(order) + place for place, heading in enumerate(LAST)}
    flags = [field for field in dataclasses.fields(cls) if field.metadata["flag"]]
    first = sorted((field for field in flags if field.metadata["first"]), key=lambda field: field.metadata["first"])
    first = first[:NUM_FIRST]
    found = []
    for number, field in enumerate(field for field in flags if field not in first):
        owner = next(base for base in reversed(order) if field.name in base.__dict__.get("__annotations__", {}))
        heading = field.metadata.get("heading", headings[owner])
        found.append((places.setdefault(heading, places[headings[owner]] + 0.5), number, heading, field))
    return [*((FIRST, field) for field in first),
            *((heading, field) for _, _, heading, field in sorted(found, key=lambda entry: entry[:2]))]


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
