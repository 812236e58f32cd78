"""Train the KL auto-encoder of DiAD on good images, or fine-tune a published one; one for any number of categories.

    python finetune_autoencoder.py --item all                                 (built-in demo data, minutes on a CPU)
    python finetune_autoencoder.py --item all --dataset_path data/mvtec --start kl-f8.ckpt

The loss is that of latent diffusion (arXiv:2112.10752): L1, a perceptual distance, KL, and late in the training a patch
discriminator. The defaults of --size kl-f8 are DiAD's (arXiv:2312.06607), except for the perceptual network. At the end
the scale of the latents is stored: 1 / their standard deviation on the training images, so that a diffusion model sees
unit variance. A model that starts from published weights keeps the published scale.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dbad.families.diad.options import AutoencoderOptions
from dbad.files.names import AUTOENCODER, LOG, MODEL_CONFIG, REPORT, TRAIN_OPTIONS
from dbad.options.command_line import main
from dbad.options.resolve import data_of, plain, run_folder, say_all

if TYPE_CHECKING:
    from diffusers.models import AutoencoderKL


@dataclass(frozen=True, kw_only=True)
class Options(AutoencoderOptions):
    """What shapes the training of an auto-encoder."""


def run(options: AutoencoderOptions) -> Path:
    """Train the auto-encoder, and return its run folder."""
    from dbad.families.diad.encoder_training import resolve_autoencoder, try_training  # these load torch
    from dbad.files.locks import writing_run
    start, options = resolve_autoencoder(options)
    folder = run_folder(options)
    if announce(options, folder):
        with writing_run(folder):
            train(options, start)
    else:
        try_training(start, options)
    return folder


def train(options: AutoencoderOptions, start: "AutoencoderKL | None") -> None:
    """Train the auto-encoder of a run, which begins as `start`, and save its best weights."""
    import torch

    from dbad.data.categories import category_of
    from dbad.data.depth import run_intensity
    from dbad.families.diad import adversarial
    from dbad.families.diad import encoder_training as training
    from dbad.families.diad.autoencoder import BalancedImages
    from dbad.files.atomic import write_json
    from dbad.runtime.device import Machine, memory_advice, memory_format
    from dbad.training.early_stopping import Best
    from dbad.training.loop import fit
    from dbad.training.plan import Hooks, Place

    folder = run_folder(options)
    device, precision, _ = Machine.of(options.device, options.precision, options.batch_size)

    # Read the good images; a share of each category is never trained on.
    categories = {name: category_of(options, name) for name in options.item}
    intensity = run_intensity(options, training.begun(options), [s for each in categories.values() for s in each.good])
    good, held_out = training.read_categories(categories, options, intensity)
    data = BalancedImages(list(good.values()), options.batch_size, options.accumulate, options.seed)

    # Build the networks.
    torch.manual_seed(options.seed)
    model = training.build_networks(start, options, precision)
    autoencoder, perceptual, terms = model.autoencoder, model.perceptual, model.terms
    print(f"{sum(map(len, good.values()))} good images to train on, {sum(map(len, held_out.values()))} held out; "
          f"{sum(p.numel() for p in autoencoder.parameters()) / 1e6:.1f} M parameters; {device.type}, {precision}")

    # Train until the held-out loss rises, and keep the best.
    best = Best(options.patience)

    def measure(autoencoder: "AutoencoderKL") -> dict[str, dict[str, float]]:
        return adversarial.held_out_losses(autoencoder, held_out, perceptual, terms.perceptual, options.batch_size,
                                           precision)

    def report(model: "adversarial.AdversarialAutoencoder", epoch: int) -> dict[str, float]:
        training.write_samples(model.autoencoder, held_out, epoch, options, precision)
        return adversarial.mean_over_categories(measure(model.autoencoder))

    with memory_advice(options, "batch_size", "accumulate", "resolution", otherwise="a smaller --resolution"):
        fit(model.to(memory_format=memory_format(device)), data, lambda model, batch: model(batch),
            training.plan_of(options, good, held_out),
            Place(folder, options.log_dir / options.run_id, "autoencoder", options.resume, options.yes),
            batch_size=options.batch_size, device=device, hooks=Hooks(
                lambda: write_json(folder / TRAIN_OPTIONS, plain(options) | intensity.settings() | {
                    "method": "autoencoder"}), report, best))
    training.finish(autoencoder.eval(), good, options, precision, best, measure)


def announce(options: AutoencoderOptions, folder: Path) -> bool:
    """Say what is trained on; on `--dry_run` also all options and what would be written. Returns True to go on."""
    print(f"{' '.join(options.item)} from {data_of(options)}; size {options.size}")
    if options.dry_run:
        say_all(options, *(folder / name for name in (AUTOENCODER, MODEL_CONFIG, TRAIN_OPTIONS, REPORT, LOG)))
    return not options.dry_run


if __name__ == "__main__":
    main(Options, lambda options: f"The auto-encoder is in {run(options)}", __doc__)
