"""Data sets that are told by a list: VisA's CSV, and the JSON lines of UniAD and DiAD."""

import json

import pytest
from helpers import one_line
from trees import CSV, VISA_FILES, VISA_FOUND, found, line, manifest, put, put_lines, visa

from dbad.data.layouts.registry import open_dataset
from dbad.errors import UserError

# visa

def test_visa_follows_its_list_for_one_class(tmp_path):
    assert found(open_dataset(visa(tmp_path)).category("candle"), tmp_path) == VISA_FOUND


def test_another_list_serves_where_that_one_is_missing_and_its_defective_training_images_are_left_out(tmp_path):
    (visa(tmp_path) / "split_csv" / "1cls.csv").unlink()
    put_lines(tmp_path / "split_csv" / "0_2cls_fewshot.csv", *CSV[:4], CSV[4].replace("test", "train"))
    category = open_dataset(tmp_path).category("candle")
    assert found(category, tmp_path) == (VISA_FILES[:2], {VISA_FILES[2]: ("good", None)})
    assert category.notes == ("1 defective image listed for training left out",)


@pytest.mark.parametrize("given, images, prefix", [
    ("VisA", "VisA", ""), ("VisA", "VisA/visa", ""), ("VisA", "VisA/visa", "visa/"),
    ("VisA/visa", "VisA/visa", ""), ("VisA/visa", "VisA/visa", "visa/")])
def test_visa_csv_may_lie_with_the_categories_or_beside_their_folder(given, images, prefix, tmp_path):
    """Its paths start where it lies, or in that folder."""
    put_lines(tmp_path / "VisA" / "visa.csv", *(row.replace("candle/", f"{prefix}candle/").replace(
        "pcb1/", f"{prefix}pcb1/") for row in CSV))
    put(tmp_path / images, *VISA_FILES)
    dataset = open_dataset(tmp_path / given)
    assert dataset.layout == "visa" and dataset.names == ("candle", "pcb1")
    category = dataset.category("candle")
    assert found(category, tmp_path / images) == VISA_FOUND
    assert all(s.path.is_relative_to(category.root.parent) for s in category.train + category.test)


@pytest.mark.parametrize("rows", [CSV, ("made,by,me",)])
def test_a_visa_csv_that_is_about_another_folder_is_passed_over(rows, tmp_path):
    put_lines(tmp_path / "visa.csv", *rows)
    put(tmp_path, *VISA_FILES, "mine/a.png")
    assert open_dataset(tmp_path / "mine").layout == "folder"


def test_categories_that_were_not_unpacked_are_not_there(tmp_path):
    put_lines(tmp_path / "split_csv" / "1cls.csv", *CSV)
    put(tmp_path, VISA_FILES[-1])
    assert open_dataset(tmp_path).names == ("pcb1",)


CSV_MISTAKES = {
    "no columns": (("candle,train,normal",), "1cls.csv: no column object split label image mask; expected object,"),
    "empty": ((), "1cls.csv: no column object"),
    "no rows": (CSV[:1], "1cls.csv: lists no images"),
    "a cut row": ((*CSV, "candle,train"), "1cls.csv, line 7: split 'train' and label None; expected train or test"),
    "another split": ((*CSV, "candle,val,normal,a.JPG,"), "line 7: split 'val'"),
    "another label": ((*CSV, "candle,test,odd,a.JPG,"), "line 7: .*label 'odd'; expected .* normal or anomaly"),
    "no image": ((*CSV, "candle,test,normal,,"), "line 7: path ''"),
    "a path out of it": ((*CSV, "candle,test,normal,../a.JPG,"), r"line 7: path '\.\./a.JPG'; expected one relative"),
    "nothing there": ((CSV[0], "candle,test,normal,x/a.JPG,"), "line 2: no file x/a.JPG in .* or in"),
}


@pytest.mark.parametrize("name", CSV_MISTAKES)
def test_a_wrong_list_of_visa_is_told_with_its_line(name, tmp_path):
    rows, message = CSV_MISTAKES[name]
    put_lines(visa(tmp_path) / "split_csv" / "1cls.csv", *rows)
    with pytest.raises(UserError, match=message) as error:
        open_dataset(tmp_path)
    assert str(tmp_path / "split_csv" / "1cls.csv") in one_line(error)


def test_a_list_that_is_no_text_is_refused(tmp_path):
    (visa(tmp_path) / "split_csv" / "1cls.csv").write_bytes(b"object,split\xff\xfe,label\n")
    with pytest.raises(UserError, match="1cls.csv: not readable as CSV") as error:
        open_dataset(tmp_path)
    one_line(error)


@pytest.mark.parametrize("layout, name, message", [
    (visa, VISA_FILES[0], "1cls.csv, line 3: no such file .*Normal/0000.JPG"),
    (manifest, "bolt/t.png", "test.json, line 1: no such file .*bolt/t.png")])
def test_a_file_that_is_listed_and_missing_is_named(layout, name, message, tmp_path):
    (layout(tmp_path) / name).unlink()
    dataset = open_dataset(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        dataset.category(dataset.names[0])
    one_line(error)
    assert dataset.category(dataset.names[1]).train


# manifest

MANIFEST_FOUND = (["bolt/a.png", "bolt/b.png"], {
    "bolt/t.png": ("good", None), "bolt/x.png": ("scratched", "bolt/x_mask.png"), "bolt/y.png": ("scratched", None)})


def test_a_manifest_lists_images_labels_and_masks(tmp_path):
    assert found(open_dataset(manifest(tmp_path)).category("bolt"), tmp_path) == MANIFEST_FOUND


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_images_may_lie_in_a_folder_beside_the_manifest_which_may_be_given_itself(ending, tmp_path):
    manifest(tmp_path / "bolts")
    for split in ("train", "test"):
        (tmp_path / "bolts" / f"{split}.json").rename(tmp_path / f"{split}.{ending}")
    for path in (tmp_path, tmp_path / f"train.{ending}"):
        dataset = open_dataset(path)
        assert (dataset.layout, dataset.names) == ("manifest", ("bolt", "nut"))
        assert found(dataset.category("bolt"), tmp_path / "bolts") == MANIFEST_FOUND


def test_a_manifest_without_test_json_can_be_trained_on(tmp_path):
    (manifest(tmp_path) / "test.json").unlink()
    assert found(open_dataset(tmp_path).category("bolt"), tmp_path) == (["bolt/a.png", "bolt/b.png"], {})


def test_a_category_with_nothing_good_to_train_on_is_refused(tmp_path):
    put_lines(manifest(tmp_path) / "train.json", line("bolt/a.png"), line("nut/a.png", 1))
    with pytest.raises(UserError, match="nut: no good images to train on") as error:
        open_dataset(tmp_path).category("nut")
    one_line(error)


def test_masks_of_good_images_are_not_asked_for(tmp_path):
    put_lines(manifest(tmp_path) / "test.json", line("bolt/t.png", 0, "bolt/nowhere.png"))
    assert [s.mask for s in open_dataset(tmp_path).category("bolt").test] == [None]


def test_defects_without_a_name_are_called_defective(tmp_path):
    put_lines(manifest(tmp_path) / "test.json", line("bolt/x.png", 1, label_name=None))
    assert [s.defect for s in open_dataset(tmp_path).category("bolt").test] == ["defective"]


MANIFEST_MISTAKES = {
    "broken": ('{"filename": "bolt/a.png", ', "not readable as JSON"),
    "an array": ("[", "not readable as JSON"),
    "a number": ("3", "no object; expected an object with filename, label and clsname"),
    "no class": (json.dumps({"filename": "a.png", "label": 0}), "no clsname"),
    "no file and no label": (json.dumps({"clsname": "bolt"}), "no filename label"),
    "another label": (line("bolt/a.png", label=2), r"label 2; expected 0 \(good\) or 1 \(defective\)"),
    "good and defective": (line("bolt/x.png", 1, label_name="good"), "label 1 .* with label_name good"),
    "a class that is a path": (line("bolt/a.png", clsname="../bolt"), "name '../bolt'; expected a plain name"),
    "a class that is a number": (line("bolt/a.png", clsname=3), "name 3; expected a plain name"),
    "an absolute path": (line("/bolt/a.png", clsname="bolt"), "path '/bolt/a.png'; expected one relative"),
    "a mask that is no path": (line("bolt/x.png", 1, mask=True), "path True; expected one relative"),
}


@pytest.mark.parametrize("name", MANIFEST_MISTAKES)
def test_a_wrong_line_of_a_manifest_is_told_with_its_number(name, tmp_path):
    text, message = MANIFEST_MISTAKES[name]
    put_lines(manifest(tmp_path) / "test.json", line("bolt/t.png"), "", text)
    with pytest.raises(UserError, match=f"test.json, line 3: .*{message}") as error:
        open_dataset(tmp_path)
    assert str(tmp_path / "test.json") in one_line(error)


def test_a_manifest_whose_images_are_nowhere_is_refused(tmp_path):
    put_lines(tmp_path / "train.json", line("bolt/a.png"))
    with pytest.raises(UserError, match="train.json, line 1: no file bolt/a.png in .* or in"):
        open_dataset(tmp_path)
    put_lines(tmp_path / "train.json")
    with pytest.raises(UserError, match="train.json: lists no images"):
        open_dataset(tmp_path)
