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

    heading: ClassVar[str] = "The run"

    seed: int = opt("every random number of the run follows from it", later=0, least=0, most=SEEDS - 1)


@dataclass(frozen=True, kw_only=True)
class IntensityOptions:
    """The gray levels of the images."""

    heading: ClassVar[str] = "The data"

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

    heading: ClassVar[str] = "The run"

    patching: bool = opt("cut images into tiles of the network's size instead of resizing them", later=False,
                         aliases=["--patch_imgs", "--crop"])
    diffusion_checkpoint_name: str = opt(
        "file name of the trained U-Net in the run folder; .safetensors is written as such", "final.pt",
        aliases=["--checkpoint_name"])


@dataclass(frozen=True, kw_only=True)
class CropOptions:
    """The part of an image that is inspected."""

    heading: ClassVar[str] = "From maps to the score of an image"

    center_crop: int = opt(
        "inspect and measure only the central square of so many px of a 256 px image (224: the papers' protocol); 0 "
        "for the full frame", later=0, least=0,
        check=lambda px: "expected at most 256, the side of the whole image" if px > 256 else None)


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(CropOptions):
    """From maps to the score of an image."""

    blur_sigma: float = opt("Gaussian blur of the maps, in px of a 256 px image; scales with the image", later=4.0,
                            least=0, most=256)
    top_share: float = opt("image score: mean of this share of the map's highest pixels; 0 for the maximum", later=0.0,
                           least=0, check=share)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The data set."""

    heading: ClassVar[str] = "The data"

    dataset_path: Path | None = opt(
        "folder of the data set (layouts: see --layout); without it the built-in demo data is drawn", None, first=2)
    layout: Literal["auto", "mvtec", "mvtec_ad_2", "visa", "mtd", "btad", "ksdd2", "folder", "manifest"] = opt(
        "how the data lie on disk; auto recognises it: python -m dbad.data PATH shows what is found", "auto")
    holdout: float = opt("share of train/good kept out of training, for validation and calibration; a data set with "
                         "validation/good has its own", later=0.1, between=(0, 1))


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """The machine."""

    heading: ClassVar[str] = "The machine"

    device: str = opt("auto, cpu, cuda, cuda:1 or mps", "auto", first=5)
    precision: Literal["auto", "fp32", "bf16"] = opt(
        "number format inside the networks; auto is bf16 where the processor has it", "auto")
    num_workers: int = opt("threads that read images and draw figures; 0 for none", 2, least=0, most=1024)


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """The run folder."""

    heading: ClassVar[str] = "The run"

    diffusion_checkpoint_dir: Path = opt("folder in which every run has a folder of its own", Path("checkpoints"),
                                         aliases=["--checkpoint_dir"])
    dry_run: bool = opt("print the options and what would be written, then stop", False)


@dataclass(frozen=True, kw_only=True)
class AnyRunOptions(Shared, DataOptions, MachineOptions, FolderOptions):
    """The run, of one category or of several."""

    heading: ClassVar[str] = "The run"

    item: str | tuple[str, ...] = opt("category to work on, such as hazelnut", aliases=["--mvtec_item"], first=1)
    run_id: str | None = opt("name of the run: its folders are called so (the item's name; with -lafite, -knn or "
                             "-diad where the method is another than ddim)", None, aliases=["--run_name"], first=3)
    preset: Literal["demo", "small", "base"] | None = opt(
        "family of defaults: demo (64 px, minutes on a CPU), small (128 px, an hour on a CPU), base (256 px, a GPU); "
        "demo with the demo data; with real data small on a CPU and for lafite and knn, as the model is for diad, else "
        "base", None, first=4)
    batch_size: int = opt("images per batch, over all processes", demo=4, base=8, least=1, most=65536)


@dataclass(frozen=True, kw_only=True)
class RunOptions(AnyRunOptions):
    """The run of one category."""

    heading: ClassVar[str] = "The run"

    item: str = opt("category to work on, such as hazelnut", aliases=["--mvtec_item"], first=1)


@dataclass(frozen=True, kw_only=True)
class SeveralItems:
    """The categories."""

    item: tuple[str, ...] = opt("one category, several, or all", aliases=["--mvtec_item"], first=1)


@dataclass(frozen=True, kw_only=True)
class BackboneOption:
    """The pretrained network that compares images."""

    heading: ClassVar[str] = "The backbone"

    extractor: str = opt("backbone: efficientnet_lite0 (comes with its weights), a torchvision ResNet such as "
                         "wide_resnet101_2 or resnet50, or any timm backbone", EMBEDDED)


@dataclass(frozen=True, kw_only=True)
class BackboneOptions(BackboneOption):
    """Its stages, and the size of the images that it sees."""

    heading: ClassVar[str] = "The backbone"

    extractor_layers: tuple[int, ...] | None = opt(
        "feature stages to compare, the first being 0 (those of strides 4, 8 and 16; with lafite and knn that of "
        "stride 2 too)", None)
    feature_resolution: int = opt("side to which the extractor resizes images, in px", demo=128, base=256, small=256,
                                  least=32, most=4096)


@dataclass(frozen=True, kw_only=True)
class ThresholdOptions:
    """Thresholds from good images."""

    pixel_quantile: float = opt("share of good pixels below the scales of the maps and the pixel threshold", 0.999,
                                between=(0, 1))
    false_alarm_rate: float | None = opt(
        "promised share of good images called defective (0.05, or what the held-out images can promise)", None,
        between=(0, 1))


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """The search for settings on good images."""

    tune: bool | None = opt(
        "choose the settings that are not given by pseudo-anomalies on good images; with --no_tune the preset's are "
        "taken (on; evaluation.py alone: those chosen before)", None)
    tune_minutes: float = opt("stop tuning after so many minutes, with the best settings so far", 30.0, least=0)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The course of a training."""

    resume: bool = opt("go on from the last saved state of this run, if there is one", True)
    log_dir: Path = opt("folder for TensorBoard's events", Path("logs"))


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """Memory of a training."""

    heading: ClassVar[str] = "The course of a training"

    gradient_checkpointing: bool = opt("compute activations twice instead of keeping them: less memory, a third slower",
                                       False)
