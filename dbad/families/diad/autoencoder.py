"""The KL auto-encoder of latent diffusion: its sizes, its run folder, published weights, the images it learns from.

    <diffusion_checkpoint_dir>/<run_id>/
        autoencoder.safetensors        EMA weights, a state dict of diffusers' AutoencoderKL
        model_config.json              what builds it; scaling_factor is the scale of the latents
        train_arg_config.json          the options of the training
        report.json                    how well held-out good images are reconstructed
        autoencoder_last.pt            everything that resume needs
        log.jsonl                      one line per epoch
        samples/                       held-out images above their reconstructions

Inside, images are ImageNet-normalised, as DiAD's auto-encoder takes and gives them; everywhere else they are in
[-1, 1]. `to_imagenet` and `from_imagenet` are where one becomes the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from diffusers.models import AutoencoderKL
from torch import Tensor
from torch.utils.data import Dataset

from dbad.checkpoints.weights import load_network, load_pickle, model_config, save_weights
from dbad.data.images import to_float
from dbad.diffusion.batches import take_turns
from dbad.diffusion.noise import draw, stream
from dbad.errors import UserError
from dbad.files.atomic import write_json
from dbad.files.names import AUTOENCODER, MODEL_CONFIG
from dbad.runtime.device import autocast

PUBLISHED_SCALE = 0.18215       # of kl-f8's latents, which Stable Diffusion was trained on
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Size(NamedTuple):
    """Channels at each resolution, the full one first, residual layers at each, and groups of the group norm."""

    channels: tuple[int, ...]
    layers_per_block: int
    norm_groups: int


# All halve the side three times and have 4 latent channels; kl-f8 is the published one.
SIZES = {
    "tiny": Size((16, 32, 64, 64), 1, 8),
    "middle": Size((32, 64, 128, 128), 1, 16),
    "kl-f8": Size((128, 256, 512, 512), 2, 32),
}


# ------------------------------------------------------------------------------------------------ ranges

def to_imagenet(images: Tensor) -> Tensor:
    """(N, 3, H, W) in [-1, 1] -> ImageNet-normalised, about -2.1 to 2.6."""
    mean, std = _statistics(images)
    return ((images + 1) / 2 - mean) / std


def from_imagenet(images: Tensor) -> Tensor:
    """The inverse of `to_imagenet`; what the network makes of an image may lie outside [-1, 1]."""
    mean, std = _statistics(images)
    return (images * std + mean) * 2 - 1


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


# ------------------------------------------------------------------------------------------- building, files

def build_autoencoder(size: str, resolution: int, scale: float = 1.0) -> AutoencoderKL:
    """A network of `SIZES` with random weights; `resolution` is the side of the images it is for, in px."""
    channels, layers_per_block, norm_groups = SIZES[size]
    return AutoencoderKL(
        block_out_channels=channels, layers_per_block=layers_per_block, norm_num_groups=norm_groups, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * len(channels), up_block_types=("UpDecoderBlock2D",) * len(channels),
        sample_size=resolution, scaling_factor=scale)


def save_autoencoder(autoencoder: AutoencoderKL, folder: Path) -> None:
    """Write the weights and what builds the network; the latter comes last, since it makes a whole of the folder."""
    save_weights(autoencoder.state_dict(), folder / AUTOENCODER)
    write_json(folder / MODEL_CONFIG, model_config(autoencoder))


def load_autoencoder(folder: Path) -> AutoencoderKL:
    """The auto-encoder that finetune_autoencoder.py left in a run folder, in eval mode.

    It takes and gives ImageNet-normalised images, (N, 3, S, S) <-> latents (N, 4, S / 8, S / 8); the latents times
    `config.scaling_factor` are what a diffusion model is trained on.
    """
    if not (folder / MODEL_CONFIG).is_file():
        raise UserError(f"{folder}: no trained auto-encoder; train it first: python finetune_autoencoder.py --item ... "
                        f"--run_id {folder.name}")
    return load_network(AutoencoderKL, folder, AUTOENCODER)


def import_autoencoder(path: Path) -> AutoencoderKL:
    """The KL-f8 auto-encoder of a .ckpt of latent diffusion: kl-f8, DiAD's mvtecad_fs, or a whole Stable Diffusion.

    In eval mode. Nothing in the file is executed; its keys are renamed to those of diffusers.
    """
    with torch.serialization.safe_globals([_lightning_callback()]):
        content = load_pickle(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    autoencoder = build_autoencoder("kl-f8", 256, PUBLISHED_SCALE)
    own = autoencoder.state_dict()
    state = convert_ldm_vae_checkpoint({key: value for key, value in state.items()
                                        if isinstance(key, str) and isinstance(value, Tensor)}, autoencoder.config)
    wrong = [key for key, value in own.items() if key not in state or state[key].shape != value.shape]
    if wrong:
        raise UserError(f"{path}: not a KL-f8 auto-encoder of latent diffusion ({len(wrong)} of {len(own)} tensors are "
                        f"missing or of another shape, such as {wrong[0]})")
    autoencoder.load_state_dict({key: state[key] for key in own})
    return autoencoder.eval()


def _lightning_callback() -> type:
    """An empty class in place of the one whose name Lightning writes into its checkpoints, beside plain values."""
    return type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})


def load_start(path: Path) -> tuple[AutoencoderKL, str]:
    """The network that a training goes on from, of a run folder or a published .ckpt, and which of `SIZES` it is."""
    if not path.exists():
        raise UserError(f"--start {path}: no such file or folder")
    autoencoder = load_autoencoder(path) if path.is_dir() else import_autoencoder(path)
    config = autoencoder.config
    for name, size in SIZES.items():
        if (tuple(config["block_out_channels"]), config["layers_per_block"], config["norm_num_groups"]) == size:
            return autoencoder, name
    channels = " ".join(map(str, config["block_out_channels"]))
    raise UserError(f"--start {path}: an auto-encoder of {channels} channels with "
                    f"{config['layers_per_block']} layers each; expected one of the sizes {', '.join(SIZES)}")


# ------------------------------------------------------------------------------------------------- images

@dataclass(frozen=True)
class BalancedImages(Dataset):
    """Good images of several categories, each with the same share of every pass however many images it has.

    A pass shows every category as often as the largest one has images; the others begin again. Items are asked for as
    lists of (batch, slot, index), see `training.StepBatches`. A batch is {"image": (N, 3, S, S) in [-1, 1],
    "noise": (N, 4, S / 8, S / 8), which the latents are sampled with, "step": (N,) the optimiser step, from 0}.

        categories   uint8 (3, S, S) images of each
        batch_size   images in a batch, over all processes
        accumulate   batches in a step
    """

    categories: Sequence[Sequence[Tensor]]
    batch_size: int
    accumulate: int
    seed: int

    def __len__(self) -> int:
        return len(self.categories) * max(map(len, self.categories))

    def __getitems__(self, wanted: list[tuple[int, int, int]]) -> dict[str, Tensor]:
        counts = [len(images) for images in self.categories]
        places = [take_turns(index, counts) for _, _, index in wanted]
        image = to_float(torch.stack([self.categories[category][place] for category, place in places]))
        # The same noise however a step is divided into batches: it follows from the image's number in the training.
        streams = [stream(self.seed, "latent", batch * self.batch_size + slot) for batch, slot, _ in wanted]
        noise = draw("gaussian", (4, *(side // 8 for side in image.shape[-2:])), streams)
        steps = torch.tensor([batch // self.accumulate for batch, _, _ in wanted])
        return {"image": image, "noise": noise, "step": steps}


# --------------------------------------------------------------------------------------- what it has learnt

@torch.no_grad()
def reconstruct(autoencoder: AutoencoderKL, images: Tensor, precision: str) -> Tensor:
    """Images (N, 3, S, S) in [-1, 1], encoded to the mean of the posterior and decoded; likewise, not clamped."""
    with autocast(images.device, precision):
        z = autoencoder.encode(to_imagenet(images)).latent_dist.mean
        return from_imagenet(autoencoder.decode(z).sample.float())


@torch.no_grad()
def latent_scale(autoencoder: AutoencoderKL, images: Sequence[Tensor], batch_size: int, precision: str) -> float:
    """1 / std of all values of the latents that are sampled for `images`, uint8 (3, S, S) each.

    With it, a diffusion model sees latents of unit variance. Of mean m and deviation s of the posterior, the samples'
    variance is Var(m) + E[s^2]; nothing is drawn.
    """
    device, count, first, second = next(autoencoder.parameters()).device, 0, 0.0, 0.0
    for begin in range(0, len(images), batch_size):
        x = to_imagenet(to_float(torch.stack(list(images[begin:begin + batch_size])).to(device)))
        with autocast(device, precision):
            posterior = autoencoder.encode(x).latent_dist
        mean, logvar = posterior.mean.double(), posterior.logvar.double()
        count += mean.numel()
        first += float(mean.sum())
        second += float((mean.square() + logvar.exp()).sum())
    return (second / count - (first / count) ** 2) ** -0.5
