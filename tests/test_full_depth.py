"""What is read of every kind of file with more than 8 bits per channel: all of it, or nothing."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from deep_files import (
    colours,
    fits,
    gradient,
    jpeg2000,
    netpbm,
    packed_12_bits,
    png,
    sgi,
    tiff,
)
from helpers import drawn, one_line
from PIL import Image, features

from dbad.data import full_depth
from dbad.data.full_depth import Deep, check_unreduced, is_deep, read_picture
from dbad.errors import UserError

GRAY, RGB, RGBA = colours(16, channels=1)[:, :, 0], colours(16), colours(16, channels=4)
LOW = GRAY >> 4         # 12 bits
FLOATS = (GRAY / 65535).astype(np.float32)
FLOAT, SIGNED = {"t339": 3}, {"t339": 2}

READ = {        # the file, its values, and what its type calls white
    "PNG, gray": (png(GRAY), GRAY, 65535),
    "PNG, gray + alpha": (png(RGBA[:, :, :2]), RGBA[:, :, 0], 65535),
    "PNG, RGB": (png(RGB), RGB, 65535),
    "PNG, RGBA": (png(RGBA), RGBA[:, :, :3], 65535),
    "PNG, RGB, interlaced": (png(RGB, interlaced=True), RGB, 65535),
    "PNG, gray + alpha, interlaced": (png(RGBA[:, :, :2], interlaced=True), RGBA[:, :, 0], 65535),
    "PGM of 16 bits": (netpbm(GRAY, 65535), GRAY, 65535),
    "PGM of 12 bits": (netpbm(LOW, 4095), LOW, 4095),
    "PGM of 12 bits, text": (netpbm(LOW, 4095, plain=True), LOW, 4095),
    "PPM of 16 bits": (netpbm(RGB, 65535), RGB, 65535),
    "PPM of 12 bits": (netpbm(RGB >> 4, 4095), RGB >> 4, 4095),
    "TIFF, 12 bits packed": (tiff(packed_12_bits(LOW), bits=12), LOW, 65535),
    "TIFF, 32 bits": (tiff(GRAY.astype(np.uint32) << 16), GRAY.astype(np.uint32) << 16, 65535),
    "TIFF, 32 bits, deflated": (tiff(GRAY.astype(np.uint32) << 16, deflate=True), GRAY.astype(np.uint32) << 16, 65535),
    "FITS": (fits(GRAY >> 1), GRAY >> 1, 65535),
} | {f"TIFF {order}, {name}": (tiff(values, order, **how), expected, white)
     for order in "<>" for name, values, how, expected, white in [
         ("gray", GRAY, {}, GRAY, 65535),
         ("gray, deflated", GRAY, {"deflate": True, "predictor": True}, GRAY, 65535),
         ("signed 16 bits", GRAY.astype(np.int16), SIGNED, GRAY.astype(np.int16), 65535),
         ("signed 32 bits", GRAY.astype(np.int32) - 5, SIGNED, GRAY.astype(np.int32) - 5, 65535),
         ("floats", FLOATS, FLOAT, FLOATS, 1),
         ("RGB", RGB, {}, RGB, 65535),
         ("RGB, deflated", RGB, {"deflate": True}, RGB, 65535),
         ("RGB, differences", RGB, {"deflate": True, "predictor": True}, RGB, 65535),
         ("RGB, tiles", RGB, {"tile": 16, "deflate": True}, RGB, 65535),
         ("RGB, plain tiles", RGB, {"tile": 16}, RGB, 65535),
         ("RGB, turned", RGB, {"t274": 6}, np.rot90(RGB, -1), 65535),
         ("RGB, deflated and turned", RGB, {"t274": 6, "deflate": True}, np.rot90(RGB, -1), 65535),
         ("RGBA", RGBA, {"t338": 2}, RGBA[:, :, :3], 65535),
         ("RGB and a channel of nothing", RGBA, {"t338": 0, "deflate": True}, RGBA[:, :, :3], 65535)]}
if features.check("jpg_2000"):
    READ |= {"JPEG 2000 of 16 bits": (jpeg2000(GRAY), GRAY, 65535),
             "JPEG 2000 of 12 bits": (jpeg2000(LOW, 12), LOW, 4095)}


@pytest.fixture
def file(tmp_path):
    """`file(data)`: a file that holds the bytes; what it is called says nothing of it."""
    def write(data: bytes):
        (tmp_path / "picture").write_bytes(data)
        return tmp_path / "picture"
    return write


@pytest.mark.parametrize("name", READ)
def test_a_picture_beyond_8_bits_is_read_at_its_full_depth(name, file):
    data, expected, white = READ[name]
    found = read_picture(file(data))
    assert isinstance(found, Deep) and found.white == white
    values = np.rot90(found.values, -1) if found.orientation == 6 else found.values     # by versions of Pillow
    assert values.dtype.isnative and values.dtype.kind in "uif"
    np.testing.assert_array_equal(values, expected)
    assert is_deep(file(data))


REFUSED = {
    "TIFF, gray + alpha": (tiff(RGBA[:, :, :2], photometric=1, t338=2), "not an image that can be read"),
    "TIFF, CMYK": (tiff(RGBA, photometric=5), "CMYK"),
    "TIFF, premultiplied": (tiff(RGBA, t338=1), "premultiplied alpha"),
    "TIFF, planes": (tiff(RGB, planes=True), "separate planes"),
    "TIFF, deflated planes": (tiff(RGB, planes=True, deflate=True), "separate planes"),
    "TIFF, gray in a plane": (tiff(GRAY, planes=True), "separate planes"),
    "TIFF, RGB of 32 bits": (tiff(RGB.astype(np.uint32)), "not an image that can be read"),
    "TIFF, RGB of floats": (tiff((RGB / 65535).astype(np.float32), t339=3), "not an image that can be read"),
    "TIFF, half floats": (tiff(FLOATS.astype(np.float16), t339=3), "not an image that can be read"),
    "PPM, text": (netpbm(RGB, 65535, plain=True), "plain-text PPM"),
    "SGI, gray": (sgi(GRAY), "SGI"),
    "SGI, RGB": (sgi(RGB), "SGI"),
    "FITS, shifted": (fits(LOW, shift=32768), "shifted"),
}
if features.check("jpg_2000"):
    REFUSED["JPEG 2000, RGB"] = jpeg2000(RGB.astype(np.uint8), 12), "JPEG 2000 of 12 bits in 3 channels"


@pytest.mark.parametrize("name", REFUSED)
def test_a_picture_whose_values_cannot_be_had_is_refused_in_one_line(name, file):
    data, says = REFUSED[name]
    path = file(data)
    with pytest.raises(UserError, match=says) as error:
        read_picture(path)
    assert one_line(error).startswith(f"{path}: ")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow does not know the format")
def test_an_avif_file_of_10_bits_is_refused_by_its_header(tmp_path):
    """Pillow writes 8 bits only, and does not open a file whose header contradicts its data."""
    Image.fromarray(drawn()).save(tmp_path / "a.avif")
    data = bytearray((tmp_path / "a.avif").read_bytes())
    data[data.index(b"av1C") + 6] |= 0x40
    with pytest.raises(full_depth._RefusedError, match="AVIF of more than 8 bits"):
        full_depth._avif(SimpleNamespace(fp=io.BytesIO(data)))


@pytest.mark.parametrize("ending", ["png", "tif", "ppm", "jpg", "bmp", "gif", "webp", "jp2", "sgi", "avif"])
def test_a_picture_of_8_bits_is_what_pillow_gives(ending, tmp_path):
    if ending in ("jp2", "avif") and not features.check({"jp2": "jpg_2000"}.get(ending, ending)):
        pytest.skip("this Pillow does not know the format")
    path = tmp_path / f"a.{ending}"
    Image.fromarray(drawn()).save(path)
    found, expected = read_picture(path), Image.open(path)
    assert found.mode == expected.mode and found.tobytes() == expected.tobytes()
    assert not is_deep(path)
    check_unreduced(found, "the image")


@pytest.mark.parametrize("name, fine", [("PNG, RGB", False), ("PNG, gray + alpha", False), ("TIFF <, RGB", False),
                                        ("TIFF <, gray", True), ("PNG, gray", True), ("PGM of 16 bits", True),
                                        ("PGM of 12 bits", False), ("PPM of 12 bits", False)])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_picture_that_pillow_has_changed_is_told(name, fine, loaded, file):
    for source in (file(READ[name][0]), io.BytesIO(READ[name][0])):
        image = Image.open(source)
        if loaded:
            image.load()
        if fine or loaded and isinstance(source, io.BytesIO):       # of the latter nothing is left to look at
            check_unreduced(image, "the image")
            continue
        with pytest.raises(UserError, match="expected its path") as error:
            check_unreduced(image, "the image")
        assert one_line(error).startswith("the image: ")
        assert np.asarray(image).shape[:2] == GRAY.shape            # it can still be decoded


def test_every_level_of_a_gradient_is_there(file):
    assert len(np.unique(read_picture(file(png(gradient(12, (64, 64))))).values)) == 4096
