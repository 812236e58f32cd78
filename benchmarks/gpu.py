"""Every method end to end on a GPU: does it run, and does it say what it must? Then how fast it is.

    python -m benchmarks.gpu --dataset_path data/mvtec --item screw --out runs/gpu
    python -m benchmarks.gpu --device cpu --tiny --out runs/gpu             (a rehearsal on a machine without a GPU)

The project's own scripts are run, for every method:

    runs      train_tune_eval.py: training, search for settings, calibration, inspection
    twice     the same command in another folder, without the search: files are equal to the byte
    kill      a third time, stopped by SIGTERM and by SIGKILL on the way and given again: likewise
    images    test images as new ones: their scores are those of the test, to 1e-3 of them
    cpu       the same images on the CPU, both in fp32: likewise

Trainings are short, and of a few images of the data set, so that the metrics mean nothing: what takes long is done by
processors, at least 16 of which should be there for --minutes. Methods run side by side (--jobs); the throughput
(benchmarks/throughput.py) is measured after that, alone. What fails is noted, and the rest goes on. --out holds
gpu.json, the images and the output of every command; the exit status is 1 where a check has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks import throughput
from benchmarks.few_images import take_few
from benchmarks.outcomes import Failed, agreement, same_files, scores
from dbad.data.categories import open_category
from dbad.data.splits import some_of
from dbad.options.shared import RunOptions
from dbad.report.results import commit, versions

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("ddim", "knn", "lafite", "diad")
CHECKS = ("runs", "twice", "kill", "images", "cpu")
SCRIPTS = {"ddim": "inference_ddim.py", "knn": "inference_lafite.py", "lafite": "inference_lafite.py",
           "diad": "inference_diad.py"}
NUM_COMPARED = 12           # images

# Lengths and sizes: as little as shows whether everything works. Tiny is for a CPU and says nothing else.
SHORT = {
    "ddim": "--preset small --steps_diffusion 96 --save_n_epochs 3 --epochs_extractor 1 --feature_resolution 128",
    "knn": "--preset small --bank_mb 1",
    "lafite": "--preset demo --bank_mb 1 --grid 16 --steps_features 120 --batch_size 32",
    "diad": "--size tiny --autoencoder_steps 100 --steps_latent 100",
}
# What the search leaves alone, so that it has little to try: all is on the processor. It stops after TUNE_MINUTES.
TUNE_MINUTES = 0.05
GIVEN = {"ddim": "--map_norm none --pixel_difference max_square --layer_weights 1 --blur_sigma 4 "
                 "--steps_to_regenerate 2"}
TINY = {
    "ddim": "--preset demo --resolution 16 --channels 32 32 --steps_diffusion 6 --save_n_epochs 1 --epochs_extractor 1 "
            "--feature_resolution 32 --steps_to_regenerate 2",
    "knn": "--preset demo --feature_resolution 32 --grid 4 --extractor_layers 0 1 --bank_mb 0.01",
    "lafite": "--preset demo --feature_resolution 32 --grid 4 --extractor_layers 0 1 --bank_mb 0.01 --components 8 "
              "--feature_channels 32 --steps_features 6 --feature_batch_size 4 --discriminator_contrib 0 "
              "--edit_contrib 1",
    "diad": "--size tiny --autoencoder_steps 2 --steps_latent 2 --latent_batch_size 2 --latent_steps_back 2 "
            "--extractor_layers 1 2 --feature_resolution 64",
}


@dataclass(frozen=True)
class Outcome:
    """A check of a method: ok, failed or skipped; how long it took, and what there is to say."""

    method: str
    check: str
    status: str
    seconds: float
    detail: str


def run_script(words: Sequence[str], folder: Path, timeout: float) -> None:
    """Run a script of the project in `folder`, with its output in output.txt there; `Failed` unless it succeeds."""
    process = start_script(words, folder)
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise Failed(f"{words[0]} had not ended when --minutes were over") from None
    if status:
        raise Failed(f"{words[0]} ended with {status}: {last_line(folder)}")


def start_script(words: Sequence[str], folder: Path) -> subprocess.Popen:
    """Begin to run a script of the project in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "a", encoding="utf-8") as output:
        print("$", *words, file=output, flush=True)
        return subprocess.Popen([sys.executable, ROOT / words[0], *words[1:]], cwd=folder, stdout=output,
                                stderr=subprocess.STDOUT)


def last_line(folder: Path) -> str:
    """What the last command said at the end."""
    lines = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")[:300]


@dataclass(frozen=True)
class Plan:
    """What is checked on which machine; `run` is what runs a script, and `deadline` when all has to be over."""

    options: argparse.Namespace
    deadline: float
    run: Callable[[Sequence[str], Path, float], None]

    def left(self) -> float:
        """Seconds."""
        return max(1.0, self.deadline - time.monotonic())

    def folder(self, method: str, name: str) -> Path:
        return self.options.out / f"{method}-{name}"

    def words(self, method: str, *more: str) -> list[str]:
        """The command that does it all, for a method."""
        sizes = TINY if self.options.tiny else SHORT
        return ["train_tune_eval.py", "--method", method, *self.data(), *sizes[method].split(),
                "--device", self.options.device, *(
                    ["--feature_cache", "cache"] if method in ("knn", "lafite") else []), *more]

    def data(self) -> list[str]:
        return ["--item", self.options.item, "--dataset_path", str(self.options.out / "data")]

    def inspect(self, method: str, name: str, *more: str) -> dict[str, float]:
        """Scores of the compared images as new ones, by file."""
        run_id = [] if method == "ddim" else ["--run_id", f"{self.options.item}-{method}"]
        folder = self.folder(method, "runs")
        files = ["--images", *compared(self.options)]
        self.run([SCRIPTS[method], *self.data(), *run_id, *files, "--img_dir", name, *more], folder, self.left())
        return scores(folder / name)


def compared(options: argparse.Namespace) -> list[str]:
    """Some of the test images that are inspected."""
    category = open_category(RunOptions(item=options.item, dataset_path=options.out / "data"))
    return [str(sample.path) for sample in some_of(category.test, NUM_COMPARED)]


# ------------------------------------------------------------------------------------------ the checks

def check_runs(plan: Plan, method: str) -> str:
    searched = [] if method == "diad" else ["--tune_minutes", str(TUNE_MINUTES), *GIVEN.get(method, "").split()]
    folder = plan.folder(method, "runs")
    plan.run(plan.words(method, *searched), folder, plan.left())
    metrics = json.loads(next(folder.glob("results/*/metrics.json")).read_text(encoding="utf-8"))
    return f"image AUROC {metrics['image']['auroc']:.3f}, {1000 * metrics['seconds_per_image']:.1f} ms per image"


def check_twice(plan: Plan, method: str) -> str:
    for name in ("once", "again"):
        plan.run(plan.words(method, *untuned(method)), plan.folder(method, name), plan.left())
    return same_files(plan.folder(method, "once"), plan.folder(method, "again"))


def check_kill(plan: Plan, method: str) -> str:
    """Stopped twice while it trains: when it has logged an epoch, and after the next one."""
    if method == "knn":
        return "nothing is trained"
    words, folder, stopped = plan.words(method, *untuned(method)), plan.folder(method, "kill"), 0
    for number, how in enumerate((signal.SIGTERM, signal.SIGKILL), 1):
        process = start_script(words, folder)
        while process.poll() is None and lines_of_logs(folder) < number and plan.left() > 1:
            time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(how)
            stopped += 1
        process.wait()
    plan.run(words, folder, plan.left())
    if not stopped:
        raise Failed("it was over before it could be stopped")
    return f"stopped {stopped} times; " + same_files(plan.folder(method, "once"), folder)


def check_images(plan: Plan, method: str) -> str:
    """What stands in scores.csv of the test has paths relative to the data set; files are told apart by their ends."""
    tested = scores(next(plan.folder(method, "runs").glob("results/*")))
    found = plan.inspect(method, "images", "--device", plan.options.device)
    expected = {path: next(score for name, score in tested.items() if path.endswith(name)) for path in found}
    return agreement(expected, found)


def check_cpu(plan: Plan, method: str) -> str:
    here = plan.inspect(method, "here", "--device", plan.options.device, "--precision", "fp32")
    return agreement(plan.inspect(method, "cpu", "--device", "cpu", "--precision", "fp32"), here)


def untuned(method: str) -> list[str]:
    """A search stops when its minutes are over, so that it need not find the same twice; diad has none."""
    return [] if method == "diad" else ["--no_tune"]


def lines_of_logs(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("checkpoints/*/log.jsonl"))


def check_method(plan: Plan, method: str) -> list[Outcome]:
    """All checks of a method in turn; those that need what an earlier one should have left fail with it."""
    outcomes = []
    for check in plan.options.checks:
        begun = time.monotonic()
        if begun > plan.deadline:
            outcomes.append(Outcome(method, check, "skipped", 0.0, "--minutes are over"))
            continue
        try:
            status, detail = "ok", globals()[f"check_{check}"](plan, method)
        except Failed as error:
            status, detail = "failed", str(error)
        except Exception as error:      # whatever it is, the other checks are to go on
            status, detail = "failed", f"{type(error).__name__}: {error}"[:300]
        outcomes.append(Outcome(method, check, status, time.monotonic() - begun, detail))
        print(f"{method} {check}: {status}, {outcomes[-1].seconds:.0f} s; {detail}", flush=True)
    return outcomes


# ------------------------------------------------------------------------------------------ all together

def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_path", type=Path, help="data set; without it the built-in demo data")
    parser.add_argument("--item", default="hazelnut", help="category (hazelnut)")
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is written")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, mps, or cpu as a rehearsal (cuda)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--checks", nargs="*", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--no_throughput", action="store_true", help="leave the throughput out")
    parser.add_argument("--tiny", action="store_true", help="networks and lengths as small as they get")
    parser.add_argument("--jobs", type=int, default=4, help="methods that are checked side by side (4)")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing more after so many minutes (8)")
    options = parser.parse_args(argv)
    options.dataset_path = options.dataset_path and options.dataset_path.resolve()
    options.out = options.out.resolve()
    return options


def main(argv: Sequence[str] | None = None, run: Callable[[Sequence[str], Path, float], None] = run_script) -> None:
    options, begun = parse(argv), time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    take_few(options.item, options.dataset_path or options.out / "drawn", options.out / "data",
             drawn=options.dataset_path is None)
    throughput_s = 0 if options.no_throughput else 60 * options.minutes / 4
    plan = Plan(options, begun + 60 * options.minutes - throughput_s, run)
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = [outcome for found in pool.map(lambda method: check_method(plan, method), options.methods)
                    for outcome in found]
    rates = [] if options.no_throughput else throughput.measure(
        torch.device(options.device), options.tiny, replace(plan, deadline=begun + 60 * options.minutes).left())
    machine = throughput.machine(options.device) | versions() | {"commit": commit()}
    found = {"machine": machine, "command": sys.argv[1:] if argv is None else list(argv),
             "checks": [asdict(outcome) for outcome in outcomes], "throughput": [asdict(rate) for rate in rates]}
    (options.out / "gpu.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    print(f"\n{', '.join(f'{name} {value}' for name, value in machine.items())}\n")
    print("| method | check | | seconds | |\n|---|---|---|---|---|")
    for each in outcomes:
        print(f"| {each.method} | {each.check} | {each.status} | {each.seconds:.0f} | {each.detail} |")
    if rates:
        print("\n" + throughput.table(rates))
    failed = [f"{each.method} {each.check}" for each in outcomes if each.status != "ok"]
    failed += [rate.what for rate in rates if rate.error]
    print(f"\n{time.monotonic() - begun:.0f} s; {len(failed)} of {len(outcomes) + len(rates)} failed"
          + (": " + ", ".join(failed) if failed else ""))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    os.environ.setdefault("TQDM_MININTERVAL", "5")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 4) // 4)))   # of scripts, four side by side
    main()
