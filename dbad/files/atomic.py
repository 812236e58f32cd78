"""Write files whole or not at all, and read JSON files."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from dbad.errors import UserError
from dbad.files.special import check_no_special
from dbad.files.temporary import temporary_file

_UMASK = os.umask(0)        # read once: it can only be read by setting it, which affects other threads
os.umask(_UMASK)
_FILE_MODE = 0o666 & ~_UMASK
DEEPEST = 20                # deepest nesting of lists and objects in a JSON file


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Give a temporary path beside `path`, and rename its file to `path` once the block has succeeded.

    The content is flushed to the disk before the rename, so that a crash or a power cut leaves either the old file or
    the new one. If the block fails, the temporary file is removed; a full or read-only disk is a `UserError`. The
    temporary name has the ending of `path`, for writers that choose a format by it; see `dbad.files.temporary`.
    """
    path = Path(path)
    with cannot_be_written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_file(path) as temporary:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(_FILE_MODE)
            os.replace(temporary, path)


@contextmanager
def cannot_be_written(path: Path | str) -> Iterator[None]:
    """Turn an `OSError` in the block into a `UserError` that names the file or folder.

    The operating system's error often has no name, for example when a write finds the disk full.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_text(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8, atomically; bytes of file names that are not UTF-8 are escaped, as in JSON."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: Path | str, value: object) -> None:
    """Write `value` as indented JSON, atomically; not-a-number is refused, since JSON does not have it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path | str) -> dict[str, Any]:
    """Read a JSON object; a missing or broken file is a `UserError` that names it.

    Some files that Python's reader accepts also count as broken: those with not-a-number, numbers too large for any
    computation, a name that occurs twice, or nesting deeper than `DEEPEST`. The byte order mark that some editors write
    at the beginning is skipped.
    """
    check_no_special(path)
    try:
        value = parse_json(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def known_json(path: Path | str) -> dict[str, Any]:
    """The object that `read_json` reads; empty if the file is missing or broken."""
    try:
        return read_json(path)
    except UserError:
        return {}


def parse_json(text: str) -> Any:
    """The value of a JSON text; a text that `read_json` calls broken is a `ValueError`."""
    try:
        value = json.loads(text, object_pairs_hook=_once_each, parse_constant=_refused, parse_float=_finite,
                           parse_int=_whole)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [entry for outer in level if isinstance(outer, (dict, list))
                 for entry in (outer.values() if isinstance(outer, dict) else outer)]
    if level:
        raise ValueError("nested too deeply")
    return value


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} occurs twice")
    return found


def _refused(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refused(text)


def _whole(text: str) -> int:
    return int(text) if len(text) <= 20 else _refused(f"{text[:20]}...")


def check_folders(**folders: Path) -> None:
    """Raise `UserError` for a folder that cannot be made, before the long work; names are those of the options."""
    for option, path in folders.items():
        nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        if not nearest.is_dir():
            raise UserError(f"--{option} {path}: expected a folder, found a file")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"--{option} {path}: not writable (no permission in {nearest})")


def ensure_folders(**folders: Path) -> None:
    """Make the folders that are missing and check that files can be made in them; names are those of the options.

    If one cannot be made or used, the new folders of the others are removed again.
    """
    made: list[Path] = []
    for option, path in folders.items():
        try:
            made += reversed([p for p in (path, *path.parents) if not p.exists()])
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            for folder in reversed(made):
                with suppress(OSError):
                    folder.rmdir()
            if isinstance(error, (FileExistsError, NotADirectoryError)):
                raise UserError(f"--{option} {path}: expected a folder, found a file") from None
            raise UserError(f"--{option} {path}: not writable ({error.strerror or error})") from error


def cache_folder(name: str) -> Path:
    """The cache folder `name` for files that can be made again: in $XDG_CACHE_HOME/dbad, or else in ~/.cache/dbad."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dbad" / name
