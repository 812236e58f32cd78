"""Masks of every kind that drawing tools write: which pixels they mark, and which are refused."""

from pathlib import Path

import numpy as np
import pytest
from helpers import one_line, save_drawn
from PIL import Image, ImageFilter

from dbad.data.masks import Mask, marks, read_mask
from dbad.errors import UserError

DRAWN = np.zeros((40, 40), bool)
DRAWN[10:20, 5:15] = True           # 100 px
ORIENTATION = 0x0112
TURNS = {2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.T,
         6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].T, 8: lambda a: np.rot90(a)}


def read(path: Path, size: tuple[int, int] = (40, 40)) -> Mask:
    """The mask of an image without EXIF data of this size."""
    return read_mask(path, size, save_drawn(path.with_name("image.png"), 0, size[::-1]))


def marked(path: Path, picture: Image.Image, **how) -> np.ndarray:
    """What a mask marks, once it is saved."""
    picture.save(path, **how)
    return np.asarray(read(path).image) == 255


def levels(low, high, dtype=np.uint8) -> Image.Image:
    return Image.fromarray(np.where(DRAWN, high, low).astype(dtype))


@pytest.mark.parametrize("low, high", [(0, 255), (0, 1), (0, 38), (0, 128), (38, 255), (1, 2), (254, 255)])
def test_of_two_levels_the_lower_one_is_background(low, high, tmp_path):
    np.testing.assert_array_equal(marked(tmp_path / "m.png", levels(low, high)), DRAWN)
    assert not read(tmp_path / "m.png").cut


@pytest.mark.parametrize("name, low, high, dtype", [
    ("m.png", 0, 65535, np.uint16), ("m.tif", 0, 1, np.uint16), ("m.tif", 0, 1, np.float32),
    ("m.tif", 0, 255, np.float32), ("m.tif", 0, 1, np.int32)])
def test_two_levels_of_other_types_are_read_alike(name, low, high, dtype, tmp_path):
    np.testing.assert_array_equal(marked(tmp_path / name, levels(low, high, dtype)), DRAWN)


@pytest.mark.parametrize("quality", [40, 60, 75, 95])
def test_a_mask_saved_as_jpeg_marks_what_was_drawn(quality, tmp_path):
    np.testing.assert_array_equal(marked(tmp_path / "m.jpg", levels(0, 255), quality=quality), DRAWN)
    assert read(tmp_path / "m.jpg").cut


def test_a_soft_mask_is_cut_in_the_middle_of_its_range(tmp_path):
    """Its edge stays where it was drawn; corners are rounded by the blur."""
    for name, scale, dtype in (("m.png", 255, np.uint8), ("m.png", 100, np.uint8), ("m.tif", 1.0, np.float32)):
        soft = np.asarray(levels(0, 255).filter(ImageFilter.GaussianBlur(1.5)), np.float32) / 255 * scale
        found = marked(tmp_path / name, Image.fromarray(soft.astype(dtype)))
        assert read(tmp_path / name).cut and abs(found.sum() - 100) <= 8 and (found <= DRAWN).all()


def test_small_whole_numbers_are_labels_of_which_each_marks_a_defect(tmp_path):
    """As in VisA, where a mask numbers the kinds of defect."""
    labels = np.zeros((40, 40), np.uint8)
    labels[DRAWN] = 9
    labels[10:12, 5:15] = 1
    labels[12:14, 5:15] = 31
    np.testing.assert_array_equal(marked(tmp_path / "m.png", Image.fromarray(labels)), DRAWN)
    assert not read(tmp_path / "m.png").cut
    marked(tmp_path / "m.png", Image.fromarray(labels + np.uint8(1)))
    assert read(tmp_path / "m.png").cut         # up to 32: shades


@pytest.mark.parametrize("value, everywhere", [(0, False), (1, True), (255, True)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_a_mask_of_one_level_marks_nothing_if_that_is_0_and_else_everything(value, everywhere, mode, tmp_path):
    found = marked(tmp_path / "m.png", Image.new("L", (40, 40), value).convert(mode))
    assert found.all() if everywhere else not found.any()
    assert marks(tmp_path / "m.png") == everywhere


# Alpha and colours

def test_alpha_counts_where_it_alone_varies(tmp_path):
    alpha = Image.fromarray(np.where(DRAWN, 255, 0).astype(np.uint8))
    for colour in ((0, 0, 0), (255, 0, 0), (255, 255, 255)):
        picture = Image.new("RGB", (40, 40), colour)
        picture.putalpha(alpha)
        np.testing.assert_array_equal(marked(tmp_path / "m.png", picture), DRAWN)
    grey = Image.new("L", (40, 40), 7)
    grey.putalpha(alpha)
    np.testing.assert_array_equal(marked(tmp_path / "m.png", grey), DRAWN)


def test_colours_count_where_they_vary_whatever_alpha_does(tmp_path):
    picture = Image.fromarray(np.where(DRAWN[:, :, None], (255, 0, 0), (0, 0, 0)).astype(np.uint8))
    np.testing.assert_array_equal(marked(tmp_path / "m.png", picture), DRAWN)
    picture.putalpha(Image.linear_gradient("L").resize((40, 40)))
    np.testing.assert_array_equal(marked(tmp_path / "m.png", picture), DRAWN)


def test_red_on_a_transparent_white_ground_is_told_by_alpha(tmp_path):
    red, white = np.array([255, 0, 0, 255], np.uint8), np.array([255, 255, 255, 0], np.uint8)
    picture = Image.fromarray(np.where(DRAWN[:, :, None], red, white))
    np.testing.assert_array_equal(marked(tmp_path / "m.png", picture), DRAWN)


def test_nothing_visible_marks_nothing(tmp_path):
    assert not marked(tmp_path / "m.png", Image.new("RGBA", (40, 40), (255, 255, 255, 0))).any()


def test_colours_that_are_equally_bright_are_refused(tmp_path):
    colours = np.where(DRAWN[:, :, None], (255, 0, 0), (255, 255, 255)).astype(np.uint8)
    with pytest.raises(UserError, match="m.png: a mask of colours that are equally bright; expected a") as error:
        marked(tmp_path / "m.png", Image.fromarray(colours))
    one_line(error)


# Palettes

def with_palette(index: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    picture = Image.fromarray(index.astype(np.uint8))
    picture.putpalette([value for colour in colours for value in colour])
    return picture


BLACK, WHITE, RED, GREEN, PURPLE = (0, 0, 0), (255, 255, 255), (128, 0, 0), (0, 128, 0), (68, 1, 84)


@pytest.mark.parametrize("colours", [
    (BLACK, RED), (BLACK, WHITE), (PURPLE, GREEN), (WHITE, RED), (BLACK, BLACK), (RED, RED)],
    ids=["labels", "black and white", "colour map", "red on white", "no colours", "one colour"])
def test_index_1_of_a_palette_is_defect_whatever_the_colours(colours, tmp_path):
    np.testing.assert_array_equal(marked(tmp_path / "m.png", with_palette(DRAWN, *colours)), DRAWN)


@pytest.mark.parametrize("colours", [(WHITE, BLACK), (RED, BLACK), ((200, 200, 200), (10, 10, 10))])
def test_a_palette_in_another_order_is_told_by_its_greys_and_by_black(colours, tmp_path):
    np.testing.assert_array_equal(marked(tmp_path / "m.png", with_palette(~DRAWN, *colours)), DRAWN)


def test_every_index_but_the_background_s_is_defect(tmp_path):
    index = np.where(DRAWN, np.arange(40) % 3 + 1, 0)
    for colours in ((BLACK, RED, GREEN, PURPLE), (PURPLE, RED, GREEN, WHITE), (BLACK,) * 4):
        np.testing.assert_array_equal(marked(tmp_path / "m.png", with_palette(index, *colours)), DRAWN)
    np.testing.assert_array_equal(marked(tmp_path / "m.png", with_palette(
        np.where(DRAWN, np.arange(40) + 60, 3), *[(i, 0, 255 - i) for i in range(120)])), DRAWN)


@pytest.mark.parametrize("colour", [PURPLE, BLACK, RED])
def test_a_palette_of_which_only_index_0_is_used_marks_nothing(colour, tmp_path):
    assert not marked(tmp_path / "m.png", with_palette(DRAWN & False, colour, GREEN)).any()


def test_a_palette_of_greys_is_read_as_an_image(tmp_path):
    soft = levels(0, 255).filter(ImageFilter.GaussianBlur(1.5))
    np.testing.assert_array_equal(marked(tmp_path / "p.png", soft.convert("P")), marked(tmp_path / "l.png", soft))
    assert read(tmp_path / "p.png").cut


# What is no mask

@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers_are_refused_by_name(value, tmp_path):
    pixels = DRAWN.astype(np.float32)
    pixels[3, 3] = value
    with pytest.raises(UserError, match="m.tif: a mask with pixels that are infinite or not a number") as error:
        marked(tmp_path / "m.tif", Image.fromarray(pixels))
    one_line(error)


def test_a_mask_of_another_size_is_refused(tmp_path):
    levels(0, 255).save(tmp_path / "m.png")
    with pytest.raises(UserError, match="m.png: mask of 40x40 px for .*image.png of 40x41 px; expected the same size"):
        read(tmp_path / "m.png", (40, 41))


# Several masks of one image

def test_masks_in_a_folder_are_read_as_one(tmp_path):
    (tmp_path / "000").mkdir()
    for number, rows in enumerate((slice(10, 14), slice(12, 20))):
        part = np.zeros((40, 40), np.uint8)
        part[rows, 5:15] = 240 + number
        Image.fromarray(part).save(tmp_path / "000" / f"{number:03}.png")
    found = read_mask(tmp_path / "000", (40, 40), save_drawn(tmp_path / "000.png", size=40))
    np.testing.assert_array_equal(np.asarray(found.image) == 255, DRAWN)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no masks in it for .*000.png"):
        read_mask(tmp_path / "empty", (40, 40), tmp_path / "000.png")


# Orientation

SHAPE = np.zeros((12, 20), bool)
SHAPE[1:4, 2:9] = True


def turned(path: Path, pixels: np.ndarray, orientation: int | None) -> Path:
    exif = Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def upright(mask: np.ndarray, own: int | None, image: int | None, tmp_path: Path, ending: str = "png") -> np.ndarray:
    """A mask as stored, with an orientation of its own or without, read for a stored image of 20x12 px."""
    photo = turned(tmp_path / f"photo.{ending}", np.zeros((12, 20, 3), np.uint8), image)
    size = (20, 12) if image in (None, 1, 2, 3, 4) else (12, 20)
    found = read_mask(turned(tmp_path / f"m.{ending}", mask.astype(np.uint8) * 255, own), size, photo)
    assert found.image.size == size
    return np.asarray(found.image) == 255


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("orientation", TURNS)
def test_a_mask_without_orientation_is_turned_with_its_image(orientation, ending, tmp_path):
    np.testing.assert_array_equal(upright(SHAPE, None, orientation, tmp_path, ending), TURNS[orientation](SHAPE))


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("orientation", TURNS)
def test_a_mask_with_an_orientation_of_its_own_is_turned_by_that(orientation, ending, tmp_path):
    drawn = TURNS[orientation](SHAPE)
    np.testing.assert_array_equal(upright(SHAPE, orientation, orientation, tmp_path, ending), drawn)
    np.testing.assert_array_equal(upright(drawn, 1, orientation, tmp_path, ending), drawn)      # 1: as it is
    if orientation < 5:
        np.testing.assert_array_equal(upright(SHAPE, orientation, None, tmp_path, ending), drawn)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_whose_size_shows_that_it_was_drawn_upright_is_not_turned(orientation, tmp_path):
    np.testing.assert_array_equal(upright(SHAPE.T, None, orientation, tmp_path), SHAPE.T)


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_orientation_that_there_is_not_turns_nothing(orientation, tmp_path):
    np.testing.assert_array_equal(upright(SHAPE, orientation, None, tmp_path), SHAPE)
