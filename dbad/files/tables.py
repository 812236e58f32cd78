"""Write and read all CSV files of the project.

Spreadsheets run a field that begins with = + - @, a tab or a line break as a formula, and the names of files and
categories can be any text. Such a text gets a single quote in front, as OWASP advises against CSV injection; numbers
stay as they are.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dbad.errors import UserError
from dbad.files.atomic import atomic_write

_RUN = re.compile(r"'*[=+\-@\t\r\n]")                               # leading quotes count, so that one can be removed
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\Z")


def write_table(path: Path | str, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> Path:
    """Write a CSV file: UTF-8, a line of column names, and a line per row, atomically.

    Numbers read back exactly, None is an empty field, and bytes of file names that are not UTF-8 are escaped.
    """
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", errors="backslashreplace",
                                               newline="") as file:
        for row in (columns, *rows):
            file.write(_line(row))
    return Path(path)


def read_table(path: Path | str) -> list[dict[str, str]]:
    """The rows of a file of `write_table`: texts by column name, without the quotes that it added.

    Bytes that are not UTF-8 are replaced; a file that is no table is a `UserError`.
    """
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        try:
            return [{name: _unquoted(text) for name, text in row.items() if isinstance(name, str)}
                    for row in csv.DictReader(file)]
        except csv.Error as error:
            raise UserError(f"{path}: not readable as CSV ({error})") from None


def _line(row: Iterable[Any]) -> str:
    """A row as a line; written with \\r\\n as line end, since only then csv quotes both of these characters."""
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\r\n").writerow(map(_quoted, row))
    return line.getvalue().removesuffix("\r\n") + "\n"


def _quoted(value: Any) -> Any:
    """The field to write for a value: a text that a spreadsheet would run gets a quote in front."""
    return f"'{value}" if isinstance(value, str) and _RUN.match(value) and not _NUMBER.match(value) else value


def _unquoted(text: str | None) -> str:
    """The value of a field without the added quote; empty if the line ends before its column."""
    text = text or ""
    return text[1:] if text.startswith("'") and _RUN.match(text) else text
