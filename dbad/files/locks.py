"""One process at a time writes into a folder.

The lock is the operating system's, on a file: it ends with the process that holds it, however that ends. Of several
processes that `accelerate launch` has started for one training, the first holds it for all.
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

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None
    import msvcrt

_HELD_ELSEWHERE = {errno.EAGAIN, errno.EACCES, errno.EDEADLK, getattr(errno, "EDEADLOCK", errno.EDEADLK)}
_FAR = 2 ** 30              # on Windows a locked byte cannot be read: one beyond what the file says
_held: dict[Path, int] = {}     # locks of this process, and how often each was asked for


def writing_run(folder: Path) -> AbstractContextManager[None]:
    """Hold a run folder, which is made if it is missing; another process that writes there is a `UserError`.

    What was made is removed again if the block fails and has left nothing in it. Within a block, the same process can
    hold the folder again. What killed processes have left half-written there is removed.
    """
    return _writing(folder, folder, ".lock", "diffusion_checkpoint_dir", "run_id")


def writing_out(folder: Path) -> AbstractContextManager[None]:
    """`writing_run` of a folder that is named by --out."""
    return _writing(folder, folder, ".lock", "out", "out")


def writing_results(folder: Path) -> AbstractContextManager[None]:
    """`writing_run` of a folder of results; the lock lies beside it, since such a folder can be renamed."""
    return _writing(folder, folder.parent, f".{folder.name}.lock", "img_dir", "img_dir")


@contextmanager
def _writing(folder: Path, place: Path, lock: str, option: str, other: str) -> Iterator[None]:
    """Hold `folder` by a lock in `place`, which `option` names; `other` is the option to give otherwise."""
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
    """Hold the lock `path` of `folder`; where the file system has no locks, go on without one."""
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
    """The open and locked file; None, with a warning, where that cannot be had."""
    while True:
        try:
            handle = _open(path)
        except OSError as error:
            return _warn(folder, error)
        try:
            _lock(handle)
            mine = os.path.samestat(os.fstat(handle), os.stat(path))
        except FileNotFoundError:       # the process before has removed it meanwhile
            mine = False
        except OSError as error:
            holder = _holder(path)
            os.close(handle)
            if error.errno in _HELD_ELSEWHERE:
                raise UserError(f"{folder}: {holder} is writing there; wait until it has ended, or give another "
                                f"--{option}") from None
            return _warn(folder, error)
        if mine:
            with suppress(OSError):     # only what others are told of us
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
    if fcntl:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        os.lseek(handle, _FAR, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)


def _release(handle: int, path: Path) -> None:
    """Remove the file while it is still locked, so that nobody locks one that is about to go; then let go."""
    with suppress(OSError):             # Windows removes no open file: there it stays
        path.unlink()
    with suppress(OSError):
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_UN)      # also for processes that were forked from this one
        else:
            os.lseek(handle, _FAR, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
    os.close(handle)


def _holder(path: Path) -> str:
    """Who holds a lock, in words."""
    about = known_json(path)
    try:
        return f"process {about['pid']} on {about['host']}, begun {about['since']},"
    except KeyError:
        return "another process"


def _warn(folder: Path, error: OSError) -> None:
    print(f"warning: {folder}: cannot be locked ({error.strerror or error}); a second process that writes there would "
          "not be noticed", file=sys.stderr)


def _rank() -> int:
    """The number of this process among those that were launched together, 0 for the first or the only one."""
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")     # those that accelerate reads
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 0)
