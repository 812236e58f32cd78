"""Results that papers state for the categories of a data set, to compare with measured ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NAMES = ("image.auroc", "pixel.auroc", "pixel.aupro_0.3")       # as in metrics.csv; papers call the last one PRO


@dataclass(frozen=True)
class Published:
    """The results of one method on one data set: for every category the metrics of `NAMES`, in percent.

    The caveat is a sentence to show beside the numbers wherever they appear.
    """

    method: str
    source: str
    caveat: str
    rows: Mapping[str, tuple[float, float, float]]


_DDAD_CAVEAT = ("The published settings were picked by hand for each category on its test images, and the published "
                "maps were cropped to the central 224 of 256 px.")

PUBLISHED = {
    "MVTec AD": Published("DDAD", "arXiv:2305.15956", _DDAD_CAVEAT, {
        "carpet": (99.3, 98.7, 93.9),
        "grid": (100.0, 99.4, 97.3),
        "leather": (100.0, 99.4, 97.7),
        "tile": (100.0, 98.2, 93.1),
        "wood": (100.0, 95.0, 82.9),
        "bottle": (100.0, 98.7, 91.8),
        "cable": (99.4, 98.1, 88.9),
        "capsule": (99.4, 95.7, 93.4),
        "hazelnut": (100.0, 98.4, 86.7),
        "metal_nut": (100.0, 99.0, 91.1),
        "pill": (100.0, 99.1, 95.5),
        "screw": (99.0, 99.3, 96.3),
        "toothbrush": (100.0, 98.7, 92.6),
        "transistor": (100.0, 95.3, 90.1),
        "zipper": (100.0, 98.2, 93.2),
    }),
    "VisA": Published("DDAD", "arXiv:2305.15956", _DDAD_CAVEAT, {
        "candle": (99.9, 98.7, 96.6),
        "capsules": (100.0, 99.5, 95.0),
        "cashew": (94.5, 97.4, 80.3),
        "chewinggum": (98.1, 96.5, 85.2),
        "fryum": (99.0, 96.9, 94.2),
        "macaroni1": (99.2, 98.7, 98.5),
        "macaroni2": (99.2, 98.2, 99.3),
        "pcb1": (100.0, 93.4, 93.3),
        "pcb2": (99.7, 97.4, 93.3),
        "pcb3": (97.2, 96.3, 86.6),
        "pcb4": (100.0, 98.5, 95.5),
        "pipe_fryum": (100.0, 99.5, 94.7),
    }),
}
