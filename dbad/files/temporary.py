"""Temporary files and folders whose names contain their process, so that those of killed processes can be removed.

    .last-0123abcd-4711-q8w3k2_x.pt     for last.pt, by process 4711 of the machine 0123abcd
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

_NAME = re.compile(r"\..+-(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-[a-z0-9_]{8}(\.[^.]*)?", re.DOTALL)
_LONGEST = 60           # characters of the final name, so that the temporary one is not too long for file systems
_own: set[Path] = set()     # those of this process: an earlier process may have had the same number


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Make an empty file beside `path`, with its ending; remove it after the block unless it has been renamed."""
    handle, name = tempfile.mkstemp(prefix=_prefix(path.stem), suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    _own.add(temporary)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        _own.discard(temporary)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Make an empty folder beside `path`; remove it with its contents after the block."""
    temporary = Path(tempfile.mkdtemp(prefix=_prefix(path.name), dir=path.parent))
    _own.add(temporary)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _own.discard(temporary)


def remove_abandoned(folder: Path, below: bool = True) -> None:
    """Remove the temporary files and folders in `folder` whose process has ended; with `below`, also in sub-folders.

    Those of other machines and all other files stay, and so does a file that cannot be removed.
    """
    for place, folders, files in os.walk(folder):
        for name in files + folders:
            found = _NAME.fullmatch(name)
            path = Path(place, name)
            if not found or found["machine"] != machine() or path in _own:
                continue
            if int(found["process"]) == os.getpid() or not psutil.pid_exists(int(found["process"])):
                if name in folders:
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with suppress(OSError):
                        path.unlink()
        folders[:] = [name for name in folders if below and not _NAME.fullmatch(name)]


def machine() -> str:
    """An identifier of the machine that counts process numbers: the host and, on Linux, the namespace of processes.

    Containers can share a folder and a host's name, but each counts its own processes.
    """
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.blake2b(f"{platform.node()} {namespace}".encode(), digest_size=4).hexdigest()


def _prefix(name: str) -> str:
    return f".{name[:_LONGEST]}-{machine()}-{os.getpid()}-"
