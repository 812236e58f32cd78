"""Files that are no pictures, or too large ones: told in one line, and never waited for."""

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import drawn, one_line, save_drawn
from PIL import Image

from dbad.data import pictures
from dbad.data.pictures import LIMIT, open_picture, orientation, picture_size
from dbad.errors import UserError
from dbad.runtime.failures import one_line_failures

READERS = [open_picture, picture_size, orientation]


def refused(path: Path, reader=open_picture) -> str:
    with pytest.raises(UserError) as error:
        reader(path)
    message = one_line(error)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("reader", READERS)
def test_a_named_pipe_is_refused_and_not_waited_for(reader, tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(tmp_path / "a.png")
    os.symlink("a.png", tmp_path / "link.png")
    for name in ("a.png", "link.png"):
        assert refused(tmp_path / name, reader) == "a named pipe; expected an image file"


@pytest.mark.parametrize("reader", READERS)
def test_links_that_lead_nowhere_are_told(reader, tmp_path):
    os.symlink("gone.png", tmp_path / "broken.png")
    os.symlink("circular.png", tmp_path / "circular.png")
    assert refused(tmp_path / "broken.png", reader) == "a link to a file that is not there"
    assert refused(tmp_path / "circular.png", reader).startswith("cannot be read (")
    assert refused(tmp_path / "a.png", reader) == "no such file"
    assert refused(tmp_path, reader).startswith("cannot be read (")


def test_a_link_to_an_image_is_an_image(tmp_path):
    save_drawn(tmp_path / "a.png", size=8)
    os.symlink("a.png", tmp_path / "b.png")
    assert open_picture(tmp_path / "b.png").size == picture_size(tmp_path / "b.png") == (8, 8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("reader", READERS)
def test_a_picture_beyond_the_limit_says_so_and_how_to_move_it(reader, tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    Image.new("1", (2000, 1000)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)      # is put back
    monkeypatch.setenv(LIMIT, "1.9")
    assert refused(path, reader) == (
        f"2 megapixels; at most 1.9 are read, unless the environment variable {LIMIT} allows more")
    monkeypatch.setenv(LIMIT, "2")
    reader(path)


def test_what_pillow_refuses_by_itself_is_read(tmp_path, monkeypatch):
    """A head of 20000x10000 px, since so many pixels take a while."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    Image.new("1", (8, 8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    head = b"IHDR" + struct.pack(">II", 20000, 10000) + content[24:29]
    (tmp_path / "a.png").write_bytes(content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:])
    assert picture_size(tmp_path / "a.png") == (20000, 10000)
    assert pictures.MAX_MEGAPIXELS == 500


@pytest.mark.parametrize("value", ["many", "0", "-1", "nan", "inf", ""])
def test_a_limit_that_is_none_is_refused(value, tmp_path, monkeypatch):
    monkeypatch.setenv(LIMIT, value)
    with pytest.raises(UserError, match=f"{LIMIT}={value}: expected a number of megapixels above 0") as error:
        open_picture(save_drawn(tmp_path / "a.png"))
    one_line(error)


def test_whoever_switches_the_limit_off_is_not_overruled(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setenv(LIMIT, "0.00001")
    assert open_picture(save_drawn(tmp_path / "a.png")).size == (16, 16)


def test_no_warning_stands_beside_the_line(tmp_path, monkeypatch, capsys):
    """Pillow warns from half of the limit on."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.setenv(LIMIT, "0.0003")
    save_drawn(tmp_path / "a.png", size=16)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with one_line_failures():
            open_picture(tmp_path / "a.png")
            picture_size(tmp_path / "a.png")
    assert said == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("value", [1, 3, 6, 8])
def test_a_tiff_file_comes_upright(value, compression, tmp_path):
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = value
    pixels = drawn(size=(12, 20))
    Image.fromarray(pixels).save(tmp_path / "a.tif", exif=exif, compression=compression)
    upright = {1: pixels, 3: pixels[::-1, ::-1], 6: np.rot90(pixels, -1), 8: np.rot90(pixels)}[value]
    np.testing.assert_array_equal(np.asarray(open_picture(tmp_path / "a.tif")), upright)


@pytest.mark.parametrize("value", [None, 1, 3, 6, 8, 0, 9])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_the_orientation_is_that_of_the_exif_data(name, value, tmp_path):
    exif = Image.Exif()
    if value is not None:
        exif[pictures.ORIENTATION] = value
    Image.fromarray(drawn()).save(tmp_path / name, exif=exif)
    assert orientation(tmp_path / name) == (value if value in (1, 3, 6, 8) else None)
