"""One process at a time writes into a folder, and what killed ones have left half-written goes."""

import errno
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import one_line

from dbad.errors import UserError
from dbad.files import locks
from dbad.files.atomic import atomic_write
from dbad.files.locks import writing_out, writing_results, writing_run
from dbad.files.temporary import machine, remove_abandoned, temporary_file, temporary_folder

fcntl = pytest.importorskip("fcntl")
WAYS = {writing_run: (".lock", "run_id"), writing_out: (".lock", "out"), writing_results: ("../.run.lock", "img_dir")}


@pytest.fixture
def elsewhere(tmp_path):
    """`elsewhere(lock, text)`: lock a file as another process does, for which another open file of this one stands."""
    handles = []

    def lock(path: Path, text: str = "") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handles.append(os.open(path, os.O_RDWR | os.O_CREAT))
        os.write(handles[-1], text.encode())
        fcntl.flock(handles[-1], fcntl.LOCK_EX)

    yield lock
    for handle in handles:
        os.close(handle)


@pytest.mark.parametrize("writing", WAYS)
def test_a_second_process_is_told_of_the_first_in_one_line(writing, elsewhere, tmp_path):
    name, option = WAYS[writing]
    folder = tmp_path / "run"
    folder.mkdir()
    elsewhere(folder / name, json.dumps({"pid": 4711, "host": "press-3", "since": "2026-01-02 03:04:05"}))
    with pytest.raises(UserError) as error, writing(folder):
        raise AssertionError("both write")
    line = one_line(error)
    assert line.startswith(f"{folder}: process 4711 on press-3, started 2026-01-02 03:04:05, is writing there; wait")
    assert line.endswith(f"another --{option}")


def test_a_lock_tells_who_holds_it_and_goes_with_the_folders_it_made(tmp_path):
    folder = tmp_path / "checkpoints" / "run"
    with writing_run(folder):
        about = json.loads((folder / ".lock").read_text())
        assert (about["pid"], about["host"]) == (os.getpid(), platform.node()) and about["since"]
    assert list(folder.iterdir()) == []
    with pytest.raises(ZeroDivisionError), writing_run(tmp_path / "others" / "run"):
        _ = 1 // 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_process_that_has_the_lock_gets_it_again_and_keeps_it_to_the_end(tmp_path):
    with writing_run(tmp_path):
        with writing_run(tmp_path / ".." / tmp_path.name):
            pass
        assert (tmp_path / ".lock").is_file()
        other = os.open(tmp_path / ".lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)
    assert not (tmp_path / ".lock").exists()


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path):
    code = ("import os, signal, sys\nfrom pathlib import Path\nfrom dbad.files.locks import writing_run\n"
            "with writing_run(Path(sys.argv[1])):\n    os.kill(os.getpid(), signal.SIGKILL)")
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parent.parent, timeout=60)
    assert killed.returncode == -9 and (tmp_path / ".lock").is_file()
    with writing_run(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_results_can_be_renamed_while_they_are_held(tmp_path):
    folder = tmp_path / "results" / "run"
    with writing_results(folder):
        folder.mkdir()
        folder.rename(tmp_path / "results" / "run.1")
        assert [path.name for path in sorted(folder.parent.iterdir())] == [".run.lock", "run.1"]
    assert [path.name for path in folder.parent.iterdir()] == ["run.1"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_in_the_file_system_it_goes_on_with_a_warning(number, tmp_path, monkeypatch, capsys):
    def none(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    with writing_run(tmp_path):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"warning: {tmp_path}: cannot be locked ({os.strerror(number)})")


def test_of_processes_that_were_launched_together_only_the_first_takes_the_lock(elsewhere, tmp_path, monkeypatch):
    elsewhere(tmp_path / ".lock")
    monkeypatch.setenv("RANK", "1")
    with writing_run(tmp_path):
        pass
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="another process is writing there"), writing_run(tmp_path):
        pass


def test_a_lock_that_went_while_it_was_waited_for_is_taken_anew(tmp_path, monkeypatch):
    """The process before removes the file and lets go of it: what was opened before is then no longer the lock."""
    lock, calls = locks._lock, []

    def late(handle):
        lock(handle)
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()

    monkeypatch.setattr(locks, "_lock", late)
    with writing_run(tmp_path):
        assert len(calls) == 2 and (tmp_path / ".lock").is_file()


# ------------------------------------------------------------------------------------------ temporary files

DEAD = 2 ** 22 + 1          # more processes than a system numbers


def left_behind(folder: Path, owner: str, process: int, name: str = "last") -> Path:
    path = folder / f".{name}-{owner}-{process}-abcd1234.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half of a sta")
    return path


def test_a_temporary_file_tells_whose_it_is_and_ends_like_the_file(tmp_path):
    with atomic_write(tmp_path / "last.pt") as temporary:
        assert temporary.name.startswith(f".last-{machine()}-{os.getpid()}-") and temporary.suffix == ".pt"
        remove_abandoned(tmp_path)
        assert temporary.is_file()
        temporary.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_very_long_name_has_a_temporary_one_that_file_systems_take(tmp_path):
    name = "x" * 250 + ".pt"
    with atomic_write(tmp_path / name) as temporary:
        temporary.write_text("whole")
    assert (tmp_path / name).read_text() == "whole"


def test_what_dead_processes_left_goes_and_nothing_else(tmp_path):
    gone = [left_behind(tmp_path, machine(), DEAD), left_behind(tmp_path / "samples", machine(), DEAD),
            left_behind(tmp_path, machine(), os.getpid())]       # a process before this one had its number
    kept = [left_behind(tmp_path, machine(), os.getppid()), left_behind(tmp_path, "0123abcd", DEAD),
            left_behind(tmp_path, "mine", DEAD)]
    for name in (".last-killed.pt", "last.pt", f"last-{machine()}-{DEAD}-abcd1234.pt"):
        kept.append(tmp_path / name)
        kept[-1].touch()
    with writing_run(tmp_path):
        pass
    assert [path.exists() for path in gone] == [False] * 3
    assert all(path.exists() for path in kept)


def test_folders_of_dead_processes_go_with_what_they_hold_and_on_the_level_that_is_asked_for(tmp_path):
    for place in (tmp_path, tmp_path / "below"):
        left_behind(place / f".hazelnut-{machine()}-{DEAD}-abcd1234", machine(), os.getppid())
    remove_abandoned(tmp_path, below=False)
    assert [path.name for path in tmp_path.iterdir()] == ["below"] and len(list((tmp_path / "below").iterdir())) == 1
    with temporary_folder(tmp_path / "hazelnut") as work, temporary_file(tmp_path / "x.png") as file:
        remove_abandoned(tmp_path)
        assert work.is_dir() and file.is_file()
    assert list((tmp_path / "below").iterdir()) == [] and [path.name for path in tmp_path.iterdir()] == ["below"]


def test_processes_of_another_namespace_are_of_another_machine(monkeypatch):
    here = machine()
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]")
    assert machine() != here
