"""How fast the methods train, search and inspect on one device, with random images and random weights.

    python -m benchmarks.throughput --device cuda

Prints a table; one figure is the median of several repeats, after one that is not counted. Images per second count
the network's work on batches in memory: neither files nor pictures are in it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dbad.diffusion.batches import denoising_loss
from dbad.diffusion.ddim import schedule
from dbad.families.ddim.detector import DdimDetector
from dbad.families.ddim.options import DdimSettings, DiffusionOptions
from dbad.families.ddim.reconstruct import Denoiser
from dbad.families.ddim.search import DdimSearch
from dbad.families.diad.detector import DiadDetector
from dbad.families.diad.latents import latent_loss
from dbad.families.diad.model import SIZES, random_diad
from dbad.families.diad.options import DiadSettings
from dbad.families.lafite import model as lafite
from dbad.families.lafite.bank import Bank, coreset
from dbad.families.lafite.detector import FeatureDetector, FeatureSpace
from dbad.families.lafite.options import PARTS, FeatureOptions, FeatureSettings
from dbad.families.search import pseudo_validation
from dbad.fields import default_of, fields_of
from dbad.networks.extractors import EMBEDDED, build_extractor
from dbad.networks.features import PatchExtractor, Standardisation
from dbad.networks.packing import ready
from dbad.networks.unet import build_unet
from dbad.runtime.device import Machine, attend, memory_format, pick_device, pick_precision

REPEATS = 5


@dataclass(frozen=True)
class Rate:
    """One figure; `error` says why there is none."""

    what: str
    value: float | None
    unit: str
    error: str = ""


@dataclass(frozen=True)
class Setup:
    """Where and how large: everything as the presets have it, or as small as it gets."""

    device: torch.device
    tiny: bool

    @property
    def precision(self) -> str:
        return pick_precision("auto", self.device)

    def preset(self, name: str) -> dict:
        small = {"resolution": 16, "channels": (32, 32), "layers_per_block": 1, "attention_levels": (),
                 "feature_channels": (32,), "grid": 4, "feature_resolution": 32, "components": 8}
        declared = fields_of(DiffusionOptions, DdimSettings, FeatureOptions, FeatureSettings, DiadSettings)
        return {option: default_of(field, name) for option, field in declared.items()} | (small if self.tiny else {})

    def settings(self, cls: type, name: str, **changes: object) -> Any:
        """The settings of a family as a preset has them, but for the `changes`."""
        return cls(**{option: self.preset(name)[option] for option in fields_of(cls)} | changes)

    def machine(self, batch_size: int) -> Machine:
        """Where a detector computes, with so many images at once."""
        return Machine(self.device, self.precision, self.count(batch_size))

    def count(self, number: int) -> int:
        """So many images, or two."""
        return min(number, 2) if self.tiny else number


def seconds(setup: Setup, work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median time of a call."""
    times = []
    for _ in range(1 + (1 if setup.tiny else repeats)):
        begun = time.perf_counter()
        work()
        if setup.device.type == "cuda":
            torch.cuda.synchronize(setup.device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


@contextmanager
def numerics(tf32: bool = False, deterministic: bool = True) -> Iterator[None]:
    """CUDA's ways to compute in float32, and whether it has to give the same twice; as it was, afterwards."""
    backends, before = torch.backends, (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
                                        torch.backends.cudnn.deterministic,
                                        torch.are_deterministic_algorithms_enabled())

    def use(matmul: bool, cudnn: bool, same: bool, algorithms: bool) -> None:
        backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = matmul, cudnn
        backends.cudnn.deterministic = same
        torch.use_deterministic_algorithms(algorithms, warn_only=True)
        attend(fused=not algorithms)
    use(tf32, tf32, deterministic, deterministic)
    try:
        yield
    finally:
        use(*before)


def training_step(setup: Setup, net: nn.Module, loss_of: Callable[[], Tensor], batch_size: int) -> float:
    """Images per second of a step of AdamW."""
    optimizer = torch.optim.AdamW(net.parameters(), 1e-5)

    def step() -> None:
        loss_of().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return batch_size / seconds(setup, step)


# ------------------------------------------------------------------------------------------ what is measured

def unet_of(setup: Setup, preset: dict) -> nn.Module:
    unet = build_unet(preset["resolution"], preset["channels"], preset["layers_per_block"], preset["attention_levels"])
    return unet.to(setup.device, memory_format=memory_format(setup.device))


def ddim_training(setup: Setup, batch_size: int, precision: str, tf32: bool = False,
                  deterministic: bool = True) -> float:
    preset, batch_size = setup.preset("base"), setup.count(batch_size)
    unet, abar = unet_of(setup, preset).train(), schedule(1000, "linear")
    shape = (batch_size, 3, preset["resolution"], preset["resolution"])
    batch = {"image": torch.rand(shape, device=setup.device) * 2 - 1, "noise": torch.randn(shape, device=setup.device),
             "timestep": torch.arange(batch_size, device=setup.device)}
    with numerics(tf32, deterministic):
        return training_step(setup, unet, lambda: denoising_loss(unet, batch, abar, precision), batch_size)


def ddim_detector(setup: Setup) -> DdimDetector:
    preset = setup.preset("base")
    settings = setup.settings(DdimSettings, "base", conditioning="ddad", eta=0.0, steps_to_regenerate=2)
    return DdimDetector(settings=settings, machine=setup.machine(8),
                        denoiser=Denoiser(unet_of(setup, preset), schedule(1000, "linear")),
                        extractor=build_extractor(EMBEDDED, None, preset["feature_resolution"]))


def ddim_inspection(setup: Setup) -> float:
    detector = ddim_detector(setup)
    images = torch.rand(setup.count(16), 3, detector.size, detector.size) * 2 - 1
    return len(images) / seconds(setup, lambda: detector.parts(images), 3)


def ddim_search(setup: Setup) -> Iterator[tuple[str, float]]:
    """Seconds of the first reconstruction of a search with all maps that are made of it, and of the next one."""
    detector, count = ddim_detector(setup), setup.count(20)
    good = torch.rand(2 * count, 3, detector.size, detector.size) * 2 - 1
    images = pseudo_validation(good[:count], [str(number) for number in range(count)], good[count:], 0)
    search = DdimSearch(detector, images)
    other = replace(detector.settings, recon_weight=4.0, start_at_timestep=150)
    with torch.no_grad(), tqdm(disable=True) as search.bar:
        for name, settings in (("first", detector.settings), ("next", other)):
            begun = time.perf_counter()
            search._reconstruct(settings)
            yield name, time.perf_counter() - begun


def feature_net(setup: Setup, preset: dict) -> nn.Module:
    return build_unet(preset["grid"], preset["feature_channels"], 1, (), preset["components"] + 1).to(setup.device)


def lafite_training(setup: Setup) -> float:
    """Steps of batch 8 per second."""
    preset, batch_size = setup.preset("small"), setup.count(8)
    net, abar = feature_net(setup, preset).train(), lafite.feature_schedule()
    data = lafite.FeatureImages({"a": torch.randn(16, preset["components"], preset["grid"], preset["grid"]).half()}, 0,
                                "train", batch_size)
    batch = data.__getitems__([(0, slot, slot) for slot in range(batch_size)])
    batch = {name: value.to(setup.device) for name, value in batch.items()}
    return training_step(setup, net, lambda: lafite.feature_loss(net, batch, abar, "x0", setup.precision)["loss"],
                         batch_size) / batch_size


def feature_inspection(setup: Setup, diffused: bool) -> float:
    preset, machine = setup.preset("small"), setup.machine(32)
    patches = PatchExtractor(build_extractor(EMBEDDED, (0, 1, 2, 3), preset["feature_resolution"]), preset["grid"])
    channels = patches.channels
    components = lafite.Components(torch.eye(channels)[:, :preset["components"]].contiguous(), 1.0, 1.0)
    space = FeatureSpace(patches, Standardisation(torch.zeros(channels), torch.ones(channels)), 20.0,
                         components if diffused else None, "x0", ("a",))
    vectors = torch.randn(200 if setup.tiny else 20_000, channels).half()
    weights = {f"{part}_contrib": float(part == ("denoise" if diffused else "knn")) for part in PARTS}
    settings = setup.settings(FeatureSettings, "small", context_power=0.5 if diffused else 0.0, **weights)
    detector = FeatureDetector(settings=settings, machine=machine, space=space,
                               bank=Bank(vectors, {"a": len(vectors)}, {}),
                               net=feature_net(setup, preset) if diffused else None)
    images = torch.rand(2 * machine.batch_size, 3, detector.size, detector.size) * 2 - 1
    return len(images) / seconds(setup, lambda: detector.parts(images), 3)


def core_set(setup: Setup) -> float:
    """Vectors per second, of a hundred times as many."""
    count = 20 if setup.tiny else 10_000
    points = torch.randn(count * 10, 8 if setup.tiny else 184, device=setup.device).half()
    return count / seconds(setup, lambda: coreset(points, count, 0, progress=None), 1)


def diad_training(setup: Setup) -> float:
    size = SIZES["tiny" if setup.tiny else "middle"]
    batch_size, side = setup.count(8), size.resolution
    model = random_diad(size).to(setup.device, memory_format=memory_format(setup.device)).train()
    model.set_trainable(whole_unet=True)
    latents = torch.randn(2, batch_size, 4, side // 8, side // 8, device=setup.device)
    batch = {"image": torch.rand(batch_size, 3, side, side, device=setup.device), "latent": latents[0],
             "noise": latents[1], "timestep": torch.arange(batch_size, device=setup.device)}
    return training_step(setup, model, lambda: latent_loss(model, batch, model.abar, setup.precision), batch_size)


def diad_inspection(setup: Setup) -> float:
    size = SIZES["tiny" if setup.tiny else "middle"]
    settings = setup.settings(DiadSettings, "small", latent_start=1000, latent_steps_back=2 if setup.tiny else 10)
    machine = setup.machine(8)
    detector = DiadDetector(settings=settings, machine=machine,
                            model=ready(random_diad(size), machine.device, machine.precision),
                            extractor=build_extractor(EMBEDDED, None, settings.feature_resolution))
    images = torch.rand(setup.count(16), 3, size.resolution, size.resolution) * 2 - 1
    return len(images) / seconds(setup, lambda: detector.parts(images), 3)


def measure(device: torch.device, tiny: bool = False, limit_s: float = 300) -> list[Rate]:
    """All figures, as far as they can be had before `limit_s` are over."""
    setup, deadline = Setup(pick_device(str(device)), tiny), time.monotonic() + limit_s
    own = setup.precision
    wanted: list[tuple[str, str, Callable[[], object]]] = [
        ("ddim base, training, fp32, batch 8", "images/s", partial(ddim_training, setup, 8, "fp32")),
        ("ddim base, training, tf32, batch 8", "images/s", partial(ddim_training, setup, 8, "fp32", tf32=True)),
        (f"ddim base, training, {own}, batch 8", "images/s", partial(ddim_training, setup, 8, own)),
        (f"ddim base, training, {own}, batch 8, not deterministic", "images/s",
         partial(ddim_training, setup, 8, own, deterministic=False)),
        (f"ddim base, training, {own}, batch 32", "images/s", partial(ddim_training, setup, 32, own)),
        ("ddim base, inspection, 2 steps, batch 8", "images/s", partial(ddim_inspection, setup)),
        ("lafite small, training, batch 8", "steps/s", partial(lafite_training, setup)),
        ("lafite small, inspection, batch 32", "images/s", partial(feature_inspection, setup, True)),
        ("knn, 20 000 vectors, inspection, batch 32", "images/s", partial(feature_inspection, setup, False)),
        ("core-set, 10 000 of 100 000 patches", "vectors/s", partial(core_set, setup)),
        ("diad middle, training, batch 8", "images/s", partial(diad_training, setup)),
        ("diad middle, inspection, 10 steps, batch 8", "images/s", partial(diad_inspection, setup)),
        ("ddim base, search, {} reconstruction with its maps", "s", partial(ddim_search, setup)),
    ]
    rates: list[Rate] = []
    for what, unit, work in wanted:
        if time.monotonic() > deadline:
            rates.append(Rate(what, None, unit, "no time was left"))
            continue
        try:
            found = work()
            named = [(what, found)] if isinstance(found, float) else [(what.format(name), s) for name, s in found]
            rates += [Rate(name, value, unit) for name, value in named]
        except Exception as error:      # one figure less; the others are to be had
            rates.append(Rate(what, None, unit, f"{type(error).__name__}: {error}"[:200]))
        print(table(rates[-1:]).splitlines()[-1], flush=True)
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()
    return rates


def machine(device: str) -> dict[str, str]:
    """What it was measured on."""
    if device.startswith("cuda"):
        return {"device": torch.cuda.get_device_name(torch.device(device)), "cuda": str(torch.version.cuda)}
    return {"device": device, "threads": str(torch.get_num_threads())}


def table(rates: Sequence[Rate]) -> str:
    """Markdown."""
    return "\n".join(["| what | | |", "|---|---|---|"] + [
        f"| {rate.what} | {'-' if rate.value is None else format(rate.value, '.4g')} | {rate.error or rate.unit} |"
        for rate in rates])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (auto)")
    parser.add_argument("--tiny", action="store_true", help="as small as it gets, to try whether all of it runs")
    parser.add_argument("--minutes", type=float, default=5.0, help="begin no further figure after so many minutes (5)")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    print(", ".join(f"{name} {value}" for name, value in machine(str(device)).items()))
    print("\n" + table(measure(device, args.tiny, 60 * args.minutes)))


if __name__ == "__main__":
    main()
