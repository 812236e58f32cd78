"""DiAD: latent diffusion that is guided by the inspected image, one model for many categories (arXiv:2312.06607).

    image -> auto-encoder -> latents, noised -> U-Net, ten steps -> latents -> auto-encoder -> reconstruction
        \\-> semantic-guided (SG) network, beside every step -> deepest skips and middle of the U-Net

The U-Net is Stable Diffusion's, with the embedding of the empty prompt. The SG network is a trainable copy of its
encoder that sees the image itself: a ControlNet, and the spatial-aware feature fusion (SFF) block on its outputs. These
outputs begin at zero, so that the guided U-Net begins as the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers.models import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from dbad.errors import UserError
from dbad.families.diad.autoencoder import build_autoencoder, from_imagenet, to_imagenet

TRAIN_STEPS, PROMPT_TOKENS, HEADS = 1000, 77, 8         # Stable Diffusion's
FIRST_FUSED, FIRST_INJECTED = 6, 9      # of the 12 skips: 6 to 8 are fused into 9 to 11, which alone are used


class Size(NamedTuple):
    """The size of a new model. Everything else is as in Stable Diffusion 1.5.

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
    convolution that begins at zero and is used nowhere else. With two zero convolutions in a row, neither gets a
    gradient, and the block never learns. Random convolutions change the first output just as little, and they do learn.
    """

    def __init__(self, fused: Sequence[int], injected: Sequence[int], zero: bool = False):
        """`fused` and `injected` are the channels of o[6], o[7], o[8] and of o[9], o[10], o[11]."""
        super().__init__()
        down = [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
                for inputs in fused for outputs in injected]
        if zero:
            for convolution in down:
                nn.init.zeros_(convolution.weight)
        self.down = nn.ModuleList(down)

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
        self.hint_channels = tuple(controlnet.config["conditioning_embedding_out_channels"])
        self.embedding = controlnet.controlnet_cond_embedding
        controlnet.register_module("controlnet_cond_embedding", nn.Identity())
        self.controlnet = controlnet
        _, c1, c2, c3 = controlnet.config["block_out_channels"]
        self.fusion = SpatialFusion((c1, c2, c2), (c2, c3, c3), zero_fusion)

    def forward(self, z_t: Tensor, t: int | Tensor, prompt: Tensor, hint: Tensor) -> tuple[list[Tensor], Tensor]:
        """The guidance to add to the three deepest skips, (N, C_k, h / 8, w / 8) each, and to the middle."""
        outputs, middle = self.controlnet(z_t, t, prompt, hint, return_dict=False)
        return self.fusion(outputs), middle


class Diad(nn.Module):
    """Auto-encoder, U-Net, SG network and the embedding of the empty prompt.

        resolution   side of the images it is for, in px
        prompt       (1, 77, width)
        abar         cumulative alphas (1000,) float64
    Raises `UserError` for parts that do not fit each other.
    """

    prompt: Tensor

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
        scale = self.autoencoder.config["scaling_factor"]
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
        z = (z / self.autoencoder.config["scaling_factor"]).to(self.autoencoder.dtype)
        return from_imagenet(self.autoencoder.decode(z).sample.float()).clamp(-1, 1)

    def hint(self, images: Tensor) -> Tensor:
        """The hint of images (N, 3, H, W) in [-1, 1] for the SG network: (N, C_0, h, w), the same at all steps."""
        return self.guide.embedding(to_imagenet(images).to(self.unet.dtype))

    def predict_noise(self, z_t: Tensor, t: int | Tensor, hint: Tensor) -> Tensor:
        """eps_theta: noisy latents (N, 4, h, w), a timestep or (N,) timesteps, `hint` -> (N, 4, h, w) float32."""
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

        Nothing before the decoder needs a gradient then, and its activations are not kept. A U-Net that was not
        pretrained has to learn as a whole (`whole_unet`).
        """
        self.requires_grad_(False)
        decoder = [self.unet] if whole_unet else [self.unet.up_blocks, self.unet.conv_norm_out, self.unet.conv_out]
        for module in (self.guide, *decoder):
            if module is not None:      # a U-Net may have no norm
                module.requires_grad_(True)
        self.guide.controlnet.controlnet_down_blocks[:FIRST_FUSED].requires_grad_(False)    # their outputs are not used

    def checkpoint_gradients(self) -> None:
        """Compute activations again in the backward pass; this takes half the memory and a third more time."""
        self.unet.enable_gradient_checkpointing()
        self.guide.controlnet.enable_gradient_checkpointing()


def _check_parts(resolution: int, autoencoder: AutoencoderKL, unet: UNet2DConditionModel, guide: SemanticGuide,
                 prompt: Tensor) -> None:
    """Raise `UserError` for parts of a model that do not fit each other."""
    hint_levels, levels = len(guide.hint_channels), len(autoencoder.config["block_out_channels"])
    if hint_levels != levels:
        raise UserError(f"hint_channels of {hint_levels} levels: expected {levels}, as the auto-encoder has")
    expected = (1, PROMPT_TOKENS, unet.config["cross_attention_dim"])
    if tuple(prompt.shape) != expected:
        raise UserError(f"embedding of the prompt, {shown_shape(prompt.shape)}: expected {shown_shape(expected)} for "
                        "this U-Net")
    cell = 2 ** (levels - 1 + len(unet.config["block_out_channels"]) - 1)
    if resolution % cell or resolution < 2 * cell:
        raise UserError(f"resolution {resolution}: expected a multiple of {cell} px (one cell of the deepest U-Net "
                        "level), at least twice that")


def build_unet(channels: Sequence[int], cross_attention_dim: int, heads: int = HEADS) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's U-Net with other widths, and random weights; see `Size`."""
    if len(channels) != 4 or any(c < 32 or c % 32 for c in channels):
        raise UserError(f"channels {' '.join(map(str, channels))}: expected four multiples of 32")
    return UNet2DConditionModel(block_out_channels=tuple(channels), cross_attention_dim=cross_attention_dim,
                                attention_head_dim=heads)       # diffusers' name for their number


def compose(autoencoder: AutoencoderKL, unet: UNet2DConditionModel, hint_channels: Sequence[int], resolution: int,
            prompt: Tensor | None = None, dtype: torch.dtype = torch.float32, zero_fusion: bool = False) -> Diad:
    """A model with a new SG network: encoder and middle of the U-Net copied, the rest random, its outputs zero.

    Without a `prompt`, its embedding is random too. The parts are cast to `dtype` one after the other.
    """
    def cast(module):
        return nn.Module.to(module, dtype)      # not diffusers' own `to`, which warns of every cast
    autoencoder, unet = cast(autoencoder), cast(unet)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=tuple(hint_channels))
    guide = cast(SemanticGuide(controlnet, zero_fusion))
    if prompt is None:
        prompt = torch.randn(1, PROMPT_TOKENS, unet.config["cross_attention_dim"])
    return Diad(resolution, autoencoder, unet, guide, prompt.to(dtype)).eval()


def random_diad(size: Size, dtype: torch.dtype = torch.float32) -> Diad:
    """A model with random weights; seed torch's own stream before it."""
    autoencoder = build_autoencoder(size.autoencoder, size.resolution)
    return compose(autoencoder, build_unet(size.channels, size.cross_attention_dim, size.heads), size.hint_channels,
                   size.resolution, dtype=dtype)


def shown_shape(shape: Sequence[int] | None) -> str:
    """A shape in a message: 1x77x768."""
    return "none" if shape is None else "x".join(map(str, shape))
