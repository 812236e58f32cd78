"""Data sets as the options name them, and the table of what is in them."""

from pathlib import Path

import pytest
from helpers import make_category, one_line
from trees import TREES, btad, folder, line, manifest, mtd, put, visa

from dbad.data import categories
from dbad.data.__main__ import main
from dbad.data.categories import find_category, open_category
from dbad.errors import UserError
from dbad.options.shared import RunOptions


def options(path: Path | None, item: str, layout: str = "auto") -> RunOptions:
    return RunOptions(item=item, dataset_path=path, layout=layout)


def test_the_options_name_a_category_of_a_data_set_in_any_layout(tmp_path):
    category = open_category(options(btad(tmp_path), "01"), ["good"])
    assert [(s.path.name, s.defect) for s in category.test] == [("1.bmp", "good")]
    assert categories.category_names(options(tmp_path, "01", "btad")) == ("01", "02")
    for refused in (open_category, categories.category_names):
        with pytest.raises(UserError, match="--layout visa: .* expected split_csv/1cls.csv"):
            refused(options(tmp_path, "01", "visa"))


def test_the_demo_data_have_the_layout_of_mvtec():
    assert "hazelnut" in categories.category_names(options(None, "hazelnut"))
    with pytest.raises(UserError, match="--layout visa: the built-in demo data has layout mvtec"):
        open_category(options(None, "hazelnut", "visa"))


def test_a_category_without_test_images_is_refused_where_they_are_needed(tmp_path):
    category = find_category(make_category(tmp_path), "bolt")
    assert categories.test_images(category) == category.test
    with pytest.raises(UserError, match="bolt: no test images; expected folders such as .*bolt/test/good.* new images: "
                                        "--images PATH") as error:
        categories.test_images(find_category(put(tmp_path / "bolts", "bolt/train/good/a.png"), "bolt"))
    one_line(error)


def described(capsys, *words: object) -> list[str]:
    main([str(word) for word in words])
    return capsys.readouterr().out.splitlines()


def test_the_table_counts_images_defects_and_masks(tmp_path, capsys):
    with open(manifest(tmp_path) / "test.json", "a") as file:
        print(line("bolt/y.png", 1, label_name="bent"), file=file)
    assert described(capsys, tmp_path) == [
        f"{tmp_path}: layout manifest",
        "",
        "category      train good  test good  defective  with mask  defects",
        "bolt                   2          1          3          1  bent 1 (0 with mask), scratched 2 (1 with mask)",
        "nut                    1          0          0          0",
        "2 categories           3          1          3          1"]


def test_where_nothing_has_a_mask_the_table_says_so_once(tmp_path, capsys):
    assert described(capsys, folder(tmp_path / "parts"))[3].split() == ["parts", *"8 2 3 0 crack 1, hole 2".split()]


def test_the_table_says_what_is_left_out(tmp_path, capsys):
    lines = described(capsys, mtd(tmp_path), "--layout", "mtd")
    assert lines[3].split() == ["magnetic_tile", "60", "12", "7", "7", "blowhole", "6,", "crack", "1"]
    assert lines[4] == "" and lines[5].startswith("magnetic_tile: 5 good images left out") and len(lines) == 6


@pytest.mark.parametrize("layout", TREES)
def test_any_layout_can_be_described(layout, tmp_path, capsys):
    make, names = TREES[layout]
    lines = described(capsys, make(tmp_path / "parts"))
    assert lines[0] == f"{tmp_path / 'parts'}: layout {layout}"
    assert [row.split()[0] for row in lines[3:3 + len(names)]] == list(names)


@pytest.mark.parametrize("words, message", [
    (["nowhere"], "--dataset_path nowhere: expected a folder, found nothing"),
    (["."], "--dataset_path .: no known layout; found nothing; expected CATEGORY/train/good"),
    ([".", "--layout", "mvtek"], "--layout mvtek: expected one of auto, mvtec"),
    ([".", "--layout", "visa"], "--layout visa: . has another layout; found nothing")])
def test_what_cannot_be_described_is_told_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(words)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and message in err and err.count("\n") == 1 and not out


def test_the_table_is_a_command(tmp_path, script, capsys):
    script("dbad/data/__main__.py", visa(tmp_path))
    assert capsys.readouterr().out.startswith(f"{tmp_path}: layout visa\n")
