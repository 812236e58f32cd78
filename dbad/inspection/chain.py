"""The chain of a method's phases, each a script, for any number of categories and seeds."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType
from typing import Any, TypeVar

from dbad.data.categories import chosen_items, named_items, open_category
from dbad.errors import printable
from dbad.families.family import Family
from dbad.fields import default_of, fields_of
from dbad.files.locks import writing_run
from dbad.inspection.options import ChainRun
from dbad.inspection.run import check_inspected
from dbad.inspection.several import Job
from dbad.options.resolve import Chain, name_of, one_header, run_folder, run_name, subset
from dbad.records import RunResults

C = TypeVar("C", bound=ChainRun)


def expand(options: C, family: Family, scripts: Sequence[ModuleType]) -> Iterator[tuple[C, tuple[str, ...]]]:
    """Yield the options of every model, with a run folder of its own, and the categories of that model."""
    for script in scripts:
        options = script.in_chain(options, skipped(options, family)) if hasattr(script, "in_chain") else options
    options = replace(options, method=family.name)
    # All names are read now, so that an unknown category fails before hours of training.
    groups = [chosen_items(options)] if family.together else [(name,) for name in named_items(options)]
    for items in groups:
        for seed in dict.fromkeys(options.seeds or (options.seed,)):
            if family.together:
                run_id = run_name(options, family.name)
            else:
                run_id = items[0] if options.run_id is None else options.run_id + f"-{items[0]}" * (len(groups) > 1)
            run_id += f"-seed{seed}" * bool(options.seeds)
            item = options.item if family.together else items[0]
            yield replace(options, item=item, seed=seed, run_id=run_id), items


def skipped(options: ChainRun, family: Family) -> set[str]:
    """The names of the phases that are skipped."""
    return {phase for phase, option in family.phases.items() if getattr(options, option)}


def job_of(options: ChainRun, items: Sequence[str], family: Family, scripts: Sequence[ModuleType]) -> Job:
    """The phases of one model as a job of the driver; the last phase inspects, the others make the model.

    A script of a phase has `Options` and `run`, and may have

        in_chain       options, names of skipped phases -> options with the defaults of the whole chain
        check_phase    options, training options that it will find, names of skipped phases -> those that the next finds
        chain          options -> options for the phases after it; called instead of `run`
        begun          options -> the intensity of a training that is resumed
    """
    *training, last = scripts
    left_out = skipped(options, family)
    inspects, header = last.__name__ not in left_out, Chain(options)

    def check(inspected: Any) -> None:
        trained: dict[str, Any] = {}
        for script in training if not family.together else ():
            trained = script.check_phase(inspected, trained, left_out)
        if inspects:
            if hasattr(last, "check_phase"):
                last.check_phase(inspected, trained, left_out)
            begun = next(script.begun for script in training if hasattr(script, "begun"))
            check_inspected(inspected, None if options.skip_train else begun, family.name)

    def train() -> None:
        chained = options
        with one_header(header), nullcontext() if options.dry_run else writing_run(run_folder(options)):
            for script in training:
                if script.__name__ not in left_out and hasattr(script, "chain"):
                    chained = script.chain(chained)
                elif script.__name__ not in left_out:
                    script.run(subset(script.Options, chained))

    def inspect(inspected: Any) -> RunResults | None:
        if not has_images(inspected):
            print(f"{inspected.item}: no test images: inspect new ones with {command_for(inspected, family)}")
            return None
        with one_header(header):
            return last.run(subset(last.Options, inspected))

    return Job(options={item: replace(options, item=item) for item in items},
               folders={item: options.img_dir / (name_of(options) + f"-{item}" * (len(items) > 1)) for item in items},
               check=check, train=None if all(script.__name__ in left_out for script in training) else train,
               inspect=inspect if inspects else None, resume=options.resume)


def has_images(options: Any) -> bool:
    """True if there is anything to inspect: new images, or test images of the category."""
    return bool(options.images or options.dataset_path is None or open_category(options, options.item_states).test)


def command_for(options: ChainRun, family: Family) -> str:
    """The command that inspects new images with the run of the options."""
    folder = options.diffusion_checkpoint_dir
    words = ["python", family.scripts.inspection, "--item", str(options.item), "--run_id", name_of(options)]
    if folder != default_of(fields_of(type(options))["diffusion_checkpoint_dir"]):
        words += ["--diffusion_checkpoint_dir", str(folder)]
    return printable(shlex.join(words)) + " --images PATH"
