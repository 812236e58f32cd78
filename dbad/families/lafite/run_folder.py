"""A run folder of the LafitE family: the parts of a detector, written and read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dbad.checkpoints.weights import (
    load_pickle,
    load_unet,
    load_weights,
    model_config,
    save_pickle,
    save_weights,
)
from dbad.errors import UserError
from dbad.families.lafite import discriminator
from dbad.families.lafite.bank import load_bank, save_bank
from dbad.families.lafite.detector import FeatureDetector, FeatureSpace
from dbad.families.lafite.discriminator import Discriminator
from dbad.families.lafite.model import Components
from dbad.families.lafite.options import FeatureSettings
from dbad.files.atomic import write_json
from dbad.files.names import BANK, MODEL_CONFIG, SPACE
from dbad.networks.extractors import build_extractor
from dbad.networks.features import PatchExtractor, Standardisation
from dbad.runtime.device import Machine


def save_space(space: FeatureSpace, folder: Path) -> None:
    """Write all of `space` except the backbone's own weights."""
    about = space.patches.description()
    components = None if space.components is None else space.components.state()
    save_pickle({"about": about, "standardisation": space.standardisation.state(), "tau": space.tau,
                 "components": components, "prediction": space.prediction, "categories": list(space.categories)},
                folder / SPACE)


def load_space(folder: Path) -> FeatureSpace:
    """Read what `save_space` wrote; the backbone must have the same weights as then."""
    path = folder / SPACE
    state = load_pickle(path)
    names = {"about", "standardisation", "tau", "components", "prediction", "categories"}
    if not isinstance(state, dict) or not names <= state.keys():
        raise UserError(f"{path}: not a feature space written by train_lafite.py")
    about = state["about"]
    extractor = build_extractor(about["backbone"], about["layers"], about["resolution"])
    patches = PatchExtractor(extractor, about["grid"], about["smoothing"])
    if patches.description() != about:
        raise UserError(f"{path}: made with weights of {about['backbone']} that differ from the installed ones; run "
                        "train_lafite.py again")
    components = state["components"] and Components(**state["components"])
    return FeatureSpace(patches, Standardisation.from_state(state["standardisation"]), state["tau"], components,
                        state["prediction"], tuple(state["categories"]))


def save_run(folder: Path, detector: FeatureDetector, judges: Mapping[str, Discriminator]) -> None:
    """Write the parts of a detector, with the discriminators by file name."""
    if detector.net is not None:
        save_weights(detector.net.state_dict(), folder / detector.settings.diffusion_checkpoint_name)
        write_json(folder / MODEL_CONFIG, model_config(detector.net))
    save_space(detector.space, folder)
    save_bank(detector.bank, folder / BANK)
    for name, judge in judges.items():
        save_discriminator(judge, folder / name)


def save_discriminator(judge: Discriminator, path: Path) -> None:
    """Write the weights of a discriminator; `load_discriminator` reads them."""
    save_weights(judge.state_dict(), path)


def load_discriminator(path: Path, layers: int) -> Discriminator:
    """Read what `save_discriminator` wrote, for a backbone of so many layers."""
    state, planes = load_pickle(path), discriminator.num_planes(layers)
    if not isinstance(state, dict) or not isinstance(state.get("mean"), Tensor):
        raise UserError(f"{path}: not a discriminator written by train_lafite.py")
    if len(state["mean"]) != planes:
        raise UserError(f"{path}: a discriminator for {len(state['mean'])} numbers per patch; expected {planes}; run "
                        "train_lafite.py again (it keeps the denoiser)")
    judge = Discriminator(planes)
    load_weights(judge, path, "train_lafite.py")
    return judge.eval().requires_grad_(False)


def open_features(folder: Path, settings: FeatureSettings, machine: Machine) -> FeatureDetector:
    """The detector of a run of train_lafite.py under `settings`."""
    space = load_space(folder)
    layers = len(space.patches.extractor.channels)
    net = None if space.components is None else load_unet(folder, settings.diffusion_checkpoint_name)
    judge = load_discriminator(folder / settings.discriminator, layers) if settings.discriminator else None
    return FeatureDetector(settings=settings, machine=machine, space=space, net=net, judge=judge,
                           bank=load_bank(folder / BANK, space.patches.description()))
