"""Output of scripts: it can be printed on any terminal, and a closed pipe ends the script quietly."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Iterator
from typing import TextIO

CLOSED = 141        # the status of a Unix tool that SIGPIPE ended: 128 + 13


@contextlib.contextmanager
def quiet_output() -> Iterator[None]:
    """Print characters that the output cannot encode as escapes; end with status `CLOSED` if its reader has gone.

    So `--dry_run | head` ends like any Unix tool. The output is flushed at the end of the block: when the interpreter
    ends, it is too late to notice a closed pipe.
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
    for stream in streams:
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure:
            reconfigure(errors="backslashreplace")
    try:
        yield
    except BrokenPipeError:
        if not output_is_closed():
            raise
        raise SystemExit(CLOSED) from None
    finally:
        for stream in streams:
            with contextlib.suppress(BrokenPipeError):
                stream.flush()
            if _is_closed(stream):      # further output is discarded, without another error
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def output_is_closed() -> bool:
    """True if the reader of the program's output or of its messages has gone."""
    return any(_is_closed(stream) for stream in (sys.stdout, sys.stderr) if stream is not None)


def _is_closed(stream: TextIO) -> bool:
    """True if the stream is a pipe whose reader has gone."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):       # no such system call, or no file behind the stream
        return False
