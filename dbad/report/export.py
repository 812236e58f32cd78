"""Anomaly maps as files for the programs of MVTec, which measure all methods alike.

    evaluation program of MVTec AD       anomaly_maps/bolt/test/crack/000.tiff
    evaluation server of MVTec AD 2      anomaly_images/can/test_public/bad/000_regular.tiff
                                         anomaly_images_thresholded/can/test_public/bad/000_regular.png

The first reads 32-bit floats; the second 16-bit ones and, as PNG, 255 where a pixel is called anomalous and 0 where it
is not. All have the size of their image.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from dbad.files.atomic import atomic_write
from dbad.files.names import ANOMALY_IMAGES, ANOMALY_MAPS, THRESHOLDED_IMAGES
from dbad.metrics.protocol import resized_map
from dbad.records import Category

SAMPLE_FORMAT, IEEE_FLOAT = 339, 3      # the TIFF tag, and its value for floating-point numbers


class MapExport:
    """Writer of the maps of a category's test images, one channel each, below the folder of the results.

    Maps of MVTec AD 2 have the format of its server, those of any other data set that of MVTec AD's program.
    """

    def __init__(self, folder: Path, category: Category, pixel_threshold: float):
        self.folder, self.pixel_threshold = folder, pixel_threshold
        self.for_server = category.layout == "mvtec_ad_2"
        self.places = _places(category)

    def write(self, number: int, anomaly_map: np.ndarray, size: tuple[int, int]) -> None:
        """Write the map (h, w) of the test image of this `number`, whose `size` is (H, W)."""
        values, place = resized_map(anomaly_map, size), self.places[number]
        if not self.for_server:
            with atomic_write(self.folder / ANOMALY_MAPS / place.with_name(f"{place.name}.tiff")) as temporary:
                Image.fromarray(values).save(temporary, "TIFF")
            return
        with atomic_write(self.folder / ANOMALY_IMAGES / place.with_name(f"{place.name}.tiff")) as temporary:
            half = values.clip(max=np.finfo(np.float16).max).astype(np.float16)
            Image.fromarray(half.view(np.uint16)).save(temporary, "TIFF", tiffinfo={SAMPLE_FORMAT: IEEE_FLOAT})
        with atomic_write(self.folder / THRESHOLDED_IMAGES / place.with_name(f"{place.name}.png")) as temporary:
            Image.fromarray(((values >= self.pixel_threshold) * 255).astype(np.uint8)).save(temporary, "PNG")


def _places(category: Category) -> list[Path]:
    """The path of every test image's map, without suffix: CATEGORY/test/DEFECT/000; no path occurs twice.

    Sub-folders of a defect are kept. The image's suffix is kept if 000.png lies beside 000.jpg.
    """
    test = "test_public" if category.layout == "mvtec_ad_2" else "test"
    folders: dict[str, list[str]] = {}
    for sample in category.test:
        folders.setdefault(sample.defect, []).append(str(sample.path.parent))
    bases = {defect: os.path.commonpath(paths) for defect, paths in folders.items()}
    places: dict[Path, None] = {}       # in order
    for sample in category.test:
        below = sample.path.relative_to(bases[sample.defect])
        stem = Path(category.name, test, sample.defect, below.parent, below.stem)
        places[stem.with_name(below.name) if stem in places else stem] = None
    return list(places)
