"""Adapt the feature extractor to one category.

The extractor is the encoder of an auto-encoder that learns to reproduce good images, or, with --extractor_use_diff,
what the diffusion model makes of them.

    python train_extractor.py --item hazelnut
    python train_extractor.py --item screw --dataset_path data/mvtec --extractor_use_diff
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from dbad.checkpoints import load_unet
from dbad.config import (
    TRAIN_OPTIONS,
    ReconstructionOptions,
    RunOptions,
    announce,
    main,
    opt,
    plain,
    resolve,
    run_folder,
    trained_options,
)
from dbad.data import fingerprint, open_category, random_crops, read_images, split_holdout, to_float
from dbad.denoising import Conditioning, reconstruct_all, schedule
from dbad.extractors import EMBEDDED, Extractor, build_extractor, save_extractor
from dbad.files import read_json
from dbad.noise import stream
from dbad.runtime import autocast, memory_format, pick_device, pick_precision
from dbad.training import IMAGES, Plan, fit


@dataclass(frozen=True, kw_only=True)
class ExtractorOptions:
    """Training of the feature extractor."""

    extractor: str = opt("backbone: efficientnet_lite0 (comes with its weights), a torchvision ResNet such as "
                         "wide_resnet101_2, or any timm backbone", EMBEDDED)
    extractor_layers: tuple[int, ...] | None = opt(
        "feature stages to compare, the first being 0 (those of strides 4, 8 and 16)", None)
    extractor_path: Path | None = opt("file of the adapted extractor (extractor.pt in the run folder)", None,
                                      aliases=["--save_to"])
    epochs_extractor: int = opt("epochs of adaptation; 0 keeps the pretrained weights", by_preset=True)
    extractor_learning_rate: float = opt("peak learning rate of AdamW for the extractor", 1e-4)
    extractor_use_diff: bool = opt("learn to reproduce the diffusion model's reconstructions instead of the images",
                                   False, aliases=["--use_diffusion_model"])
    resolution: int = opt("side of the images, in px; that of the trained diffusion model, if there is one",
                          by_preset=True)
    feature_resolution: int = opt("side to which the extractor resizes images, in px", by_preset=True)
    resume: bool = opt("go on from the last saved state of this run, if there is one", True)
    log_dir: Path = opt("folder for TensorBoard's events", Path("logs"))


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions, ExtractorOptions, ReconstructionOptions):
    """What shapes the adaptation of the extractor."""


def run(options: Options) -> Path:
    """Adapt the extractor, and return the file it is in."""
    options = resolve(options, trained_options(options))
    folder, path = run_folder(options), extractor_path(options)
    if not announce(options, path):
        return path
    device = pick_device(options.device)
    precision = pick_precision(options.precision, device)
    torch.manual_seed(options.seed)
    extractor = build_extractor(options.extractor, options.extractor_layers, options.feature_resolution)

    # Read the good images that training may see, and what is to be made of them.
    category = open_category(options)
    train, _ = split_holdout(category.train, options.holdout)
    size = None if options.patching else options.resolution
    images = training_images(read_images(train, size, options.num_workers), options)
    targets = reconstructions(images, folder, options, device, precision) if options.extractor_use_diff else images

    # Train the auto-encoder, keep its encoder.
    if options.epochs_extractor:
        model = AutoEncoder(extractor).to(memory_format=memory_format(device))

        def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            with autocast(device, precision):
                rebuilt = model(batch["image"])
            return {"loss": F.mse_loss(rebuilt, batch["target"])}

        fit(model, Pairs(images, targets), loss_of, plan_of(options, images, targets), phase="extractor",
            batch_size=options.batch_size, folder=folder, log_dir=options.log_dir / options.run_id, device=device,
            resume=options.resume)
    save_extractor(extractor, path)
    return path


def extractor_path(options: Any) -> Path:
    """Where the adapted extractor of the run is kept."""
    return options.extractor_path or run_folder(options) / "extractor.pt"


class AutoEncoder(nn.Module):
    """The extractor's deepest features, decoded to the image again by transposed convolutions.

    (N, 3, H, W) in [-1, 1] -> (N, 3, H, W).
    """

    def __init__(self, extractor: Extractor, width: int = 128):
        super().__init__()
        self.extractor = extractor
        doublings = (extractor.strides[-1] - 1).bit_length()
        widths = [extractor.channels[-1]] + [max(16, width // 2 ** k) for k in range(doublings)]
        stages = [nn.Sequential(nn.ConvTranspose2d(a, b, 4, stride=2, padding=1), nn.ReLU())
                  for a, b in zip(widths, widths[1:], strict=False)]
        self.decoder = nn.Sequential(*stages, nn.Conv2d(widths[-1], 3, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        rebuilt = self.decoder(self.extractor(images)[-1]).float()
        return F.interpolate(rebuilt, size=images.shape[-2:], mode="bilinear", antialias=True, align_corners=False)


class Pairs(Dataset):
    """Images with their targets, both (N, 3, S, S) in [-1, 1]; asked for as `training.StepBatches` does."""

    def __init__(self, images: Tensor, targets: Tensor):
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, wanted: list[tuple[int, int, int]]) -> dict[str, Tensor]:
        index = [index for _, _, index in wanted]
        return {"image": self.images[index], "target": self.targets[index]}


def training_images(pixels: list[Tensor], options: Options, crops_per_image: int = 4) -> Tensor:
    """Images as (N, 3, S, S) in [-1, 1]; with --patching some random crops of each."""
    if not options.patching:
        return to_float(torch.stack(pixels))
    streams = [stream(options.seed, "extractor crop", i) for i in range(len(pixels))]
    return to_float(torch.cat([random_crops(pixels, options.resolution, streams) for _ in range(crops_per_image)]))


def reconstructions(images: Tensor, folder: Path, options: Options, device: torch.device, precision: str) -> Tensor:
    """What the trained diffusion model makes of the images."""
    unet = load_unet(folder, options.diffusion_checkpoint_name).to(device, memory_format=memory_format(device))
    trained = read_json(folder / TRAIN_OPTIONS)
    how = Conditioning(options.conditioning, options.recon_weight, options.eta, options.start_at_timestep,
                       options.steps_to_regenerate)
    return reconstruct_all(unet, images, schedule(trained["train_steps"], trained["beta_schedule"]), how,
                           noise_kind=trained["noise_kind"], seed=options.seed, batch_size=options.batch_size,
                           device=device, precision=precision)


def plan_of(options: Options, images: Tensor, targets: Tensor) -> Plan:
    """The length and speed of the training, and what a resumed run must agree in."""
    steps_per_epoch = -(-len(images) // options.batch_size)
    shaping = ("item", "holdout", "batch_size", "seed", "extractor", "extractor_layers", "feature_resolution",
               "epochs_extractor", "extractor_learning_rate", "extractor_use_diff", "patching")
    settings = {name: value for name, value in plain(options).items() if name in shaping} | {
        IMAGES: fingerprint([images, targets])}
    return Plan(options.epochs_extractor * steps_per_epoch, steps_per_epoch, 1, options.extractor_learning_rate,
                warmup_steps=0, seed=options.seed, settings=settings)


if __name__ == "__main__":
    main(Options, lambda options: f"The adapted extractor is {run(options)}", __doc__)
