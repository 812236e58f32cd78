"""Handle Ctrl-C and SIGTERM: a training ends its step first, everything else stops at once; both print a message.

Python runs signal handlers between two operations of its own, and an operation on large tensors can take minutes. The
message therefore comes from a thread, which the system wakes at once.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

STOPPING = (signal.SIGINT, signal.SIGTERM)
STATUS = 130            # exit status of a program that was stopped
STOPPED = "stopped; finished parts are kept; the same command continues a training"
SAME_S = 1.0            # seconds; a launcher passes Ctrl-C on to processes that got it from the terminal already
PATIENCE_S = 5.0        # seconds that the operation in progress may take after a second signal


@contextmanager
def terminable() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt in the block, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield                       # signals reach the main thread only
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number, frame) -> None:
    raise KeyboardInterrupt


@contextmanager
def stop_signals(step_s: Callable[[], float | None] | None = None) -> Iterator[Callable[[], bool]]:
    """Give a function that returns True once Ctrl-C or SIGTERM has come; a second signal stops at once.

    A loop calls the function after every step. `step_s` gives the seconds that a step takes, None while that is not
    known; without `step_s` no message is printed.
    """
    asked, requests = threading.Event(), _Requests()

    def ask(number, frame):
        if requests.hear() > 1:
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    with _told(step_s):
        before = {number: signal.signal(number, ask) for number in STOPPING}
        try:
            yield asked.is_set
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Requests:
    """A counter of requests to stop; signals within SAME_S of the first are one request."""

    def __init__(self):
        self._count, self._first = 0, -math.inf

    def hear(self) -> int:
        """Count a new signal and return the number of requests so far."""
        now = time.monotonic()
        if now - self._first > SAME_S:
            self._count += 1
            self._first = now if self._count == 1 else -math.inf
        return self._count


@contextmanager
def _told(step_s: Callable[[], float | None] | None) -> Iterator[None]:
    """Report signals in the block when they arrive, and end the program if a second one has no effect."""
    ended = threading.Event()
    ours, systems = socket.socketpair()
    systems.setblocking(False)

    def listen() -> None:
        requests, told = _Requests(), 0
        while numbers := ours.recv(64):
            for _ in filter(STOPPING.__contains__, numbers):
                before, told = told, requests.hear()
                if told == before:
                    continue
                if told == 1 and step_s:
                    _say(_finishing(step_s()))
                elif told == 2 and not ended.wait(PATIENCE_S):
                    _say(f"{os.path.basename(sys.argv[0])}: {STOPPED}")
                    os._exit(STATUS)        # in the middle of an operation; files are always whole

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(systems.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        systems.close()                     # ends the thread
        thread.join()
        ours.close()


def _finishing(seconds: float | None) -> str:
    longest = "" if seconds is None else f" (up to {max(1, math.ceil(seconds))} s)"
    return f"finishing this step{longest}; press Ctrl-C again to stop now"


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)       # above the bar, which is drawn again below it
