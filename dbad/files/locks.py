"""Locks that let one process at a time write into a folder.

The operating system locks a file and ends the lock with the process that holds it, even if that process is killed. If
`accelerate launch` has started several processes for one training, the first holds the lock for all.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from dbad.errors import UserError
from dbad.files.atomic import ensure_folders, known_json
from dbad.files.temporary import remove_abandoned

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_HELD_ELSEWHERE = {errno.EAGAIN, errno.EACCES, errno.EDEADLK, getattr(errno, "EDEADLOCK", errno.EDEADLK)}
_FAR = 2 ** 30              # on Windows a locked byte cannot be read: this one lies beyond the file's text
_held: dict[Path, int] = {}     # locks of this process, with the number of blocks that hold each


def writing_run(folder: Path) -> AbstractContextManager[None]:
    """Lock a run folder, and make it if it is missing; another process that writes there is a `UserError`.

    A new folder is removed again if the block fails and the folder is empty. Within a block, the same process can lock
    the folder again. Half-written files of killed processes are removed from the folder.
    """
    return _writing(folder, folder, ".lock", "diffusion_checkpoint_dir", "run_id")


def writing_out(folder: Path) -> AbstractContextManager[None]:
    """Lock the folder named by --out, as `writing_run` does."""
    return _writing(folder, folder, ".lock", "out", "out")


def writing_results(folder: Path) -> AbstractContextManager[None]:
    """Lock a folder of results, as `writing_run` does; the lock lies beside it, since such a folder can be renamed."""
    return _writing(folder, folder.parent, f".{folder.name}.lock", "img_dir", "img_dir")


@contextmanager
def _writing(folder: Path, place: Path, lock: str, option: str, other: str) -> Iterator[None]:
    """Hold `folder` by a lock in `place`, which `option` names; `other` is the option to change if it is in use."""
    if _rank():
        yield
        return
    made = [path for path in (place, *place.parents) if not path.exists()]
    ensure_folders(**{option: place})
    try:
        with _locked(place / lock, folder, other):
            remove_abandoned(folder)
            yield
    except BaseException:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def _locked(path: Path, folder: Path, option: str) -> Iterator[None]:
    """Hold the lock `path` of `folder`; if the file system has no locks, go on without one."""
    place = Path(os.path.realpath(path))
    if place in _held:
        _held[place] += 1
        try:
            yield
        finally:
            _held[place] -= 1
        return
    handle = _acquire(path, folder, option)
    _held[place] = 1
    try:
        yield
    finally:
        del _held[place]
        if handle is not None:
            _release(handle, path)


def _acquire(path: Path, folder: Path, option: str) -> int | None:
    """Open and lock the file, and return its handle; None, with a warning, if that is not possible."""
    while True:
        try:
            handle = _open(path)
        except OSError as error:
            return _warn(folder, error)
        try:
            _lock(handle)
            mine = os.path.samestat(os.fstat(handle), os.stat(path))
        except FileNotFoundError:       # the process that held the lock has removed it meanwhile
            mine = False
        except OSError as error:
            holder = _holder(path)
            os.close(handle)
            if error.errno in _HELD_ELSEWHERE:
                raise UserError(f"{folder}: {holder} is writing there; wait until it ends, or give another "
                                f"--{option}") from None
            return _warn(folder, error)
        if mine:
            with suppress(OSError):     # the text only informs other processes
                about = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
                os.ftruncate(handle, 0)
                os.write(handle, json.dumps(about).encode())
            return handle
        os.close(handle)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:             # left by the killed process of another user
        return os.open(path, os.O_RDONLY)


def _lock(handle: int) -> None:
    if sys.platform == "win32":
        os.lseek(handle, _FAR, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)
    else:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _release(handle: int, path: Path) -> None:
    """Remove the file while it is still locked, so that no process locks a file about to vanish; then unlock it."""
    with suppress(OSError):             # Windows does not remove open files: the file stays there
        path.unlink()
    with suppress(OSError):
        if sys.platform == "win32":
            os.lseek(handle, _FAR, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_UN)      # also for processes that were forked from this one
    os.close(handle)


def _holder(path: Path) -> str:
    """The holder of a lock, in words."""
    about = known_json(path)
    try:
        return f"process {about['pid']} on {about['host']}, started {about['since']},"
    except KeyError:
        return "another process"


def _warn(folder: Path, error: OSError) -> None:
    print(f"warning: {folder}: cannot be locked ({error.strerror or error}); a second process that writes there would "
          "not be noticed", file=sys.stderr)


def _rank() -> int:
    """The number of this process among those launched together, 0 for the first or the only one."""
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")     # those accelerate reads
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 0)
