"""How failures and notes reach the user: a line, and no traceback for what a user can cause.

Loads no torch: reading a command line does without.
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

# What a user's names, disks and limits can cause, beside what is found by looking first.
_UNWRITABLE = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.ETXTBSY)
_UNUSABLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EMFILE,
             errno.ENFILE, errno.EIO, errno.ESTALE)


@contextlib.contextmanager
def one_line_failures() -> Iterator[None]:
    """A failure that a user can cause ends the program with one line on stderr and status 2, without a traceback.

    Ctrl-C and SIGTERM end it with status 130.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)    # its retries would bury the line
    logging.getLogger("PIL").setLevel(logging.ERROR)                # so would what it says of odd files
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
    """Print a line that several scripts in one process, or several looks at the same files, would repeat."""
    print(printable(line))


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory was missing: on a CPU torch says so in words alone."""
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
