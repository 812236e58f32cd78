"""What is printed: one line for a failure whatever is in it, characters that the output has, and pipes that close."""

import errno
import io
import os
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from helpers import complaint

import dbad.calibration.__main__ as calibration_module
import dbad.checkpoints.__main__ as checkpoints_module
import dbad.data.__main__ as data_module
from dbad.data.demo import draw
from dbad.errors import UserError, printable
from dbad.finite import NotFinite
from dbad.inspection import several
from dbad.options.command_line import main
from dbad.report import damage_sheet
from dbad.report.runs import Run
from dbad.runtime.failures import one_line_failures
from dbad.runtime.output import CLOSED
from inference_ddim import Options

SCRIPTS = ("train_ddim.py", "train_extractor.py", "evaluation.py", "inference_ddim.py", "train_lafite.py",
           "inference_lafite.py", "finetune_autoencoder.py", "build_diad.py", "train_diad.py", "inference_diad.py",
           "train_tune_eval.py")
MODULES = {"data": (data_module.main, ["--help"]), "demo": (draw.main, ["--help"]),
           "pseudo": (damage_sheet.main, ["--help"]), "checkpoints": (checkpoints_module.main, ["import", "--help"]),
           "calibration": (calibration_module.main, ["--preview", "--help"])}


@contextmanager
def closed_pipe():
    """Standard output is a pipe that nobody reads; gives what is said on standard error.

    Lines are written at once, as a long output would be.
    """
    reader, writer = os.pipe()
    os.close(reader)
    errors = io.StringIO()
    with open(writer, "w", buffering=1) as stream, redirect_stdout(stream), redirect_stderr(errors):
        yield errors        # and closing flushes: what is left must not complain, as at the interpreter's end


# Pipes

@pytest.mark.parametrize("flag", ["--help", "--help_all"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_help_into_a_closed_pipe_ends_quietly(script, name, flag):
    with pytest.raises(SystemExit) as ended, closed_pipe() as errors:
        script(name, flag)
    assert ended.value.code in (0, CLOSED) and not errors.getvalue()


@pytest.mark.parametrize("name", MODULES)
def test_the_help_of_a_module_into_a_closed_pipe_ends_quietly(name):
    module, words = MODULES[name]
    with pytest.raises(SystemExit) as ended, closed_pipe() as errors:
        module(words)
    assert ended.value.code in (0, CLOSED) and not errors.getvalue()


@pytest.mark.parametrize("name, words", [("train_ddim.py", "--item hazelnut --dry_run"),
                                         ("build_diad.py", "--random --size tiny --out x --dry_run")])
def test_a_dry_run_into_a_closed_pipe_ends_as_unix_tools_do(script, tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended, closed_pipe() as errors:
        script(name, *words.split())
    assert ended.value.code == CLOSED and not errors.getvalue()


def test_what_is_in_the_buffer_when_the_pipe_closes_does_not_complain_later():
    """`print` succeeds, and only the flush at the interpreter's end would fail."""
    with closed_pipe() as errors:
        sys.stdout.reconfigure(line_buffering=False)
        with one_line_failures():
            print("all in the buffer")
    assert not errors.getvalue()


def test_a_failure_is_told_though_the_output_is_closed():
    with pytest.raises(SystemExit) as ended, closed_pipe() as errors:
        sys.stdout.reconfigure(line_buffering=False)
        with one_line_failures():
            print("working")
            raise UserError("no such file")
    assert ended.value.code == 2 and errors.getvalue().endswith(": no such file\n")


def test_another_pipe_that_breaks_keeps_its_traceback():
    with pytest.raises(BrokenPipeError), one_line_failures():
        raise BrokenPipeError(errno.EPIPE, "of a worker")


def test_a_closed_pipe_ends_several_runs_and_is_no_failure_of_one():
    """As in train_tune_eval.py --item all --dry_run | head."""
    run = Run("bolt", 0, Path("results/bolt"), "skipped")
    with pytest.raises(SystemExit) as ended, closed_pipe() as errors, one_line_failures():
        several._attempt(run, lambda: print("bolt from data"))
    assert ended.value.code == CLOSED and not errors.getvalue()


def test_a_pipe_of_a_worker_that_breaks_is_a_failure_of_its_run(capsys):
    def worker():
        raise BrokenPipeError(errno.EPIPE, "of a worker")
    _, run = several._attempt(Run("bolt", 0, Path("results/bolt"), "skipped"), worker)
    assert run.status == "failed" and "of a worker" in run.error


# Characters

def test_names_that_the_output_has_no_characters_for_are_printed_as_escapes():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with redirect_stdout(stream):
        main(Options, lambda options: f"{options.item} in {options.img_dir}", "Inspect.",
             ["--item", "Gehäuse", "--img_dir", "\udcff"])
    assert stream.buffer.getvalue() == b"Geh\\xe4use in \\udcff\n"


@pytest.mark.parametrize("text, shown", [
    ("a\nb", r"a\nb"), ("a\r\tb\x1b[31m\x7f", r"a\r\tb\x1b[31m\x7f"), ("a\u2028b\x85", r"a\u2028b\x85"),
    ("\udcff", r"\udcff"), ("Gehäuse 螺丝 \U0001F529", "Gehäuse 螺丝 \U0001F529"), (r"a\nb", r"a\nb")])
def test_a_message_is_one_line_that_a_terminal_may_be_shown(text, shown):
    assert printable(text) == printable(printable(text)) == shown
    assert str(UserError(f"--item {text}: unknown")) == f"--item {shown}: unknown"
    assert shown in str(NotFinite("score", 0, text))


@pytest.mark.parametrize("flags, says", [
    (["--item", "a\nb"], r"--item 'a\nb': expected a plain name"), (["--item", "\udcff"], r"--item '\udcff': expected"),
    (["--dataset_path", "no\nwhere"], r"--dataset_path no\nwhere"), (["--a\nb"], "--a"),
    (["--layout", "x\ny"], r"x\ny"),
    (["--run_id", "x" * 300], "expected a name of at most 120 bytes"),
    (["--run_id", "ü" * 110], "at most 120 bytes"), (["--run_id", "\udcff"], r"--run_id '\udcff': expected"),
    (["--log_dir", "\udcff"], r"--log_dir \udcff: expected a name in UTF-8"), (["--item", "a\0b"], "null characters"),
    (["--dataset_path", "x" * 300], "--dataset_path xxx"),
    (["--diffusion_checkpoint_dir", "x" * 300], os.strerror(errno.ENAMETOOLONG)),
    (["--log_dir", "loop/x"], "--log_dir loop/x"),
    (["--item", ""], "--item"), (["--img_dir", ""], "--img_dir"), (["--device", ""], "--device"),
    (["--run_id", ""], "--run_id")])
def test_odd_words_on_the_command_line_end_in_one_line(workplace, script, tiny, capsys, flags, says):
    Path("loop").symlink_to("loop")
    before = sorted(Path().rglob("*"))
    assert says in complaint(capsys, script, "train_tune_eval.py", *tiny, *flags)
    assert sorted(Path().rglob("*")) == before


# Failures of the system

@pytest.mark.parametrize("name", ["ENAMETOOLONG", "ENOTDIR", "EISDIR", "ELOOP", "EMFILE", "EDQUOT", "EIO", "ETXTBSY",
                                  "ENOSPC", "EROFS", "EACCES", "EPERM", "EFBIG", "ENFILE", "ESTALE"])
def test_what_a_system_refuses_is_one_line_with_the_file(name, capsys):
    number = getattr(errno, name)
    with pytest.raises(SystemExit) as ended, one_line_failures():
        raise OSError(number, os.strerror(number), "some\nfile")
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.count("\n") == 1
    assert r"some\nfile: cannot be " in line and os.strerror(number) in line


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 TB"),
    torch.OutOfMemoryError("CUDA out of memory")])
def test_missing_memory_is_one_line(error, capsys):
    with pytest.raises(SystemExit) as ended, one_line_failures():
        raise error
    assert ended.value.code == 2 and "ran out of memory" in capsys.readouterr().err


def test_other_failures_of_torch_keep_their_traceback():
    with pytest.raises(RuntimeError), one_line_failures():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
