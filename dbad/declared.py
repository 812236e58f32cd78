"""Values from a JSON file, checked against the types and ranges that the code declares for them.

People edit these files by hand, and disks damage them. The declaration of a dataclass field (`dbad.fields`) says which
values are allowed. The error for another value names the file, the field, the value found and what was expected.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from dbad.errors import UserError
from dbad.fields import Declared, check_value

Types = Mapping[str, Any]       # names of fields -> annotations

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a text",
          dict: "an object", type(None): "null"}
_SHOWN = 40                     # characters of a wrong value that a message shows


@lru_cache
def types_of(*classes: type[Declared]) -> Types:
    """The types of the fields of dataclasses by name, each annotated with the metadata of its field."""
    hints: dict[str, Any] = {}
    for cls in classes:
        found = typing.get_type_hints(cls)
        hints |= {field.name: Annotated[found[field.name], field.metadata]      # ty: ignore[invalid-type-form]
                  for field in dataclasses.fields(cls)}
    return hints


def check_declared(values: Mapping[str, Any], declared: Types, where: object, required: Collection[str] = ()) -> None:
    """Raise `UserError` for options from a file that have another type than declared, or lie outside their ranges.

        where      start of the message: the file; "" for a message that becomes part of another one
        required   names that must be present
    Names that are not declared are ignored.
    """
    check_types(values, declared, where, required)
    for name, hint in declared.items():
        if name in values and typing.get_origin(hint) is Annotated:
            try:
                check_value(name, values[name], hint.__metadata__[0])
            except UserError as error:
                raise UserError(_begun(where) + str(error).removeprefix("--")) from None


def check_types(values: Mapping[str, Any], declared: Types, where: object, required: Collection[str] = ()) -> None:
    """Raise `UserError` for values of the wrong type, as `check_declared` does, but without checking ranges."""
    for name in required:
        if name not in values:
            raise UserError(f"{_begun(where)}lacks {name}; expected {described(declared[name])}")
    for name, hint in declared.items():
        if name in values and not fits(values[name], hint):
            raise UserError(f"{_begun(where)}{name} {shown(values[name])}: expected {described(hint)}")


def _begun(where: object) -> str:
    return f"{where}: " if where else ""


def fits(value: Any, hint: Any) -> bool:
    """True if a value from JSON has an annotated type; numbers must be finite.

    A JSON list stands for a tuple of one type, a text for a path, an object for a dictionary with texts as keys.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return fits(value, arguments[0])
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in arguments)
    if origin is Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if origin in (tuple, list):
        return isinstance(value, (tuple, list)) and all(fits(entry, arguments[0]) for entry in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(entry, arguments[1]) for entry in value.values())
    if hint in (float, int):
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2 ** 63
        return whole or hint is float and isinstance(value, float) and math.isfinite(value)
    if hint in (str, Path):
        return isinstance(value, str) and _is_text(value)
    return isinstance(value, types.NoneType if hint is None else hint)


def _is_text(value: str) -> bool:
    """True if a file name may have all these characters: no null character and no lone surrogate of JSON."""
    return "\0" not in value and not any("\ud800" <= character < "\udc80" or "\udcff" < character <= "\udfff"
                                         for character in value)


def described(hint: Any) -> str:
    """An annotation in words, for the end of a message: "expected ..."."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return described(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(described, arguments))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (tuple, list):
        return f"a list, each entry {described(arguments[0])}"
    return _WORDS.get(origin or hint, str(hint))


def shown(value: Any) -> str:
    """A value as JSON text, cut after `_SHOWN` characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
