"""The training of LafitE's denoiser: features of good images, the network, its length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers.models import UNet2DModel
from torch import Tensor

from dbad.data.categories import category_of, split_category
from dbad.data.images import fingerprint, read_images
from dbad.data.intensity import Intensity
from dbad.diffusion.batches import validation_loss
from dbad.errors import UserError
from dbad.families.lafite import model as lafite
from dbad.families.lafite.bank import build_bank
from dbad.families.lafite.detector import FeatureDetector, FeatureSpace
from dbad.families.lafite.lessons import Good
from dbad.families.lafite.options import FeatureOptions, FeatureSettings, LafiteOptions, has_denoiser
from dbad.files.atomic import cache_folder
from dbad.networks.extractors import build_extractor, stages_of, usual_layers
from dbad.networks.features import PatchExtractor, Standardisation, extract_features, to_patches
from dbad.networks.unet import build_unet
from dbad.options.resolve import name_of, plain, run_folder
from dbad.runtime.device import Machine
from dbad.training.loop import fit
from dbad.training.plan import IMAGES, Hooks, Place, Plan
from dbad.training.trial import say_forecast

# The options that shape the denoiser, so that a training resumes only under equal ones.
SHAPING = ("item", "holdout", "seed", "extractor", "extractor_layers", "feature_resolution", "grid", "components",
           "prediction", "feature_channels", "steps_features", "feature_batch_size", "feature_learning_rate")


def new_network(options: FeatureOptions, components: int) -> UNet2DModel:
    """The denoiser with random weights; one more input tells what is noised, one more output is the expected error."""
    return build_unet(options.grid, options.feature_channels, 1, (), components + 1, ("grid", "feature_channels"))


def default_layers(extractor: str) -> list[int]:
    """The stages of strides 2, 4, 8 and 16 that the backbone has, see `usual_layers`."""
    stages = stages_of(extractor)
    return [0] * (stages[0].stride == 2) + usual_layers(extractor, stages)


def build_detector(options: LafiteOptions, settings: FeatureSettings, machine: Machine
                   ) -> tuple[FeatureDetector, dict[str, Good]]:
    """The detector of a run with a trained denoiser, and the good images of its categories with their features."""
    layers = options.extractor_layers or default_layers(options.extractor)
    patches = PatchExtractor(build_extractor(options.extractor, layers, options.feature_resolution), options.grid)
    intensity = Intensity(settings.intensity, settings.intensity_bits)
    good = {name: read_good(name, patches, options, machine.device, intensity) for name in options.item}
    features = {name: part.train_features for name, part in good.items()}
    standardisation = Standardisation.fit(features.values())
    bank = build_bank(features, standardisation, options.bank_mb, options.seed, patches.description(), machine.device,
                      images={name: part.pixels for name, part in good.items()})
    if settings.neighbours > len(bank.vectors):
        raise UserError(f"--neighbours {settings.neighbours}: the memory bank has {len(bank.vectors)} vectors; "
                        "expected at most as many, or a larger --bank_mb")
    components = net = None
    if has_denoiser(options.method):
        components = lafite.Components.fit(features, standardisation, min(options.components, patches.channels))
        net = train_denoiser(good, standardisation, components, options, intensity, machine)
    queries = [to_patches(next(standardisation.batches(part.held_out_features))) for part in good.values()]
    tau = bank.to(torch.device("cpu")).temperature(torch.cat(queries))
    space = FeatureSpace(patches, standardisation, tau, components, options.prediction, tuple(options.item))
    return FeatureDetector(settings=settings, machine=machine, space=space, bank=bank, net=net), good


def read_good(name: str, patches: PatchExtractor, options: LafiteOptions, device: torch.device,
              intensity: Intensity) -> Good:
    """Read the good images of a category, and extract their features unless they are in the cache."""
    train, held_out = split_category(category_of(options, name), options.holdout)
    cache = options.feature_cache or cache_folder("features")
    pixels = [read_images(part, options.feature_resolution, options.num_workers, intensity)
              for part in (train, held_out)]
    features = [extract_features(patches, part, cache, batch_size=options.batch_size, device=device)
                for part in pixels]
    return Good(train, held_out, pixels[0], *features)


def try_training(options: LafiteOptions) -> None:
    """Print how long the training of the denoiser takes; steps are tried on random features."""
    machine, abar = Machine.of(options.device, options.precision, options.batch_size), lafite.feature_schedule()
    features = torch.randn(options.feature_batch_size, options.components, options.grid, options.grid).half()
    data = lafite.FeatureImages({"random": features}, options.seed, "train", options.feature_batch_size)
    say_forecast("features", new_network(options, options.components), data,
                 lambda net, batch: lafite.feature_loss(net, batch, abar, options.prediction, machine.precision),
                 options.steps_features, device=machine.device)


def train_denoiser(good: Mapping[str, Good], standardisation: Standardisation, components: lafite.Components,
                   options: LafiteOptions, intensity: Intensity, machine: Machine) -> UNet2DModel:
    """Train the U-Net on components of good features, or load the trained one; it is returned with its EMA weights."""
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
          f"{machine.device.type}, {machine.precision}")

    def loss_of(model, batch) -> dict[str, Tensor]:
        return lafite.feature_loss(model, batch, abar, options.prediction, machine.precision)

    def report(model, epoch: int) -> dict[str, float]:
        return {"val_loss": validation_loss(
            validation, lambda batch: loss_of(model, batch)["loss"], machine.device)}

    settings: dict[str, Any] = {name: value for name, value in plain(options).items() if name in SHAPING}
    settings |= intensity.binding()
    settings[IMAGES] = fingerprint([pixels for part in good.values() for pixels in part.pixels])
    plan = Plan(options.steps_features, -(-len(data) // options.feature_batch_size), 5, options.feature_learning_rate,
                100, options.seed, settings, betas=(0.9, 0.99), ema_decay=0.999)
    place = Place(folder, options.log_dir / name_of(options), "features", options.resume, options.yes)
    return fit(net, data, loss_of, plan, place,
               batch_size=options.feature_batch_size, device=machine.device, hooks=Hooks(on_report=report))
