"""Picture files at their full depth: up to 8 bits per channel as Pillow gives them, deeper ones as numbers.

Pillow keeps the 16 bits of a gray picture. When it decodes a coloured one, it reduces the values to their high byte.
It stretches gray levels of other depths to 16 bits. Neither can be seen afterwards. This module gives for each file:

    PNG of 16 bits          gray, gray + alpha, RGB, RGBA: its values
    TIFF                    gray of 12, 16 and 32 bits, floats, RGB and RGBA of 16 bits: its values; CMYK, premultiplied
                            alpha and separate planes of more than 8 bits: refused
    PGM, PPM                its values; a plain-text PPM of more than 8 bits: refused
    JPEG 2000               gray: its values; colours of more than 8 bits: refused
    FITS of 16 bits         its values, if none is negative or shifted (BZERO), which Pillow ignores
    AVIF, SGI, DDS          more than 8 bits: refused

Pillow reads no other files of more than 8 bits per channel. Transparency is dropped.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

from dbad.data.pictures import orientation_of, picture_file
from dbad.errors import UserError

if TYPE_CHECKING:
    from PIL.TiffImagePlugin import TiffImageFile  # Pillow tries formats in the order of their imports

PLANES, SAMPLE_BITS = 284, 258          # TIFF's tags PlanarConfiguration and BitsPerSample
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}     # by the order of bytes
_ADVICE = "expected PNG, or TIFF with RGB in one plane, which are read at their full depth"


class Deep(NamedTuple):
    """The pixels of a picture of more than 8 bits per channel, as stored in the file.

        values         (H, W) or (H, W, 3), integers or floats
        white          the value of white in this type of file: 1 for floats, the highest number for integers
        orientation    EXIF orientation that is still to be applied, 1 for none; TIFF files are turned already
    """

    values: np.ndarray
    white: float
    orientation: int = 1


Reader = Callable[[ImageFile], tuple[np.ndarray, float]]       # reads a file that is opened and not decoded yet


class _RefusedError(Exception):
    """Error for a file whose values cannot be read; the message names the kind of file."""


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile]:
    try:
        with picture_file(path) as image:
            yield image
    except _RefusedError as error:
        raise UserError(f"{path}: {error}; {_ADVICE}") from None


def read_picture(path: Path) -> Image.Image | Deep:
    """A picture in its own mode if it has at most 8 bits per channel, else its values.

    A failure is a `UserError` that names the file, as in `pictures.open_picture`.
    """
    with _opened(path) as image:
        read = _reader(image)
        if read is not None:
            return Deep(*read(image), orientation_of(image) or 1)
        image.load()
    return deep_values(image) or image


def deep_values(image: Image.Image) -> Deep | None:
    """The values of a decoded picture in one of Pillow's modes of more than 8 bits; None in other modes."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return None
    values = np.asarray(image)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    return Deep(values, 1.0 if image.mode == "F" else 65535.0, orientation_of(image) or 1)


def is_deep(path: Path) -> bool:
    """True if the picture has more than 8 bits per channel; reads its header only."""
    with _opened(path) as image:
        return image.mode == "F" or image.mode.startswith("I") or _reader(image) is not None


def check_unreduced(image: Image.Image, name: object) -> None:
    """Raise `UserError` for a picture opened elsewhere whose values Pillow changes when it decodes the file."""
    source = getattr(image, "filename", None)
    if isinstance(image, ImageFile) and image.tile:         # not decoded yet
        changed = _is_changed(image)
    elif image.format in _READERS and source and Path(source).is_file():
        with picture_file(Path(source)) as header:
            changed = _is_changed(header)
    else:
        return
    if changed:
        raise UserError(f"{name}: a file of more than 8 bits per channel ({image.format}), which Pillow changes when "
                        "it decodes it; expected its path, or its values as a uint16 array")


def _is_changed(image: ImageFile) -> bool:
    try:
        return _reader(image) is not None
    except _RefusedError:
        return True


# ------------------------------------------------------------------------------------------ what Pillow changes

def _reader(image: ImageFile) -> Reader | None:
    """The reader for an opened picture whose values Pillow would change; None if Pillow keeps the values."""
    return _READERS[image.format](image) if image.format in _READERS else None


def _png(image: ImageFile) -> Reader | None:
    return {"RGB;16B": _colours, "RGBA;16B": _colours, "LA;16B": _gray_of_two}.get(_raw_mode(image))


def _tiff(image: ImageFile) -> Reader | None:
    tags = cast("TiffImageFile", image).tag_v2
    if max(tags.get(SAMPLE_BITS, (1,))) <= 8:
        return None
    kind = _raw_mode(image).partition(";")[0]
    if tags.get(PLANES, 1) != 1:
        raise _RefusedError("TIFF of more than 8 bits in separate planes")
    if kind in ("RGB", "RGBA", "RGBX"):
        return _colours
    if _raw_mode(image) == "I;32N":
        return _unsigned
    if kind in ("I", "F"):
        return None
    raise _RefusedError(f"TIFF of 16 bits per channel and mode {image.mode}" + " with premultiplied alpha" * (
        kind == "RGBa"))


def _netpbm(image: ImageFile) -> Reader | None:
    codec, _, _, args = image.tile[0]
    maxval = args[1] if codec in ("ppm", "ppm_plain") and isinstance(args, tuple) else 255
    if maxval <= 255:
        return None
    if image.mode == "I":
        return lambda image: ((_loaded(image) * (maxval / 65535)).round().astype(np.uint16), float(maxval))
    if codec == "ppm_plain":
        raise _RefusedError("plain-text PPM of more than 8 bits")
    return lambda image: (_both_bytes(image, "RGB;16B", "raw"), float(maxval))


def _jpeg2000(image: ImageFile) -> Reader | None:
    data = _contents(image)
    start = data.find(b"\xff\x4f\xff\x51")      # the codestream, which begins with the marker segment SIZ
    if start < 0:
        return None
    channels = int.from_bytes(data[start + 40:start + 42], "big")
    depths = [data[start + 42 + 3 * channel] for channel in range(channels)]        # bits - 1, and the sign above
    bits = max(depth % 128 for depth in depths) + 1
    if bits <= 8 or depths == [15]:
        return None
    if channels > 1 or bits > 16 or max(depths) > 127:
        raise _RefusedError(f"JPEG 2000 of {bits} bits in {channels} channels")
    return lambda image: (_loaded(image) >> (16 - bits), float(2 ** bits - 1))


def _fits(image: ImageFile) -> Reader | None:
    return _unshifted if image.mode == "I;16" else None


def _avif(image: ImageFile) -> Reader | None:
    data = _contents(image)
    place = data.find(b"av1C")
    if place > 0 and data[place + 6] & 0x40:        # high_bitdepth
        raise _RefusedError("AVIF of more than 8 bits")
    return None


def _sgi(image: ImageFile) -> Reader | None:
    if _contents(image)[3] > 1:                 # bytes per value
        raise _RefusedError("SGI file of 16 bits")
    return None


def _dds(image: ImageFile) -> Reader | None:
    if getattr(image, "pixel_format", "").startswith("BC6H"):
        raise _RefusedError("DDS of 16 bits")
    return None


_READERS = {"PNG": _png, "TIFF": _tiff, "PPM": _netpbm, "JPEG2000": _jpeg2000, "FITS": _fits, "AVIF": _avif,
            "SGI": _sgi, "DDS": _dds}


# ------------------------------------------------------------------------------------------ reading what it changes

def _colours(image: ImageFile) -> tuple[np.ndarray, float]:
    return _both_bytes(image, _raw_mode(image)), 65535.0


def _both_bytes(image: ImageFile, raw_mode: str, codec: str | None = None) -> np.ndarray:
    """The values (H, W, 3) uint16, decoded twice: once for the high bytes, once in the other byte order for the low."""
    with Image.open(io.BytesIO(_contents(image))) as again:
        low = _decoded_as(again, raw_mode[:-1] + _OTHER_BYTE[raw_mode[-1]], codec)
    high = _decoded_as(image, raw_mode, codec)
    return high[:, :, :3].astype(np.uint16) << 8 | low[:, :, :3]


def _gray_of_two(image: ImageFile) -> tuple[np.ndarray, float]:
    """The gray values of a picture with gray and alpha of two bytes each, decoded as four channels of one byte."""
    channels = _decoded_as(image, "RGBA").astype(np.uint16)
    return channels[:, :, 0] << 8 | channels[:, :, 1], 65535.0


def _unsigned(image: ImageFile) -> tuple[np.ndarray, float]:
    return _loaded(image).view(np.uint32), 65535.0


def _unshifted(image: ImageFile) -> tuple[np.ndarray, float]:
    values = _loaded(image)
    if values.max() > 0x7fff:       # they are signed
        raise _RefusedError("FITS of 16 bits with negative or shifted values")
    return values, 65535.0


def _loaded(image: ImageFile) -> np.ndarray:
    image.load()
    return np.asarray(image)


def _decoded_as(image: ImageFile, raw_mode: str, codec: str | None = None) -> np.ndarray:
    """The picture decoded with the given raw mode, Pillow's name for an arrangement of bytes, instead of its own."""
    image.tile = [_changed(tile, raw_mode, codec) for tile in image.tile]
    return _loaded(image)


def _changed(tile: tuple, raw_mode: str, codec: str | None) -> Any:
    name, extents, offset, args = tile
    if codec is not None:
        name, args = codec, (raw_mode, 0, 1)
    else:
        args = raw_mode if isinstance(args, str) else (raw_mode, *args[1:])
    new = (name, extents, offset, args)
    return type(tile)(*new) if hasattr(tile, "_fields") else new  # ty: ignore[too-many-positional-arguments]


def _raw_mode(image: ImageFile) -> str:
    args = image.tile[0][3]
    assert args is not None         # all formats of `_READERS` have some
    return args if isinstance(args, str) else args[0]


def _contents(image: ImageFile) -> bytes:
    """The whole file of an opened picture; the picture can still be decoded afterwards."""
    file = image.fp
    assert file is not None         # not decoded yet
    place = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(place)
    return data


