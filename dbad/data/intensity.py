"""Conversion of pictures of more than 8 bits per channel to 8-bit RGB: the values that become black and white."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, ImageOps

from dbad.data.full_depth import Deep, check_unreduced, deep_values, read_picture
from dbad.data.pictures import ORIENTATION, open_picture
from dbad.errors import UserError

Depth = Literal[8, 10, 12, 14, 16]  # bits per channel that cameras have
DEPTHS = get_args(Depth)
INTENSITY = ("values that become black and white, for images of more than 8 bits per channel: auto (0 and the largest "
             "number of the training images' bit depth), full (0 and 65535), or window:LOW,HIGH")       # help text
_WINDOW = "--intensity window:LOW,HIGH"


@dataclass(frozen=True)
class Intensity:
    """The conversion of pictures of more than 8 bits to 8 bits; it never changes pictures of 8 bits.

        option    auto               integers from 0 to 2^bits - 1, floats from 0 to 1
                  full               the range of the file's type: integers from 0 to 65535, floats from 0 to 1
                  window:LOW,HIGH    LOW becomes 0, HIGH 255; values beyond are clipped
        bits      with auto, bit depth of the data set that a model was trained on (`data.depth`), None until it is
                  known: integers of more than 8 bits are then refused. With full, 8 stands for runs older than this
                  option: their pictures are read as they were then, coloured ones by their high bytes.
    """

    option: str = "auto"
    bits: int | None = None

    def __post_init__(self):
        if self.option not in ("auto", "full") and self.window is None:
            raise UserError(f"--intensity {self.option}: expected auto, full or window:LOW,HIGH, such as window:0,4095")
        if self.bits not in (None, *DEPTHS):
            raise UserError(f"a bit depth of {self.bits!r}: expected one of {', '.join(map(str, DEPTHS))}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Intensity:
        """The intensity in the options of a training or the settings of a calibration; auto if they have none."""
        return cls(values.get("intensity") or "auto", values.get("intensity_bits"))

    def settings(self) -> dict[str, Any]:
        """The values that `of` reads, as plain values: part of the `settings` of a calibration."""
        return {"intensity": self.option, "intensity_bits": self.bits}

    def binding(self) -> dict[str, Any]:
        """The setting that a continued training must share; empty for a training older than the option."""
        return {} if self == AS_BEFORE else {"intensity": self.option}

    @property
    def is_known(self) -> bool:
        """True if it can convert every picture to 8 bits; only auto needs to see the training images first."""
        return self.option != "auto" or self.bits is not None

    @property
    def window(self) -> tuple[float, float] | None:
        """LOW and HIGH; None if the option is no window, or not a valid one."""
        kind, _, numbers = str(self.option).partition(":")
        try:
            low, high = (float(number) for number in numbers.split(","))
        except ValueError:
            return None
        return (low, high) if kind == "window" and -math.inf < low < high < math.inf else None

    def read(self, path: Path) -> Image.Image:
        """Read a picture file of any size and mode as 8-bit RGB, turned upright; errors name the file."""
        return _as_before(open_picture(path), path) if self == AS_BEFORE else self._to_rgb(read_picture(path), path)

    def to_rgb(self, picture: Image.Image | Deep, name: object) -> Image.Image:
        """A picture that the caller has read, converted as by `read`; errors call it `name`."""
        if isinstance(picture, Image.Image):
            if self == AS_BEFORE:
                return _as_before(picture, name)
            check_unreduced(picture, name)
            picture = deep_values(picture) or picture
        return self._to_rgb(picture, name)

    def _to_rgb(self, picture: Image.Image | Deep, name: object) -> Image.Image:
        """8-bit RGB from a picture of 8 bits, or from the values of a deeper one."""
        if isinstance(picture, Image.Image):
            picture = ImageOps.exif_transpose(picture)      # frees the picture before at once
            return picture.convert("RGB")
        image = Image.fromarray(self._levels(picture, name)).convert("RGB")
        image.getexif()[ORIENTATION] = picture.orientation
        return ImageOps.exif_transpose(image)

    def _levels(self, deep: Deep, name: object) -> np.ndarray:
        """The pixels as 256 levels, uint8; a picture that the option does not cover is a `UserError`."""
        if self.window:
            check_finite(deep, name)
            return _scaled(deep.values, *self.window)
        if deep.values.dtype.kind == "f" or self.option == "full":
            check_floats(deep, name)
            return _scaled(deep.values, 0, deep.white)
        largest = largest_integer(deep, name)
        if self.bits is None:
            raise UserError(f"{name}: more than 8 bits per channel, and no training images to find the bit depth; "
                            f"expected --intensity full or {_WINDOW}")
        if largest >= 2 ** self.bits:
            raise UserError(f"{name}: largest value {largest}, but the run is trained on images of {self.bits} bits, 0 "
                            f"to {2 ** self.bits - 1} (--intensity auto); expected such images, or a training with "
                            f"{_WINDOW}")
        return _scaled(deep.values, 0, 2 ** self.bits - 1)


UNKNOWN = Intensity()
AS_BEFORE = Intensity("full", 8)


def with_intensity(trained: dict[str, Any]) -> dict[str, Any]:
    """The options of a training, completed for a training older than --intensity; published weights have none."""
    return trained if "imported_from" in trained else AS_BEFORE.settings() | trained


def largest_integer(deep: Deep, name: object) -> int:
    """The largest value of a picture of integers; a value below 0, which auto does not expect, is a `UserError`."""
    least, most = int(deep.values.min()), int(deep.values.max())
    if least < 0:
        raise UserError(f"{name}: pixels from {least} to {most}; expected none below 0, or {_WINDOW}")
    return most


def check_finite(deep: Deep, name: object) -> None:
    """Raise `UserError` for pixels that are not a number, or infinite."""
    if not np.isfinite(deep.values).all():
        raise UserError(f"{name}: pixels that are infinite or not a number (NaN); expected finite ones")


def check_floats(deep: Deep, name: object) -> None:
    """Raise `UserError` for floating-point pixels outside 0 to 1."""
    check_finite(deep, name)
    least, most = deep.values.min(), deep.values.max()
    if deep.values.dtype.kind == "f" and not (least >= 0 and most <= 1):
        raise UserError(f"{name}: floating-point pixels from {least:g} to {most:g}; expected 0 to 1, or {_WINDOW}")


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values of any shape -> uint8: `low` becomes 0, `high` 255, values beyond are clipped."""
    if values.dtype == np.uint16:       # a table saves memory
        return _scaled(np.arange(2 ** 16, dtype=np.float64), low, high)[values]
    return ((values.astype(np.float64) - low) * (255 / (high - low))).round().clip(0, 255).astype(np.uint8)


def _as_before(image: Image.Image, name: object) -> Image.Image:
    """The picture as runs older than --intensity read it: the full range of the values that Pillow decodes."""
    image = ImageOps.exif_transpose(image)
    deep = deep_values(image)
    if deep is not None:
        check_floats(deep, name)
        image = Image.fromarray(_scaled(deep.values, 0, deep.white))
    return image.convert("RGB")
