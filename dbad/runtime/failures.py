"""Report failures and notes to the user: one line, without a traceback if a user can cause the failure.

This module does not load torch, since reading a command line does not need it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import sys
import warnings
from collections.abc import Iterator
from functools import cache

from dbad.errors import UserError, printable
from dbad.runtime.output import quiet_output
from dbad.runtime.signals import STATUS, STOPPED, terminable

# Errors that a user's names, disks and limits can cause, besides those that checks find before.
_UNWRITABLE = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.ETXTBSY)
_UNUSABLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EMFILE,
             errno.ENFILE, errno.EIO, errno.ESTALE)


@contextlib.contextmanager
def one_line_failures() -> Iterator[None]:
    """End the program with one line on stderr and status 2, without a traceback, after a failure a user can cause.

    Ctrl-C and SIGTERM end it with status 130.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)    # reports of its retries would hide the line
    logging.getLogger("PIL").setLevel(logging.ERROR)                # so would its messages about unusual files
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        with terminable(), quiet_output():
            yield
    except UserError as error:
        _exit(str(error), 2)
    except KeyboardInterrupt:
        _exit(STOPPED, STATUS)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _exit("the device ran out of memory; try a smaller --batch_size or --resolution, or --precision bf16", 2)
    except OSError as error:
        if error.errno not in _UNWRITABLE + _UNUSABLE:
            raise
        what = "written" if error.errno in _UNWRITABLE else "read or written"
        _exit(f"{error.filename or 'output'}: cannot be {what} ({error.strerror})", 2)


@cache
def say_once(line: str) -> None:
    """Print a line once per process, even if several scripts or several reads of the same files repeat it."""
    print(printable(line))


def _is_out_of_memory(error: Exception) -> bool:
    """True if the error means that memory ran out; on a CPU only the text of torch's error says so."""
    torch = sys.modules.get("torch")
    kinds = (MemoryError, torch.OutOfMemoryError) if torch else (MemoryError,)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _end_bars() -> None:
    """End the lines of progress bars that are still open: the message would stand behind one of them."""
    tqdm = sys.modules.get("tqdm.std")
    for bar in list(getattr(tqdm.tqdm, "_instances", ())) if tqdm else ():
        bar.close()


def _exit(message: str, status: int) -> None:
    _end_bars()
    print(f"{sys.argv[0].rsplit('/', 1)[-1]}: {printable(message)}", file=sys.stderr)
    raise SystemExit(status)
