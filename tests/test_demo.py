"""The built-in demo data: what is drawn, where the masks lie, and how the files get to the disk."""
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from dbad.data.demo import draw as demo
from dbad.data.demo.draw import draw, write_demo
from dbad.data.demo.drawings import CATEGORIES
from dbad.errors import UserError
from dbad.files.temporary import machine

KINDS = [(category, defect) for category, defects in CATEGORIES.items() for defect in defects]
TINY = dict(size=32, num_train=2, num_test_good=1, num_per_defect=1)


def contents(root: Path) -> dict:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def grown(mask, by=1):
    """A mask and what lies up to `by` pixels around it."""
    size = len(mask)
    padded = np.pad(mask, by)
    steps = range(2 * by + 1)
    return np.any([padded[i:i + size, j:j + size] for i in steps for j in steps], axis=0)


@pytest.mark.parametrize("category", CATEGORIES)
def test_an_image_follows_from_its_key_alone(category):
    alone, _ = draw(category, "good", index=3, seed=5, split="test", size=48)
    for index in range(3):
        draw(category, "good", index=index, seed=5, split="test", size=48)
    again, _ = draw(category, None, index=3, seed=5, split="test", size=48)
    np.testing.assert_array_equal(alone, again)
    for other in (dict(index=4, seed=5, split="test"), dict(index=3, seed=6, split="test"), dict(index=3, seed=5)):
        assert (draw(category, size=48, **other)[0] != alone).mean() > 0.5


@pytest.mark.parametrize("category, defect", KINDS)
def test_the_mask_is_where_the_defect_changed_the_picture(category, defect):
    for index in range(4):
        image, mask = draw(category, defect, index, size=96)
        clean, empty = draw(category, defect, index, size=96, flawless=True)
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8
        assert mask.shape == (96, 96) and mask.dtype == bool
        assert 0.006 < mask.mean() < 0.1 and not empty.any()
        change = np.abs(image.astype(int) - clean).max(axis=2)
        assert not change[~grown(mask, 2)].any()            # two pixels: thin outlines may cover less than half of one
        assert np.median(change[mask]) > 35 and (change[mask] > 8).mean() > 0.8


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_same_scene_is_drawn_at_every_size(category):
    defect = CATEGORIES[category][0]
    small, small_mask = draw(category, defect, size=64)
    large, large_mask = draw(category, defect, size=256)
    reduced = large.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(reduced - small).mean() < 5
    assert abs(large_mask.mean() / small_mask.mean() - 1) < 0.2


@pytest.mark.parametrize("category, defect", KINDS)
def test_a_forced_defect_diameter_is_kept(category, defect):
    for index in range(2):
        _, mask = draw(category, defect, index, size=256, defect_px=16)
        rows, columns = np.nonzero(mask)
        extent = max(np.ptp(rows), np.ptp(columns)) + 1
        assert 7 <= extent <= 26
        assert draw(category, defect, index, size=64, defect_px=2)[1].any()


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_distance_to_the_mean_image_does_not_find_the_defects(category):
    def images(defect, count, split):
        return np.stack([draw(category, defect, index, split=split, size=64)[0] / 255 for index in range(count)])
    mean = images("good", 60, "train").mean(axis=0)
    scores = {defect: np.abs(images(defect, 24, "test") - mean).max(axis=(1, 2, 3))
              for defect in ("good", *CATEGORIES[category])}
    bad = np.concatenate([scores[defect] for defect in CATEGORIES[category]])
    assert roc_auc_score([0] * 24 + [1] * len(bad), [*scores["good"], *bad]) < 0.85


def test_the_files_lie_as_in_mvtec_ad(tmp_path):
    assert write_demo(tmp_path, ["carpet"], **TINY) == tmp_path
    expected = {"carpet/demo.json", "carpet/train/good/000.png", "carpet/train/good/001.png",
                "carpet/test/good/000.png"}
    for defect in CATEGORIES["carpet"]:
        expected |= {f"carpet/test/{defect}/000.png", f"carpet/ground_truth/{defect}/000_mask.png"}
    assert contents(tmp_path).keys() == expected
    for name in expected - {"carpet/demo.json"}:
        picture = Image.open(tmp_path / name)
        assert picture.size == (32, 32) and picture.mode == ("L" if "_mask" in name else "RGB")
        if "_mask" in name:
            assert set(np.unique(picture)) == {0, 255}
    image, mask = draw("carpet", "cut", size=32)
    np.testing.assert_array_equal(Image.open(tmp_path / "carpet/test/cut/000.png"), image)
    np.testing.assert_array_equal(Image.open(tmp_path / "carpet/ground_truth/cut/000_mask.png"), mask * 255)


def test_the_same_parameters_write_the_same_bytes(tmp_path):
    first, second = (contents(write_demo(tmp_path / name, "pcb", **TINY)) for name in "ab")
    assert first and first == second


def test_a_complete_category_is_kept_and_one_of_other_parameters_is_replaced(tmp_path, capsys, monkeypatch):
    image = tmp_path / "hazelnut/train/good/000.png"
    write_demo(tmp_path, ["hazelnut"], **TINY)
    assert "drawn, not photographed" in capsys.readouterr().out
    before, written = contents(tmp_path), image.stat().st_mtime_ns

    write_demo(tmp_path, ["hazelnut"], **TINY)
    assert capsys.readouterr().out == "" and image.stat().st_mtime_ns == written

    write_demo(tmp_path, ["hazelnut"], **TINY | dict(num_train=1, seed=1))
    after = contents(tmp_path)
    assert len(after) == len(before) - 1 and after["hazelnut/train/good/000.png"] != before[
        "hazelnut/train/good/000.png"]
    assert json.loads(after["hazelnut/demo.json"])["seed"] == 1

    monkeypatch.setattr(demo, "VERSION", demo.VERSION + 1)
    written = image.stat().st_mtime_ns
    write_demo(tmp_path, ["hazelnut"], **TINY | dict(num_train=1, seed=1))
    assert image.stat().st_mtime_ns > written


def test_a_category_that_lost_an_image_is_drawn_again(tmp_path):
    before = contents(write_demo(tmp_path, ["pcb"], **TINY))
    (tmp_path / "pcb/ground_truth/solder/000_mask.png").unlink()
    assert contents(write_demo(tmp_path, ["pcb"], **TINY)) == before


def test_an_interrupted_drawing_leaves_what_was_there(tmp_path, monkeypatch):
    def interrupted(category, defect, index, *args):
        if defect != "good":
            raise KeyboardInterrupt
        return draw(category, defect, index, *args)
    before = contents(write_demo(tmp_path, ["carpet"], **TINY))
    monkeypatch.setattr(demo, "draw", interrupted)
    for category in ("carpet", "pcb"):
        with pytest.raises(KeyboardInterrupt):
            write_demo(tmp_path, [category], **TINY | dict(seed=9))
    assert contents(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["carpet"]


def test_what_a_killed_drawing_left_goes_with_the_next_one(tmp_path):
    left = tmp_path / f".hazelnut-{machine()}-{2 ** 22 + 1}-abcd1234"
    (left / "new").mkdir(parents=True)
    (tmp_path / ".hazelnut-mine").mkdir()
    write_demo(tmp_path, ["pcb"], **TINY)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hazelnut-mine", "pcb"]


def test_a_full_disk_names_the_folder_that_is_drawn_into(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))      # as writing says it: without a name

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=f"{tmp_path}/pcb: cannot be written .{os.strerror(errno.ENOSPC)}"):
        write_demo(tmp_path, ["pcb"], **TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_not_drawn_here_is_never_touched(tmp_path):
    photograph = tmp_path / "hazelnut/train/good/000.png"
    photograph.parent.mkdir(parents=True)
    photograph.write_bytes(b"a real one")
    with pytest.raises(UserError, match="was not drawn here"):
        write_demo(tmp_path, ["hazelnut"], **TINY)
    assert contents(tmp_path) == {"hazelnut/train/good/000.png": b"a real one"}


@pytest.mark.parametrize("call, message", [
    (lambda: draw("walnut"), "no demo category 'walnut'"),
    (lambda: draw("carpet", "crack"), "no defect 'crack' of carpet"),
    (lambda: draw("carpet", split="val"), "split is 'val'"),
    (lambda: write_demo("nowhere", size=4), "size is 4"),
    (lambda: write_demo("nowhere", num_train=-1), "num_train is -1"),
    (lambda: write_demo("nowhere", defect_px=500), "defect_px is 500"),
])
def test_a_mistake_is_named_before_anything_is_drawn(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_every_set_of_parameters_has_its_own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DBAD_DEMO_DIR", str(tmp_path))
    roots = {demo.demo_root(), demo.demo_root(size=64), demo.demo_root(seed=1), demo.demo_root(num_train=3),
             demo.demo_root(defect_px=8), demo.demo_root(num_test_good=3), demo.demo_root(num_per_defect=3)}
    assert len(roots) == 7 and {root.parent for root in roots} == {tmp_path}
    monkeypatch.delenv("DBAD_DEMO_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert demo.demo_root().parent == tmp_path / "cache/dbad/demo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert demo.demo_root().parent == tmp_path / "home/.cache/dbad/demo"


def test_the_command_line_draws_one_category(tmp_path, capsys):
    demo.main([str(tmp_path), "--category", "pcb", "--size", "32", "--seed", "2", "--num_train", "1",
               "--num_test_good", "1", "--num_per_defect", "1"])
    assert str(tmp_path) in capsys.readouterr().out
    np.testing.assert_array_equal(Image.open(tmp_path / "pcb/train/good/000.png"), draw("pcb", seed=2, size=32)[0])
    with pytest.raises(SystemExit) as stopped:
        demo.main([str(tmp_path), "--size", "3"])
    assert stopped.value.code == 2
