"""What the scripts do with wrong options, broken images, damaged run folders, and when they are killed.

    python -m benchmarks.hostile --out runs/hostile                       (about half an hour on two cores)
    python -m benchmarks.hostile --out runs/hostile --kinds flags --cases 50 --seed 7
    python -m benchmarks.hostile --out runs/hostile --kinds files --only 17          (one case again, with its output)

    flags     random combinations of options, right and wrong ones, over all scripts
    images    images that are broken, odd, or no images, among those to train on, of the test, and new ones
    files     random damage to a file of a finished run folder, then a script that reads it
    kills     trainings killed at random moments (SIGKILL, SIGTERM, SIGINT) and given again, three times each

A case passes if it ends in time with status 0, 2 or 130 and says why in one line at most, progress and warnings aside;
after damage to weights and the like, status 0 is only for the scores of the undamaged run; a killed training passes if
it ends with the weights and the log of the unbroken one. Every case follows from the seed
and its number. Cases run in forked copies of this process, which has loaded everything, in folders below --out.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks import hostile_cases as cases
from benchmarks import tiny_runs
from dbad.report.results import commit

ROOT = Path(__file__).resolve().parents[1]
COUNTS = {"flags": 300, "images": 60, "files": 400, "kills": 20}
LIMIT_S = 120           # of a case; a script that is not over then hangs, or computes for hours what cannot be
BAR = re.compile(r"(\d+%\|.*\||\d+\w* \[|\d+it).*[\]\d]\s*$|^\s*$")        # tqdm's lines
WARNING = re.compile(r"^(warning: |finishing this step|.*: left out: |  \w|.*Warning: )")


@dataclass(frozen=True)
class Ended:
    """How a script ended: exit status or minus the signal, None where it had to be stopped; what it said on stderr."""

    status: int | None
    lines: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """A case: what was done, whether it passed, and why not."""

    kind: str
    number: int
    what: str
    passed: bool
    status: int | None
    said: str
    seconds: float


# ------------------------------------------------------------------------------------------ running a script

def run(words: Sequence[str], folder: Path, meanwhile: Callable[[int], None] = lambda pid: None) -> Ended:
    """Run a script in `folder` in a forked copy of this process; `meanwhile` is called with its number."""
    begun = time.monotonic()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _be_script(words, folder)
    meanwhile(pid)
    status = None
    while status is None and time.monotonic() - begun < LIMIT_S:
        done, code = os.waitpid(pid, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if done else None
        time.sleep(0.005)
    if status is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    said = (folder / "stderr.txt").read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    lines = tuple(line for line in said if not BAR.search(line) and not WARNING.match(line))
    return Ended(status, lines, time.monotonic() - begun)


def _be_script(words: Sequence[str], folder: Path) -> None:
    """In the copy: become the script; never returns."""
    status = 1
    try:
        os.chdir(folder)
        for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
            handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, number)
        sys.argv = list(words)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def judged(kind: str, number: int, what: str, ended: Ended, expected: Sequence[int] = (0, 2, 130)) -> Verdict:
    """Whether a script ended as it should."""
    said = " | ".join(ended.lines)[-400:]
    wordy = len(ended.lines) > (1 if ended.status else 0)
    passed = ended.status in expected and not wordy and not (ended.status and not ended.lines)
    return Verdict(kind, number, what, passed, ended.status, said, ended.seconds)


# ------------------------------------------------------------------------------------------ the kinds of cases

def try_flags(number: int, chance: random.Random, prepared: Path, work: Path) -> Verdict:
    words = cases.random_command(chance)
    tiny_runs.copy(prepared, work)
    return judged("flags", number, " ".join(words), run(words, work))


def try_images(number: int, chance: random.Random, prepared: Path, work: Path) -> Verdict:
    tiny_runs.copy(prepared, work)
    what, words = cases.spoil_images(chance, work)
    return judged("images", number, f"{what}: {' '.join(words[:1])}", run(words, work))


def try_files(number: int, chance: random.Random, prepared: Path, work: Path) -> Verdict:
    tiny_runs.copy(prepared, work)
    what, words = cases.spoil_run(chance, work)
    verdict = judged("files", number, f"{what}: {' '.join(words[:1])}", run(words, work))
    if verdict.status == 0 and not what.endswith(".json") and tiny_runs.scores_differ(prepared, work):
        return replace(verdict, passed=False, said="other scores, and not a word")
    return verdict


def try_kills(number: int, chance: random.Random, prepared: Path, work: Path) -> Verdict:
    """A training killed three times, each after a random part of the time that it takes, and given again."""
    words, unbroken = tiny_runs.training(number, prepared)
    shutil.copytree(prepared / "data", work / "data")
    stops = []
    for how in chance.choices((signal.SIGKILL, signal.SIGTERM, signal.SIGINT), k=3):
        delay = chance.random() * unbroken.seconds

        def kill(pid: int, how=how, delay=delay) -> None:
            time.sleep(delay)
            os.kill(pid, how)
        ended = run(words, work, kill)
        stops.append(f"{how.name} after {delay:.1f} s")
        if ended.status not in (0, 2, 130, -how) or len(ended.lines) > 1:
            return judged("kills", number, f"{words[0]}, {', '.join(stops)}", ended)
    ended = run(words, work)
    verdict = judged("kills", number, f"{words[0]}, {', '.join(stops)}", ended, (0,))
    different = tiny_runs.differences(unbroken.folder, work)
    if verdict.passed and different:
        return replace(verdict, passed=False, said=f"differ: {', '.join(different)}")
    return verdict


TRY = {"flags": try_flags, "images": try_images, "files": try_files, "kills": try_kills}


def seed_of(*keys: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(keys).encode(), digest_size=8).digest(), "little")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is written")
    parser.add_argument("--kinds", nargs="+", choices=COUNTS, default=list(COUNTS))
    parser.add_argument("--cases", type=int, help="of each kind (300 flags, 60 images, 400 files, 20 kills)")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this case alone; its folder is kept")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)            # a process with threads cannot be copied
    for path in ROOT.glob("*.py"):      # once, and not in every copy
        importlib.import_module(path.stem)
    out = args.out.resolve()
    os.environ["XDG_CACHE_HOME"] = str(out / "cache")
    prepared = tiny_runs.prepare(out / "prepared", run)

    verdicts = []
    for kind in args.kinds:
        chosen = range(args.cases or COUNTS[kind]) if args.only is None else [args.only]
        for number in chosen:
            work = out / f"{kind}-{number}"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            verdict = TRY[kind](number, random.Random(seed_of(args.seed, kind, number)), prepared, work)
            verdicts.append(verdict)
            if not verdict.passed or args.only is not None:
                print(f"{kind} {number} {'passed' if verdict.passed else 'FAILED'}, status {verdict.status}, "
                      f"{verdict.seconds:.0f} s: {verdict.what}\n    {verdict.said}", flush=True)
            if verdict.passed and args.only is None:
                shutil.rmtree(work, ignore_errors=True)
    (out / "hostile.json").write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1) + "\n")
    print(f"\ncommit {commit()}, seed {args.seed}\n\n| kind | cases | status 0 | 2 | 130 | failed |\n"
          "|---|---|---|---|---|---|")
    for kind in args.kinds:
        found = [verdict for verdict in verdicts if verdict.kind == kind]
        counts = Counter(verdict.status for verdict in found)
        print(f"| {kind} | {len(found)} | {counts[0]} | {counts[2]} | {counts[130]} | "
              f"{sum(not verdict.passed for verdict in found)} |")
    if not all(verdict.passed for verdict in verdicts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
