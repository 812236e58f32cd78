"""What scripts print: it reaches any terminal, and a pipe that nobody reads on ends the script quietly."""

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
    """Print what the output has no characters for as escapes; end with status `CLOSED` where nobody reads it on.

    So `--dry_run | head` ends as any Unix tool does. What was printed is flushed before the block is left: at the
    interpreter's end it would be too late to take notice of a closed pipe.
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except BrokenPipeError:
        if not any(map(_is_closed, streams)):
            raise
        raise SystemExit(CLOSED) from None
    finally:
        for stream in streams:
            with contextlib.suppress(BrokenPipeError):
                stream.flush()
            if _is_closed(stream):      # what else is printed goes nowhere, without another error
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _is_closed(stream: TextIO) -> bool:
    """Whether the stream is a pipe whose reader has gone."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):       # no such system call, or no file behind the stream
        return False
