"""The pictures of images in a report, encoded at once, so that no array is kept."""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Iterable
from typing import Any, NamedTuple

from PIL import Image

from dbad.records import Pictures
from dbad.report.colours import heat, overlay
from dbad.report.drawing import tile

MOST = 2000             # images of a report: more would make the page too large to use
IMAGE_BYTES = 50_000    # for all pictures of one image; base64 adds a third, so 200 images stay below 15 MB
PICTURE_SIDE = 256      # pixels, the longer side at most
FREE = 200              # most images with pictures of that side; if there are more, pictures are smaller


class Shown(NamedTuple):
    """The pictures of one image in a report: encoded files by name, None for a missing one."""

    shape: tuple[int, int]      # of the image, (H, W)
    files: dict[str, bytes | None]
    counterpart: str

    def uris(self) -> dict[str, str | None]:
        """The files as data URIs."""
        kinds = {"truth": "png"}
        return {name: f"data:image/{kinds.get(name, 'jpeg')};base64,{base64.b64encode(file).decode('ascii')}"
                if file else None for name, file in self.files.items()}


class Gallery:
    """The pictures of the highest-scoring images of a stream, at most `most`.

    More than `FREE` images get smaller pictures, so that memory and the page grow slowly.
    """

    def __init__(self, num_images: int, most: int = MOST):
        """`num_images` is the number of images in the stream."""
        self.most, count = most, max(1, min(num_images, most))
        self.side = max(64, round(PICTURE_SIDE * min(1.0, (FREE / count) ** 0.5)))
        self.shown: dict[int, Shown] = {}
        self._lowest: list[tuple[float, int]] = []      # a heap of (score, -number)

    def wants(self, number: int, score: float) -> bool:
        """True if an image of this number and score would be kept, given the images so far."""
        return len(self._lowest) < self.most or (bool(self._lowest) and (score, -number) > self._lowest[0])

    def put(self, number: int, score: float, shown: Shown) -> None:
        """Add the pictures of an image; if there are too many, drop those of the lowest score."""
        self.shown[number] = shown
        heapq.heappush(self._lowest, (score, -number))
        if len(self._lowest) > self.most:
            del self.shown[-heapq.heappop(self._lowest)[1]]


def encode(pictures: Pictures, scale: float, side: int = PICTURE_SIDE) -> Shown:
    """The pictures of one image, together at most `IMAGE_BYTES` before base64; `scale` is that of the anomaly map.

    Photographs are JPEG; their quality, and then their size, is reduced until the sum fits. The mask is PNG.
    """
    photographs = {"input": pictures.image, "reconstruction": pictures.reconstruction,
                   "map": heat(pictures.anomaly_map, scale),
                   "overlay": overlay(pictures.image, pictures.anomaly_map, scale)}
    for quality, shrink in ((82, 1), (72, 1), (60, 1), (45, 1), (40, 0.75), (30, 0.5), (20, 0.25)):
        small = max(16, round(side * shrink))
        files = {name: None if pixels is None else
                 _file(tile(pixels, small, enlarge=False), "JPEG", quality=quality, optimize=True)
                 for name, pixels in photographs.items()}
        files["truth"] = None if pictures.mask is None else _file(
            tile(pictures.mask, small, enlarge=False).convert("1", dither=Image.Dither.NONE), "PNG", optimize=True)
        if sum(map(len, _there(files.values()))) <= IMAGE_BYTES:
            break
    return Shown(pictures.image.shape[:2], files, pictures.counterpart)


def _there(files: Iterable[bytes | None]) -> list[bytes]:
    return [file for file in files if file is not None]


def _file(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
