"""Open and decode picture files, or refuse them with the reason in one line.

Pillow treats a picture of more than 179 million pixels as an attack on the memory. The limit here is higher, and the
environment variable `DBAD_MAX_MEGAPIXELS` changes it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from dbad.errors import UserError
from dbad.files.special import special_kind

LIMIT = "DBAD_MAX_MEGAPIXELS"       # environment variable
MAX_MEGAPIXELS = 500.0              # if the variable is not set; 2 GB once decoded to RGB
ORIENTATION = 0x0112                # the EXIF tag


def open_picture(path: Path) -> Image.Image:
    """A picture in its own mode, decoded.

    A file that is no picture, is truncated or has too many pixels is a `UserError` that names it. So is a named pipe,
    a socket or a device; these are not opened, since reading a named pipe may never end.
    """
    with picture_file(path) as image:
        image.load()
        return image


@contextmanager
def picture_file(path: Path) -> Iterator[ImageFile]:
    """Open a picture for the block and read only its header; errors in the block are those of `open_picture`."""
    kind = special_kind(path)
    if kind is not None:
        raise UserError(f"{path}: {kind}; expected an image file")
    megapixels = _allow_large()
    try:
        # Given a path, Pillow maps the file into memory and then mixes up the pixels of a TIFF that must be turned.
        with open(path, "rb") as file, Image.open(file) as image:
            yield image
    except FileNotFoundError:
        what = "a link to a file that is not there" if os.path.islink(path) else "no such file"
        raise UserError(f"{path}: {what}") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image that can be read") from None
    except Image.DecompressionBombError as error:
        found = re.search(r"\d{4,}", str(error))
        raise UserError(f"{path}: {f'{int(found[0]) / 1e6:.0f}' if found else 'too many'} megapixels; at most "
                        f"{megapixels:g} are read, unless the environment variable {LIMIT} allows more") from None
    except (OSError, SyntaxError, ValueError, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        raise UserError(f"{path}: truncated or broken image ({error})") from None


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height in px as stored, from the header of the file alone; errors as in `open_picture`."""
    with picture_file(path) as image:
        return image.size


def orientation(path: Path) -> int | None:
    """The EXIF orientation of a picture, 1 to 8; None if it has none."""
    with picture_file(path) as image:
        if image.format == "PNG" and not _has_words(path):
            return None         # Pillow would decode the pixels to look for data behind them
        return orientation_of(image)


def _has_words(path: Path) -> bool:
    """True if a PNG file has EXIF data or texts, where Pillow finds an orientation, or if the file is broken."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
            if head[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)        # the chunk and its checksum
    return len(head) < 8


def orientation_of(image: Image.Image) -> int | None:
    """The `orientation` of an opened picture."""
    value = image.getexif().get(ORIENTATION)
    return value if value in range(1, 9) else None


def _allow_large() -> float:
    """Set Pillow's limit, which holds for the whole process, to ours; returns ours in megapixels."""
    text = os.environ.get(LIMIT)
    try:
        megapixels = MAX_MEGAPIXELS if text is None else float(text)
    except ValueError:
        megapixels = math.nan
    if not 0 < megapixels < math.inf:
        raise UserError(f"{LIMIT}={text}: expected a number of megapixels above 0")
    if Image.MAX_IMAGE_PIXELS is not None:      # None: the importing program has switched the limit off
        Image.MAX_IMAGE_PIXELS = int(megapixels * 1e6 / 2)      # Pillow warns from here on, and refuses from twice this
    return megapixels
