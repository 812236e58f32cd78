"""Ctrl-C and SIGTERM: what is said, when, and how the program ends."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dbad.runtime import signals
from dbad.runtime.failures import one_line_failures
from dbad.runtime.signals import stop_signals

ROOT = Path(__file__).parent.parent
BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@BOTH
def test_a_first_signal_asks_and_a_second_one_stops(number, monkeypatch):
    monkeypatch.setattr(signals, "SAME_S", 0.0)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        with stop_signals() as stopped:
            assert not stopped()
            os.kill(os.getpid(), number)
            assert stopped()
            os.kill(os.getpid(), number)
            raise AssertionError("the second signal was not heard")
    assert signal.getsignal(number) is before


def test_a_signal_that_a_launcher_passes_on_is_no_second_one():
    with stop_signals() as stopped:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stopped()


@BOTH
@pytest.mark.parametrize("seconds, says", [(11.2, " (up to 12 s)"), (0.01, " (up to 1 s)"), (None, "")])
def test_the_first_signal_is_answered_at_once(number, seconds, says, capsys):
    with stop_signals(lambda: seconds):
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 5
        while not (said := capsys.readouterr().err) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert said == f"finishing this step{says}; press Ctrl-C again to stop now\n"


def test_without_a_signal_and_without_a_step_nothing_is_said(capsys):
    with stop_signals(lambda: 1.0):
        pass
    with stop_signals():
        os.kill(os.getpid(), signal.SIGINT)
    assert capsys.readouterr().err == "" and signal.set_wakeup_fd(-1) == -1


@BOTH
def test_a_signal_ends_whatever_a_script_does_with_the_words_and_the_status_of_a_training(number, capsys):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop, one_line_failures():
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert stop.value.code == 130
    assert re.fullmatch(r"\S+: stopped; finished parts are kept; the same command continues a training\n",
                        capsys.readouterr().err)
    assert signal.getsignal(number) is before


@pytest.mark.skipif(sys.platform != "linux", reason="a mutex of zeros is that of Linux")
def test_a_second_signal_ends_an_operation_that_does_not_end():
    """Python's own handlers wait for an operation in C to end; a mutex that is locked twice is one that never does."""
    code = ("import ctypes, os, signal, threading, time\nfrom dbad.runtime import signals\n"
            "signals.SAME_S, signals.PATIENCE_S = 0.1, 0.1\n"
            "def press():\n    for _ in range(2):\n        time.sleep(0.3)\n"
            "        os.kill(os.getpid(), signal.SIGINT)\n"
            "with signals.stop_signals(lambda: 60.0):\n"
            "    threading.Thread(target=press, daemon=True).start()\n"
            "    mutex = ctypes.create_string_buffer(128)\n"
            "    for _ in range(2):\n        ctypes.CDLL(None).pthread_mutex_lock(mutex)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    first, second = done.stderr.splitlines()
    assert first == "finishing this step (up to 60 s); press Ctrl-C again to stop now" and ": stopped; " in second
