"""Train LafitE on the good images of one category or of many: features, memory bank, denoiser, discriminator, settings.

    python train_lafite.py --item hazelnut                                        (built-in demo data)
    python train_lafite.py --item screw --dataset_path data/mvtec
    python train_lafite.py --item all --dataset_path data/mvtec                   (one model for all categories)
    python train_lafite.py --item screw --dataset_path data/mvtec --method knn    (the memory bank alone)

Features are extracted once and kept in --feature_cache. inference_lafite.py inspects with what this leaves.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor

from dbad.checkpoints.weights import build_unet, model_config, save_weights
from dbad.data.categories import chosen_items, open_category, split_category
from dbad.data.depth import begun_with, keep_intensity, run_intensity
from dbad.data.images import fingerprint, read_images
from dbad.data.intensity import Intensity
from dbad.diffusion.batches import validation_loss
from dbad.errors import UserError
from dbad.families.ddim.search import NUM_PSEUDO
from dbad.families.lafite import model as lafite
from dbad.families.lafite.bank import build_bank
from dbad.families.lafite.detector import FeatureDetector, FeatureSettings, FeatureSpace, save_run
from dbad.families.lafite.discriminator import Discriminator
from dbad.families.lafite.lessons import (
    LEAST_ASIDE,
    NUM_ASIDE,
    NUM_TAUGHT,
    Good,
    bank_without,
    choose,
    judge_file,
    prepare_lessons,
    set_aside,
    teach,
    trials_file,
)
from dbad.files.atomic import cache_folder, write_json
from dbad.files.locks import writing_run
from dbad.files.names import BANK, CALIBRATION, MODEL_CONFIG, SPACE, TRAIN_OPTIONS
from dbad.inspection.calibrate import (
    PLACED,
    begin_files,
    calibrate_all,
    check_promises,
    finish_files,
    is_whole,
    with_thresholds,
)
from dbad.networks.extractors import EMBEDDED, build_extractor, stages_of, usual_layers
from dbad.networks.features import PatchExtractor, Standardisation, extract_features, to_patches
from dbad.options.command_line import (
    FeatureMapOptions,
    RunOptions,
    announce,
    main,
    opt,
    plain,
    resolve,
    run_folder,
    run_name,
    trained_options,
)
from dbad.options.presets import default_preset
from dbad.report.results import listing_digest
from dbad.runtime.device import pick_device, pick_precision
from dbad.training.loop import fit
from dbad.training.plan import IMAGES, Hooks, Place, Plan


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """Features, their memory bank, and the diffusion model that learns them."""

    method: Literal["lafite", "knn"] | None = opt("lafite, or knn: the memory bank alone, without diffusion (lafite)",
                                                  None)
    extractor: str = opt("backbone: efficientnet_lite0 (comes with its weights), a torchvision ResNet such as "
                         "wide_resnet101_2, or any timm backbone", EMBEDDED)
    extractor_layers: tuple[int, ...] | None = opt(
        "feature stages, the first being 0 (those of strides 2, 4, 8 and 16)", None)
    feature_resolution: int = opt("side to which the extractor resizes images, in px", by_preset=True)
    grid: int = opt("side of the grid of patches", by_preset=True)
    feature_cache: Path | None = opt("folder in which extracted features are kept (~/.cache/dbad/features)", None)
    bank_mb: float = opt("size of the memory bank in 10^6 bytes, shared equally by the categories", by_preset=True)
    components: int = opt("principal components of the features that are diffused, at most all", by_preset=True)
    prediction: Literal["x0", "v", "epsilon"] = opt(
        "what the network learns to give: clean features, velocity or noise", by_preset=True)
    feature_channels: tuple[int, ...] = opt("channels of the U-Net at each resolution, the full grid first",
                                            by_preset=True)
    steps_features: int = opt("length of the training in optimiser steps", by_preset=True)
    feature_batch_size: int = opt("feature maps per training batch, over all processes", by_preset=True)
    feature_learning_rate: float = opt("peak learning rate of AdamW", by_preset=True)
    pixel_quantile: float = opt("share of good pixels below the scales of the maps and the pixel threshold", 0.999)
    false_alarm_rate: float | None = opt(
        "promised share of good images called defective (0.05, or what the held-out images can promise)", None)
    tune: bool | None = opt("choose the settings that are not given by pseudo-anomalies on good images (on)", None)
    tune_minutes: float = opt("stop tuning after so many minutes, with the best settings so far", 30.0)
    resume: bool = opt("go on from the last saved state of this run, if there is one", True)
    log_dir: Path = opt("folder for TensorBoard's events", Path("logs"))


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions, FeatureOptions, FeatureMapOptions):
    """What shapes a run; saved as train_arg_config.json in its run folder, once it is finished."""

    item: tuple[str, ...] = opt("one category, several, or all", aliases=["--mvtec_item"])


def run(options: Options) -> Path:
    """Train, tune and calibrate; returns the run folder."""
    given = sorted(field.name for field in fields(FeatureMapOptions) if getattr(options, field.name) is not None)
    options = settled(options)
    folder = run_folder(options)
    writes = [SPACE, BANK, CALIBRATION, TRAIN_OPTIONS] + [options.diffusion_checkpoint_name] * (
        options.method == "lafite") + [judge_file(name) for name in with_thresholds(options.item)] * may_judge(
        options, given) + [trials_file(name, options.item) for name in options.item] * options.tune
    if announce(options, *(folder / name for name in writes)):
        with writing_run(folder):
            train(options, given, folder)
    return folder


def train(options: Options, given: Sequence[str], folder: Path) -> None:
    """Train, tune and calibrate a run, unless that is done; `given` are the settings that the search leaves alone."""
    samples = [sample for name in options.item for sample in open_category(replace(options, item=name)).good]
    record = plain(options) | {"given": given, "data": listing_digest(sample.path for sample in samples),
                               "hidden_blocks": list(lafite.HIDDEN)}    # discriminators by others are taught again
    if options.resume and is_finished(folder, record):
        print(f"{folder} is finished; --no_resume makes it anew")
        return
    device = pick_device(options.device)
    precision = pick_precision(options.precision, device)
    intensity = run_intensity(options, begun(options), samples)
    record |= intensity.settings()

    # Features of good images, once for all.
    layers = options.extractor_layers or default_layers(options.extractor)
    patches = PatchExtractor(build_extractor(options.extractor, layers, options.feature_resolution), options.grid)
    good = {name: read_good(name, patches, options, device, intensity) for name in options.item}
    features = {name: part.train_features for name, part in good.items()}
    standardisation = Standardisation.fit(features.values())
    bank = build_bank(features, standardisation, options.bank_mb, options.seed, patches.description(), device,
                      images={name: part.pixels for name, part in good.items()})
    if options.neighbours > len(bank.vectors):
        raise UserError(f"--neighbours {options.neighbours}: the memory bank has {len(bank.vectors)} vectors; expected "
                        "at most as many, or a larger --bank_mb")

    # The denoiser, in principal components of them.
    components = net = None
    if options.method == "lafite":
        components = lafite.Components.fit(features, standardisation, min(options.components, patches.channels))
        net = train_denoiser(good, standardisation, components, options, intensity, device, precision)
    queries = [to_patches(next(standardisation.batches(part.held_out_features))) for part in good.values()]
    tau = bank.to(torch.device("cpu")).temperature(torch.cat(queries))
    space = FeatureSpace(patches, standardisation, tau, components, options.prediction, options.item)

    # Settings and thresholds; then all files, so that those of the run before serve until then.
    detector = FeatureDetector(space, bank, net, FeatureSettings.of(vars(options)), seed=options.seed,
                               batch_size=options.batch_size, device=device, precision=precision, intensity=intensity)
    judges, prepare = learn_from_damage(detector, good, options, given)
    settings = {name: getattr(options, name) for name in ("method", "seed", "diffusion_checkpoint_name")}
    settings |= intensity.settings()
    held_out = {name: part.held_out for name, part in good.items()}
    thresholds = calibrate_all(detector, held_out, settings, options, prepare)
    trials = [trials_file(name, options.item) for name in options.item] * options.tune
    begin_files(folder, record, [*judges, *trials])
    if net is not None:
        save_weights(net.state_dict(), folder / options.diffusion_checkpoint_name)
        write_json(folder / MODEL_CONFIG, model_config(net))
    save_run(folder, space, bank, judges)
    finish_files(folder, record, thresholds)


def is_finished(folder: Path, record: dict[str, Any]) -> bool:
    """Whether a run of these options on these images is there, whole."""
    return is_whole(folder, record, (SPACE, BANK), PLACED | {"feature_cache"})


def settled(options: Options) -> Options:
    """The options with every default filled in, and the categories by name."""
    if options.patching:
        raise UserError("--patching: features are taken from whole images; expected --no_patching")
    method = options.method or "lafite"
    preset = options.preset or default_preset(options.dataset_path, options.device, method)
    items = chosen_items(options)
    if options.method == "knn":
        for name in ("discriminator_contrib", "denoise_contrib", "inversion_contrib", "context_power"):
            if getattr(options, name):
                raise UserError(f"--{name} {getattr(options, name)}: --method knn has no denoiser; expected 0")
        plain_knn = {"discriminator_contrib": 0.0, "knn_contrib": 1.0, "edit_contrib": 0.0, "denoise_contrib": 0.0,
                     "inversion_contrib": 0.0, "context_power": 0.0}
        options = replace(options, **{name: value for name, value in plain_knn.items()
                                      if getattr(options, name) is None})
    tune = options.tune is not False
    options = replace(options, item=items, run_id=run_name(options, method), preset=preset, tune=tune, method=method)
    options = resolve(keep_intensity(options, begun(options)))
    trained_options(options, "train_lafite.py")     # refuses a run of another script
    check_promises(options, items)
    with torch.device("meta"):
        new_network(options, options.components)    # refuses channels and grids that do not fit
    return options


def begun(options: Options) -> dict[str, Any]:
    """The --intensity of the run that is gone on with, see `begun_with`."""
    return begun_with(options, "train_lafite.py", "features")


def new_network(options: Options, components: int) -> UNet2DModel:
    """The denoiser, with random weights: one channel more for what is noised, and for the expected error."""
    return build_unet(options.grid, options.feature_channels, 1, (), components + 1, ("grid", "feature_channels"))


def default_layers(extractor: str) -> list[int]:
    """The stages of strides 2, 4, 8 and 16, as far as the backbone has them; see `usual_layers`."""
    stages = stages_of(extractor)
    return [0] * (stages[0].stride == 2) + usual_layers(extractor, stages)


def read_good(name: str, patches: PatchExtractor, options: Options, device: torch.device,
              intensity: Intensity) -> Good:
    """Read the good images of a category and extract their features, or find them extracted."""
    train, held_out = split_category(open_category(replace(options, item=name)), options.holdout)
    cache = options.feature_cache or cache_folder("features")
    pixels = [read_images(part, options.feature_resolution, options.num_workers, intensity)
              for part in (train, held_out)]
    features = [extract_features(patches, part, cache, batch_size=options.batch_size, device=device)
                for part in pixels]
    return Good(train, held_out, pixels[0], *features)


def train_denoiser(good: Mapping[str, Good], standardisation: Standardisation, components: lafite.Components,
                   options: Options, intensity: Intensity, device: torch.device, precision: str) -> torch.nn.Module:
    """Train the U-Net on the components of good features, or load it where that is done; with its EMA weights."""
    folder, abar = run_folder(options), lafite.feature_schedule()

    def projected(features: np.ndarray) -> Tensor:
        return torch.cat([components.project(batch).half() for batch in standardisation.batches(features)])

    data = lafite.FeatureImages({name: projected(part.train_features) for name, part in good.items()}, options.seed,
                                "train", options.feature_batch_size)
    validation = lafite.FeatureImages({name: projected(part.held_out_features) for name, part in good.items()},
                                      options.seed, "validation", options.feature_batch_size)
    torch.manual_seed(options.seed)
    net = new_network(options, components.basis.shape[1])
    print(f"{sum(len(part.train) for part in good.values())} good images to train on, "
          f"{sum(len(part.held_out) for part in good.values())} held out; {components.basis.shape[1]} components hold "
          f"{components.kept:.0%} of the variance; {sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters; "
          f"{device.type}, {precision}")

    def loss_of(model, batch) -> dict[str, Tensor]:
        return lafite.feature_loss(model, batch, abar, options.prediction, precision)

    def report(model, epoch: int) -> dict[str, float]:
        return {"val_loss": validation_loss(
            validation, lambda batch: loss_of(model, batch)["loss"], device)}

    shaping = ("item", "holdout", "seed", "extractor", "extractor_layers", "feature_resolution", "grid", "components",
               "prediction", "feature_channels", "steps_features", "feature_batch_size", "feature_learning_rate")
    settings: dict[str, Any] = {name: value for name, value in plain(options).items() if name in shaping}
    settings |= intensity.binding()
    settings[IMAGES] = fingerprint([pixels for part in good.values() for pixels in part.pixels])
    plan = Plan(options.steps_features, -(-len(data) // options.feature_batch_size), 5, options.feature_learning_rate,
                100, options.seed, settings, betas=(0.9, 0.99), ema_decay=0.999)
    return fit(net, data, loss_of, plan, Place(folder, options.log_dir / options.run_id, "features", options.resume),
               batch_size=options.feature_batch_size, device=device, hooks=Hooks(on_report=report))


def may_judge(options: Options, given: Sequence[str]) -> bool:
    """Whether discriminators are taught; the search may then do without."""
    return options.method == "lafite" and (options.discriminator_contrib > 0 or (
        options.tune and "discriminator_contrib" not in given))


def learn_from_damage(detector: FeatureDetector, good: Mapping[str, Good], options: Options,
                      given: Sequence[str]
                      ) -> tuple[dict[str, Discriminator], Callable[[str | None], dict[str, Any]]]:
    """Teach the discriminators, and choose the settings that were not given, by pseudo-anomalies.

    Returns the discriminators that count, by their files, and what brings the detector to a category, or to all
    together (None), and gives its settings.
    """
    folder, share = run_folder(options), max(1.0, LEAST_ASIDE * len(good) / NUM_ASIDE) / len(good)
    judged = may_judge(options, given)
    chosen = dict.fromkeys([*good, None], detector.settings)
    judges: dict[str | None, Discriminator] = {}
    if options.tune or judged:
        aside = {name: set_aside(len(part.train), share) for name, part in good.items()}
        whole, detector.bank = detector.bank, bank_without(aside, good, detector, options.bank_mb, options.seed)
        taught, shown = (math.ceil(share * number) for number in (NUM_TAUGHT, NUM_PSEUDO))
        lessons = prepare_lessons(detector, good, aside, taught if judged else 0, shown, options.seed)
        if judged:
            judges = teach(lessons, options.seed)
        if options.tune:
            fixed = set(given) | ({"knn_contrib", "edit_contrib"} if options.method == "knn" else set())
            chosen = choose(detector, lessons, fixed, options.seed, options.tune_minutes, folder)
        detector.bank = whole
    files = {name: judge_file(name) for name in with_thresholds(good)
             if name in judges and chosen[name].discriminator_contrib}

    def prepare(name: str | None) -> dict[str, Any]:
        detector.settings, detector.judge = chosen[name], judges.get(name) if name in files else None
        return vars(detector.settings) | {"discriminator": files.get(name, "")}
    return {file: judges[name] for name, file in files.items()}, prepare


if __name__ == "__main__":
    main(Options, lambda options: f"The trained model is in {run(options)}", __doc__)
