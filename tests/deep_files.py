"""Files of more than 8 bits per channel, written byte by byte: Pillow writes few of them."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
SHORT, LONG = 3, 4      # types of TIFF's entries


def gradient(bits: int, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    """Every level of so many bits between black and white, (H, W) uint16."""
    return np.linspace(0, 2 ** bits - 1, size[0] * size[1]).round().astype(np.uint16).reshape(size)


def colours(bits: int, size: tuple[int, int] = (32, 48), channels: int = 3) -> np.ndarray:
    """Random values below 2^bits, (H, W, channels) uint16, the highest of them in the first pixel."""
    values = np.random.default_rng(0).integers(0, 2 ** bits, (*size, channels)).astype(np.uint16)
    values[0, 0] = 2 ** bits - 1
    return values


def as_8_bit(values: np.ndarray, bits: int) -> np.ndarray:
    """The 8-bit version of a picture, (H, W, 3) uint8."""
    levels = np.rint(values * (255 / (2 ** bits - 1))).astype(np.uint8)
    return levels if levels.ndim == 3 else np.repeat(levels[:, :, None], 3, axis=2)


def png(values: np.ndarray, interlaced: bool = False) -> bytes:
    """(H, W) or (H, W, 2 to 4) uint16 -> PNG of 16 bits: gray, with alpha, RGB, RGBA."""
    values = values.reshape(*values.shape[:2], -1)
    height, width, channels = values.shape
    parts = [values[y::dy, x::dx] for x, y, dx, dy in (ADAM7 if interlaced else [(0, 0, 1, 1)])]
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for part in parts if part.size for row in part)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, interlaced)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines))
            + chunk(b"IEND", b""))


def tiff(values: np.ndarray, order: str = "<", photometric: int | None = None, *, deflate: bool = False,
         predictor: bool = False, tile: int = 0, planes: bool = False, bits: int | None = None, **tags: int) -> bytes:
    """(H, W) or (H, W, channels) -> TIFF in strips of 16 rows, or in tiles.

        order       "<" or ">", of the bytes
        bits        of a value that is packed already, where it is not that of the array
        tags        t274=6 and the like: more entries, with one number each
    """
    values = values.reshape(*values.shape[:2], -1)
    (height, width, channels), bits = values.shape, bits or values.dtype.itemsize * 8
    if tile:
        padded = np.zeros((-(-height // tile) * tile, -(-width // tile) * tile, channels), values.dtype)
        padded[:height, :width] = values
        blocks = [padded[y:y + tile, x:x + tile] for y in range(0, height, tile) for x in range(0, width, tile)]
    else:
        blocks = [values[y:y + 16] for y in range(0, height, 16)]
    if planes:
        blocks = [block[:, :, channel] for channel in range(channels) for block in blocks]
    if predictor:
        blocks = [np.concatenate([block[:, :1], block[:, 1:] - block[:, :-1]], axis=1) for block in blocks]
    data = [block.astype(values.dtype.newbyteorder(order)).tobytes() for block in blocks]
    data = [zlib.compress(part) for part in data] if deflate else data
    places = [8 + sum(map(len, data[:number])) for number in range(len(data))]
    width = width * 8 * values.dtype.itemsize // bits
    entries = {256: (LONG, [width]), 257: (LONG, [height]), 258: (SHORT, [bits] * channels),
               259: (SHORT, [8 if deflate else 1]), 277: (SHORT, [channels]),
               262: (SHORT, [photometric if photometric is not None else 2 if channels > 2 else 1])}
    if tile:
        entries |= {322: (LONG, [tile]), 323: (LONG, [tile]), 324: (LONG, places), 325: (LONG, list(map(len, data)))}
    else:
        entries |= {273: (LONG, places), 278: (LONG, [16]), 279: (LONG, list(map(len, data)))}
    if planes:
        entries[284] = SHORT, [2]
    if predictor:
        entries[317] = SHORT, [2]
    entries |= {int(name[1:]): (SHORT, [number]) for name, number in tags.items()}

    body = b"".join(data)
    body += b"\0" * (len(body) % 2)
    first = 8 + len(body)
    head, more = struct.pack(order + "H", len(entries)), b""
    for tag, (kind, numbers) in sorted(entries.items()):
        value = struct.pack(order + {SHORT: "H", LONG: "I"}[kind] * len(numbers), *numbers)
        if len(value) > 4:
            place = struct.pack(order + "I", first + 2 + 12 * len(entries) + 4 + len(more))
            value, more = place, more + value
        head += struct.pack(order + "HHI", tag, kind, len(numbers)) + value.ljust(4, b"\0")
    return {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, first) + body + head + b"\0" * 4 + more


def packed_12_bits(values: np.ndarray) -> np.ndarray:
    """(H, W) below 4096, W even -> (H, 1.5 W) uint8, two values in three bytes."""
    first, second = values[:, 0::2], values[:, 1::2]
    parts = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
    return np.stack(parts, axis=2).astype(np.uint8).reshape(len(values), -1)


def netpbm(values: np.ndarray, maxval: int, plain: bool = False) -> bytes:
    """PGM or PPM with 16 bits a value, as bytes or as text."""
    colour = values.ndim == 3
    kind = {(False, False): "P5", (True, False): "P6", (False, True): "P2", (True, True): "P3"}[colour, plain]
    body = " ".join(map(str, values.ravel())).encode() if plain else values.astype(">u2").tobytes()
    return f"{kind}\n# drawn\n{values.shape[1]} {values.shape[0]}\n{maxval}\n".encode() + body


def sgi(values: np.ndarray) -> bytes:
    values = values.reshape(*values.shape[:2], -1)
    height, width, channels = values.shape
    head = struct.pack(">hBBHHHHii", 474, 0, 2, 3 if channels > 1 else 2, width, height, channels, 0, 65535)
    return head.ljust(512, b"\0") + values[::-1].transpose(2, 0, 1).astype(">u2").tobytes()


def fits(values: np.ndarray, shift: int = 0) -> bytes:
    """(H, W) -> FITS of 16-bit signed integers, of which `shift` is subtracted, as for unsigned ones."""
    cards = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": values.shape[1], "NAXIS2": values.shape[0],
             "BZERO": shift}
    head = "".join(f"{name:8}= {value:>20}".ljust(80) for name, value in cards.items()) + "END"
    body = (values[::-1].astype(np.int32) - shift).astype(">i2").tobytes()
    return head.encode().ljust(2880) + body.ljust(-(-len(body) // 2880) * 2880, b"\0")


def jpeg2000(values: np.ndarray, bits: int = 16) -> bytes:
    """(H, W) below 2^bits, (H, W, 3) below 256 -> lossless JPEG 2000 that says to have so many bits per channel.

    Pillow writes gray of 16 bits only, counted from the middle of their range.
    """
    values = values if values.ndim == 3 else (values + 2 ** 15 - 2 ** (bits - 1)).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "JPEG2000", irreversible=False)
    data = bytearray(file.getvalue())
    start = data.index(b"\xff\x4f\xff\x51")
    for channel in range(data[start + 41]):
        data[start + 42 + 3 * channel] = bits - 1
    return bytes(data)


def deepen(folder: Path, bits: int = 12) -> None:
    """Write the pictures of a folder and below again, as PNG of 16 bits that hold `bits`; of the same 8-bit version."""
    for path in folder.rglob("*.png"):
        values = np.asarray(Image.open(path)) * ((2 ** bits - 1) / 255)
        path.write_bytes(png(np.rint(values).astype(np.uint16)))


def forget_intensity(*paths: Path) -> None:
    """Bring JSON files of a run to what they were before there was --intensity."""
    for path in paths:
        values = json.loads(path.read_text())
        if values.pop("format", None):          # of calibrations; their method was a setting then
            values["settings"]["method"] = values.pop("method")
        for place in (values, values.get("settings", {}), values.get("options", {})):
            for name in ("intensity", "intensity_bits"):
                place.pop(name, None)
        path.write_text(json.dumps(values))
