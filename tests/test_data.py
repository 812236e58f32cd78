"""Images of every mode, masks, the held-out split, augmentation, and what a user can get wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import drawn, make_category, one_line, random_images, save_drawn, save_mask, streams
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dbad.data.augment import augment, random_crops
from dbad.data.categories import find_category, split_holdout
from dbad.data.images import read_image, read_images, read_items, to_float, to_pixels, to_uint8
from dbad.data.intensity import Intensity
from dbad.errors import UserError
from dbad.records import Sample

RGB = drawn(3, (12, 8))
GREY = RGB[:, :, 0]


def as_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, axis=2)


# Reading images

def with_transparency() -> Image.Image:
    image = Image.fromarray(RGB).quantize(16)
    image.info["transparency"] = 0
    return image


FULL = Intensity("full")
MODES = {
    "L.png": (Image.fromarray(GREY), as_rgb(GREY)),
    "RGB.png": (Image.fromarray(RGB), RGB),
    "RGBA.png": (Image.fromarray(np.dstack([RGB, GREY])), RGB),
    "LA.png": (Image.fromarray(np.dstack([GREY, RGB[:, :, 1]])), as_rgb(GREY)),
    "1.png": (Image.fromarray(GREY > 127), as_rgb((GREY > 127) * np.uint8(255))),
    "P.png": (Image.fromarray(RGB).quantize(16), np.array(Image.fromarray(RGB).quantize(16).convert("RGB"))),
    "P with transparency.png": (with_transparency(), np.array(Image.fromarray(RGB).quantize(16).convert("RGB"))),
    "I;16.png": (Image.fromarray(GREY.astype(np.uint16) * 257), as_rgb(GREY)),
    "I;16.tif": (Image.fromarray(GREY.astype(np.uint16) * 257), as_rgb(GREY)),
    "I.tif": (Image.fromarray(GREY.astype(np.int32) * 257), as_rgb(GREY)),
    "F.tif": (Image.fromarray(GREY.astype(np.float32) / 255), as_rgb(GREY)),
    "RGB.bmp": (Image.fromarray(RGB), RGB),
    "RGB.tif": (Image.fromarray(RGB), RGB),
}


@pytest.mark.parametrize("name", MODES)
def test_an_image_of_any_mode_is_read_as_8_bit_rgb(name, tmp_path):
    image, expected = MODES[name]
    image.save(tmp_path / name)
    read = read_image(tmp_path / name, FULL)
    assert read.mode == "RGB"
    np.testing.assert_array_equal(np.array(read), expected)


def test_16_bit_images_may_be_scaled_by_their_full_range_and_not_by_their_content(tmp_path):
    dark = np.full((4, 4), 257, np.uint16)
    Image.fromarray(dark).save(tmp_path / "dark.png")
    assert (np.array(read_image(tmp_path / "dark.png", FULL)) == 1).all()


ORIENTATIONS = {1: lambda a: a, 3: lambda a: a[::-1, ::-1], 6: lambda a: np.rot90(a, -1), 8: lambda a: np.rot90(a)}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_an_image_is_turned_upright_as_its_exif_data_say(orientation, bits, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = RGB if bits == 8 else GREY.astype(np.uint16) * 257
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    expected = ORIENTATIONS[orientation](RGB if bits == 8 else as_rgb(GREY))
    np.testing.assert_array_equal(np.array(read_image(tmp_path / "turned.png", FULL)), expected)


def test_floating_point_pixels_beyond_0_to_1_are_refused(tmp_path):
    Image.fromarray(GREY.astype(np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(UserError, match="expected 0 to 1") as error:
        read_image(tmp_path / "f.tif")
    assert str(tmp_path / "f.tif") in one_line(error)


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "webp", "gif"])
def test_a_file_truncated_anywhere_is_read_or_refused_in_one_line_that_names_it(ending, tmp_path):
    path = tmp_path / f"cut.{ending}"
    Image.fromarray(RGB).save(path)
    content = path.read_bytes()
    refused = 0
    for length in range(0, len(content), 11):
        path.write_bytes(content[:length])
        try:
            assert read_image(path).size == (8, 12)
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused >= 0.8 * len(range(0, len(content), 11))


@pytest.mark.parametrize("content, message", [(None, "no such file"), (b"", "not an image"), (b"hello", "not an image"),
                                              (b"version https://git-lfs.github.com/spec/v1\n", "not an image")])
def test_a_file_that_is_no_image_is_refused_in_one_line_that_names_it(content, message, tmp_path):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_image(path)
    assert str(path) in one_line(error)


def test_a_folder_called_like_an_image_is_refused(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UserError) as error:
        read_image(tmp_path / "a.png")
    assert str(tmp_path / "a.png") in one_line(error)


# Pixels and their ranges

def test_pixels_survive_the_way_to_floats_and_back():
    levels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(3, 16, 16)
    floats = to_float(levels)
    assert floats.dtype == torch.float32 and floats.min() == -1 and floats.max() == 1
    np.testing.assert_array_equal(to_pixels(floats), levels.permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(to_uint8(Image.fromarray(RGB)).permute(1, 2, 0).numpy(), RGB)


def test_images_are_read_resized_or_as_they_are_by_any_number_of_threads(tmp_path):
    samples = [Sample(save_drawn(tmp_path / f"{i}.png", i, (12, 8)), "bolt", "good") for i in range(5)]
    whole = read_images(samples, None)
    assert [tuple(i.shape) for i in whole] == [(3, 12, 8)] * 5 and whole[0].dtype == torch.uint8
    for index, image in enumerate(whole):
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), drawn(index, (12, 8)))
    resized = read_images(samples, 16)
    assert {tuple(i.shape) for i in resized} == {(3, 16, 16)}
    assert all(torch.equal(a, b) for a, b in zip(resized, read_images(samples, 16, num_workers=3), strict=True))


def test_one_broken_file_among_many_is_named_whatever_the_number_of_threads(tmp_path):
    samples = [Sample(save_drawn(tmp_path / f"{i}.png", i), "bolt", "good") for i in range(5)]
    samples[3].path.write_bytes(samples[3].path.read_bytes()[:60])
    for num_workers in (0, 2):
        with pytest.raises(UserError, match="3.png"):
            read_images(samples, 16, num_workers)


# Masks

@pytest.mark.parametrize("name", ["000_mask.png", "000.png", "000_mask.bmp"])
def test_masks_are_found_by_either_name(name, tmp_path):
    save_drawn(tmp_path / "bolt" / "train" / "good" / "000.png")
    save_drawn(tmp_path / "bolt" / "test" / "crack" / "000.png")
    mask = save_mask(tmp_path / "bolt" / "ground_truth" / "crack" / name)
    assert find_category(tmp_path, "bolt").test[0].mask == mask


@pytest.mark.parametrize("value", [1, 128, 255])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_every_value_above_0_of_a_mask_is_defect(value, mode, tmp_path):
    mask = save_mask(tmp_path / "m.png", value=value, mode=mode)
    sample = Sample(save_drawn(tmp_path / "a.png"), "bolt", "crack", mask)
    item, = read_items([sample], None)
    expected = torch.zeros(1, 16, 16)
    expected[:, :8, :8] = 1
    assert torch.equal(item.mask, expected)


@pytest.mark.parametrize("pixels", [lambda m: m, lambda m: m.astype(np.uint16) * 256], ids=["1 bit", "16 bit"])
def test_masks_of_1_and_of_16_bits_are_read(pixels, tmp_path):
    mask = np.zeros((16, 16), bool)
    mask[3:5, 2:9] = True
    Image.fromarray(pixels(mask)).save(tmp_path / "m.png")
    item, = read_items([Sample(save_drawn(tmp_path / "a.png"), "bolt", "crack", tmp_path / "m.png")], None)
    np.testing.assert_array_equal(item.mask[0].numpy().astype(bool), mask)


@pytest.mark.parametrize("size", [8, 11, 16, 33])
def test_a_resized_mask_stays_binary_and_covers_its_share(size, tmp_path):
    sample = Sample(save_drawn(tmp_path / "a.png", size=24), "bolt", "crack", save_mask(tmp_path / "m.png", 24))
    item, = read_items([sample], size)
    assert item.image.shape == (3, size, size) and item.mask.shape == (1, size, size)
    assert set(item.mask.unique().tolist()) == {0.0, 1.0} and item.mask.dtype == torch.float32
    assert abs(float(item.mask.mean()) - 0.25) < 0.06


def test_items_of_good_and_of_defective_images_have_the_same_fields(tmp_path):
    category = find_category(make_category(tmp_path), "bolt")
    for item, sample in zip(read_items(category.test, 16), category.test, strict=True):
        assert (item.path, item.category, item.defect, item.label) == (sample.path, "bolt", sample.defect, sample.label)
        assert item.image.dtype == torch.float32 and -1 <= item.image.min() and item.image.max() <= 1
        assert bool(item.mask.any()) == bool(item.label) == (item.defect != "good")


def test_a_mask_of_another_size_than_its_image_is_refused(tmp_path):
    image, mask = save_drawn(tmp_path / "a.png", size=(16, 20)), save_mask(tmp_path / "m.png", (20, 16))
    sample = Sample(image, "bolt", "crack", mask)
    with pytest.raises(UserError, match="16x20 px.*20x16 px; expected the same size") as error:
        read_items([sample], 16)
    assert str(tmp_path / "m.png") in one_line(error)


# The held-out split

def names(count: int, folder: str = "/data") -> list[Sample]:
    return [Sample(Path(folder) / f"{i:03}.png", "bolt", "good") for i in range(count)]


@pytest.mark.parametrize("count", [2, 3, 10, 99, 500])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_the_split_is_disjoint_complete_and_of_the_right_share(count, share):
    samples = names(count)
    train, held_out = split_holdout(samples, share)
    assert sorted(train + held_out, key=lambda s: s.path) == samples
    assert not set(train) & set(held_out) and train and held_out
    assert abs(len(held_out) - share * count) <= max(0.5, 1 - share * count, share * count - count + 1)


def test_the_split_follows_from_the_names_alone():
    train, held_out = split_holdout(names(50), 0.2)
    moved_train, moved_out = split_holdout(names(50, "/elsewhere/deep/down")[::-1], 0.2)
    assert {s.path.name for s in held_out} == {s.path.name for s in moved_out}
    assert {s.path.name for s in train} == {s.path.name for s in moved_train}
    assert train == [s for s in names(50) if s in set(train)]


def test_the_held_out_files_are_spread_over_the_folder():
    _, held_out = split_holdout(names(500), 0.1)
    numbers = [int(s.path.stem) for s in held_out]
    assert sum(n < 250 for n in numbers) > 10 and sum(n >= 250 for n in numbers) > 10


def test_adding_files_moves_few_others():
    _, before = split_holdout(names(200), 0.1)
    train, _ = split_holdout(names(220), 0.1)
    assert len(set(before) & set(train)) <= 3


def test_a_larger_share_holds_out_the_same_files_and_more():
    _, few = split_holdout(names(100), 0.1)
    _, many = split_holdout(names(100), 0.3)
    assert set(few) < set(many)


def test_a_single_image_cannot_be_split():
    with pytest.raises(UserError, match="/data: 1 image; expected at least 2") as error:
        split_holdout(names(1), 0.1)
    one_line(error)


def test_files_that_are_on_their_own_are_held_out_as_they_always_were():
    """Recorded: trained runs must find the images again that they did not see."""
    _, held_out = split_holdout(names(30), 0.2)
    assert [s.path.stem for s in held_out] == ["009", "012", "014", "015", "023", "028"]


@st.composite
def grouped(draw) -> list[Sample]:
    """Images, some on their own, the others in groups of any size and order."""
    groups = draw(st.lists(st.none() | st.integers(0, 7).map(str), min_size=2, max_size=60))
    return [Sample(Path(f"/data/{i:03}.png"), "bolt", "good", group=group) for i, group in enumerate(groups)]


def unit(sample: Sample) -> object:
    return sample.group or sample.path


@settings(deadline=None, max_examples=200)
@given(grouped(), st.floats(0.01, 0.99), st.randoms())
def test_a_group_is_held_out_as_a_whole_or_not_at_all(samples, share, random):
    if len({unit(s) for s in samples}) == 1:
        with pytest.raises(UserError, match=f"/data: {len(samples)} images of one group; expected at least 2"):
            split_holdout(samples, share)
        return
    train, held_out = split_holdout(samples, share)
    assert train and held_out and sorted(train + held_out, key=lambda s: s.path) == samples
    assert not {unit(s) for s in train} & {unit(s) for s in held_out}

    largest = max(sum(unit(s) == one for s in samples) for one in {unit(s) for s in samples})
    assert abs(len(held_out) - share * len(samples)) <= largest

    shuffled = random.sample(samples, len(samples))
    assert set(split_holdout(shuffled, share)[1]) == set(held_out)


# Augmentation

EVERYTHING = dict(flip=True, rotate=30.0, color_jitter=0.3)


def test_nothing_asked_for_changes_nothing():
    images = random_images(4)
    assert torch.equal(augment(images, streams(4), flip=False, rotate=0.0, color_jitter=0.0), images)


def test_each_image_is_varied_by_its_own_stream():
    images = random_images(6)
    together = augment(images, streams(6), **EVERYTHING)
    for i in range(6):
        torch.testing.assert_close(augment(images[i:i + 1], streams(6)[i:i + 1], **EVERYTHING)[0], together[i])
    same = augment(images[:1].expand(6, -1, -1, -1), streams(6), **EVERYTHING)
    assert all((same[0] - same[i]).abs().max() > 0.01 for i in range(1, 6))


def test_images_stay_in_their_range_and_keep_their_shape():
    images = random_images(20)
    varied = augment(images, streams(20), flip=True, rotate=180.0, color_jitter=0.9)
    assert varied.shape == images.shape and varied.dtype == torch.float32
    assert varied.min() >= -1 and varied.max() <= 1


def test_flipping_mirrors_about_half_the_images_left_to_right():
    images = random_images(200, 4)
    flipped = augment(images, streams(200), flip=True, rotate=0.0, color_jitter=0.0)
    mirrored = [torch.equal(f, i.flip(2)) for f, i in zip(flipped, images, strict=True)]
    assert all(m or torch.equal(f, i) for m, f, i in zip(mirrored, flipped, images, strict=True))
    assert 60 < sum(mirrored) < 140


def test_flipping_twice_by_the_same_stream_is_the_identity():
    images = random_images(20)
    once = augment(images, streams(20), flip=True, rotate=0.0, color_jitter=0.0)
    assert not torch.equal(once, images)
    assert torch.equal(augment(once, streams(20), flip=True, rotate=0.0, color_jitter=0.0), images)


def test_whether_an_image_is_flipped_does_not_depend_on_what_else_is_varied():
    images = torch.linspace(-0.5, 0.5, 8).expand(30, 3, 8, 8)
    rising = [augment(images, streams(30), flip=True, rotate=0.0, color_jitter=j)[:, 0, 0].diff().sum(1) > 0
              for j in (0.0, 0.2)]
    assert torch.equal(*rising) and 0 < rising[0].sum() < 30


def test_rotation_turns_by_at_most_so_many_degrees_either_way():
    """A mark on the circle of radius 10 px moves along it."""
    images = torch.full((60, 3, 33, 33), -1.0)
    images[:, :, 15:18, 25:28] = 1
    turned = augment(images, streams(60), flip=False, rotate=30.0, color_jitter=0.0)[:, 0] + 1
    offsets = torch.arange(33.0) - 16
    total = turned.sum(dim=(1, 2))
    x, y = (turned.sum(1) * offsets).sum(1) / total, (turned.sum(2) * offsets).sum(1) / total
    degrees = torch.atan2(y, x).rad2deg()
    assert ((x ** 2 + y ** 2).sqrt() - 10).abs().max() < 0.3
    assert degrees.abs().max() < 31 and degrees.min() < -15 and degrees.max() > 15


def test_rotation_fills_corners_from_the_image_and_keeps_a_constant_one():
    images = torch.full((5, 3, 16, 16), 0.3)
    torch.testing.assert_close(augment(images, streams(5), flip=False, rotate=45.0, color_jitter=0.0), images)


def test_colour_jitter_keeps_places_and_changes_grey_to_grey():
    grey = (torch.linspace(-0.4, 0.4, 16).expand(10, 1, 16, 16)).expand(-1, 3, -1, -1)
    varied = augment(grey, streams(10), flip=False, rotate=0.0, color_jitter=0.2)
    torch.testing.assert_close(varied[:, 0], varied[:, 2], rtol=0, atol=1e-6)
    assert (varied.diff(dim=3) > 0).all() and (varied - grey).abs().max() < 0.6
    assert (varied - grey).abs().amax(dim=(1, 2, 3)).min() > 0.001


@pytest.mark.parametrize("size", [4, 16, 20])
def test_random_crops_are_squares_of_the_image(size):
    images = [to_uint8(Image.fromarray(drawn(i, (16, 24)))) for i in range(8)]
    crops = random_crops(images, size, streams(8))
    assert crops.shape == (8, 3, size, size) and crops.dtype == torch.uint8
    if size <= 16:
        for crop, image in zip(crops, images, strict=True):
            windows = image.unfold(1, size, 1).unfold(2, size, 1).permute(1, 2, 0, 3, 4)
            assert (windows == crop).flatten(2).all(dim=2).any()
    places = {tuple(c[0, 0, :4].tolist()) for c in random_crops([images[0]] * 8, 4, streams(8))}
    assert len(places) > 3
