"""Fields of options: each is declared once, with its help, default, range and other spellings.

A field is the flag of a script, a setting of a detector and an entry of a JSON file at the same time. Values from the
command line and from files are checked against the range that is declared here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypedDict, cast

from dbad.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Unpack

PRESETS = ("demo", "small", "base")
MOST, SEEDS = 10 ** 9, 2 ** 63      # larger numbers would exceed the memory of any machine, or overflow
LEVELS = 10             # largest number of levels of a network
EACH_PRESET = "presets"


class Declared(Protocol):
    """An object of a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


class About(TypedDict, total=False):
    """The properties of a field besides its help and its default.

        aliases      other spellings of the flag
        later        default that `resolve` fills in; until then the value is None, "not given"
        demo, small, base    the same, one for each preset; small takes that of demo where it has none
        least, most, above, between    range of a number, or of each number of several; `above` and `between` are open
        check        takes a value and returns what was expected instead, None if the value is right
        flag         False for a field that is recorded but is no flag of a script
        first        place of the flag among those that the help lists first; 0 for all other flags
        heading      heading of the flag in the help, where it is not that of its class
    """

    aliases: Sequence[str]
    later: Any
    demo: Any
    small: Any
    base: Any
    least: float
    most: float
    above: float
    between: tuple[float, float]
    check: Callable[[Any], str | None]
    flag: bool
    first: int
    heading: str


def opt(help: str, default: Any = dataclasses.MISSING, **about: Unpack[About]) -> Any:
    """A dataclass field of options; the user must give it if it has neither a default nor `later` or presets."""
    if unknown := about.keys() - About.__annotations__.keys():
        raise TypeError(f"{sorted(unknown)[0]}: no property of an option")
    metadata: dict[str, Any] = {"help": help, "aliases": (), "flag": True, "first": 0} | about
    presets = _presets(about)
    if presets is not None:
        default, metadata[EACH_PRESET] = None, presets
    return dataclasses.field(default=default, metadata=metadata)


def _presets(about: Mapping[str, Any]) -> dict[str, Any] | None:
    if "later" in about:
        return dict.fromkeys(PRESETS, about["later"])
    if "demo" not in about:
        return None
    return {"demo": about["demo"], "small": about.get("small", about["demo"]), "base": about["base"]}


def fields_of(*classes: type[Declared]) -> dict[str, dataclasses.Field]:
    """The fields of dataclasses by name."""
    return {field.name: field for cls in classes for field in dataclasses.fields(cls)}


def default_of(field: dataclasses.Field, preset: str | None = None) -> Any:
    """The default value of a field: that of the preset if presets differ or `resolve` fills it in later."""
    presets = field.metadata.get(EACH_PRESET)
    return field.default if presets is None else presets.get(preset)


class Given:
    """Values by name as attributes; None for a name that is missing."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = values

    def __getattr__(self, name: str) -> Any:
        return self._values.get(name)


def check(options: Declared) -> None:
    """Raise `UserError` for a value of a dataclass outside its range, and for values that contradict each other.

    None counts as not given. The static methods `contradictions` of the classes find the contradictions: each takes
    the values as `Given` and yields one message per contradiction.
    """
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    for field in dataclasses.fields(options):
        check_value(field.name, values[field.name], field.metadata)
    for message in contradictions(type(options), values):
        raise UserError(message)


def contradictions(cls: type, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the messages about contradictions from the class and its bases, in the order of their declaration."""
    for owner in reversed(cls.__mro__):
        if "contradictions" in vars(owner):
            yield from cast(Any, owner).contradictions(Given(values))


def check_value(name: str, value: Any, about: Mapping[str, Any]) -> None:
    """Raise `UserError` for the value of the option `name`, declared with `about`; None counts as not given."""
    several = isinstance(value, (list, tuple))
    entries = [value] if not several else value
    expected = next((words for entry in entries if (words := _expected(entry, about))), None)
    if expected:
        raise UserError(f"--{name} {shown(value)}: {expected}")
    for entry in entries:
        if (words := _least(entry, about)):
            raise UserError(f"--{name} {entry}: {words}")
    if value is not None and "check" in about and (words := about["check"](value)):
        raise UserError(f"--{name} {shown(value)}: {words}")


def _expected(value: Any, about: Mapping[str, Any]) -> str | None:
    """The message for a number that is not finite or too large, or a text with null characters; None if it is right."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            return "expected a finite number"
        most = about.get("most", MOST)
        if "between" not in about and value > most:
            return "expected a number below 2^63" if most == SEEDS - 1 else f"expected at most {most}"
    return "expected a text without null characters" if "\0" in str(value) else None


def _least(value: Any, about: Mapping[str, Any]) -> str | None:
    if value is None:
        return None
    if "least" in about and not value >= about["least"]:        # `not >=` also refuses not-a-number
        return f"expected at least {about['least']}"
    if "between" in about and not about["between"][0] < value < about["between"][1]:
        return "expected a number between {} and {}".format(*about["between"])
    if "above" in about and not value > about["above"]:
        return f"expected a number above {about['above']}"
    return None


def shown(value: Any) -> str:
    """A value as it is written on the command line: 1 2 3, on, off; - for None."""
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return "-" if value is None else str(value)
