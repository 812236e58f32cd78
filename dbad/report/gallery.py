"""The pictures of images in a report, encoded at once, so that no array is kept."""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Iterable
from typing import Any, NamedTuple

from PIL import Image

from dbad.records import Pictures
from dbad.report.colours import heat, tint
from dbad.report.drawing import tile

MOST = 2000             # images of a report: more would make the page too large to use
IMAGE_BYTES = 50_000    # for all pictures of one of 200 images; base64 adds a third, so they stay below 15 MB
MOST_BYTES = 800_000    # for those of one of few images
INPUT_SIDE = 2048       # pixels, the longer side of an input at most
PICTURE_SIDE = 256      # pixels, the longer side at most
FREE = 200              # most images with pictures of that side; if there are more, pictures are smaller


class Shown(NamedTuple):
    """The pictures of one image in a report: encoded files by name, None for a missing one."""

    shape: tuple[int, int]      # of the image in its file, (H, W)
    files: dict[str, bytes | None]
    counterpart: str
    input_side: int             # longer side of the input picture, in pixels

    def uris(self) -> dict[str, str | None]:
        """The files as data URIs."""
        kinds = {"truth": "png", "overlay": "png"}
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
        self.image_bytes = min(MOST_BYTES, FREE * IMAGE_BYTES // count)
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


def encode(pictures: Pictures, scale: float, side: int = PICTURE_SIDE, most_bytes: int = IMAGE_BYTES,
           original: Image.Image | None = None, size: tuple[int, int] | None = None) -> Shown:
    """The pictures of one image, together at most `most_bytes` before base64; `scale` is that of the anomaly map.

    The input is the `original` as large as the bytes allow; `size` is that of its file, (H, W). The other pictures have
    a longer side of at most `side`. Photographs are JPEG; quality, and for the busiest images the size, give way until
    the sum fits. Mask and overlay are PNG; the overlay is transparent where the map is low.
    """
    photographs = {"input": pictures.image, "reconstruction": pictures.reconstruction,
                   "map": heat(pictures.anomaly_map, scale)}
    for quality, shrink in ((82, 1), (72, 1), (60, 1), (45, 1), (40, 0.75), (30, 0.5), (20, 0.25)):
        small = max(16, round(side * shrink))
        files = {name: None if pixels is None else
                 _file(tile(pixels, small, enlarge=False), "JPEG", quality=quality, optimize=True)
                 for name, pixels in photographs.items()}
        files["overlay"] = _file(tint(pictures.anomaly_map, scale, small), "PNG", optimize=True)
        files["truth"] = None if pictures.mask is None else _file(
            tile(pictures.mask, small, enlarge=False).convert("1", dither=Image.Dither.NONE), "PNG", optimize=True)
        if sum(map(len, _there(files.values()))) <= min(most_bytes, IMAGE_BYTES):
            break
    own = original or Image.fromarray(pictures.image)
    others = sum(map(len, _there(file for name, file in files.items() if name != "input")))
    found = _largest(own, small, most_bytes - others)
    input_side = min(small, max(own.size))
    if found:
        files["input"], input_side = found
    return Shown(size or (own.height, own.width), files, pictures.counterpart, input_side)


def _largest(picture: Image.Image, least: int, most_bytes: int) -> tuple[bytes, int] | None:
    """The picture as JPEG as large as the bytes allow, with its longer side; None if that is below `least` pixels."""
    longest = max(picture.size)
    side = min(longest, INPUT_SIDE)
    while side >= min(least, longest):
        size = [max(1, round(length * side / longest)) for length in picture.size]
        shown = picture if side == longest else picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        for quality in (88, 75):
            file = _file(shown, "JPEG", quality=quality, optimize=True)
            if len(file) <= most_bytes:
                return file, side
        side = int(side * max(0.4, min(0.85, (most_bytes / len(file)) ** 0.5)))
    return None


def _there(files: Iterable[bytes | None]) -> list[bytes]:
    return [file for file in files if file is not None]


def _file(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
