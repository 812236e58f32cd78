"""Recognise named pipes, sockets and devices, which must not be opened: reading a named pipe may never end."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from dbad.errors import UserError

_SPECIAL = ((stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISBLK, "a device"),
            (stat.S_ISCHR, "a device"))


def special_kind(path: Path | str) -> str | None:
    """The kind of a path in words, "a named pipe", "a socket" or "a device"; None for any other path."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return None
    return next((name for is_one, name in _SPECIAL if is_one(mode)), None)


def check_no_special(path: Path | str) -> None:
    """Raise `UserError` for a named pipe, a socket or a device in place of a run's file."""
    kind = special_kind(path)
    if kind is not None:
        raise UserError(f"{path}: {kind}; expected a file")
