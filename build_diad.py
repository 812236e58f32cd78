"""Assemble a model of the diad family, ready for training: one model for many categories (arXiv:2312.06607).

    python build_diad.py --stable_diffusion downloads/v1-5-pruned.ckpt --autoencoder checkpoints/autoencoder \\
        --out checkpoints/diad
    python build_diad.py --random --size tiny --autoencoder checkpoints/autoencoder --out checkpoints/diad
                                                                                            (nothing to download)

The U-Net and the embedding of the empty prompt come from Stable Diffusion 1.5. The SG network is a copy of the U-Net's
encoder. The auto-encoder was fine-tuned on the good images.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import finetune_autoencoder
import train_diad
from dbad.errors import UserError
from dbad.families.diad.options import Assembled, AutoencoderOptions, BuildOptions, ModelOptions
from dbad.files.names import BUILD_OPTIONS, MODEL_CONFIG, TRAIN_OPTIONS
from dbad.options.command_line import main
from dbad.options.resolve import plain, run_folder, say_all, subset


@dataclass(frozen=True, kw_only=True)
class Options(BuildOptions):
    """What the model is assembled from; saved as build_arg_config.json in its run folder."""


def run(options: BuildOptions) -> Path:
    """Assemble the model and save it; returns the run folder."""
    from dbad.families.diad.assembling import build, check_build  # these load torch
    from dbad.files.locks import writing_out
    check_build(options)
    options = replace(options, seed=options.seed or 0)
    if options.dry_run:
        say_all(options, f"a model in {options.out}")
        return options.out
    with writing_out(options.out):
        build(options)
    return options.out


# ------------------------------------------------------------------------------------------ for train_tune_eval.py

ChainOptions = ModelOptions


def chain(options: Assembled) -> Assembled:
    """The options with the model that train_diad.py begins with: --model, or one assembled for the images.

    Its auto-encoder is trained for it, unless one is given.
    """
    from dbad.families.diad.assembling import planned
    from dbad.networks.extractors import build_extractor
    if options.model is not None:
        return options
    encoder, build = planned(options)
    options = replace(options, model=build.out)
    train_diad.resolve_all(subset(train_diad.Options, replace(options, dry_run=True)))      # before hours
    if not options.dry_run:
        build_extractor(options.extractor, options.extractor_layers)
    if not is_built(build, encoder, options.resume):
        if options.autoencoder is None:
            finetune_autoencoder.run(encoder)
        if not options.dry_run:
            run(build)
    return options


def is_built(build: BuildOptions, encoder: AutoencoderOptions, resume: bool) -> bool:
    """True if the model exists; one that was built otherwise, or is to be made anew, is a `UserError`."""
    from dbad.data.intensity import with_intensity
    from dbad.families.diad.encoder_training import resolve_autoencoder
    from dbad.files.atomic import read_json
    from dbad.inspection.calibrate import PLACED
    if not (build.out / MODEL_CONFIG).is_file():
        return False
    built = read_json(build.out / BUILD_OPTIONS)
    same = resume and built | plain(build) == built
    if same and build.autoencoder == run_folder(encoder):
        how = PLACED | {"precision", "gradient_checkpointing", "method"}
        known, wanted = ({name: value for name, value in values.items() if name not in how} for values in (
            with_intensity(read_json(run_folder(encoder) / TRAIN_OPTIONS)),
            plain(resolve_autoencoder(encoder)[1])))
        same = known == wanted
    if not same:
        raise UserError(f"{build.out}: contains a model already, and it would be built differently or again; nothing "
                        "is overwritten; delete it, or give another --run_id")
    return True


if __name__ == "__main__":
    main(Options, lambda options: f"The model is in {run(options)}", __doc__)
