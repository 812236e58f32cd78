"""Train, tune and evaluate, end to end: one category, several, or all of a data set.

    python train_tune_eval.py --item hazelnut                                     (built-in demo data, minutes on a CPU)
    python train_tune_eval.py --item screw --dataset_path data/mvtec --preset small
    python train_tune_eval.py --item all --dataset_path data/mvtec --seeds 0 1 2
    python train_tune_eval.py --item all --dataset_path data/mvtec --method lafite      (one model for all of them)
    python train_tune_eval.py --item all --method diad --size tiny                      (likewise)

Each phase of a method is a script and can be run alone.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, cast

from dbad.errors import UserError
from dbad.families.family import Family
from dbad.families.registry import FAMILIES, Method, family_of
from dbad.fields import opt
from dbad.inspection.options import AnyInspectionRun, ChainRun
from dbad.options.command_line import flag_value, flags_of, given_flags, parse, print_end
from dbad.options.resolve import run_folder
from dbad.runtime.failures import one_line_failures

DEFAULT = "ddim"
SKIPS = {"skip_train": "skip the training of the "
                       "model", "skip_extractor": "skip the adaptation of the feature extractor",
         "skip_threshold": "skip calibration; needed for --pxl_threshold and --feature_threshold to have an effect",
         "skip_evaluation": "skip the inspection of the test images"}


@dataclass(frozen=True, kw_only=True)
class SetOptions:
    """Any number of categories and seeds."""

    heading: ClassVar[str] = "Phases"

    item: tuple[str, ...] = opt("one category, several, or all", aliases=["--mvtec_item"], first=1)
    method: Method | None = opt(
        "; ".join(f"{family.name}: {family.about}" for family in FAMILIES.values())
        + f" (default: {DEFAULT})", None, first=2)
    seeds: tuple[int, ...] | None = opt("run with each of these seeds; the summary gives mean and spread", None,
                                        least=0, first=7)


def options_of(family: Family) -> type[ChainRun]:
    """The options of all phases of a method, each as its script declares it; a skipped phase uses the disk."""
    skips = [(name, bool, opt(SKIPS[name], False)) for name in dict.fromkeys(family.phases.values())]
    scripts = [getattr(script, "ChainOptions", script.Options) for script in modules(family)]
    bases = (SetOptions, *scripts)
    return cast("type[ChainRun]", make_dataclass("Options", skips, bases=bases, frozen=True, kw_only=True, namespace={
        "__doc__": "Which phases run.", "heading": SetOptions.heading, "__module__": __name__}))


def modules(family: Family) -> list[ModuleType]:
    """The scripts of the phases."""
    return [importlib.import_module(name) for name in family.phases]


Options = options_of(FAMILIES[DEFAULT])


def run(options: ChainRun) -> Path:
    """Run what the options name; returns the folder of the results, for several runs that of all of them."""
    from dbad.inspection.chain import expand, job_of  # these load torch
    from dbad.inspection.several import run_jobs, run_one, write_set_summary
    family = family_of(options.method or DEFAULT, "--method")
    scripts = modules(family)
    models = list(expand(options, family, scripts))
    jobs = [job_of(model, items, family, scripts) for model, items in models]
    count = sum(len(job.options) for job in jobs)
    if count == 1:
        results = run_one(jobs[0])
        return results.folder if results else run_folder(models[0][0])
    if options.images:
        raise UserError(f"--images: expected one --item and one seed, found {count} runs")

    def summarise(runs: Sequence[Any]) -> None:
        if not options.skip_evaluation:
            write_set_summary(cast(AnyInspectionRun, options), runs)
    runs = run_jobs(jobs, summarise)
    if hasattr(scripts[-1], "table") and not options.dry_run and not options.skip_evaluation:
        print(scripts[-1].table(runs))
    return options.img_dir


# ------------------------------------------------------------------------------------------ the command line

def overview() -> str:
    """The help without a method: the methods, and how to see the options of each."""
    width = max(map(len, FAMILIES))
    lines = [f"  {name.ljust(width)}  {family.about}{' (default)' * (name == DEFAULT)}"
             for name, family in FAMILIES.items()]
    phases = [f"  {name.ljust(width)}  {' '.join(f'{script}.py' for script in family.phases)}"
              for name, family in FAMILIES.items()]
    return "\n".join([
        "usage: train_tune_eval.py --item NAME [--method NAME] [options]", "", __doc__.strip(), "", "methods:", *lines,
        "", "phases:", *phases, "", "the options of a method:",
        *(f"  python train_tune_eval.py --method {name} --help" for name in FAMILIES), "", "all options: --help_all"])


def read(words: Sequence[str]) -> ChainRun:
    """The options of the method that the words name; a flag of another method is a `UserError`."""
    family = family_of(flag_value(words, "--method") or DEFAULT, "--method")
    chosen = options_of(family)
    own = flags_of(chosen)
    for flag in given_flags(words):
        if flag not in own and any(flag in flags_of(options_of(other)) for other in FAMILIES.values()):
            raise UserError(f"{flag}: not an option of --method {family.name}")
    return parse(chosen, words, __doc__)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the method, then its options; run, and print where everything is."""
    words = sys.argv[1:] if argv is None else [str(word) for word in argv]
    with one_line_failures():
        if {"-h", "--help"} & set(words) and flag_value(words, "--method") is None:
            print(overview())
            raise SystemExit(0)
        print_end(read(words), lambda options: f"Everything is in {run(options)}")


if __name__ == "__main__":
    main()
