"""How much memory an inspection takes, metrics, pictures and report included: the same for few images and for many.

    python -m benchmarks.memory                                 # 500 and 5000 images of 64 px, in about three minutes
    python -m benchmarks.memory --images 500 5000 --size 128

Draws a test set, half of it defective with masks, and inspects it in a fresh process with a detector that takes the
brightness for the anomaly: what a network takes besides does not depend on the number of images. Prints the peak
resident memory of every process and the difference between the largest and the smallest.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import inference_ddim
from dbad.calibration.thresholds import Calibration
from dbad.data.categories import find_category
from dbad.families.ddim.options import DdimSettings
from dbad.families.detector import Detector
from dbad.inspection.category import inspect_category
from dbad.options.resolve import resolve
from dbad.runtime.device import Machine

LIMIT_MB = 200


class Brightness(Detector):
    """A detector without a network: the anomaly map is the brightness, and the reconstruction the negative."""

    family = "ddim"

    def __init__(self, size: int):
        options = resolve(inference_ddim.Options(item="nut", intensity="full"))
        settings = DdimSettings.of(options)
        super().__init__(settings=settings, machine=Machine(torch.device("cpu"), "fp32", 8),
                         calibration=Calibration({"pixel": 1.0}, 0.5, 0.9, settings=settings.record()))
        object.__setattr__(self, "side", size)

    @property
    def size(self) -> int:
        """See `Detector`."""
        return self.side

    def parts(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """See `Detector.parts`."""
        return {"pixel": (images.mean(1, keepdim=True) + 1) / 2}, -images

    def combine(self, parts: dict[str, Tensor], scales: dict[str, float]) -> tuple[Tensor, Tensor]:
        """See `Detector.combine`."""
        return parts["pixel"], parts["pixel"].amax(dim=(1, 2, 3))


def draw_test(folder: Path, num_images: int, size: int) -> None:
    """A category "nut" with so many test images of noise; every other one has a bright square, its defect."""
    rng = np.random.default_rng(0)
    for name in ("train/good", "test/good", "test/spot", "ground_truth/spot"):
        (folder / "nut" / name).mkdir(parents=True)
    for number in range(num_images):
        image, mask = rng.integers(0, 160, (size, size, 3), dtype=np.uint8), np.zeros((size, size), np.uint8)
        if number % 2:
            top, left = rng.integers(0, size * 3 // 4, 2)
            mask[top:top + size // 4, left:left + size // 4] = 255
            image[mask > 0] += rng.integers(0, 95, dtype=np.uint8)
            Image.fromarray(mask).save(folder / f"nut/ground_truth/spot/{number:05}_mask.png")
        Image.fromarray(image).save(folder / f"nut/test/{'spot' if number % 2 else 'good'}/{number:05}.png")
    Image.fromarray(image).save(folder / "nut/train/good/000.png")


def inspect(folder: Path, size: int) -> tuple[float, float, float, str]:
    """Inspect the drawn test in this process; MB at the peak and before it, seconds, how pixels were measured."""
    options = resolve(inference_ddim.Options(item="nut", dataset_path=folder, num_workers=2))
    detector, category = Brightness(size), find_category(folder, "nut")
    before, begun = peak_mb(), time.monotonic()
    metrics, _ = inspect_category(detector, detector.calibration, category, options, folder / "results")
    return peak_mb(), before, time.monotonic() - begun, metrics["pixel"]["method"]


def peak_mb() -> float:
    """The most memory this process has had, in MB of 10^6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[500, 5000])
    parser.add_argument("--size", type=int, default=64, help="side of the images, in px")
    args = parser.parse_args(argv)
    peaks = []
    for num_images in args.images:
        with tempfile.TemporaryDirectory() as folder:
            draw_test(Path(folder), num_images, args.size)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                peak, before, seconds, method = pool.submit(inspect, Path(folder), args.size).result()
            page = Path(folder, "results", "report.html").stat().st_size / 1e6
        peaks.append(peak)
        print(f"{num_images} images of {args.size} px: {peak:.0f} MB, {before:.0f} MB before them; {seconds:.0f} s; "
              f"pixel metrics {method}; report.html has {page:.1f} MB", flush=True)
    more = max(peaks) - min(peaks)
    print(f"at most {more:.0f} MB more, {'below' if more < LIMIT_MB else 'NOT below'} {LIMIT_MB} MB")


if __name__ == "__main__":
    main()
