"""What an evaluation costs beside the networks: metrics, tables, pictures and the report of drawn inspections.

    python -m benchmarks.evaluation         # 160 images of 256x256 px, 120 of them defective

Prints the seconds of every part, medians of several runs.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import inference_ddim
from benchmarks.metrics import draw_maps
from dbad.calibration.thresholds import Calibration
from dbad.data.demo import draw
from dbad.families.ddim import DDIM
from dbad.families.ddim.options import DdimSettings
from dbad.inspection.loop import measure
from dbad.metrics import verdicts
from dbad.metrics.protocol import Protocol
from dbad.metrics.verdicts import Thresholds
from dbad.options.resolve import resolve
from dbad.records import Inspection, Sample
from dbad.report import figures, page
from dbad.report.results import write_results


def draw_inspections(num_images: int, num_defective: int, size: int) -> tuple[list[Inspection], list[Sample]]:
    """Inspections of drawn hazelnuts, with smooth noise for maps."""
    masks, maps = draw_maps(num_images, num_defective, size)
    maps -= maps.min()
    pictures = [draw.draw("hazelnut", "good", index, size=size)[0] for index in range(10)]
    inspections, samples = [], []
    for index, (mask, values) in enumerate(zip(masks, maps, strict=True)):
        defect = "crack" if mask.any() else "good"
        path = Path("hazelnut", "test", defect, f"{index:03}.png")
        samples.append(Sample(path, "hazelnut", defect))
        image, score = np.roll(pictures[index % 10], 7 * index, axis=1), float(values.max())
        inspections.append(Inspection(path.as_posix(), "hazelnut", defect, int(mask.any()), score, 0.5, 0.5, 0, image,
                                      255 - image, values, {"pixel": values, "feature": values[::-1]}, mask))
    return inspections, samples


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median of several runs."""
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        function()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--size", type=int, default=256, help="side of the images, in px")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    inspections, samples = draw_inspections(args.images, args.images * 3 // 4, args.size)
    thresholds, options = Thresholds(0.5, 0.5), resolve(inference_ddim.Options(item="hazelnut"))
    calibration = Calibration({"pixel": 1.0, "feature": 1.0}, 0.5, 0.5, settings=DdimSettings.of(options).record())
    found = verdicts.curves(inspections)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = {
            "metrics and curves": lambda: measure(inspections, calibration, samples, Protocol()),
            "scores.csv": lambda: page.write_scores(folder / "scores.csv", inspections),
            "panels": lambda: figures.write_panels(folder / "images", inspections, thresholds, options.num_workers),
            "overview.png": lambda: figures.write_overview(folder / "overview.png", inspections, thresholds),
            "curves.png": lambda: figures.write_curves(folder / "curves.png", inspections, thresholds, found),
            "report.html": lambda: page.write_report(folder / "report.html", inspections, {}, {}, thresholds, found),
            "all together": lambda: write_results(folder, inspections, samples, calibration, options, 0.0,
                                                  DDIM.about),
        }
        for part, function in parts.items():
            print(f"{part:<20}{seconds(function, args.repeats):>8.2f} s", flush=True)
        print(f"report.html has {(folder / 'report.html').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
