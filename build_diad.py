"""Assemble a model of the diad family, ready for training: one model for many categories (arXiv:2312.06607).

    python build_diad.py --stable_diffusion downloads/v1-5-pruned.ckpt --autoencoder checkpoints/autoencoder \\
        --out checkpoints/diad
    python build_diad.py --random --size tiny --autoencoder checkpoints/autoencoder --out checkpoints/diad
                                                                                            (nothing to download)

Its U-Net and the embedding of the empty prompt are Stable Diffusion 1.5's, its SG network is a copy of the U-Net's
encoder, its auto-encoder was fine-tuned on the good images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import finetune_autoencoder
from dbad.data.intensity import UNKNOWN, with_intensity
from dbad.errors import UserError
from dbad.families.diad.autoencoder import build_autoencoder
from dbad.families.diad.files import FAMILY
from dbad.families.diad.model import SIZES, build_unet, compose
from dbad.families.diad.storage import save_diad
from dbad.families.diad.weights import read_autoencoder, read_prompt, read_stable_diffusion
from dbad.files.atomic import read_json, write_json
from dbad.files.locks import writing_out
from dbad.files.names import BUILD_OPTIONS, MODEL_CONFIG, TRAIN_OPTIONS
from dbad.inspection.calibrate import PLACED
from dbad.options.command_line import main, opt, plain, run_folder
from dbad.options.presets import PRESETS, default_preset

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the model is assembled from; saved as build_arg_config.json in its run folder."""

    out: Path = opt("run folder to write, such as checkpoints/diad")
    stable_diffusion: Path | None = opt(
        "Stable Diffusion 1.5: a folder as diffusers saves it, or one file (.safetensors, or v1-5-pruned.ckpt)", None)
    autoencoder: Path | None = opt(
        "auto-encoder: the folder of a fine-tuned one, one as diffusers saves it, or a file (kl-f8, mvtecad_fs.ckpt); "
        "that of --stable_diffusion to take Stable Diffusion's own", None)
    prompt_embedding: Path | None = opt(
        "file with the empty prompt's embedding, one tensor 1x77x768, where --stable_diffusion has no text encoder",
        None)
    random: bool = opt("random weights instead of --stable_diffusion, for a training of the whole U-Net", False)
    size: Literal["tiny", "middle", "sd15"] | None = opt(
        "with --random: tiny (6 M parameters, 128 px), middle (98 M, 256 px) or sd15 (1415 M, 256 px)", None)
    resolution: int | None = opt("side of the images in px (256, or that of --size)", None)
    weights: Literal["fp32", "bf16"] = opt("number format of the saved weights; a training needs fp32", "fp32")
    paper_exact: bool = opt(
        "start the SFF block at zero as the published code does; it then never learns (see dbad/families/diad)", False)
    seed: int = opt("every random number follows from it", 0)
    dry_run: bool = opt("print the options and what would be written, then stop", False)


def run(options: Options) -> Path:
    """Assemble the model and save it; returns the run folder."""
    check(options)
    if options.dry_run:
        print("\n".join(f"  {name} = {'-' if value is None else value}" for name, value in plain(options).items()))
        print(f"would write: a model in {options.out}")
        return options.out

    with writing_out(options.out):
        build(options)
    return options.out


def build(options: Options) -> None:
    """Assemble the model that the options describe, and save it."""
    # Read what is given; the rest is random.
    torch.manual_seed(options.seed)
    size, prompt = SIZES[options.size or "sd15"], None
    resolution = options.resolution or size.resolution
    if options.autoencoder:
        autoencoder = read_autoencoder(options.autoencoder)
    else:
        autoencoder = build_autoencoder(size.autoencoder, resolution)
    if options.stable_diffusion:
        unet, prompt = read_stable_diffusion(options.stable_diffusion)
    else:
        unet = build_unet(size.channels, size.cross_attention_dim, size.heads)
    if options.prompt_embedding:
        prompt = read_prompt(options.prompt_embedding)
    if prompt is None and not options.random:
        raise UserError(f"--stable_diffusion {options.stable_diffusion}: has no text encoder; expected the empty "
                        "prompt's embedding as --prompt_embedding")

    # Assemble and save.
    model = compose(autoencoder, unet, size.hint_channels, resolution, prompt, FORMATS[options.weights],
                    zero_fusion=options.paper_exact)
    write_json(options.out / BUILD_OPTIONS, plain(options) | autoencoders_intensity(options.autoencoder))
    save_diad(model, options.out)
    counts = {name: sum(p.numel() for p in getattr(model, name).parameters()) / 1e6
              for name in ("autoencoder", "unet", "guide")}
    print(", ".join(f"{name} {count:.1f} M" for name, count in counts.items()), "parameters;", resolution, "px")


def autoencoders_intensity(autoencoder: Path | None) -> dict[str, Any]:
    """How the auto-encoder's training brought images to 8 bits, which the model's has to agree in; None of others'."""
    trained = autoencoder / TRAIN_OPTIONS if autoencoder else None
    known = with_intensity(read_json(trained)) if trained and trained.is_file() else {}
    return {name: known.get(name) for name in UNKNOWN.settings()}


def check(options: Options) -> None:
    """Raise `UserError` for options that do not go together, before anything is read."""
    if options.random == bool(options.stable_diffusion):
        raise UserError("--stable_diffusion and --random are both given: expected one of them" if options.random else
                        "--stable_diffusion: not given; expected the weights of Stable Diffusion 1.5, or --random")
    if options.random and not options.size:
        raise UserError(f"--random: expected --size too, {', '.join(SIZES)}")
    if options.size and not options.random:
        raise UserError(f"--size {options.size}: the size of Stable Diffusion is its own; --size goes with --random")
    if not options.random and options.autoencoder is None:
        raise UserError("--autoencoder: not given; expected one that was fine-tuned on the good images "
                        f"(finetune_autoencoder.py), or {options.stable_diffusion} again, to take Stable Diffusion's")
    for name in ("stable_diffusion", "autoencoder", "prompt_embedding"):
        path = getattr(options, name)
        if path is not None and not path.exists():
            raise UserError(f"--{name} {path}: no such file or folder")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out}: expected a folder, found a file in its place")
    if (options.out / MODEL_CONFIG).exists():
        raise UserError(f"--out {options.out}: has {MODEL_CONFIG} already, and nothing is written over; expected a new "
                        "folder")


# ------------------------------------------------------------------------------------------ for train_tune_eval.py

@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What a model of the diad family is put together from, where --model names none."""

    size: Literal["tiny", "middle", "sd15"] | None = opt(
        "the networks: sd15 are the published ones and need --stable_diffusion, the others are smaller and begin with "
        "random weights", by_preset=True)
    stable_diffusion: Path | None = opt("Stable Diffusion 1.5, as build_diad.py takes it", None)
    prompt_embedding: Path | None = opt("the empty prompt's embedding, as build_diad.py takes it", None)
    autoencoder: Path | None = opt("auto-encoder, as build_diad.py takes it (finetune_autoencoder.py trains one)", None)
    autoencoder_start: Path | None = opt("what finetune_autoencoder.py is to --start with (random weights)", None)
    autoencoder_steps: int | None = opt("optimiser steps of finetune_autoencoder.py", by_preset=True)


def planned(options: Any) -> tuple[finetune_autoencoder.Options, Options]:
    """How the auto-encoder is trained and the model put together of a run with `ModelOptions`, called `run_id`."""
    default = PRESETS[options.preset or default_preset(options.dataset_path, options.device, FAMILY)]
    size = options.size or ("sd15" if options.stable_diffusion and not options.preset else default["size"])
    if (size == "sd15") != (options.stable_diffusion is not None):
        raise UserError(f"--size {size}: expected --stable_diffusion with sd15, and only with it; tiny and middle "
                        "begin with random weights")
    steps = options.autoencoder_steps or next(values["autoencoder_steps"] for values in PRESETS.values()
                                              if values["size"] == size)
    shared = {name: getattr(options, name) for name in (
        "item", "dataset_path", "layout", "intensity", "diffusion_checkpoint_dir", "log_dir", "resume",
        "gradient_checkpointing", "device", "precision", "num_workers", "dry_run")}
    encoder = finetune_autoencoder.Options(
        **shared, run_id=f"{options.run_id}-autoencoder", size="kl-f8" if size == "sd15" else size, num_steps=steps,
        start=options.autoencoder_start, resolution=SIZES[size].resolution, seed=options.seed or 0,
        holdout=options.holdout or default["holdout"])
    return encoder, Options(
        out=options.diffusion_checkpoint_dir / f"{options.run_id}-model", stable_diffusion=options.stable_diffusion,
        autoencoder=options.autoencoder or run_folder(encoder), prompt_embedding=options.prompt_embedding,
        random=size != "sd15", size=None if size == "sd15" else size, seed=options.seed or 0)


def is_built(build: Options, encoder: finetune_autoencoder.Options, resume: bool) -> bool:
    """Whether the model is there; one that was built otherwise, or is to be made anew, is a `UserError`."""
    if not (build.out / MODEL_CONFIG).is_file():
        return False
    built = read_json(build.out / BUILD_OPTIONS)
    same = resume and built | plain(build) == built
    if same and build.autoencoder == run_folder(encoder):
        how = PLACED | {"precision", "gradient_checkpointing"}
        known, wanted = ({name: value for name, value in values.items() if name not in how} for values in (
            with_intensity(read_json(run_folder(encoder) / TRAIN_OPTIONS)),
            plain(finetune_autoencoder.settle(encoder)[1])))
        same = known == wanted
    if not same:
        raise UserError(f"{build.out}: was built with other options, or is to be built anew, and nothing is written "
                        "over; delete it, or give another --run_id")
    return True


if __name__ == "__main__":
    main(Options, lambda options: f"The model is in {run(options)}", __doc__)
