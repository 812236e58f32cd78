"""What an evaluation costs beside the networks: metrics, tables, pictures and the report of drawn inspections.

    python -m benchmarks.evaluation         # 160 images of 256x256 px, 120 of them defective

Prints the seconds of every part, medians of several runs.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

import inference_ddim
from benchmarks.metrics import draw_maps
from dbad.calibration.thresholds import Calibration
from dbad.data.demo import draw
from dbad.metrics.measure import Measurement
from dbad.metrics.protocol import Protocol
from dbad.metrics.verdicts import Curves, Thresholds
from dbad.options.resolve import resolve
from dbad.records import Pictures, ScoreRow
from dbad.report import page
from dbad.report.colours import map_scales
from dbad.report.curves import write_curves
from dbad.report.gallery import Gallery, encode
from dbad.report.overview import Overview, small_pictures
from dbad.report.panels import panel_names, write_panel


class Drawn(NamedTuple):
    """An inspected image that is drawn: its row and its arrays."""

    row: ScoreRow
    pictures: Pictures


def draw_inspected(num_images: int, num_defective: int, size: int) -> list[Drawn]:
    """Drawn hazelnuts, with smooth noise for maps."""
    masks, maps = draw_maps(num_images, num_defective, size)
    maps -= maps.min()
    pictures = [draw.draw("hazelnut", "good", index, size=size)[0] for index in range(10)]
    found = []
    for index, (mask, values) in enumerate(zip(masks, maps, strict=True)):
        defect = "crack" if mask.any() else "good"
        row = ScoreRow(f"hazelnut/test/{defect}/{index:03}.png", "hazelnut", defect, int(mask.any()),
                       float(values.max()), 0.5, 0.5, 0)
        image = np.roll(pictures[index % 10], 7 * index, axis=1)
        found.append(Drawn(row, Pictures(image, 255 - image, values, {"pixel": values, "feature": values[::-1]}, mask)))
    return found


class Parts:
    """What is done with the images beside the networks, part by part; files go into `folder`."""

    def __init__(self, found: Sequence[Drawn], folder: Path, num_workers: int):
        self.found, self.folder, self.num_workers = found, folder, num_workers
        self.rows, self.thresholds = [row for row, _ in found], Thresholds(0.5, 0.5)
        self.scales = map_scales(Calibration({"pixel": 1.0, "feature": 1.0}, 0.5, 0.5))
        _, self.curves = self.measure()

    def measure(self) -> tuple[dict, Curves]:
        """Metrics and curves."""
        measurement = Measurement(self.thresholds, Protocol())
        for row, pictures in self.found:
            measurement.add(row, pictures.anomaly_map, pictures.mask)
        return measurement.result()

    def panels(self) -> None:
        """A panel of every image, in threads as in an inspection."""
        with ThreadPoolExecutor(max(1, self.num_workers)) as pool:
            for name, (row, pictures) in zip(panel_names(self.rows), self.found, strict=True):
                pool.submit(write_panel, self.folder / "images" / name, row, pictures, self.thresholds, self.scales)

    def overview(self) -> None:
        """The overview, with the small pictures of its candidates."""
        overview = Overview(self.rows, self.thresholds)
        for number, (row, pictures) in enumerate(self.found):
            if overview.offer(number, row):
                overview.put(number, small_pictures(pictures, self.scales["anomaly map"]))
        overview.write(self.folder / "overview.png")

    def report(self) -> None:
        """The report, with the pictures of its images."""
        gallery = Gallery(len(self.rows))
        for number, (row, pictures) in enumerate(self.found):
            gallery.put(number, row.score, encode(pictures, self.scales["anomaly map"], gallery.side))
        page.write_report(self.folder / "report.html", self.rows, gallery, {}, {}, self.thresholds, self.curves)


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
    found = draw_inspected(args.images, args.images * 3 // 4, args.size)
    with tempfile.TemporaryDirectory() as name:
        folder, num_workers = Path(name), resolve(inference_ddim.Options(item="hazelnut")).num_workers
        work = Parts(found, folder, num_workers)
        parts = {
            "metrics and curves": work.measure,
            "scores.csv": lambda: page.write_scores(folder / "scores.csv", work.rows),
            "panels": work.panels,
            "overview.png": work.overview,
            "curves.png": lambda: write_curves(folder / "curves.png", work.rows, work.thresholds, work.curves),
            "report.html": work.report,
        }
        for part, function in parts.items():
            print(f"{part:<20}{seconds(function, args.repeats):>8.2f} s", flush=True)
        print(f"report.html has {(folder / 'report.html').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
