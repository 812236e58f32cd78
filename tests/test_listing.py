"""Sub-folders, masks beside images, names of the good: which files are read, as what, and what is said of others."""

import os
import socket
from collections import Counter
from pathlib import Path

import pytest
from helpers import make_category, one_line, save_drawn, save_mask
from trees import CSV, found, line, manifest, mvtec_ad_2, put, put_lines

from dbad.data.categories import find_category, split_category, split_holdout
from dbad.data.images import read_items
from dbad.data.layouts.listing import match, split_masks
from dbad.data.layouts.registry import open_dataset
from dbad.data.splits import files_of
from dbad.errors import UserError
from dbad.records import Category, Sample


@pytest.fixture
def bolt(tmp_path) -> Path:
    """A category of empty files: two good images to train on, one of the test, two cracks with masks."""
    return put(tmp_path / "bolt", "train/good/0.png", "train/good/1.png", "test/good/0.png", "test/crack/000.png",
               "test/crack/001.png", "ground_truth/crack/000_mask.png", "ground_truth/crack/001.png")


def category(root: Path, **how) -> Category:
    return find_category(root.parent, root.name, **how)


def masks(root: Path) -> dict[str, str | None]:
    return {path: mask for path, (defect, mask) in found(category(root), root)[1].items() if defect != "good"}


# Sub-folders

def test_images_in_sub_folders_are_read_beside_the_others(bolt):
    put(bolt, "train/good/day1/0.png", "train/good/day1/1.png", "train/good/day2/late/0.png", "train/good/.cache/9.png",
        "test/good/day1/5.png", "test/crack/day1/000.png")
    train, test = found(category(bolt), bolt)
    assert train == [f"train/good/{name}.png" for name in ("0", "1", "day1/0", "day1/1", "day2/late/0")]
    assert list(test) == ["test/crack/000.png", "test/crack/001.png", "test/crack/day1/000.png", "test/good/0.png",
                          "test/good/day1/5.png"]
    assert category(bolt).notes == (
        "train/good: images in 2 sub-folders, each of them trained on or held out as a whole",)


def test_a_sub_folder_is_trained_on_or_held_out_as_a_whole(bolt):
    put(bolt, *(f"train/good/day{day}/{i}.png" for day in range(8) for i in range(5)))
    train, held_out = split_category(category(bolt), 0.25)
    sides = [{s.path.parent.name for s in side} - {"good"} for side in (train, held_out)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 8 and len(held_out) in range(8, 14)
    assert [s.group for s in category(bolt).train[:3]] == [None, None, "day0"]


def test_one_sub_folder_that_has_everything_is_no_group(bolt):
    for path in (bolt / "train/good").iterdir():
        path.unlink()
    put(bolt, *(f"train/good/images/{i}.png" for i in range(10)))
    assert {s.group for s in category(bolt).train} == {None} and not category(bolt).notes
    flat = [Sample(Path(f"{i}.png"), "bolt", "good") for i in range(10)]
    assert [[s.path.name for s in part] for part in split_category(category(bolt), 0.3)] == [
        [s.path.name for s in part] for part in split_holdout(flat, 0.3)]       # as if there were no folder


def test_links_to_folders_are_followed_but_never_for_ever(bolt):
    put(bolt.parent / "far", "a.png")
    os.symlink(bolt.parent / "far", bolt / "train/good/far")
    os.symlink("..", bolt / "train/good/up")
    os.symlink("self", bolt / "train/good/self")
    assert found(category(bolt), bolt)[0] == [f"train/good/{name}.png" for name in ("0", "1", "far/a")]


def test_what_is_not_read_is_named(bolt):
    put(bolt, "train/0.png", "train/crack/0.png", "train/crack/deep/1.png", "test/0.png", "ground_truth/0.png",
        "ground_truth/hole/0.png", "ground_truth/good/0.png", "train/notes/a.txt",
        "more/crack/0.png", "papers/a.txt")
    assert set(category(bolt).notes) == {
        "train/crack: 2 images left out, as training uses good images only",
        "train: 1 image left out; expected train/good (train/0.png)",
        "test: 1 image left out; expected a folder such as test/good or test/crack (test/0.png)",
        "ground_truth: 1 image left out; expected a folder such as ground_truth/crack (ground_truth/0.png)",
        "ground_truth/hole: 1 image left out, as test has no folder of that name",
        "more: 1 image left out, as only train, validation, test and ground_truth are read"}


# Masks in the ground truth

def test_masks_lie_in_the_same_sub_folder_or_are_told_by_name(bolt):
    put(bolt, "test/crack/day1/000.png", "ground_truth/crack/day1/000.png", "test/crack/day2/002.png",
        "ground_truth/crack/002_mask.png", "test/crack/003.png", "ground_truth/crack/day3/003.png",
        "test/crack/day1/004.png", "test/crack/day2/004.png", "ground_truth/crack/004_mask.png")
    truth = "ground_truth/crack"
    assert masks(bolt) == {
        "test/crack/000.png": f"{truth}/000_mask.png", "test/crack/001.png": f"{truth}/001.png",
        "test/crack/003.png": f"{truth}/day3/003.png", "test/crack/day1/000.png": f"{truth}/day1/000.png",
        "test/crack/day1/004.png": None, "test/crack/day2/002.png": f"{truth}/002_mask.png",
        "test/crack/day2/004.png": None}                # of two images of one name it may be that of either
    assert category(bolt).notes == (
        "1 mask left out, as no image has that name (ground_truth/crack/004_mask.png)",)


def test_a_mask_too_many_and_a_second_one_are_named(bolt):
    put(bolt, "ground_truth/crack/999_mask.png", "ground_truth/crack/000.png", "ground_truth/crack/001_GT.bmp")
    assert masks(bolt) == {"test/crack/000.png": "ground_truth/crack/000_mask.png",
                           "test/crack/001.png": "ground_truth/crack/001_GT.bmp"}
    assert category(bolt).notes == (
        "2 masks left out, as the image has another one (ground_truth/crack/000.png, "
        "ground_truth/crack/001.png)",
        "1 mask left out, as no image has that name (ground_truth/crack/999_mask.png)")


def test_notes_name_few_files_of_many(bolt):
    put(bolt, *(f"ground_truth/crack/{i}_mask.png" for i in range(100, 150)))
    assert category(bolt).notes == (
        "50 masks left out, as no image has that name (ground_truth/crack/100_mask.png, "
        "ground_truth/crack/101_mask.png, ground_truth/crack/102_mask.png and 47 more)",)


def test_the_masks_in_a_folder_of_the_image_s_name_are_read_as_one(tmp_path):
    """As in MVTec LOCO."""
    root = make_category(tmp_path) / "bolt"
    for i in range(3):
        save_mask(root / f"ground_truth/logical/000/{i:03}.png", size=16, value=200 + i)
    save_drawn(root / "test/logical/000.png")
    save_drawn(root / "test/logical/001.png")
    logical = [s for s in category(root).test if s.defect == "logical"]
    assert [s.mask for s in logical] == [root / "ground_truth/logical/000", None]       # 001.png there is of 000
    assert len(files_of(logical[0])) == 4 and not category(root).notes
    assert read_items(logical, None)[0].mask.sum() == 64


def test_two_images_of_one_name_share_their_mask(bolt):
    put(bolt, "test/crack/000.bmp")
    assert masks(bolt)["test/crack/000.bmp"] == masks(bolt)["test/crack/000.png"] == "ground_truth/crack/000_mask.png"


# Masks beside images

@pytest.mark.parametrize("name", ["002_mask.png", "002_GT.bmp", "002_Mask.png", "masks/002.png", "gt/002_mask.png"])
def test_a_mask_beside_its_image_is_taken_as_its_mask(bolt, name):
    put(bolt, "test/crack/002.png", f"test/crack/{name}")
    assert masks(bolt)["test/crack/002.png"] == f"test/crack/{name}" and len(masks(bolt)) == 3
    assert category(bolt).notes == (f"1 mask among the images, used as their masks (test/crack/{name})",)


def test_a_mask_in_the_ground_truth_goes_before_one_beside_the_image(bolt):
    put(bolt, "test/crack/000_mask.png", "test/crack/001_mask.png", "test/crack/007_mask.png")
    assert masks(bolt) == {"test/crack/000.png": "ground_truth/crack/000_mask.png",
                           "test/crack/001.png": "ground_truth/crack/001.png"}
    assert category(bolt).notes == (
        "2 masks among the images left out, as the ground truth has its own (test/crack/000_mask.png, "
        "test/crack/001_mask.png)", "1 mask left out, as no image has that name (test/crack/007_mask.png)")


def test_masks_among_good_images_are_neither_trained_on_nor_inspected(bolt):
    put(bolt, "train/good/0_mask.png", "test/good/0_GT.png", "test/good/masks/0.png")
    train, test = found(category(bolt), bolt)
    assert train == ["train/good/0.png", "train/good/1.png"] and list(test)[2:] == ["test/good/0.png"]
    assert category(bolt).notes == ("1 mask of good images left out (train/good/0_mask.png)",
                                    "2 masks of good images left out (test/good/0_GT.png, test/good/masks/0.png)")


def test_names_like_those_of_masks_are_images_where_nothing_else_is_there(bolt):
    """A data set of face masks, say."""
    put(bolt, "test/hole/a_mask.png", "test/hole/b_mask.png", "ground_truth/hole/a_mask_mask.png",
        "ground_truth/hole/b_mask.png", "test/masks/0.png")
    assert {path: mask for path, mask in masks(bolt).items() if "crack" not in path} == {
        "test/hole/a_mask.png": "ground_truth/hole/a_mask_mask.png",
        "test/hole/b_mask.png": "ground_truth/hole/b_mask.png", "test/masks/0.png": None}
    folder = Path("crack")
    assert split_masks(folder, [folder / "masks/0.png"]).images == [folder / "masks/0.png"]


def test_the_ground_truth_may_lie_in_the_test(bolt):
    (bolt / "ground_truth").rename(bolt / "test/ground_truth")
    assert masks(bolt) == {"test/crack/000.png": "test/ground_truth/crack/000_mask.png",
                           "test/crack/001.png": "test/ground_truth/crack/001.png"}


def test_masks_are_found_whatever_the_order_of_the_files():
    images = [Path("i/a.png"), Path("i/day/a.png"), Path("i/day/b.png")]
    truth = [Path("t/a.png"), Path("t/a_mask.png"), Path("t/b.png"), Path("t/day/a_GT.png"), Path("t/c.png")]
    for order in (truth, truth[::-1]):
        result = match(images, Path("i"), order, Path("t"))
        assert result.masks == {images[0]: truth[1], images[1]: truth[3], images[2]: truth[2]}
        assert (result.second, result.unused) == ([truth[0]], [truth[4]])


# Plain folders

def test_folders_of_images_have_masks_beside_them_or_in_a_folder_of_their_own(tmp_path):
    root = put(tmp_path / "parts", *(f"good/day{i % 5}/{i}.png" for i in range(20)), "crack/a.png", "crack/a_GT.png",
               "crack/deep/b.png", "hole/a.png", "ground_truth/hole/a_mask.png", "ground_truth/dent/a.png",
               "good/day0/0_mask.png")
    data = open_dataset(root).category("parts")
    assert {s.path.relative_to(root).as_posix(): s.mask and s.mask.relative_to(root).as_posix()
            for s in data.test if s.label} == {
        "crack/a.png": "crack/a_GT.png", "crack/deep/b.png": None, "hole/a.png": "ground_truth/hole/a_mask.png"}
    good = [{s.path.parent.name for s in side if not s.label} for side in (data.train, data.test)]
    assert (len(good[0]), len(good[1])) == (4, 1) and not good[0] & good[1]
    assert set(data.notes) == {
        "1 mask of good images left out (good/day0/0_mask.png)",
        "good: images in 5 sub-folders, each of them trained on or held out as a whole",
        "1 mask among the images, used as their masks (crack/a_GT.png)",
        "ground_truth/dent: 1 image left out, as there is no folder of images of that name"}


def test_a_single_folder_of_defects_may_have_its_masks_in_a_single_folder(tmp_path):
    root = put(tmp_path / "parts", "ok/a.png", "ok/b.png", "bad/0.png", "bad/1.png", "masks/0.png", "masks/1_mask.png")
    test = open_dataset(root).category("parts").test
    assert [s.mask and s.mask.name for s in test if s.label] == ["0.png", "1_mask.png"]
    data = open_dataset(put(root, "worse/0.png")).category("parts")
    assert not any(s.mask for s in data.test) and data.notes == (
        "masks: 2 images left out; expected a folder such as masks/crack (masks/0.png, masks/1_mask.png)",)


# Names of the good

@pytest.mark.parametrize("train", ["good", "Good", "OK", "normal"])
@pytest.mark.parametrize("test", ["good", "Good", "ok", "NORMAL"])
def test_good_images_may_be_called_good_ok_or_normal_in_any_case(bolt, train, test):
    (bolt / "train/good").rename(bolt / f"train/{train}")
    (bolt / "test/good").rename(bolt / f"test/{test}")
    dataset = open_dataset(bolt.parent)
    assert dataset.layout == ("btad" if train == "OK" else "mvtec") and dataset.names == ("bolt",)
    data = dataset.category("bolt")
    assert len(data.train) == 2 and Counter(s.defect for s in data.test) == {"crack": 2, "good": 1}
    assert len(dataset.category("bolt", ["OK"]).test) == 1          # so may the state


def test_categories_with_any_of_the_names_are_one_data_set(bolt):
    put(bolt.parent, "nut/train/ok/0.png", "pin/train/Normal/0.png", "papers/a.png")
    assert open_dataset(bolt.parent).names == ("bolt", "nut", "pin")
    assert open_dataset(bolt.parent).layout == "mvtec"


@pytest.mark.parametrize("split", ["train", "test", "validation"])
def test_two_names_of_the_good_in_one_place_are_refused(bolt, split):
    put(bolt, f"{split}/good/0.png", f"{split}/normal/0.png")
    with pytest.raises(UserError, match=f"bolt/{split}: folders good and normal both stand for good images") as error:
        category(bolt)
    one_line(error)


def test_two_good_folders_of_images_are_refused(tmp_path):
    put(tmp_path / "parts", "Good/a.png", "ok/a.png", "crack/a.png")
    with pytest.raises(UserError, match="parts: folders Good and ok both stand for good images; expected one of them"):
        open_dataset(tmp_path / "parts").category("parts")


def test_lists_may_call_the_good_likewise(tmp_path):
    put_lines(manifest(tmp_path / "m") / "test.json", line("bolt/t.png", 0, label_name="OK"))
    assert [s.defect for s in open_dataset(tmp_path / "m").category("bolt").test] == ["good"]
    put_lines(tmp_path / "m" / "test.json", line("bolt/x.png", 1, label_name="Normal"))
    with pytest.raises(UserError, match=r"label 1 \(defective\) with label_name Normal"):
        open_dataset(tmp_path / "m")
    put_lines(tmp_path / "v" / "visa.csv", CSV[0], "pin,train,Good,a.png,", "pin,test,OK,b.png,")
    put(tmp_path / "v", "a.png", "b.png")
    data = open_dataset(tmp_path / "v").category("pin")
    assert [(s.path.name, s.defect) for s in data.train + data.test] == [("a.png", "good"), ("b.png", "good")]


# Images that the data set itself holds out

def test_mvtec_ad_2_holds_out_its_validation_images(tmp_path):
    root = mvtec_ad_2(tmp_path) / "can"
    data = category(root)
    train, test = found(data, root)
    assert train == ["train/good/000_regular.png", "train/good/001_overexposed.png"]
    assert test == {"test_public/bad/000_regular.png": ("bad", "test_public/ground_truth/bad/000_regular_mask.png"),
                    "test_public/bad/001_shift_1.png": ("bad", "test_public/ground_truth/bad/001_shift_1_mask.png"),
                    "test_public/good/000_regular.png": ("good", None)}
    assert data.layout == "mvtec_ad_2" and not data.unmasked
    assert split_category(data, 0.1) == (list(data.train), list(data.held_out))
    assert [s.path for s in data.held_out] == [root / "validation/good/000_regular.png"]
    assert data.notes == (
        "validation/good: 1 good image held out, instead of a share of the training images",
        f"test_private: 1 image without label, not in the test; --images {root / 'test_private'} inspects them",
        f"test_private_mixed: 1 image without label, not in the test; --images {root / 'test_private_mixed'} inspects "
        "them")


def test_without_images_of_its_own_a_share_is_held_out(tmp_path):
    root = mvtec_ad_2(tmp_path) / "can"
    (root / "validation/good/000_regular.png").unlink()
    train, held_out = split_category(category(root), 0.1)
    assert (len(train), len(held_out)) == (1, 1) and not category(root).held_out


def test_so_does_mvtec_loco(bolt):
    put(bolt, "validation/good/a.png", "validation/good/b.png", "validation/c.png")
    train, held_out = split_category(category(bolt), 0.5)
    assert [s.path.name for s in train] == ["0.png", "1.png"] and [s.path.name for s in held_out] == ["a.png", "b.png"]
    assert "validation: 1 image left out; expected validation/good (validation/c.png)" in category(bolt).notes


# What is no file

@pytest.fixture
def specials(bolt):
    """A named pipe among the training images, one among the cracks and a socket among the masks."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(bolt / "train/good/pipe.png")
    os.mkfifo(bolt / "test/crack/pipe.png")
    before = os.getcwd()
    os.chdir(bolt / "ground_truth/crack")       # names of sockets are short
    with socket.socket(socket.AF_UNIX) as place:
        place.bind("s.png")
    os.chdir(before)
    return bolt


def test_named_pipes_and_sockets_are_left_out_and_named(specials):
    data = category(specials)
    assert all(s.path.name != "pipe.png" for s in data.train + data.test)
    assert set(data.notes) == {"1 left out that is no file (train/good/pipe.png: a named pipe)",
                               "1 left out that is no file (test/crack/pipe.png: a named pipe)",
                               "1 left out that is no file (ground_truth/crack/s.png: a socket)"}


def test_a_name_that_is_too_long_for_a_mask_s_has_none(bolt):
    name = "x" * 250
    put(bolt, f"test/crack/{name}.png")
    assert [s.path.stem for s in category(bolt).unmasked] == [name]


def test_a_file_name_that_is_no_text_is_split_like_any_other(bolt):
    try:
        os.close(os.open(os.fsencode(bolt / "train/good/caf") + b"\xe9.png", os.O_CREAT))
    except OSError:
        pytest.skip("this file system has no such names")
    train, held_out = split_category(category(bolt), 0.3)
    assert len(train) + len(held_out) == 3
