"""Options of more than one script: the data, the run, the machine; backbone, thresholds, tuning, training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from dbad.data.intensity import INTENSITY, Depth, Intensity
from dbad.fields import LEVELS, SEEDS, Given, opt

EMBEDDED = "efficientnet_lite0"     # the backbone whose weights come with a package


def share(value: float) -> str | None:
    """What is expected of a share of a whole, where it is more than all."""
    return "expected a share, at most 1" if value > 1 else None


def one_for_each_level(value: tuple[int, ...]) -> str | None:
    """What is expected of the channels of a network, where their number is another."""
    return None if 1 <= len(value) <= LEVELS else f"expected 1 to {LEVELS} numbers, one for each level"


def two_betas(value: tuple[float, ...]) -> str | None:
    """What is expected of Adam's decay rates, where they are no two such numbers."""
    usable = len(value) == 2 and all(0 <= beta < 1 for beta in value)
    return None if usable else "expected two numbers from 0 to below 1"


@dataclass(frozen=True, kw_only=True)
class SeedOption:
    """The seed."""

    heading: ClassVar[str] = "Run"

    seed: int = opt("seed of all random numbers", later=0, least=0, most=SEEDS - 1)


@dataclass(frozen=True, kw_only=True)
class IntensityOptions:
    """The gray levels of the images."""

    heading: ClassVar[str] = "Data"

    intensity: str = opt(INTENSITY, later="auto")
    intensity_bits: Depth | None = opt("bit depth of the data set, found with --intensity auto", None, flag=False)

    @staticmethod
    def contradictions(given: Given) -> Iterator[str]:
        """No messages; an intensity that is none raises its own error."""
        if given.intensity is not None:
            Intensity(given.intensity)
        return iter(())


@dataclass(frozen=True, kw_only=True)
class Shared(SeedOption, IntensityOptions):
    """What shapes a prediction in every family."""

    heading: ClassVar[str] = "Run"

    patching: bool = opt("cut images into tiles of the network's size instead of resizing them", later=False,
                         aliases=["--patch_imgs", "--crop"], heading="Data")
    diffusion_checkpoint_name: str = opt(
        "file name of the trained U-Net in the run folder; with .safetensors it is written in that format", "final.pt",
        aliases=["--checkpoint_name"])


@dataclass(frozen=True, kw_only=True)
class CropOptions:
    """The part of an image that is inspected."""

    heading: ClassVar[str] = "Crop, blur and image score"

    center_crop: int = opt(
        "inspect and measure only the central square; its side in px for a 256 px image (the papers use 224); 0 = "
        "whole image", later=0, least=0,
        check=lambda px: "expected at most 256, the side of the whole image" if px > 256 else None)


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(CropOptions):
    """Crop, blur and image score."""

    blur_sigma: float = opt("sigma of the Gaussian blur of the maps, in px for a 256 px image; scaled with the image "
                            "size", later=4.0,
                            least=0, most=256)
    top_share: float = opt("image score = mean over this share of the map's highest pixels; 0 = the maximum", later=0.0,
                           least=0, check=share)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The data set."""

    heading: ClassVar[str] = "Data"

    dataset_path: Path | None = opt(
        "folder of the data set (see --layout); if not given, the built-in demo data is drawn", None, first=3)
    layout: Literal["auto", "mvtec", "mvtec_ad_2", "visa", "mtd", "btad", "ksdd2", "folder", "manifest"] = opt(
        "folder layout of the data set; auto detects it; python -m dbad.data PATH shows what is found", "auto")
    holdout: float = opt("share of train/good held out of training for validation and calibration; not used if the "
                         "data set has validation/good", later=0.1, between=(0, 1))


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """The machine."""

    heading: ClassVar[str] = "Hardware"

    device: str = opt("auto, cpu, cuda, cuda:1 or mps", "auto", first=12)
    precision: Literal["auto", "fp32", "bf16"] = opt(
        "number format in the networks; auto uses bf16 if the processor supports it", "auto")
    num_workers: int = opt("threads that read images and draw figures; 0 = none", 2, least=0, most=1024)


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """The run folder."""

    heading: ClassVar[str] = "Run"

    diffusion_checkpoint_dir: Path = opt("parent folder of the run folders", Path("checkpoints"),
                                         aliases=["--checkpoint_dir"])
    dry_run: bool = opt("print the options, what would be written and how long a training takes, then stop", False,
                        first=10)


@dataclass(frozen=True, kw_only=True)
class AnyRunOptions(Shared, DataOptions, MachineOptions, FolderOptions):
    """The run, of one category or of several."""

    heading: ClassVar[str] = "Run"

    item: str | tuple[str, ...] = opt("category to work on, such as hazelnut", aliases=["--mvtec_item"], first=1)
    run_id: str | None = opt("name of the run and of its folders (default: the item's name, followed by -lafite, -knn "
                             "or -diad for these methods)", None, aliases=["--run_name"], first=6)
    preset: Literal["demo", "small", "base"] | None = opt(
        "set of defaults: demo (64 px, minutes on a CPU), small (128 px, an hour on a CPU), base (256 px, GPU) "
        "(default: demo for the demo data; for real data the model's preset with diad, small on a CPU and with lafite "
        "and knn, else base)", None, first=5)
    batch_size: int = opt("images per batch, over all processes", demo=4, base=8, least=1, most=65536)


@dataclass(frozen=True, kw_only=True)
class RunOptions(AnyRunOptions):
    """The run of one category."""

    heading: ClassVar[str] = "Run"

    item: str = opt("category to work on, such as hazelnut", aliases=["--mvtec_item"], first=1)


@dataclass(frozen=True, kw_only=True)
class SeveralItems:
    """The categories."""

    item: tuple[str, ...] = opt("one category, several, or all", aliases=["--mvtec_item"], first=1)


@dataclass(frozen=True, kw_only=True)
class BackboneOption:
    """The pretrained network that compares images."""

    heading: ClassVar[str] = "Backbone"

    extractor: str = opt("backbone: efficientnet_lite0 (weights included), a torchvision ResNet such as "
                         "wide_resnet101_2 or resnet50, or any timm backbone", EMBEDDED, first=17)


@dataclass(frozen=True, kw_only=True)
class BackboneOptions(BackboneOption):
    """Its stages, and the size of the images that it sees."""

    heading: ClassVar[str] = "Backbone"

    extractor_layers: tuple[int, ...] | None = opt(
        "feature stages to compare, counted from 0 (default: strides 4, 8 and 16; with lafite and knn also stride "
        "2)", None)
    feature_resolution: int = opt("side of the extractor's input images, in px", demo=128, base=256, small=256,
                                  least=32, most=4096)


@dataclass(frozen=True, kw_only=True)
class RateOption:
    """The promised rate of false alarms, from which the image threshold follows."""

    heading: ClassVar[str] = "Thresholds"

    false_alarm_rate: float | None = opt(
        "largest share of good images that may be called defective; it sets the image threshold (default: that of the "
        "calibration, where it is 0.05, or the smallest share that the held-out images can promise if it is larger)",
        None, between=(0, 1), first=9)


@dataclass(frozen=True, kw_only=True)
class ThresholdOptions(RateOption):
    """Calibration of thresholds on good images."""

    heading: ClassVar[str] = "Thresholds"

    pixel_quantile: float = opt("quantile of good pixels that sets the map scales and the pixel threshold", 0.999,
                                between=(0, 1))


@dataclass(frozen=True, kw_only=True)
class RestorationOption:
    """The measure of what reconstructions restore."""

    heading: ClassVar[str] = "Thresholds"

    restoration: bool = opt("also measure how much of a damage reconstructions remove, on held-out good images with "
                            "pseudo-anomalies; takes about twice the time of calibrating", True)


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """Tuning of settings on good images."""

    tune: bool | None = opt(
        "choose all settings that are not given, with pseudo-anomalies on good images; --no_tune takes the preset's "
        "(default: on; evaluation.py alone reuses the settings chosen before)", None, first=8)
    tune_minutes: float = opt("time limit for tuning, in minutes; the best settings so far are taken", 30.0, least=0)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Course of the training."""

    resume: bool = opt("continue from the last saved state of this run, if there is one", True, first=18)
    log_dir: Path = opt("folder for TensorBoard logs: tensorboard --logdir logs", Path("logs"))
    yes: bool = opt("train even if it takes more than a day on a CPU", False)


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """Memory of a training."""

    heading: ClassVar[str] = "Course of the training"

    gradient_checkpointing: bool = opt("recompute activations in the backward pass: less memory, a third slower",
                                       False)
