"""Options: frozen dataclasses -> command line -> JSON.

A script's `Options` is the only home of its defaults. `parse` makes the command line from it, a notebook or another
script builds it by keyword. Fields whose default depends on `--preset` are None until `resolve` fills them in.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from dbad.data.intensity import INTENSITY, Depth, with_intensity
from dbad.errors import UserError, printable
from dbad.files.atomic import read_json
from dbad.files.names import TRAIN_OPTIONS, check_names
from dbad.options.checks import check
from dbad.options.declared import Types, check_declared, types_of
from dbad.options.presets import PRESETS, default_preset
from dbad.runtime import parsing

T = TypeVar("T")

_TRAINED_BY = {"train_ddim.py": "noise_kind", "train_lafite.py": "bank_mb", "train_diad.py": "steps_latent",
               "finetune_autoencoder.py": "discriminator_start"}        # an option that no other script has
_TRAINED: Types = {"item": str | tuple[str, ...], "intensity_bits": Depth | None}       # whoever reads them


def opt(help: str, default: Any = dataclasses.MISSING, *, aliases: Sequence[str] = (), by_preset: bool = False) -> Any:
    """A dataclass field with its help text and the other spellings of its flag.

    `by_preset` fields are None until `resolve` takes their value from `dbad.options.presets.PRESETS`.
    """
    metadata = {"help": help, "aliases": tuple(aliases), "by_preset": by_preset}
    return dataclasses.field(default=None if by_preset else default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every script needs: the data, the run folder, the machine."""

    item: str = opt("category to work on, such as hazelnut", aliases=["--mvtec_item"])
    dataset_path: Path | None = opt(
        "folder of the data set (layouts: see --layout); without it the built-in demo data is drawn", None
    )
    layout: Literal["auto", "mvtec", "mvtec_ad_2", "visa", "mtd", "btad", "ksdd2", "folder", "manifest"] = opt(
        "how the data lie on disk; auto recognises it: python -m dbad.data PATH shows what is found", "auto"
    )
    intensity: str = opt(INTENSITY, by_preset=True)
    run_id: str | None = opt("name of the run: its folders are called so (the item's name; with -lafite, -knn or "
                             "-diad where the method is another than ddim)", None, aliases=["--run_name"])
    diffusion_checkpoint_dir: Path = opt(
        "folder in which every run has a folder of its own", Path("checkpoints"), aliases=["--checkpoint_dir"]
    )
    diffusion_checkpoint_name: str = opt(
        "file name of the trained U-Net in the run folder; .safetensors is written as such",
        "final.pt",
        aliases=["--checkpoint_name"],
    )
    preset: Literal["demo", "small", "base"] | None = opt(
        "family of defaults: demo (64 px, minutes on a CPU), small (128 px, an hour on a CPU), base (256 px, a GPU); "
        "demo with the demo data; with real data small on a CPU and for lafite and knn, as the model is for diad, else "
        "base",
        None,
    )
    holdout: float = opt("share of train/good kept out of training, for validation and calibration; a data set with "
                         "validation/good has its own", by_preset=True)
    batch_size: int = opt("images per batch, over all processes", by_preset=True)
    patching: bool = opt("cut images into tiles of the network's size instead of resizing them", by_preset=True,
                         aliases=["--patch_imgs", "--crop"])
    seed: int = opt("every random number of the run follows from it", by_preset=True)
    device: str = opt("auto, cpu, cuda, cuda:1 or mps", "auto")
    precision: Literal["auto", "fp32", "bf16"] = opt(
        "number format inside the networks; auto is bf16 where the processor has it", "auto"
    )
    num_workers: int = opt("threads that read images and draw figures; 0 for none", 2)
    dry_run: bool = opt("print the options and what would be written, then stop", False)


@dataclass(frozen=True, kw_only=True)
class ReconstructionOptions:
    """Conditioned denoising: the parameters of inference that are worth editing."""

    conditioning: Literal["ddad", "blend"] = opt(
        "how the inspected image guides denoising: ddad corrects the predicted noise, blend mixes the image in",
        by_preset=True,
    )
    recon_weight: float = opt("w, pull towards the inspected image; 0 is unconditioned", by_preset=True,
                              aliases=["--reconstruction_weight"])
    eta: float = opt("DDIM's share of fresh noise per step: 0 deterministic, 1 as DDPM", by_preset=True)
    start_at_timestep: int = opt("noise the image up to this training timestep", by_preset=True)
    steps_to_regenerate: int = opt(
        "denoising steps from there back to 0", by_preset=True, aliases=["--num_inference_steps"]
    )
    sampler: Literal["ddim", "dpm++"] = opt("solver of these steps; dpm++ is of second order from the third step on",
                                            by_preset=True)


@dataclass(frozen=True, kw_only=True)
class CropOptions:
    """What of an image is inspected."""

    center_crop: int = opt("inspect and measure only the central square of so many px of a 256 px image (224: the "
                           "papers' protocol); 0 for the full frame", by_preset=True)


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(CropOptions):
    """From maps to the score of an image."""

    blur_sigma: float = opt("Gaussian blur of the maps, in px of a 256 px image; scales with the image", by_preset=True)
    top_share: float = opt("image score: mean of this share of the map's highest pixels; 0 for the maximum",
                           by_preset=True)


@dataclass(frozen=True, kw_only=True)
class MapOptions(ScoreOptions):
    """From two images to one anomaly map."""

    num_samples: int = opt("noise draws per image, over which the maps are averaged", by_preset=True)
    pixel_difference: Literal["max_square", "mean_abs"] = opt(
        "pixel map: the largest squared difference of the colours, or their mean absolute one", by_preset=True)
    layer_weights: tuple[float, ...] = opt("weights of the extractor's layers in the feature map, or one for all",
                                           by_preset=True)
    map_norm: Literal["none", "location", "contrast"] = opt(
        "maps in standard deviations above what good images show: at the same pixel (aligned parts), or at the same "
        "local contrast", by_preset=True)
    feature_smoothing_kernel: int = opt("side of the mean filter over features, in feature pixels; 1 for none",
                                        by_preset=True, aliases=["-fsk"])
    tile_overlap: float = opt("with --patching: share of a tile's side that it has in common with the next, at least",
                              by_preset=True)
    pl_contrib: float = opt("contribution of the pixel map to the anomaly map", by_preset=True)
    fl_contrib: float = opt("contribution of the feature map to the anomaly map", by_preset=True)


@dataclass(frozen=True, kw_only=True)
class FeatureMapOptions(ScoreOptions):
    """From features to one anomaly map: the parameters of inference that are worth editing."""

    neighbours: int = opt("nearest good patches of which a patch's edited version is a weighted mean", by_preset=True)
    editing: bool = opt("edit features before they are noised and denoised", by_preset=True)
    feature_start: int = opt("noise features up to this timestep of 1000", by_preset=True)
    feature_steps_back: int = opt("denoising steps from there back to 0", by_preset=True)
    context_power: float = opt(
        "distances are divided by this power of the error that the network expects of a patch, given its surroundings; "
        "0 for plain distances", by_preset=True)
    discriminator_contrib: float = opt("contribution of the network that judges a patch by all its distances, learnt "
                                       "from pseudo-anomalies", by_preset=True)
    knn_contrib: float = opt("contribution of the distance to the nearest good patch", by_preset=True)
    edit_contrib: float = opt("contribution of the distance to the edited patch", by_preset=True)
    denoise_contrib: float = opt("contribution of the distance to the denoised patch", by_preset=True)
    inversion_contrib: float = opt("contribution of how unlikely the noise is that the features lead to",
                                   by_preset=True)


@dataclass(frozen=True, kw_only=True)
class DiadMapOptions(CropOptions):
    """From an image and its sample to one anomaly map: the parameters of inference that are worth editing."""

    latent_start: int = opt("noise latents up to this timestep of 1000", by_preset=True)
    latent_steps_back: int = opt("denoising steps from there back to 0", by_preset=True)
    paper_exact: bool = opt("visit the timesteps that DiAD's published code visits", by_preset=True)
    map_sigma: float = opt("Gaussian blur of the map, in px of a 256 px image; scales with the image", by_preset=True)


# What shapes a prediction beside the weights: the `settings` of calibration.json, with those of `Intensity`.
SETTING_NAMES = frozenset(field.name for group in (ReconstructionOptions, MapOptions)
                          for field in dataclasses.fields(group)) | {
    "seed", "patching", "diffusion_checkpoint_name", "extractor_path"}
FEATURE_SETTING_NAMES = frozenset(field.name for field in dataclasses.fields(FeatureMapOptions)) | {
    "method", "seed", "diffusion_checkpoint_name", "discriminator"}
DIAD_SETTING_NAMES = frozenset(field.name for field in dataclasses.fields(DiadMapOptions)) | {
    "method", "seed", "extractor", "extractor_layers", "extractor_weights", "feature_resolution"}


def setting_names(method: str) -> frozenset[str]:
    """The names of the settings of a family's detectors: ddim, lafite, knn or diad."""
    return {"ddim": SETTING_NAMES, "diad": DIAD_SETTING_NAMES}.get(method, FEATURE_SETTING_NAMES)


def resolve(options: T, trained: Mapping[str, Any] | None = None) -> T:
    """Fill in every option that was not given: as the run was trained, else as the preset says.

    `trained` are the options of a training that later scripts build on (`trained_options`), None for a training. The
    preset is the given one, else that of the training, else `default_preset`. Raises `UserError` for values out of
    range and for those that contradict the training.
    """
    training, trained = trained, trained or {}
    preset = options.preset or trained.get("preset") or default_preset(options.dataset_path, options.device)
    length_given = any(getattr(options, name, None) is not None for name in _LENGTHS)
    changes: dict[str, Any] = {"preset": preset, "run_id": options.run_id or options.item}
    check_bound(options, trained)
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.metadata["by_preset"] and value is None and not (length_given and field.name in _LENGTHS):
            value = trained.get(field.name, PRESETS[preset][field.name])
            changes[field.name] = tuple(value) if isinstance(value, list) else value
    resolved = dataclasses.replace(options, **changes)
    check(resolved)
    check_names(resolved, training)
    return resolved


_LENGTHS = ("epochs_diffusion", "steps_diffusion")      # one replaces the other
_BINDING = ("item", "holdout", "patching", "resolution", "intensity")  # what later scripts cannot change


def check_bound(options: RunOptions, trained: Mapping[str, Any]) -> None:
    """Raise `UserError` for options that later scripts cannot change and that were given otherwise than in training."""
    for name in _BINDING:
        value = getattr(options, name, None)
        if value is not None and value != trained.get(name, value):
            raise UserError(f"--{name} {value}: the run {run_folder(options)} was trained with {trained[name]}")


def run_folder(options: RunOptions) -> Path:
    """Where the run keeps its weights and calibration."""
    return options.diffusion_checkpoint_dir / (options.run_id or options.item)


def run_name(options: Any, method: str) -> str:
    """The name of a run of any number of categories: the given one, else one of the categories and the method."""
    names = (options.item,) if isinstance(options.item, str) else options.item
    return options.run_id or ("-".join(names) if len(names) < 4 else f"{len(names)}-categories") + f"-{method}"


def announce(options: RunOptions, *writes: Path | str) -> bool:
    """Say which preset is in force and what differs from it; on `--dry_run` also all options and what would be written.

    Returns whether the script is to go on.
    """
    different = ", ".join(f"{name} {_shown(value)}" for name, value in changed(options).items()
                          if name not in ("item", "preset", "dry_run", "run_id", "dataset_path", "images"))
    print(printable(f"{_shown(options.item)} from {data_of(options)}; preset {options.preset}{_why_small(options)}"
                    + f" with {different}" * bool(different)))
    if options.dry_run:
        print("\n".join(f"  {name} = {_shown(value)}" for name, value in plain(options).items()))
        print("would write:", *writes, sep="\n  ")
    return not options.dry_run


def _why_small(options: RunOptions) -> str:
    """Why the preset is not the largest one, which a GPU would get."""
    if options.dataset_path is None or options.preset != "small":
        return ""
    on_cpu = default_preset(options.dataset_path, options.device) == "small"
    return " (the default for real data without a CUDA GPU)" * on_cpu


def data_of(options: RunOptions) -> str:
    """Where the images come from, in words."""
    if getattr(options, "images", None):
        return " ".join(options.images)
    return str(options.dataset_path or "built-in demo data (drawn, not photographed)")


def trained_options(options: RunOptions, by: str = "train_ddim.py") -> dict[str, Any]:
    """The options that the run was trained with `by` a script; empty if it was not trained yet.

    A run of another script is a `UserError`: its files have the same names and another meaning. So is a value that is
    not as it is declared for the `options` of the same name.
    """
    path = run_folder(options) / TRAIN_OPTIONS
    trained = with_intensity(read_json(path)) if path.is_file() else {}
    for script, own in _TRAINED_BY.items():
        if script != by and own in trained:
            raise UserError(f"{run_folder(options)}: no run of {by} but one of {script}; expected another --run_id")
    check_declared(trained, types_of(type(options)) | _TRAINED, path)
    return trained


def subset(cls: type[T], options: Any) -> T:
    """The options of `cls` out of a larger set that has them all."""
    return cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(cls)})


def plain(options: Any) -> dict[str, Any]:
    """The options as JSON values: paths as strings, tuples as lists."""
    return {field.name: _json_value(getattr(options, field.name)) for field in dataclasses.fields(options)}


def _json_value(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def changed(options: Any) -> dict[str, Any]:
    """The options that differ from their defaults, as JSON values; presets count as defaults."""
    values = plain(options)
    defaults = PRESETS.get(getattr(options, "preset", None) or "", {})
    result = {}
    for field in dataclasses.fields(options):
        default = defaults.get(field.name) if field.metadata["by_preset"] else field.default
        if values[field.name] != _json_value(default):
            result[field.name] = values[field.name]
    return result


# ---------------------------------------------------------------------------------------- command line

def parse(cls: type[T], argv: Sequence[str] | None = None, description: str | None = None) -> T:
    """Read the command line of the dataclass `cls`: one flag per field, `--a_b` or `--a-b`."""
    parser = parsing.Parser(description=description, usage="%(prog)s --item NAME [options]", allow_abbrev=False,
                             formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(cls)
    groups: dict[str, Any] = {}
    for owner, field in _fields_by_owner(cls):
        title = (owner.__doc__ or "").strip().splitlines()[0].rstrip(".")
        group = groups.setdefault(title, parser.add_argument_group(title))
        _add_argument(group, field, hints[field.name])
    words = sys.argv[1:] if argv is None else [str(word) for word in argv]
    found = vars(parser.parse_args([_with_underscores(word) for word in words]))
    for name in [name for name, value in found.items() if isinstance(value, list)]:
        parser.error(f"argument --{name}: expected a value, found --")      # which argparse takes for none at all
    return cls(**found)


def main(cls: type[T], run: Callable[[T], str], description: str, argv: Sequence[str] | None = None) -> None:
    """Parse, run, print what `run` returns; a user's mistake ends in one line and status 2."""
    from dbad.runtime.device import one_line_failures, pick_device
    with one_line_failures():
        options = parse(cls, argv, description)
        check(options)
        if not options.dry_run and hasattr(options, "device"):
            pick_device(options.device)         # one that is not there is found now, and not after the long work
        found = run(options)
        if not options.dry_run:
            print(found)


def _add_argument(group: Any, field: dataclasses.Field, hint: Any) -> None:
    flags = [f"--{field.name}", *field.metadata["aliases"]]
    required = field.default is dataclasses.MISSING
    text = textwrap.dedent(field.metadata["help"]).replace("%", "%%")
    if field.metadata["by_preset"]:
        values = {name: _shown(values[field.name]) for name, values in PRESETS.items()}
        same = len(set(values.values())) == 1
        text += f" (default: {values['base'] if same else ', '.join(f'{k} {v}' for k, v in values.items())})"
    elif not required and field.default is not None:
        text += f" (default: {_shown(field.default)})"
    keywords: dict[str, Any] = {"dest": field.name, "help": text, "default": None if required else field.default}
    kind, choices, many = _kind(hint)
    if kind is bool:
        group.add_argument(*flags, f"--no_{field.name}", action=_OnOff, nargs=0, **keywords)
        return
    if many:
        keywords["nargs"] = "+"
        keywords["action"] = _AsTuple
    group.add_argument(*flags, type=_CONVERTERS.get(kind, kind), choices=choices, required=required,
                       metavar=None if choices else _METAVARS.get(kind, "TEXT"), **keywords)


class _AsTuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


class _OnOff(argparse.Action):
    """--flag sets it, --no_flag unsets it."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


_CONVERTERS = {str: parsing.text, Path: parsing.path}
_METAVARS = {int: "N", float: "X", Path: "PATH", str: "TEXT"}


def _kind(hint: Any) -> tuple[type, list[str] | None, bool]:
    """An annotation as (type of one value, choices, whether several are taken)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        kind, choices, _ = _kind(typing.get_args(hint)[0])
        return kind, choices, True
    if typing.get_origin(hint) is Literal:
        return str, list(typing.get_args(hint)), False
    return hint, None, False


def _shown(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return "-" if value is None else str(value)


def _with_underscores(word: str) -> str:
    """--run-id -> --run_id, as both are in use; values stay as they are."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def _fields_by_owner(cls: type) -> list[tuple[type, dataclasses.Field]]:
    """Fields with the class that declares them, in the order of the bases: the help is grouped as the code is."""
    order = list(cls.__mro__)
    pairs = []
    for field in dataclasses.fields(cls):
        owner = next(base for base in reversed(order) if field.name in base.__dict__.get("__annotations__", {}))
        pairs.append((owner, field))
    return sorted(pairs, key=lambda pair: order.index(pair[0]))
