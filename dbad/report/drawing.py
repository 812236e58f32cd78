"""Drawing pictures with Pillow, which takes milliseconds where matplotlib takes a second: tiles, texts, outlines."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dbad.report.colours import colour_bar

INK, MUTED, PAPER, EMPTY = (27, 31, 36), (96, 105, 115), (255, 255, 255), (232, 235, 238)
GOOD, DEFECTIVE, UNKNOWN = (47, 111, 176), (200, 80, 30), (125, 131, 140)  # the same in panels, curves and report
OUTLINE = (0, 229, 255)     # stands out from wood, metal, textile and from the colours of the maps
BAR_HEIGHT = 30             # px, of `draw_bar` with its numbers


@lru_cache(maxsize=8)
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and covers Latin, Greek and Cyrillic names."""
    from matplotlib import get_data_path
    path = Path(get_data_path(), "fonts", "ttf", f"DejaVuSans{'-Bold' * bold}.ttf")
    return ImageFont.truetype(str(path), size)      # older versions of Pillow take no Path


def shorten(text: str, face: ImageFont.FreeTypeFont, width: float) -> str:
    """The end of `text` that fits into `width` pixels: the end of a path says most."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    if face.getlength(text) <= width:
        return text
    while len(text) > 1 and face.getlength("…" + text) > width:
        text = text[max(1, len(text) // 40):]
    return "…" + text


def tile(pixels: np.ndarray, side: int, enlarge: bool = True) -> Image.Image:
    """An array (H, W, 3) uint8, or a bool mask (H, W), as a picture whose longer side is `side` pixels."""
    picture = Image.fromarray(pixels if pixels.ndim == 3 else pixels * np.uint8(255))
    factor = side / max(picture.size)
    if factor == 1 or (factor > 1 and not enlarge):
        return picture
    width, height = (max(1, round(length * factor)) for length in picture.size)
    smooth = pixels.ndim == 3 and factor < 1  # enlarged pixels stay visible as squares
    return picture.resize((width, height), Image.Resampling.BOX if smooth else Image.Resampling.NEAREST)


def outlined(picture: Image.Image, region: np.ndarray) -> Image.Image:
    """The picture with the outline of `region`, a bool array of any size: two bright pixels, and a black one inside."""
    inside = np.asarray(Image.fromarray(region).resize(picture.size, Image.Resampling.NEAREST))
    pixels = np.array(picture)
    for width, colour in ((3, (0, 0, 0)), (2, OUTLINE)):
        pixels[inside & ~_shrunk(inside, width)] = colour
    return Image.fromarray(pixels)


def draw_bar(sheet: Image.Image, place: tuple[int, int], width: int, highest: float, marked: bool) -> None:
    """Draw the bar of the maps' colours with the values at its ends, and, if `marked`, the threshold in its middle."""
    draw, (left, top) = ImageDraw.Draw(sheet), place
    sheet.paste(Image.fromarray(colour_bar(width, 8)), place)
    texts = [(0.0, "0"), (1.0, f"{highest:.3g}")]
    if marked:
        draw.line((left + width // 2, top - 2, left + width // 2, top + 10), PAPER, 5)
        draw.line((left + width // 2, top - 2, left + width // 2, top + 10), INK, 2)
        texts.append((0.5, f"{highest / 2:.3g}"))
    for share, text in texts:
        room = width - font(11).getlength(text)
        draw.text((left + share * room, top + 11), text, MUTED, font(11))


def _shrunk(inside: np.ndarray, width: int) -> np.ndarray:
    """A bool region (H, W) without its outermost `width` pixels; the border of the picture is an edge, too."""
    padded = np.pad(inside, width)
    height, length = inside.shape
    across = [padded[width:width + height, shift:shift + length] for shift in (0, 2 * width)]
    down = [padded[shift:shift + height, width:width + length] for shift in (0, 2 * width)]
    return inside & across[0] & across[1] & down[0] & down[1]
