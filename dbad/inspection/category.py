"""The results of a category's test images: each is measured and drawn while the loop goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dbad.calibration.thresholds import Calibration
from dbad.families.detector import Detector
from dbad.files.names import CURVES, OVERVIEW, PAGE, PANELS, SCORES
from dbad.inspection.again import again_of
from dbad.inspection.calibrated import summary_of
from dbad.inspection.loop import Inspected, Jobs, Timed, batch_of, inspect_samples, origins_of, started
from dbad.inspection.options import InspectionRun
from dbad.inspection.restoration import in_words, read_restoration
from dbad.metrics.measure import Measurement
from dbad.metrics.protocol import Protocol
from dbad.metrics.verdicts import Thresholds
from dbad.options.resolve import run_folder
from dbad.records import Category, Origin, Pictures
from dbad.report import page
from dbad.report.again import Again
from dbad.report.colours import map_scales
from dbad.report.curves import write_curves
from dbad.report.export import MapExport
from dbad.report.gallery import Gallery, Shown, encode
from dbad.report.overview import Overview, small_pictures
from dbad.report.panels import panel_names, write_panel
from dbad.report.results import mask_words, whole_results

Also = Callable[[Path, str, Pictures], None]


def inspect_category(detector: Detector, calibration: Calibration, category: Category, options: InspectionRun,
                     folder: Path, also: Also | None = None) -> tuple[dict[str, Any], list[Path]]:
    """Inspect the test images and write all results; returns the metrics and the files of the panels.

        folder     of the results; what lies there stays until all images have been inspected, see `whole_results`
        also       called for every image with the folder to write to, the name of its panel and its arrays, between
                   batches
    Panels and exported maps are written on the way, all else at the end.
    """
    protocol, root = Protocol(options.eval_resolution, calibration.settings["center_crop"]), category.root.parent
    with ThreadPoolExecutor(max(1, options.num_workers)) as pool:
        images = Timed(inspect_samples(detector, category.test, root, pool, protocol.resolution == "original"))
        begun = started(images)         # a failure at the first image leaves no folder
        with whole_results(folder, options) as hidden:
            results = CategoryResults(hidden, calibration, protocol, origins_of(category.test, root))
            results.again = again_of(options, calibration)
            results.restoration = read_restoration(run_folder(options))
            if options.export_maps == "mvtec":
                results.export = MapExport(hidden, category, calibration.pixel_threshold)
            jobs = Jobs(pool, batch_of(detector), results.keep)
            try:
                for number, image in enumerate(begun):
                    pictures = image.pictures()
                    jobs.add(results.take(image, pictures))
                    if also:
                        also(hidden, results.names[number], pictures)
                jobs.finish()
            finally:
                jobs.settle()       # so that none writes into a folder that is being removed
            summary = summary_of(options, calibration, len(category.test))
            metrics = results.write(summary, images.seconds, detector.counterpart)
    return metrics, [folder / PANELS / name for name in results.names]


class Drawn(NamedTuple):
    """The pictures of an image that are kept: files for the overview and for the report, None where not wanted."""

    number: int
    score: float
    small: dict[str, bytes] | None
    shown: Shown | None


class CategoryResults:
    """The results of test images that come one by one; their arrays are released as soon as they are drawn.

    It keeps a small row for every image, the part of its map that metrics need, and few pictures as files.
    """

    def __init__(self, folder: Path, calibration: Calibration, protocol: Protocol, origins: Sequence[Origin]):
        """`origins` describes all images that will come, in their order."""
        self.folder, self.scales, self.export = folder, map_scales(calibration), None
        self.again: Again | None = None
        self.restoration: dict[str, Any] | None = None
        self.thresholds = Thresholds(calibration.image_threshold, calibration.pixel_threshold)
        self.measurement = Measurement(self.thresholds, protocol)
        self.overview, self.gallery = Overview(origins, self.thresholds), Gallery(len(origins))
        self.names = panel_names(origins)

    def take(self, image: Inspected, pictures: Pictures) -> Callable[[], Drawn]:
        """Measure an image; returns the job that draws it. The job's result goes to `keep`."""
        number, row, decoded = len(self.measurement.rows), image.row, image.decoded
        self.measurement.add(row, pictures.anomaly_map, decoded.mask, decoded.own_mask, decoded.cut)
        wanted = self.overview.offer(number, row), self.gallery.wants(number, row.score)
        return partial(self._draw, number, image, pictures, *wanted)

    def keep(self, drawn: Drawn) -> None:
        """Keep the pictures of an image that are shown at the end."""
        if drawn.small is not None:
            self.overview.put(drawn.number, drawn.small)
        if drawn.shown is not None:
            self.gallery.put(drawn.number, drawn.score, drawn.shown)

    def write(self, summary: Mapping[str, str], seconds: float, counterpart: str) -> dict[str, Any]:
        """Write tables, overview, curves and report; returns the metrics.

            summary        lines about the run for the report
            seconds        time that all images took
            counterpart    name of the reconstructions in figures
        """
        rows = self.measurement.rows
        metrics, curves = self.measurement.result()
        metrics["seconds_per_image"] = seconds / max(1, len(rows))
        if self.restoration:
            metrics["restoration"] = self.restoration
            summary = {**summary, "Restoration": in_words(self.restoration)}
        page.write_scores(self.folder / SCORES, rows)
        page.write_metrics(self.folder, metrics)
        self.overview.write(self.folder / OVERVIEW, counterpart)
        write_curves(self.folder / CURVES, rows, self.thresholds, curves)
        words = mask_words(metrics["masks"])
        summary = {**summary, **({"Masks": "; ".join(words)} if words else {})}
        page.write_report(self.folder / PAGE, rows, self.gallery, metrics, summary, self.thresholds, curves, self.again)
        return metrics

    def _draw(self, number: int, image: Inspected, pictures: Pictures, for_overview: bool, for_report: bool) -> Drawn:
        write_panel(self.folder / PANELS / self.names[number], image.row, pictures, self.thresholds, self.scales)
        if self.export:
            self.export.write(number, pictures.anomaly_map, image.decoded.size)
        scale = self.scales["anomaly map"]
        return Drawn(number, image.row.score, small_pictures(pictures, scale) if for_overview else None,
                     encode(pictures, scale, self.gallery.side, self.gallery.image_bytes, image.decoded.original,
                            image.decoded.size) if for_report else None)
