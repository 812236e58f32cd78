"""Every layout of a data set on disk: how it is recognised, what is listed, and what a user can get wrong."""

import shutil
from collections import Counter
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from helpers import make_category, one_line, save_mask
from trees import TREES, btad, folder, found, ksdd2, line, manifest, mtd, mvtec, put, put_lines, tile

from dbad.data import categories
from dbad.data.categories import find_category, split_holdout
from dbad.data.finding import list_images
from dbad.data.layouts import registry
from dbad.data.layouts.registry import LAYOUTS, open_dataset
from dbad.errors import UserError
from dbad.options.shared import RunOptions

# Recognising

def test_every_layout_has_a_tree_here_and_a_place_on_the_command_line():
    assert {"auto", *TREES} == set(LAYOUTS) == {"auto", *registry.EXPECTED}
    assert get_args(get_type_hints(RunOptions)["layout"]) == LAYOUTS


@pytest.mark.parametrize("layout", TREES)
def test_a_layout_is_recognised_and_given_by_name_is_the_same(layout, tmp_path):
    make, names = TREES[layout]
    dataset = open_dataset(make(tmp_path / "parts"))
    assert dataset == open_dataset(tmp_path / "parts", layout)
    assert (dataset.layout, dataset.root, dataset.names) == (layout, tmp_path / "parts", names)
    for name in names:
        category = dataset.category(name)
        assert category.name == name and category.train and all(s.label == 0 and not s.mask for s in category.train)
        assert {s.category for s in category.train + category.test} == {name}
        assert all(s.path.is_relative_to(category.root.parent) for s in category.train + category.test)


@pytest.mark.parametrize("layout", TREES)
@pytest.mark.parametrize("other", TREES)
def test_no_layout_is_read_as_another(layout, other, tmp_path):
    TREES[layout][0](tmp_path / "parts")
    if other != layout:
        with pytest.raises(UserError) as error:
            open_dataset(tmp_path / "parts", other)
        assert str(tmp_path / "parts") in one_line(error)


@pytest.mark.parametrize("layout", [name for name in TREES if name not in ("folder", "mtd")])
def test_a_data_set_one_folder_deeper_is_pointed_at(layout, tmp_path):
    TREES[layout][0](tmp_path / "parts")
    with pytest.raises(UserError, match=f"found parts/; {tmp_path}/parts has layout {layout}: give that") as error:
        open_dataset(tmp_path)
    one_line(error)


def test_folders_of_categories_go_before_a_list_and_a_list_before_a_single_category(tmp_path):
    """UniAD's lists are put beside the categories of MVTec AD, and beside train/ and test/ of a category alone."""
    manifest(mvtec(tmp_path / "many"))
    assert open_dataset(tmp_path / "many").layout == "mvtec"
    put_lines(tmp_path / "one" / "train.json", line("train/good/a.png", clsname="bolt"))
    assert open_dataset(put(tmp_path / "one", "train/good/a.png")).layout == "manifest"


def test_an_unknown_layout_names_what_was_found_and_what_is_expected(tmp_path):
    put(tmp_path, *(f"{i}.txt" for i in range(12)), "deep/er/a.png")
    with pytest.raises(UserError, match=r"found 0.txt, .* and 5 more; expected CATEGORY/train/good \(mvtec\)") as error:
        open_dataset(tmp_path)
    assert all(f"({name})" in one_line(error) for name in TREES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="found nothing; expected"):
        open_dataset(tmp_path / "empty")
    with pytest.raises(UserError, match="--layout mvtek: expected one of auto, mvtec"):
        open_dataset(tmp_path, "mvtek")


def test_a_data_set_is_found_from_within_it(tmp_path, monkeypatch):
    folder(tmp_path / "parts")
    monkeypatch.chdir(tmp_path / "parts")
    assert open_dataset(Path(".")).names == ("parts",)
    monkeypatch.chdir(tmp_path / "parts" / "Good")
    assert open_dataset(Path("..")).names == ("parts",)


# mvtec and btad

def test_a_category_lists_its_files_in_sorted_order(tmp_path):
    make_category(tmp_path, num_train=12)
    good = tmp_path / "bolt" / "train" / "good"
    put(good, ".hidden.png", "notes.txt", "Thumbs.db", "010b.PNG")
    put(tmp_path, "bolt/test/.ipynb_checkpoints/000.png")
    category = find_category(tmp_path, "bolt")
    assert [s.path.name for s in category.train] == sorted([f"{i:03}.png" for i in range(12)] + ["010b.PNG"])
    assert [(s.defect, s.path.name, s.label) for s in category.test] == [
        ("crack", "000.png", 1), ("crack", "001.png", 1), ("good", "000.png", 0)]
    assert all(s.mask is not None for s in category.test if s.label)
    assert category.name == "bolt" and category.root == tmp_path / "bolt"
    assert list_images(good) == [s.path for s in category.train]


def test_the_test_can_be_limited_to_some_states(tmp_path):
    make_category(tmp_path)
    assert {s.defect for s in find_category(tmp_path, "bolt", ["good"]).test} == {"good"}
    assert {s.defect for s in find_category(tmp_path, "bolt", ["crack"]).test} == {"crack"}
    assert {s.defect for s in find_category(tmp_path, "bolt", ["good", "crack"]).test} == {"good", "crack"}


def test_unknown_states_list_those_there_are(tmp_path):
    make_category(tmp_path)
    with pytest.raises(UserError, match="--item_states crak: .*there are: all crack good") as error:
        find_category(tmp_path, "bolt", ["good", "crak"])
    one_line(error)


def test_masks_that_are_missing_are_missed_and_refused_only_where_they_are_required(tmp_path):
    make_category(tmp_path)
    image, mask = tmp_path / "bolt" / "test" / "crack" / "001.png", "ground_truth/crack/001_mask.png"
    (tmp_path / "bolt" / mask).unlink()
    category = find_category(tmp_path, "bolt")
    assert [s.mask and s.mask.name for s in category.test] == ["000_mask.png", None, None]
    assert [(s.path, s.mask) for s in category.unmasked] == [(image, tmp_path / "bolt" / mask)]
    assert categories.test_images(category) == category.test
    with pytest.raises(UserError, match=f"{image} shows a defect, but there is no mask .*{mask}: 1 of 2") as error:
        categories.test_images(category, "required")
    one_line(error)
    assert categories.test_images(find_category(tmp_path, "bolt", ["good"]), "required")   # not asked for, not missed

    for path in (tmp_path / "bolt" / "ground_truth" / "crack").iterdir():
        path.unlink()
    for remove in (None, "ground_truth/crack", "ground_truth"):
        if remove:
            (tmp_path / "bolt" / remove).rmdir()
        category = find_category(tmp_path, "bolt")
        assert len(category.unmasked) == 2 and all(s.mask is None for s in category.test)
    with pytest.raises(UserError, match="000.png shows a defect, but there is no mask: 2 of 2 defective images"):
        categories.test_images(category, "required")


def test_a_category_without_a_test_folder_can_be_trained_on(tmp_path):
    shutil.rmtree(make_category(tmp_path) / "bolt" / "test")
    assert find_category(tmp_path, "bolt").test == ()


def test_a_misspelt_item_gets_the_nearest_name_suggested(tmp_path):
    put(make_category(make_category(tmp_path, "bolt"), "washer"), "papers/a.txt")
    for item, message in (("wascher", "did you mean washer"), ("qqq", "there are: bolt, washer"),
                          ("papers", "folder is there, but layout mvtec expects CATEGORY/train/good")):
        with pytest.raises(UserError, match=f"--item {item}: .*{message}") as error:
            find_category(tmp_path, item)
        one_line(error)


@pytest.mark.parametrize("layout", ["auto", "mvtec", "btad"])
def test_a_category_given_as_the_data_set_is_recognised(layout, tmp_path):
    make_category(tmp_path)
    with pytest.raises(UserError, match=f"give the data set: --dataset_path {tmp_path} --item bolt"):
        find_category(tmp_path / "bolt", "bolt", layout=layout)


@pytest.mark.parametrize("there, message", [("nothing", "found nothing"), ("file", "found a file")])
def test_a_data_set_that_is_not_a_folder_is_refused(there, message, tmp_path):
    path = tmp_path / "data"
    if there == "file":
        path.write_text("")
    with pytest.raises(UserError, match=f"--dataset_path .*{message}") as error:
        find_category(path, "bolt")
    assert str(path) in one_line(error)


def test_a_category_without_good_images_is_refused(tmp_path):
    good = make_category(tmp_path) / "bolt" / "train" / "good"
    for path in good.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="no images") as error:
        find_category(tmp_path, "bolt")
    assert str(good) in one_line(error)
    good.rmdir()
    with pytest.raises(UserError, match="no such folder") as error:
        find_category(tmp_path, "bolt")
    assert str(good) in one_line(error)


def test_ok_of_btad_is_good_and_ko_keeps_its_name(tmp_path):
    category = open_dataset(btad(tmp_path)).category("01")
    assert found(category, tmp_path / "01") == (["train/ok/0.bmp"], {
        "test/ok/1.bmp": ("good", None), "test/ko/2.bmp": ("ko", "ground_truth/ko/2.png"),
        "test/ko/3.bmp": ("ko", "ground_truth/ko/3.bmp")})


# mtd

def test_tiles_of_mtd_are_never_divided(tmp_path):
    """Tile 1000 has one crack, 2000 shows a blowhole at every exposure, the other twelve are good."""
    category = open_dataset(mtd(tmp_path)).category("magnetic_tile")
    good = Counter(s.group for s in category.train)
    good_test = Counter(s.group for s in category.test if s.label == 0)
    assert set(good.values()) == set(good_test.values()) == {6}
    assert (len(good), len(good_test)) == (10, 2) and not good.keys() & good_test.keys()
    assert [(s.path.name, s.defect, s.mask.name, s.group) for s in category.test if s.label] == [
        *((f"exp{e}_num_{1980 + 20 * e}.jpg", "blowhole", f"exp{e}_num_{1980 + 20 * e}.png", "exp1_num_2000")
          for e in range(1, 7)), ("exp2_num_1020.jpg", "crack", "exp2_num_1020.png", "exp1_num_1000")]
    assert [note[:70] for note in category.notes] == [
        "5 good images left out, as their tile shows a defect at another exposu"]
    assert category == open_dataset(tmp_path).category("magnetic_tile")
    train, held_out = split_holdout(category.train, 0.1)
    assert len(held_out) == 6 and not {s.group for s in train} & {s.group for s in held_out}


def test_mtd_may_lie_in_a_folder_of_its_archive(tmp_path):
    inner = mtd(tmp_path / "archive" / "Magnetic-tile-defect-datasets.-master")
    category = open_dataset(tmp_path / "archive").category("magnetic_tile")
    assert category == open_dataset(inner).category("magnetic_tile") and category.root == inner


def groups(root: Path) -> list[list[int]]:
    """Frames by tile, in the order of the frames; no tile may be left out or shown to be defective."""
    category = open_dataset(root).category("magnetic_tile")
    tiles = {}
    for sample in category.train + category.test:
        tiles.setdefault(sample.group, []).append(int(sample.path.stem.split("_")[2]))
    return sorted(sorted(frames) for frames in tiles.values())


def test_a_new_tile_starts_where_frames_jump_or_where_all_exposures_have_come(tmp_path):
    first, second, third = tile(1000), tile(1120), tile(1500)
    assert groups(put(tmp_path / "a", *first, *second, *third)) == [
        [*range(1000, 1101, 20)], [*range(1120, 1221, 20)], [*range(1500, 1601, 20)]]
    jump = tile(1000, step=260), tile(3000, exposures=(4, 5, 6)), tile(3301), tile(3421)
    assert list(map(len, groups(put(tmp_path / "b", *(n for names in jump for n in names))))) == [6, 3, 6, 6]


def test_tiles_whose_frames_mingle_or_lack_exposures_stay_together(tmp_path):
    other = tile(9000)
    for name, first, second in [
            ("mingled", tile(1000), tile(1050)),
            ("begun in the middle", tile(1000, exposures=(3, 4, 5, 6, 1, 2)), []),
            ("an exposure missing", tile(1000, exposures=(2, 3, 4, 5, 6)), tile(1150)),
            ("at exposure 0 as well", tile(1000, exposures=range(7)), tile(1010, exposures=range(7)))]:
        found = groups(put(tmp_path / name, *first, *second, *other))
        assert list(map(len, found)) == [(len(first) + len(second)) // 2, 6], name


def test_a_file_of_mtd_with_another_name_is_refused(tmp_path):
    put(mtd(tmp_path), "MT_Free/Imgs/copy of exp1.jpg")
    with pytest.raises(UserError, match="copy of exp1.jpg: expected a name such as exp1_num_4727.jpg") as error:
        find_category(tmp_path, "magnetic_tile")
    one_line(error)


def test_a_defective_tile_without_its_mask_is_missed(tmp_path):
    mask = mtd(tmp_path) / "MT_Crack/Imgs/exp2_num_1020.png"
    mask.unlink()
    assert [s.mask for s in find_category(tmp_path, "magnetic_tile").unmasked] == [mask]


def test_files_of_mtd_that_are_no_images_of_its_kind_are_named(tmp_path):
    put(mtd(tmp_path), "MT_Free/Imgs/exp1_num_99.png", "MT_Free/Imgs/late/exp1_num_7.jpg", "MT_Crack/exp1_num_7.jpg")
    put(tmp_path, "MT_Crack/more/exp1_num_8.jpg")
    assert set(find_category(tmp_path, "magnetic_tile").notes[:-1]) == {
        "1 left out, as no .jpg has that name (MT_Free/Imgs/exp1_num_99.png)",
        "MT_Free/Imgs/late: 1 image left out, as images are expected in MT_Free/Imgs itself",
        "MT_Crack/more: 1 image left out, as images are expected in MT_Crack/Imgs itself",
        "MT_Crack: 1 image left out; expected MT_Crack/Imgs (MT_Crack/exp1_num_7.jpg)"}


# ksdd2

def test_masks_of_ksdd2_tell_what_is_defective(tmp_path):
    category = open_dataset(ksdd2(tmp_path)).category("kolektorsdd2")
    assert found(category, tmp_path) == (["train/10000.png", "train/10002.png"], {
        "test/20000.png": ("good", None), "test/20001.png": ("defect", "test/20001_GT.png")})
    assert category.notes == (
        "train: 2 left out, as expected names are NUMBER.png for images and NUMBER_GT.png for masks "
        "(train/10001 (copy).png, "
        "train/10001_GT (copy).png)", "1 defective image of train left out")


def test_sub_folders_and_masks_without_image_of_ksdd2_are_named(tmp_path):
    put(ksdd2(tmp_path), "test/more/20002.png", "test/20009_GT.png")
    assert {"test: 1 left out, as expected names are NUMBER.png for images and NUMBER_GT.png for masks "
            "(test/20009_GT.png)",
            "test/more: 1 image left out, as images are expected in test itself"} < set(
                find_category(tmp_path, "kolektorsdd2").notes)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1"])
def test_masks_of_ksdd2_may_have_any_mode(mode, tmp_path):
    ksdd2(tmp_path)
    save_mask(tmp_path / "test" / "20000_GT.png", value=0, mode=mode)
    save_mask(tmp_path / "test" / "20001_GT.png", value=255, mode=mode)
    assert [s.label for s in find_category(tmp_path, "kolektorsdd2").test] == [0, 1]


@pytest.mark.parametrize("spoil, message", [
    (Path.unlink, "10002_GT.png: no such file"), (lambda p: p.write_bytes(b""), "10002_GT.png: not an image"),
    (lambda p: p.write_bytes(p.read_bytes()[:45]), "10002_GT.png: truncated")])
def test_an_image_of_ksdd2_without_a_readable_mask_is_refused(spoil, message, tmp_path):
    spoil(ksdd2(tmp_path) / "train" / "10002_GT.png")
    with pytest.raises(UserError, match=message) as error:
        find_category(tmp_path, "kolektorsdd2")
    one_line(error)


# folder

def test_a_folder_of_images_is_good_and_has_no_test(tmp_path):
    category = open_dataset(put(tmp_path / "parts", "b.png", "a.jpg", "notes.txt", "papers/a.txt")).category("parts")
    assert found(category, tmp_path / "parts") == (["a.jpg", "b.png"], {})
    assert category.notes == ("2 images, all taken as good; none to test",)


@pytest.mark.parametrize("good", ["good", "ok", "Normal"])
def test_of_folders_of_images_the_good_one_is_divided_and_the_others_are_defects(good, tmp_path):
    put(tmp_path / "parts", *(f"{good}/{i:03}.png" for i in range(50)), "crack/a.png", "Hole/a.png", "crack/deep/b.png")
    category = open_dataset(tmp_path / "parts").category("parts")
    assert Counter(s.defect for s in category.test) == {"good": 10, "crack": 2, "Hole": 1}
    assert all(s.mask is None for s in category.test) and len(category.train) == 40
    assert not {s.path for s in category.train} & {s.path for s in category.test}
    before = {s.path for s in category.test}
    put(tmp_path / "parts", f"{good}/new.png")
    assert len(before - {s.path for s in open_dataset(tmp_path / "parts").category("parts").test}) <= 1


def test_a_single_good_image_is_trained_on(tmp_path):
    put(tmp_path / "parts", "good/a.png", "crack/a.png")
    assert found(find_category(tmp_path / "parts", "parts"), tmp_path / "parts") == (
        ["good/a.png"], {"crack/a.png": ("crack", None)})


def test_a_folder_that_is_one_category_has_the_name_that_the_user_gives(tmp_path):
    for root, names in ((tmp_path / "photos", ("a.jpg", "b.jpg")), (tmp_path / "kinds", ("good/a.png", "crack/a.png"))):
        put(root, *names)
        category = find_category(root, "bolt")
        assert category.name == "bolt" and category.root == root and {s.category for s in category.good} == {"bolt"}
        assert category.notes[0] == f"the name given to the images in {root}"
        assert find_category(root, root.name).train == open_dataset(root).category(root.name).train
    with pytest.raises(UserError, match="--item crack: no such category in .*the folder is there"):
        find_category(tmp_path / "kinds", "crack")


@pytest.mark.parametrize("layout", ["auto", "folder"])
def test_folders_of_categories_may_hold_good_images_alone_or_kinds(layout, tmp_path):
    put(tmp_path, "bolt/a.jpg", "bolt/b.jpg", "nut/good/a.png", "nut/crack/a.png", "papers/a.txt")
    dataset = open_dataset(tmp_path, layout)
    assert (dataset.layout, dataset.names) == ("folder", ("bolt", "nut"))
    assert found(dataset.category("bolt"), tmp_path / "bolt") == (["a.jpg", "b.jpg"], {})
    assert dataset.category("bolt").notes == ("2 images, all taken as good; none to test",)
    assert found(dataset.category("nut"), tmp_path / "nut") == (["good/a.png"], {"crack/a.png": ("crack", None)})
    with pytest.raises(UserError, match="--item bold: .*did you mean bolt"):
        dataset.category("bold")


@pytest.mark.parametrize("names", [("a.png", "good/a.png"), ("images/a.png", "masks/a.png"),
                                   ("very/deep/good/a.png",), ("bolt/a.png", "nut/deep/a.png")],
                         ids=["images beside folders", "masks", "too deep", "one too deep"])
def test_folders_that_do_not_say_what_is_good_are_not_guessed(names, tmp_path):
    with pytest.raises(UserError, match=r"one of them called good, ok or normal \(folder\)") as error:
        open_dataset(put(tmp_path / "parts", *names))
    one_line(error)


@pytest.mark.parametrize("names", [("10_GT.png", "10.png"), ("a_mask.png", "a.png", "b.png"), ("a.jpg", "a.png")])
def test_masks_among_the_images_are_not_taken_for_good_ones(names, tmp_path):
    """As in train/ of KolektorSDD2 or in Imgs/ of MTD."""
    with pytest.raises(UserError, match=f"masks seem to lie among the images .*{names[0]}.*; expected images alone"):
        open_dataset(put(tmp_path, *names))
