"""Build networks from the description in a file, which is checked before any large memory is used.

model_config.json has the arguments of one of diffusers' networks. An edited file can ask for any number of layers, for
more weights than the memory holds, or for layers that do not fit each other. So its values are first compared with the
types that diffusers declares and with bounds that no useful network reaches. Then the network is made on torch's meta
device, without weights, where a trial run finds layers that do not fit.
"""

from __future__ import annotations

import inspect
import json
import math
import typing
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn

from dbad.declared import check_types, shown
from dbad.errors import UserError
from dbad.fields import LEVELS

Network = UNet2DModel | UNet2DConditionModel | AutoencoderKL
N = TypeVar("N", bound=Network)

MOST_PARAMETERS = 3 * 10 ** 9   # Stable Diffusion XL has 2.6
MOST_LAYERS = 256               # levels x layers of each x layers of their attention; Stable Diffusion XL has 60
_BOUNDS = {"sample_size": (1, 8192), "block_out_channels": (1, 16384), "in_channels": (1, 65536),
           "out_channels": (1, 65536), "latent_channels": (1, 4096), "layers_per_block": (1, 64),
           "transformer_layers_per_block": (1, 64), "norm_num_groups": (1, 16384), "attention_heads": (1, 1024),
           "num_train_timesteps": (1, 1_000_000)}
_OTHERS = (0, 65536)            # whole numbers without a bound of their own


def network_of(cls: type[N], config: Mapping[str, Any]) -> N:
    """The network that a configuration describes, with random weights.

    A `UNet2DModel` may have `attention_heads`, the number in every attention layer, which diffusers cannot express.
    """
    heads = config.get("attention_heads") if cls is UNet2DModel else None
    network = cls(**{key: value for key, value in config.items() if key != "attention_heads"})
    if isinstance(network, UNet2DModel) and heads is not None:
        for module in network.modules():
            if isinstance(module, Attention):
                module.heads, module.scale = heads, (module.inner_dim // heads) ** -0.5
        network.register_to_config(attention_heads=heads)       # for `checkpoints.model_config`
    return network


def planned(cls: type[Network], config: Mapping[str, Any], where: object) -> Network:
    """The network that a configuration describes, on the meta device, without memory; it is for inspection only.

    A configuration that describes no network is a `UserError` that begins with `where`.
    """
    try:
        _check_values(cls, config)
        return _tried(cls, json.dumps(config, sort_keys=True, default=list))
    except Exception as error:      # diffusers raises many kinds of errors for wrong values
        article = "an" if cls.__name__[0] in "AEIO" else "a"
        raise UserError(f"{where}: does not describe {article} {cls.__name__} ({first_line(error)})") from None


def first_line(error: Exception) -> str:
    """The first line of a library's error, or the name of its class if it has no text."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def num_parameters(network: nn.Module) -> int:
    """The number of weights of a network."""
    return sum(parameter.numel() for parameter in network.parameters())


@lru_cache(maxsize=8)
def _tried(cls: type[Network], text: str) -> Network:
    """The network of a configuration, given as JSON text, on the meta device, after a trial run there."""
    config = json.loads(text)
    with torch.device("meta"), torch.no_grad():
        network = network_of(cls, config).eval()
        count = num_parameters(network)
        if count > MOST_PARAMETERS:
            raise UserError(f"{count:.3g} parameters; expected at most {MOST_PARAMETERS:.3g}")
        _try(network)
    return network


def _try(network: Network) -> None:
    """Run the network once, as it is used here; an unexpected output is a `ValueError`."""
    config = network.config
    if isinstance(network, AutoencoderKL):
        side = 2 ** (len(config["block_out_channels"]) - 1)
        z = network.encode(torch.zeros(1, config["in_channels"], 4 * side, 4 * side)).latent_dist.mean
        found, expected = network.decode(z).sample.shape, (1, config["out_channels"], 4 * side, 4 * side)
    else:
        side = config["sample_size"] if isinstance(network, UNet2DModel) else 64
        x, prompt = torch.zeros(1, config["in_channels"], side, side), ()
        if isinstance(network, UNet2DConditionModel):
            prompt = (torch.zeros(1, 2, config["cross_attention_dim"]),)
        found, expected = network(x, 0, *prompt).sample.shape, (1, config["out_channels"], side, side)
    if tuple(found) != expected:
        raise ValueError(f"an output of shape {tuple(found)} instead of {expected}")


def _check_values(cls: type[Network], config: Mapping[str, Any]) -> None:
    """Raise `UserError` for names, types and numbers that no network of `cls` has."""
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    types, defaults = _arguments(cls)
    for name in config:
        if name not in types:
            raise UserError(f"{name}: it has no such option")
    given = {name: value for name, value in config.items() if value != defaults.get(name)}
    check_types(given, types, "", ("sample_size",) if cls is UNet2DModel else ())
    for name, value in config.items():
        low, high = _BOUNDS.get(name, _OTHERS)
        if any(not low <= number <= high for number in _whole_numbers(value)):
            raise UserError(f"{name} {shown(value)}: expected {low} to {high}")
        if isinstance(value, (list, tuple)) and len(value) > LEVELS:
            raise UserError(f"{name} {shown(value)}: expected at most {LEVELS} levels")
    most = [max(_whole_numbers(config.get(name)), default=1)
            for name in ("layers_per_block", "transformer_layers_per_block")]
    layers = len(config.get("block_out_channels") or ()) * math.prod(most)
    if layers > MOST_LAYERS:
        raise UserError(f"layers_per_block {shown(config.get('layers_per_block'))}: {layers} layers in all; "
                        f"expected at most {MOST_LAYERS}")


@lru_cache
def _arguments(cls: type[Network]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The types and the defaults of the arguments of a network, by name; with tuples as in JSON."""
    types = typing.get_type_hints(cls.__init__)
    defaults = {name: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
                for name, parameter in inspect.signature(cls.__init__).parameters.items() if name != "self"}
    types = {name: types.get(name, Any) for name in defaults}
    if cls is UNet2DModel:      # here always with a size, and of square images
        types |= {"sample_size": int, "attention_heads": int | None}
        del defaults["sample_size"]
    return types, defaults


def _whole_numbers(value: Any) -> list[int]:
    """The whole numbers in a value, also in nested lists."""
    if isinstance(value, (list, tuple)):
        return [number for entry in value for number in _whole_numbers(entry)]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []
