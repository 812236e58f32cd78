"""DiAD: latent diffusion that is guided by the inspected image, one model for many categories (arXiv:2312.06607).

    image -> auto-encoder -> latents, noised -> U-Net, ten steps -> latents -> auto-encoder -> reconstruction
        \\-> semantic-guided (SG) network, beside every step -> deepest skips and middle of the U-Net

The U-Net is Stable Diffusion's, asked with the embedding of the empty prompt. The SG network is a trainable copy of its
encoder that sees the image itself: a ControlNet, and the spatial-aware feature fusion (SFF) block on its outputs. Its
outputs begin at zero, so that the guided U-Net begins as the plain one.

A run folder holds a model as

    model_config.json                                                 what builds its networks
    build_arg_config.json                                             what it was assembled from
    autoencoder.safetensors   unet.safetensors   guide.safetensors    state dicts
    prompt.safetensors                                                the embedding of the empty prompt
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from dbad import maps as diffmaps
from dbad.checkpoints.blueprints import first_line
from dbad.checkpoints.weights import model_config
from dbad.diffusion import noise
from dbad.diffusion.ddim import conditioned_step, visited_timesteps
from dbad.errors import UserError
from dbad.families.diad.autoencoder import build_autoencoder, from_imagenet, to_imagenet
from dbad.families.diad.files import FAMILY, read_diad_config
from dbad.files.atomic import write_json
from dbad.files.checksums import read_tensors, write_tensors
from dbad.files.names import MODEL_CONFIG, NETWORKS
from dbad.networks.extractors import Extractor
from dbad.runtime.device import autocast

TRAIN_STEPS, PROMPT_TOKENS, HEADS = 1000, 77, 8         # Stable Diffusion's
FIRST_FUSED, FIRST_INJECTED = 6, 9      # of the 12 skips: 6 to 8 are fused into 9 to 11, which alone are used


class Size(NamedTuple):
    """What a new model is made with. Everything else is as in Stable Diffusion 1.5.

        resolution            side of the images, in px
        channels              of the four levels of U-Net and SG network, the latents' own resolution first
        cross_attention_dim   width of the prompt's embedding
        autoencoder           its size, one of `autoencoder.SIZES`
        hint_channels         of the layers that bring the image into the SG network, its full resolution first
        heads                 of every attention layer
    """

    resolution: int
    channels: tuple[int, ...]
    cross_attention_dim: int
    autoencoder: str
    hint_channels: tuple[int, ...]
    heads: int = HEADS


SIZES = {
    "tiny": Size(128, (32, 64, 64, 64), 32, "tiny", (16, 16, 32, 32), 2),     # narrow heads are slow
    "middle": Size(256, (96, 192, 320, 320), 256, "middle", (16, 32, 96, 256)),
    "sd15": Size(256, (320, 640, 1280, 1280), 768, "kl-f8", (16, 32, 96, 256)),
}


class SpatialFusion(nn.Module):
    """The SFF block: o[9 + k] <- SiLU(o[9 + k] + sum over j = 6, 7, 8 of D_jk(o[j])), k = 0, 1, 2.

    D_jk is a 3x3 convolution of stride 2 without bias, instance norm, SiLU. `down` holds the convolutions, j by j.

    The published code sets the convolutions to zero at first, and so does `zero`. But o[j] itself comes from a
    convolution that begins at zero and is used nowhere else: of two zeros in a row neither ever gets a gradient, and
    the block stays what it was. Random convolutions change the first output just as little, and they learn.
    """

    def __init__(self, fused: Sequence[int], injected: Sequence[int], zero: bool = False):
        """`fused` and `injected` are the channels of o[6], o[7], o[8] and of o[9], o[10], o[11]."""
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
                                   for inputs in fused for outputs in injected])
        if zero:
            for convolution in self.down:
                nn.init.zeros_(convolution.weight)

    def forward(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The SG network's outputs o[0] to o[11] -> the new o[9], o[10], o[11]."""
        fused, injected = outputs[FIRST_FUSED:FIRST_INJECTED], outputs[FIRST_INJECTED:]
        new = []
        for k, o in enumerate(injected):
            parts = [F.silu(F.instance_norm(self.down[3 * j + k](source).float())) for j, source in enumerate(fused)]
            new.append(F.silu(o + sum(parts)).to(o.dtype))
        return new


class SemanticGuide(nn.Module):
    """The SG network: a ControlNet whose hint is the image, and the SFF block.

    The hint's embedding is a module of its own, since it is the same at every step.
    """

    def __init__(self, controlnet: ControlNetModel, zero_fusion: bool = False):
        super().__init__()
        self.hint_channels = tuple(controlnet.config.conditioning_embedding_out_channels)
        self.embedding, controlnet.controlnet_cond_embedding = controlnet.controlnet_cond_embedding, nn.Identity()
        self.controlnet = controlnet
        _, c1, c2, c3 = controlnet.config.block_out_channels
        self.fusion = SpatialFusion((c1, c2, c2), (c2, c3, c3), zero_fusion)

    def forward(self, z_t: Tensor, t: int | Tensor, prompt: Tensor, hint: Tensor) -> tuple[list[Tensor], Tensor]:
        """What is added to the three deepest skips, (N, C_k, h / 8, w / 8) each, and to the middle; see `Diad`."""
        outputs, middle = self.controlnet(z_t, t, prompt, hint, return_dict=False)
        return self.fusion(outputs), middle


class Diad(nn.Module):
    """Auto-encoder, U-Net, SG network and the embedding of the empty prompt.

        resolution   side of the images it is for, in px
        prompt       (1, 77, width)
        abar         cumulative alphas (1000,) float64
    Raises `UserError` for parts that do not fit each other.
    """

    def __init__(self, resolution: int, autoencoder: AutoencoderKL, unet: UNet2DConditionModel, guide: SemanticGuide,
                 prompt: Tensor):
        super().__init__()
        _check_parts(resolution, autoencoder, unet, guide, prompt)
        self.resolution, self.autoencoder, self.unet, self.guide = resolution, autoencoder, unet, guide
        self.register_buffer("prompt", prompt)
        with torch.device("cpu"):       # whatever device the networks are made on
            self.abar = DDIMScheduler(TRAIN_STEPS, beta_start=0.00085, beta_end=0.012,
                                      beta_schedule="scaled_linear").alphas_cumprod.double()

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) in [-1, 1] -> mean and standard deviation of their latents, (N, 4, h, w) float32 each."""
        found = self.autoencoder.encode(to_imagenet(images).to(self.autoencoder.dtype)).latent_dist
        scale = self.autoencoder.config.scaling_factor
        return found.mean.float() * scale, found.std.float() * scale

    def encode(self, images: Tensor, drawn: Tensor | None = None) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> latents (N, 4, h, w) float32: the mean of their distribution.

        With unit noise `drawn` (N, 4, h, w) they are a sample of it, as in training.
        """
        mean, std = self.posterior(images)
        return mean if drawn is None else mean + std * drawn

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents (N, 4, h, w) -> images (N, 3, H, W) float32 in [-1, 1]."""
        z = (z / self.autoencoder.config.scaling_factor).to(self.autoencoder.dtype)
        return from_imagenet(self.autoencoder.decode(z).sample.float()).clamp(-1, 1)

    def hint(self, images: Tensor) -> Tensor:
        """What the SG network sees of images (N, 3, H, W) in [-1, 1]: (N, C_0, h, w), for all steps."""
        return self.guide.embedding(to_imagenet(images).to(self.unet.dtype))

    def predict_noise(self, z_t: Tensor, t: int | Tensor, hint: Tensor) -> Tensor:
        """eps_theta: noisy latents (N, 4, h, w), timestep or (N,) timesteps, `hint` -> (N, 4, h, w) float32."""
        z_t = z_t.to(self.unet.dtype)
        prompt = self.prompt.to(z_t.dtype).expand(len(z_t), -1, -1)
        deepest, middle = self.guide(z_t, t, prompt, hint)
        skips = [*[z_t.new_zeros(())] * FIRST_INJECTED, *deepest]
        return self.unet(z_t, t, prompt, down_block_additional_residuals=skips, mid_block_additional_residual=middle,
                         return_dict=False)[0].float()

    def forward(self, z_t: Tensor, t: Tensor, images: Tensor) -> Tensor:
        """`predict_noise` of the images, for training: gradients reach the hint, also through a wrapper."""
        return self.predict_noise(z_t, t, self.hint(images))

    def set_trainable(self, whole_unet: bool = False) -> None:
        """Freeze all but the SG network and the U-Net's decoder, as published.

        Nothing before the decoder then needs a gradient, so that its activations are not kept. A U-Net that was not
        pretrained has to learn as a whole (`whole_unet`).
        """
        self.requires_grad_(False)
        decoder = [self.unet] if whole_unet else [self.unet.up_blocks, self.unet.conv_norm_out, self.unet.conv_out]
        for module in (self.guide, *decoder):
            module.requires_grad_(True)
        self.guide.controlnet.controlnet_down_blocks[:FIRST_FUSED].requires_grad_(False)    # lead nowhere

    def checkpoint_gradients(self) -> None:
        """Compute activations again in the backward pass: half the memory, a third more time."""
        self.unet.enable_gradient_checkpointing()
        self.guide.controlnet.enable_gradient_checkpointing()


def _check_parts(resolution: int, autoencoder: AutoencoderKL, unet: UNet2DConditionModel, guide: SemanticGuide,
                 prompt: Tensor) -> None:
    """Raise `UserError` for parts of a model that do not fit each other."""
    hint_levels, levels = len(guide.hint_channels), len(autoencoder.config.block_out_channels)
    if hint_levels != levels:
        raise UserError(f"hint_channels of {hint_levels} levels: expected {levels}, as the auto-encoder has")
    expected = (1, PROMPT_TOKENS, unet.config.cross_attention_dim)
    if tuple(prompt.shape) != expected:
        raise UserError(f"embedding of the prompt, {_shown(prompt.shape)}: expected {_shown(expected)} for this U-Net")
    cell = 2 ** (levels - 1 + len(unet.config.block_out_channels) - 1)
    if resolution % cell or resolution < 2 * cell:
        raise UserError(f"resolution {resolution}: expected a multiple of {cell} px, which are one cell of the U-Net's "
                        "deepest level, and at least two of them")


# ------------------------------------------------------------------------------------------------- inspection

@torch.no_grad()
def reconstruct(model: Diad, images: Tensor, streams: Sequence[Generator], start: int = TRAIN_STEPS,
                num_steps: int = 10, paper_exact: bool = False, precision: str = "fp32") -> Tensor:
    """The defect-free version of each image: its latents noised at timestep start - 1, and denoised by DDIM, eta 0.

        images    (N, 3, H, W) in [-1, 1], on the model's device
        streams   one random stream per image
    The published code guides with scale 9 between two predictions that are the same; one of them is enough. It also
    visits 901, 801, ..., 1 for latents noised at 999, and ends at abar_0 instead of 1; `paper_exact` does so too.
    Returns (N, 3, H, W) float32 in [-1, 1].
    """
    if paper_exact:
        visited = list(range(0, start, start // num_steps))[:num_steps]
        visited = [t + 1 for t in reversed(visited)]
    else:
        visited = visited_timesteps(start, num_steps)
    alphas = [*(float(model.abar[t]) for t in visited), float(model.abar[0]) if paper_exact else 1.0]
    with autocast(images.device, precision):
        z_0, hint = model.encode(images), model.hint(images)
    abar = float(model.abar[start - 1])
    z = abar ** 0.5 * z_0 + (1 - abar) ** 0.5 * noise.draw("gaussian", z_0.shape[1:], streams).to(z_0.device)
    for i, t in enumerate(visited):
        with autocast(images.device, precision):
            eps = model.predict_noise(z, t, hint)
        z, _ = conditioned_step(z, eps, z_0, alphas[i], alphas[i + 1])
    with autocast(images.device, precision):
        return model.decode(z)


@torch.no_grad()
def anomaly_map(extractor: Extractor, images: Tensor, reconstructions: Tensor, sigma: float = 5.0,
                precision: str = "fp32") -> Tensor:
    """Sum over the extractor's layers of 1 - cosine, blurred; (N, 3, S, S) in [-1, 1] twice -> (N, 1, S, S) >= 0.

    The published ones are stages 1 to 3 of a ResNet-50. `sigma` is in px of a 256 px image, and scales with it.
    """
    size = tuple(images.shape[-2:])
    with autocast(images.device, precision):
        features, others = extractor(images), extractor(reconstructions)
    layers = diffmaps.feature_maps(features, others, size, kernel=1)
    return diffmaps.blur(layers.sum(dim=1, keepdim=True), sigma * size[0] / 256)


def image_score(maps: Tensor) -> Tensor:
    """Maximum of (N, 1, S, S) after eight mean poolings of stride 1, 8x8 at 256 px, in proportion at others: (N,)."""
    kernel = max(1, round(8 * maps.shape[-1] / 256))
    for _ in range(8):
        maps = F.avg_pool2d(maps, kernel, stride=1)
    return maps.flatten(1).amax(dim=1)


# ------------------------------------------------------------------------------------------------ build, save, load

def build_unet(channels: Sequence[int], cross_attention_dim: int, heads: int = HEADS) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's U-Net with other widths, and random weights; see `Size`."""
    if len(channels) != 4 or any(c < 32 or c % 32 for c in channels):
        raise UserError(f"channels {' '.join(map(str, channels))}: expected four multiples of 32")
    return UNet2DConditionModel(block_out_channels=tuple(channels), cross_attention_dim=cross_attention_dim,
                                attention_head_dim=heads)       # diffusers' name for their number


def compose(autoencoder: AutoencoderKL, unet: UNet2DConditionModel, hint_channels: Sequence[int], resolution: int,
            prompt: Tensor | None = None, dtype: torch.dtype = torch.float32, zero_fusion: bool = False) -> Diad:
    """A model with a new SG network: encoder and middle of the U-Net copied, the rest random, its outputs zero.

    Without a `prompt` its embedding is random too. The parts become `dtype` one after the other.
    """
    def cast(module):
        return nn.Module.to(module, dtype)      # past diffusers' own `to`, which warns of every cast
    autoencoder, unet = cast(autoencoder), cast(unet)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=tuple(hint_channels))
    guide = cast(SemanticGuide(controlnet, zero_fusion))
    if prompt is None:
        prompt = torch.randn(1, PROMPT_TOKENS, unet.config.cross_attention_dim)
    return Diad(resolution, autoencoder, unet, guide, prompt.to(dtype)).eval()


def random_diad(size: Size, dtype: torch.dtype = torch.float32) -> Diad:
    """A model with random weights; seed torch's own stream before it."""
    autoencoder = build_autoencoder(size.autoencoder, size.resolution)
    return compose(autoencoder, build_unet(size.channels, size.cross_attention_dim, size.heads), size.hint_channels,
                   size.resolution, dtype=dtype)


def diad_config(model: Diad) -> dict[str, Any]:
    """The contents of model_config.json, as plain values."""
    return {"family": FAMILY, "resolution": model.resolution, "hint_channels": list(model.guide.hint_channels),
            "autoencoder": model_config(model.autoencoder), "unet": model_config(model.unet)}


def diad_of(config: Mapping[str, Any]) -> Diad:
    """The model, with random weights, that the contents of model_config.json describe."""
    return compose(AutoencoderKL(**config["autoencoder"]), UNet2DConditionModel(**config["unet"]),
                   config["hint_channels"], config["resolution"])


def save_diad(model: Diad, folder: Path) -> None:
    """Write the model into its run folder; each file whole or not at all, model_config.json last."""
    for name in NETWORKS:
        write_tensors(getattr(model, name).state_dict(), folder / f"{name}.safetensors")
    write_tensors({"prompt": model.prompt}, folder / "prompt.safetensors")
    write_json(folder / MODEL_CONFIG, diad_config(model))


def load_diad(folder: Path, dtype: torch.dtype | None = None) -> Diad:
    """The model of a run folder, in eval mode; `dtype` None keeps that of the files.

    The networks are made without memory, and take the tensors as they are read.
    """
    path, config = folder / MODEL_CONFIG, read_diad_config(folder)
    try:
        with torch.device("meta"):
            model = diad_of(config)
    except Exception as error:      # diffusers has as many ways to fail as there are wrong values
        raise UserError(f"{path}: does not describe a model of the {FAMILY} family ({first_line(error)})") from None
    for name in NETWORKS:
        file = folder / f"{name}.safetensors"
        assign(getattr(model, name), load_part(file, dtype), file, path)
    prompt = load_part(folder / "prompt.safetensors", dtype).get("prompt")
    if prompt is None or prompt.shape != model.prompt.shape:
        raise UserError(f"{folder / 'prompt.safetensors'}: expected a tensor prompt, {_shown(model.prompt.shape)}")
    model.prompt = prompt
    return model


def load_part(path: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The state dict in a safetensors file; a missing or broken one is a `UserError` that names it."""
    return {key: value.to(dtype or value.dtype) for key, value in read_tensors(path)[0].items()}


def assign(model: nn.Module, state: Mapping[str, Tensor], path: Path, description: Path | None = None) -> None:
    """Give `model` the tensors themselves, without a copy; other names or shapes than its own are a `UserError`.

    `path` is where the tensors come from, `description` the file that says what the model is like.
    """
    own, given = ({key: value.shape for key, value in tensors.items()} for tensors in (model.state_dict(), state))
    wrong = sorted(key for key in own.keys() | given.keys() if own.get(key) != given.get(key))
    if wrong:
        than = f" than {description} describes" if description else ""
        raise UserError(f"{path}: weights of another architecture{than} ({len(own.keys() - given.keys())} missing, "
                        f"{len(given.keys() - own.keys())} unknown, such as {wrong[0]}: "
                        f"{_shown(given.get(wrong[0]))} instead of {_shown(own.get(wrong[0]))})")
    model.load_state_dict(state, assign=True)


def _shown(shape: Sequence[int] | None) -> str:
    return "none" if shape is None else "x".join(map(str, shape))
