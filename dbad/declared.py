"""Values from a JSON file, checked against the types and ranges that are declared for them in the code.

People edit these files by hand, and disks damage them. What a field of an options' dataclass may hold is known from its
declaration (`dbad.fields`); a file that says something else is told by its name, the field, what was found and
what was expected.
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
from dbad.fields import check_value

Types = Mapping[str, Any]       # names of fields -> annotations

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a text",
          dict: "an object", type(None): "null"}
_SHOWN = 40                     # characters of what was found that a message shows


@lru_cache
def types_of(*classes: type) -> Types:
    """The annotations of the fields of dataclasses, as types that know what is declared of the field besides."""
    hints: dict[str, Any] = {}
    for cls in classes:
        found = typing.get_type_hints(cls)
        hints |= {field.name: Annotated[found[field.name], field.metadata]      # ty: ignore[invalid-type-form]
                  for field in dataclasses.fields(cls)}
    return hints


def check_declared(values: Mapping[str, Any], declared: Types, where: object, required: Collection[str] = ()) -> None:
    """Raise `UserError` for options out of a file that are of other types than declared, or out of their ranges.

        where      the file, as the message begins; "" for a message that is to be put into another one
        required   names that have to be there
    Names that are not declared are not looked at.
    """
    check_types(values, declared, where, required)
    for name, hint in declared.items():
        if name in values and typing.get_origin(hint) is Annotated:
            try:
                check_value(name, values[name], hint.__metadata__[0])
            except UserError as error:
                raise UserError(_begun(where) + str(error).removeprefix("--")) from None


def check_types(values: Mapping[str, Any], declared: Types, where: object, required: Collection[str] = ()) -> None:
    """`check_declared` for values that are no options, without ranges."""
    for name in required:
        if name not in values:
            raise UserError(f"{_begun(where)}lacks {name}; expected {described(declared[name])}")
    for name, hint in declared.items():
        if name in values and not fits(values[name], hint):
            raise UserError(f"{_begun(where)}{name} {shown(values[name])}: expected {described(hint)}")


def _begun(where: object) -> str:
    return f"{where}: " if where else ""


def fits(value: Any, hint: Any) -> bool:
    """Whether a value that JSON gives is of an annotated type; numbers have to be finite.

    Lists stand for tuples of one type, texts for paths, objects for dictionaries with texts as keys.
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
    """Whether a file could be called so, as far as its characters go; lone surrogates of JSON are none of them."""
    return "\0" not in value and not any("\ud800" <= character < "\udc80" or "\udcff" < character <= "\udfff"
                                         for character in value)


def described(hint: Any) -> str:
    """An annotation in words, for what was expected."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return described(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(described, arguments))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (tuple, list):
        return f"a list, each of it {described(arguments[0])}"
    return _WORDS.get(origin or hint, str(hint))


def shown(value: Any) -> str:
    """A value of JSON as it was found, shortened."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
