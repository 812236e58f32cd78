"""The settings of a detector, which shape a prediction beside the weights."""

from __future__ import annotations

import typing
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dbad.declared import check_declared, types_of
from dbad.errors import UserError
from dbad.fields import EACH_PRESET, check, default_of
from dbad.options.shared import CropOptions, Shared

try:
    from typing import Self
except ImportError:                 # before Python 3.11
    from typing import Any as Self  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class Settings(CropOptions, Shared):
    """The settings of every family; a family adds its own.

    The same class gives the flags, what the detector works with, and the record in calibration.json.
    """

    @property
    @abstractmethod
    def contributions(self) -> dict[str, float]:
        """The weights of the maps in the anomaly map, by name; 0 for those that do not count."""

    @classmethod
    def of(cls, options: Any, **others: Any) -> Self:
        """The settings taken from `options`; `others` gives those that are no option or are recorded differently.

        A setting in neither takes its default.
        """
        values = {field.name: getattr(options, field.name, default_of(field, "base")) for field in fields(cls)}
        return cls(**values | others)

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Self:
        """The settings that a file has recorded; one that it lacks takes its default, see `missing`.

        An unknown setting, or one of another type or range than declared, is a `UserError` that begins with its name.
        """
        types = types_of(cls)
        if unknown := sorted(record.keys() - types.keys()):
            raise UserError(f"{unknown[0]}: no setting of this method")
        defaults = {field.name: default_of(field, "base") for field in fields(cls)}
        values = defaults | {name: _from_json(value) for name, value in record.items()}
        check_declared(values, types, "")
        if unset := next((field.name for field in fields(cls)
                          if EACH_PRESET in field.metadata and values[field.name] is None), None):
            raise UserError(f"{unset} null: expected a value")
        typed: dict[str, Any] = {name: Path(value) if isinstance(value, str) and _is_path(types[name]) else value
                                 for name, value in values.items()}
        read = cls(**typed)
        try:
            check(read)
        except UserError as error:
            raise UserError(str(error).removeprefix("--")) from None
        return read

    @classmethod
    def missing(cls, record: Mapping[str, Any]) -> list[str]:
        """The names of the settings that a record lacks."""
        return [field.name for field in fields(cls) if field.name not in record]

    def record(self) -> dict[str, Any]:
        """The settings as plain values for JSON."""
        return {name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
                for name, value in asdict(self).items()}


def _is_path(hint: Any) -> bool:
    return Path in (hint, *typing.get_args(hint), *typing.get_args(typing.get_args(hint)[0]))


def _from_json(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
