"""A model put together from published or random weights, and how its parts are planned for a whole chain."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from dbad.data.intensity import UNKNOWN, with_intensity
from dbad.errors import UserError
from dbad.families.diad.autoencoder import build_autoencoder
from dbad.families.diad.model import SIZES, build_unet, compose
from dbad.families.diad.options import Assembled, AutoencoderOptions, BuildOptions, ModelOptions, SizeName
from dbad.families.diad.storage import save_diad
from dbad.families.diad.weights import read_autoencoder, read_prompt, read_stable_diffusion
from dbad.fields import PRESETS, default_of, fields_of
from dbad.files.atomic import read_json, write_json
from dbad.files.names import BUILD_OPTIONS, MODEL_CONFIG, TRAIN_OPTIONS
from dbad.options.resolve import default_preset, plain, run_folder

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check_build(options: BuildOptions) -> None:
    """Raise `UserError` for options that do not go together, before anything is read."""
    if options.random == bool(options.stable_diffusion):
        raise UserError("--stable_diffusion and --random are both given: expected one of them" if options.random else
                        "--stable_diffusion: not given; expected the weights of Stable Diffusion 1.5, or --random")
    if options.random and not options.size:
        raise UserError(f"--random: expected --size too, {', '.join(SIZES)}")
    if options.size and not options.random:
        raise UserError(f"--size {options.size}: Stable Diffusion has a fixed size; expected --size only with --random")
    if not options.random and options.autoencoder is None:
        raise UserError("--autoencoder: not given; expected one that was fine-tuned on the good images "
                        f"(finetune_autoencoder.py), or {options.stable_diffusion} for Stable Diffusion's own")
    for name in ("stable_diffusion", "autoencoder", "prompt_embedding"):
        path = getattr(options, name)
        if path is not None and not path.exists():
            raise UserError(f"--{name} {path}: no such file or folder")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out}: expected a folder, found a file")
    if (options.out / MODEL_CONFIG).exists():
        raise UserError(f"--out {options.out}: contains {MODEL_CONFIG} already; nothing is overwritten; expected a new "
                        "folder")


def build(options: BuildOptions) -> None:
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
    """The intensity options of the auto-encoder's training, which the model's must equal.

    Their values are None where there is no record of a training, as for published auto-encoders.
    """
    trained = autoencoder / TRAIN_OPTIONS if autoencoder else None
    known = with_intensity(read_json(trained)) if trained and trained.is_file() else {}
    return {name: known.get(name) for name in UNKNOWN.settings()}


def size_of(options: Assembled) -> SizeName:
    """The size of the model that --size, --stable_diffusion or the preset name."""
    size = options.size
    if size is None:
        preset = options.preset or default_preset(options.dataset_path, options.device)
        published = options.stable_diffusion and not options.preset
        size = "sd15" if published else default_of(fields_of(ModelOptions)["size"], preset)
    if (size == "sd15") != (options.stable_diffusion is not None):
        raise UserError(f"--size {size}: expected --stable_diffusion with sd15 and only with it; tiny and middle start "
                        "from random weights")
    return size


def planned(options: Assembled) -> tuple[AutoencoderOptions, BuildOptions]:
    """The options to train the auto-encoder and to assemble the model of the run `run_id` with `ModelOptions`."""
    size, declared = size_of(options), fields_of(ModelOptions)
    preset = next(name for name in PRESETS if default_of(declared["size"], name) == size)
    steps = options.autoencoder_steps or default_of(declared["autoencoder_steps"], preset)
    own = {"run_id": f"{options.run_id}-autoencoder", "size": "kl-f8" if size == "sd15" else size, "num_steps": steps,
           "start": options.autoencoder_start, "resolution": SIZES[size].resolution}
    # Options of the chain hold for each part too, except those that only share a name.
    unlike = {"batch_size", "learning_rate", "schedule", "extractor", "intensity_bits", *own}
    shared = {field.name: getattr(options, field.name) for field in fields(AutoencoderOptions)
              if field.name not in unlike and hasattr(options, field.name)}
    encoder = AutoencoderOptions(**shared, **own)
    return encoder, BuildOptions(
        out=options.diffusion_checkpoint_dir / f"{options.run_id}-model", stable_diffusion=options.stable_diffusion,
        autoencoder=options.autoencoder or run_folder(encoder), prompt_embedding=options.prompt_embedding,
        random=size != "sd15", size=None if size == "sd15" else size, seed=options.seed or 0)
