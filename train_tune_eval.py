"""Train, tune and evaluate, end to end: one category, several, or all of a data set.

    python train_tune_eval.py --item hazelnut                                     (built-in demo data, minutes on a CPU)
    python train_tune_eval.py --item screw --dataset_path data/mvtec --preset small
    python train_tune_eval.py --item all --dataset_path data/mvtec --seeds 0 1 2
    python train_tune_eval.py --item all --dataset_path data/mvtec --method lafite      (one model for all of them)
    python train_tune_eval.py --item all --method diad --size tiny                      (likewise)

The four phases of --method ddim are train_ddim.py, train_extractor.py, evaluation.py and inference_ddim.py, the two of
lafite and knn train_lafite.py and inference_lafite.py, the four of diad finetune_autoencoder.py, build_diad.py,
train_diad.py and inference_diad.py; each can be run alone.
"""

import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import build_diad
import evaluation
import finetune_autoencoder
import inference_ddim
import inference_diad
import inference_lafite
import train_ddim
import train_diad
import train_extractor
import train_lafite
from dbad.checkpoints.weights import check_trained
from dbad.data.depth import run_intensity
from dbad.data.images import category_names, check_readable, chosen_items, named_items, open_category, test_images
from dbad.errors import UserError, printable
from dbad.families.detector import check_layer_weights
from dbad.files.atomic import check_folders, known_json, write_json
from dbad.files.locks import writing_run
from dbad.files.names import FINISHED
from dbad.inspection.run import check_new_images
from dbad.inspection.settle import given_thresholds
from dbad.networks.extractors import build_extractor, chosen_layers, load_extractor
from dbad.options.command_line import main, opt, plain, resolve, run_folder, run_name, subset, trained_options
from dbad.report import summary
from dbad.report.results import listing_digest, set_summary
from dbad.report.runs import Run


@dataclass(frozen=True, kw_only=True)
class PhaseOptions:
    """Which phases run; a skipped one uses what is on disk."""

    skip_train: bool = opt("skip training the diffusion model", False)
    skip_extractor: bool = opt("skip adapting the feature extractor", False)
    skip_threshold: bool = opt("skip calibration; --pxl_threshold and --feature_threshold count only then", False)
    skip_evaluation: bool = opt("skip inspecting the test images", False)


# The methods that have one model for all categories, and their options.
TOGETHER = {"lafite": (train_lafite.Options, inference_lafite.Options),
            "knn": (train_lafite.Options, inference_lafite.Options),
            "diad": (train_diad.Options, inference_diad.Options, build_diad.ModelOptions)}


@dataclass(frozen=True, kw_only=True)
class CategoryOptions(PhaseOptions, train_ddim.Options, train_extractor.Options, evaluation.Options,
                      inference_ddim.Options, train_lafite.Options, inference_lafite.Options, train_diad.Options,
                      inference_diad.Options, build_diad.ModelOptions):
    """The options of all phases of all methods, for one category."""

    item: str = opt("category to work on, such as hazelnut", aliases=["--mvtec_item"])
    method: Literal["ddim", "lafite", "knn", "diad"] | None = opt(
        "ddim: conditioned denoising of images; lafite: diffusion of features, one model for all categories; knn: "
        "distance to good patches, no diffusion; diad: latent diffusion, one model for all categories (ddim)", None)


@dataclass(frozen=True, kw_only=True)
class Options(CategoryOptions):
    """The options of all phases of all methods, for any number of categories and seeds."""

    item: tuple[str, ...] = opt("one category, several, or all", aliases=["--mvtec_item"])
    seeds: tuple[int, ...] | None = opt("run with each of these seeds; the summary gives mean and spread", None)


def run(options: Options) -> Path:
    """Run what the options name; returns the folder of the results, for several runs that of all of them."""
    refuse_foreign(options)
    if options.method in TOGETHER:
        return run_together(options)
    runs = list(expand(options))
    if len(runs) == 1:
        return run_category(runs[0])
    if options.images:
        raise UserError(f"--images: expected one --item and one seed with it, found {len(runs)} runs")
    results = [Run(each.item, each.seed or 0, each.img_dir / each.run_id, "skipped") for each in runs]
    try:
        for number, each in enumerate(runs):
            print(printable(f"--- {number + 1} of {len(runs)}: {each.run_id}"))
            results[number] = attempt(each, results[number])
    finally:
        summarise(options, results)
    failed = [result for result in results if result.status == "failed"]
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: "
                        + "; ".join(f"{result.folder.name} ({result.error})" for result in failed))
    return options.img_dir


def summarise(options: Options, results: Sequence[Run]) -> None:
    """Write the summary of several runs."""
    if not options.dry_run and not options.skip_evaluation:
        about = set_summary(options, results)
        whole = options.dataset_path is not None and options.item_states == ("all",)
        known = summary.dataset_of(category_names(options)) if whole else None
        print(f"The summary is {summary.write_summary(options.img_dir, results, about, known)}")


def refuse_foreign(options: Options) -> None:
    """Raise `UserError` for an option of another method."""
    own = {"method", "seeds", "skip_train", "skip_evaluation"}
    if options.method not in TOGETHER:
        own |= {"skip_extractor", "skip_threshold"}
    for group in TOGETHER.get(options.method, (train_ddim.Options, train_extractor.Options, evaluation.Options,
                                               inference_ddim.Options)):
        own |= {field.name for field in fields(group)}
    for field in fields(options):
        if field.name not in own and getattr(options, field.name) != field.default:
            raise UserError(f"--{field.name}: not an option of --method {options.method or 'ddim'}")


def run_together(options: Options) -> Path:
    """One model for all categories, for each seed; then every category's test images."""
    names, results = chosen_items(options), []
    if options.images and len(names) > 1:
        raise UserError(f"--images: expected one --item with it, found {len(names)}")
    run_id = run_name(options, options.method)
    runs = [replace(options, seed=seed, run_id=run_id + f"-seed{seed}" * bool(options.seeds))
            for seed in dict.fromkeys(options.seeds or (options.seed,))]
    if not options.skip_evaluation:
        check_inspected(runs[0], names)
    for each in runs:
        if not options.skip_train and options.method == "diad":
            train_diad.run(subset(train_diad.Options, replace(each, model=build_model(each))))
        elif not options.skip_train:
            train_lafite.run(subset(train_lafite.Options, each))
        if not options.skip_evaluation:
            results += inspect_together(each, names)
    if len(results) > 1:
        if options.method == "diad" and not options.dry_run:
            print(inference_diad.table(results))
        summarise(options, results)
        return options.img_dir
    return results[0].folder if results else run_folder(each)


def inspect_together(options: Options, names: Sequence[str]) -> list[Run]:
    """Inspect the test images of every category with the model of all."""
    if options.method == "diad":
        return inference_diad.inspect_categories(subset(inference_diad.Options, replace(options, item=names)))
    results = []
    for name in names:
        begun = time.monotonic()
        folder = inference_lafite.run(subset(inference_lafite.Options, replace(options, item=name)))
        results.append(Run(name, options.seed or 0, folder, "done", seconds=time.monotonic() - begun))
    return results


def build_model(options: Options) -> Path:
    """The folder of the model that train_diad.py begins with: --model, or one that is put together for the images."""
    if options.model is not None:
        return options.model
    encoder, build = build_diad.planned(options)
    train_diad.settled(subset(train_diad.Options, replace(options, model=build.out, dry_run=True)))   # before hours
    if not options.dry_run:
        build_extractor(options.extractor, options.extractor_layers)
    if not build_diad.is_built(build, encoder, options.resume):
        if options.autoencoder is None:
            finetune_autoencoder.run(encoder)
        if not options.dry_run:
            build_diad.run(build)
    return build.out


def expand(options: Options) -> Iterator[CategoryOptions]:
    """One set of options per category and seed, with a run folder each."""
    names = named_items(options)        # an unknown one is found at once, and not after the others' hours
    shared = {field.name: getattr(options, field.name) for field in fields(CategoryOptions)}
    for name in names:
        for seed in dict.fromkeys(options.seeds or (options.seed,)):
            run_id = name if options.run_id is None else options.run_id + f"-{name}" * (len(names) > 1)
            yield CategoryOptions(**shared | {
                "item": name, "seed": seed, "run_id": run_id + f"-seed{seed}" * bool(options.seeds)})


def attempt(options: CategoryOptions, run: Run) -> Run:
    """Run one of several; what is finished is skipped, and a failure is noted for the others to go on."""
    begun, finished = time.monotonic(), run.folder / FINISHED
    try:
        category = open_category(options, options.item_states)
        files = [path for sample in category.good + category.test for path in sample.files]
        record = {"options": plain(options), "data": listing_digest(files)}
        if options.resume and given(known_json(finished)) == given(record):
            print("finished before")
            return replace(run, status="finished before")
        run_category(options)
        if not options.dry_run and not options.skip_evaluation:
            write_json(finished, record)
    except UserError as error:
        print(f"failed: {error}", file=sys.stderr)
        return replace(run, status="failed", error=str(error))
    except Exception as error:      # a defect of the program, or of the machine, in one category spares the others
        traceback.print_exc()
        return replace(run, status="failed", error=f"{type(error).__name__}: {error}".splitlines()[0])
    return replace(run, status="done", seconds=time.monotonic() - begun)


def given(record: dict[str, Any]) -> dict[str, Any]:
    """A record of what a run was made with, without the options that were not given: there may have been fewer."""
    options = record.get("options")
    options = options if isinstance(options, dict) else {}      # a damaged file says anything
    return record | {"options": {name: value for name, value in options.items() if value is not None}}


def check_inspected(options: CategoryOptions, names: Sequence[str]) -> None:
    """Raise `UserError` for what the inspection of the categories would stumble over, before the long work.

    On --dry_run only by options.
    """
    check_new_images(options)
    if options.dry_run:
        return
    check_folders(img_dir=options.img_dir)
    if options.images:
        return
    categories = [open_category(replace(options, item=name), options.item_states) for name in names]
    samples = [sample for category in categories for sample in test_images(category, options.masks)]
    by = {"lafite": train_lafite, "knn": train_lafite, "diad": train_diad}.get(options.method, train_ddim)
    known = trained_options(options, f"{by.__name__}.py") if options.skip_train else by.begun(options)
    good = [sample for category in categories for sample in category.good]
    check_readable(samples, options.num_workers, run_intensity(options, known, good, quiet=True))


def run_category(options: CategoryOptions) -> Path:
    """Run the phases in turn; returns the folder of the results, or of the run where evaluation is skipped."""
    if not options.skip_threshold and (options.pxl_threshold or options.feature_threshold):
        print("the given thresholds are not used: calibration measures them; --skip_threshold makes them count")
    if not options.skip_threshold:
        options = replace(options, pxl_threshold=None, feature_threshold=None)
    options = replace(options, tune=options.tune is not False)
    check_phases(options)
    writes = not (options.dry_run or options.skip_train and options.skip_extractor and options.skip_threshold)
    with writing_run(run_folder(options)) if writes else nullcontext():
        if not options.skip_train:
            train_ddim.run(subset(train_ddim.Options, options))
        if not options.skip_extractor:
            train_extractor.run(subset(train_extractor.Options, options))
        if not options.skip_threshold:
            evaluation.run(subset(evaluation.Options, options))
        if not options.skip_evaluation:
            return inference_ddim.run(subset(inference_ddim.Options, options))
    return run_folder(options)


def check_phases(options: CategoryOptions) -> None:
    """Raise `UserError` for what one of the phases would refuse, before the first of them begins."""
    trained = trained_options(options)
    if not options.skip_train:
        trained = plain(train_ddim.settled(subset(train_ddim.Options, options)))
    elif not (options.skip_threshold and options.skip_evaluation or options.dry_run):
        check_trained(run_folder(options))
    path = train_extractor.extractor_path(options)
    if not options.skip_extractor:
        train_extractor.settled(subset(train_extractor.Options, options), trained)
        layers = chosen_layers(options.extractor, options.extractor_layers)
        if not options.dry_run:
            build_extractor(options.extractor, layers)      # its weights may have to be downloaded
    else:
        layers = load_extractor(path).layers if path.is_file() or not options.dry_run else None
    if not options.skip_threshold:
        settings = evaluation.settled(subset(evaluation.Options, options), trained)
        if layers:
            check_layer_weights(settings.layer_weights, len(layers), path)
    if not options.skip_evaluation:
        check_inspected(options, [options.item])
        given_thresholds(options)
        resolve(subset(inference_ddim.Options, options), trained)


if __name__ == "__main__":
    main(Options, lambda options: f"Everything is in {run(options)}", __doc__)
