"""New images: which files a pattern stands for, what is written of each, and what happens to files that are broken."""

import csv
import io
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import MACHINE, SETTINGS, drawn, one_line, save_drawn
from PIL import Image

from dbad.calibration.thresholds import Calibration
from dbad.errors import UserError
from dbad.families.detector import Detector, load_detector
from dbad.files.atomic import write_text
from dbad.inspection import new_images, reading
from dbad.inspection.loop import inspect
from dbad.inspection.new_images import KEPT_SIDE, find_images, inspect_new, last_line, overlay_names
from dbad.inspection.reading import read_new
from dbad.records import Origin, Pictures, ScoreRow
from dbad.report import colours
from dbad.report.drawing import OUTLINE

# ------------------------------------------------------------------------------------------ finding files


def made(*names: str) -> None:
    for name in names:
        save_drawn(Path(name))


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Every test works in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(*patterns: str, recursive: bool = False) -> list[str]:
    return [path.as_posix() for path in find_images(patterns, recursive)]


def test_a_folder_stands_for_its_images_in_sorted_order_without_hidden_ones():
    made("in/b.png", "in/a.jpg", "in/.hidden.png", "in/sub/c.png", "in/x.png/inner.png")
    write_text("in/notes.txt", "")
    assert found("in") == ["in/a.jpg", "in/b.png"]


def test_recursion_takes_sub_folders_without_hidden_ones():
    made("in/b.png", "in/sub/deep/c.png", "in/sub/.d.png", "in/.cache/e.png")
    assert found("in", recursive=True) == ["in/b.png", "in/sub/deep/c.png"]


def test_a_glob_stands_for_what_it_matches():
    made("in/1/a.png", "in/1/b.jpg", "in/2/a.png", "in/2/deep/c.png", "in/.hidden/a.png")
    assert found("in/*/a.png") == ["in/1/a.png", "in/2/a.png"]
    assert found("in/**/*.png") == ["in/1/a.png", "in/2/a.png", "in/2/deep/c.png"]
    assert found("in/[1]/*") == ["in/1/a.png", "in/1/b.jpg"]
    assert found("in/?") == ["in/1/a.png", "in/1/b.jpg", "in/2/a.png"]
    assert found("in/?", recursive=True)[-1] == "in/2/deep/c.png"


def test_names_with_brackets_that_exist_are_no_globs():
    made("a[1].png", "a1.png", "in[2]/b.png", "in2/b.png")
    assert found("a[1].png") == ["a[1].png"]
    assert found("in[2]") == found("in[2]/*.png") == ["in[2]/b.png"]


def test_a_file_that_is_named_is_taken_whatever_its_suffix():
    write_text("measured.dat", "no image")
    assert found("measured.dat") == ["measured.dat"]


def test_each_file_comes_once_however_often_it_is_named(place):
    made("in/a.png", "in/b.png")
    os.makedirs("links")
    os.symlink(place / "in/a.png", "links/a.png")
    os.symlink(place / "in/a.png", "links/other.png")
    assert len(found("in/b.png", "in", "./in/*.png", "in/../in/a.png", str(place / "in"))) == 2
    assert found("in", "links") == ["in/a.png", "in/b.png", "links/other.png"]


def test_links_to_folders_are_followed_but_never_for_ever():
    made("far/a.png", "in/b.png")
    os.symlink("../far", "in/far")
    os.symlink("..", "in/up")
    assert sorted(path.name for path in find_images(["in"], recursive=True)) == ["a.png", "b.png"]


@pytest.mark.parametrize("pattern, says", [
    ("in/mising.png", "matches nothing; expected image files"), ("in/*.tif", "matches nothing"),
    ("", "matches nothing"), ("empty", "no images in it; expected files such as 000.png"),
    ("deep", "only in sub-folders; add --recursive"), ("dee?", "only in sub-folders; add --recursive")])
def test_a_pattern_that_stands_for_no_image_is_named(pattern, says):
    made("in/a.png", "deep/1/a.png")
    write_text("empty/notes.txt", "")
    with pytest.raises(UserError) as error:
        find_images(["in", pattern])
    assert one_line(error).startswith(f"--images {pattern}: ") and says in str(error.value)


# ------------------------------------------------------------------------------------------ inspecting

CALIBRATION = Calibration({"pixel": 1.0}, 0.5, 0.5, (0.1, 0.2, 0.3), false_alarm_rate=0.25)


class Brightness(Detector):
    """A detector whose anomaly map is the brightness of the image in [0, 1]."""

    family = "ddim"

    def __init__(self, size: int = 16, patching: bool = False, batch_size: int = 2):
        super().__init__(settings=replace(SETTINGS, patching=patching, intensity="full"),
                         machine=MACHINE._replace(batch_size=batch_size), calibration=CALIBRATION)
        object.__setattr__(self, "side", size)
        object.__setattr__(self, "num_seen", 0)

    @property
    def size(self):
        """See `Detector`."""
        return self.side

    def parts(self, images):
        object.__setattr__(self, "num_seen", self.num_seen + len(images))
        return {"pixel": (images.mean(1, keepdim=True) + 1) / 2}, -images

    def combine(self, parts, scales):
        return parts["pixel"], parts["pixel"].amax(dim=(1, 2, 3))


def save_grey(name: str, value: int, size: int = 16) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (size, size), value).save(name)


def inspected(*patterns: str, detector=None, **options) -> new_images.NewImages:
    return inspect_new(detector or Brightness(), find_images(patterns), Path("out"), 2, **options)


def table(name: str) -> list[dict[str, str]]:
    with open(name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_an_image_has_the_score_that_it_has_in_a_test_set_and_from_python(finished, place):
    """Bit for bit, as long as it goes through the networks in the same batches."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        detector = load_detector(finished / "checkpoints/hazelnut", "cpu", "fp32", batch_size=4)
        paths = find_images([finished / "data/hazelnut/test"], recursive=True)
        new = inspect_new(detector, paths, place / "out", 2, category="hazelnut")
        assert [row.score for row in new.rows] == [found.score for found in detector(paths)]
        alone = [detector(path).score for path in paths]
    finally:
        torch.set_num_threads(threads)
    known = {finished / "data" / line["path"]: line for line in table(finished / "results/hazelnut/scores.csv")}
    assert len(known) == len(paths) == 7
    for line, path in zip(table("out/scores.csv"), paths, strict=True):
        assert line == known[path] | {"path": path.as_posix(), "defect": "", "label": ""}
    np.testing.assert_allclose([row.score for row in new.rows], alone, rtol=1e-4)


def test_every_image_is_a_line_of_the_same_table_as_in_a_test_set():
    save_grey("in/b.png", 255)
    save_grey("in/a.png", 0)
    new = inspected("in", category="bolt")
    lines = table("out/scores.csv")
    assert tuple(lines[0]) == ScoreRow._fields
    assert lines[0] == dict(zip(ScoreRow._fields, ("in/a.png", "bolt", "", "", "0.0", "1.0", "0.0", "0"), strict=True))
    assert [line["path"] for line in lines] == ["in/a.png", "in/b.png"]
    assert [(row.score, row.p_value, row.decision) for row in new.rows] == [(0.0, 1.0, 0), (1.0, 0.25, 1)]
    assert (new.num_good, new.num_defective, new.unreadable) == (1, 1, [])
    assert new.seconds_per_image > 0
    assert not os.path.exists("out/unreadable.csv")


@pytest.mark.parametrize("keep", [0, 1, 3, 9])
def test_the_pictures_of_the_highest_scoring_images_are_kept(keep):
    for index, value in enumerate((10, 200, 30, 200, 90)):
        save_grey(f"in/{index}.png", value)
    new = inspected("in", keep=keep)
    assert sorted(new.gallery.shown) == sorted([1, 3, 4, 2, 0][:keep]) and len(new.rows) == 5
    for number, shown in new.gallery.shown.items():
        assert shown.shape == (16, 16) and shown.files["truth"] is None and shown.files["reconstruction"]
        image = np.asarray(Image.open(io.BytesIO(shown.files["input"])))
        assert np.abs(image.astype(int) - round(255 * new.rows[number].score)).max() <= 2


def pictures_of(detector, *paths: Path) -> list[Pictures]:
    """The arrays from which the report's pictures are drawn."""
    origins = [Origin(str(path), "bolt", None, None) for path in paths]
    with ThreadPoolExecutor(1) as pool:
        return [found.pictures(KEPT_SIDE) for found in inspect(
            detector, paths, origins, lambda path, size: read_new(path, size, detector.intensity), pool)]


def test_large_tiled_images_are_kept_small_but_with_their_highest_value():
    pixels = np.zeros((300, 1100, 3), np.uint8)
    pixels[77, 990] = 255
    Image.fromarray(pixels).save("a.png")
    save_drawn(Path("b.png"), 1, (40, 20))
    wide, small = pictures_of(Brightness(patching=True), Path("a.png"), Path("b.png"))
    assert wide.anomaly_map.shape == wide.image.shape[:2] == (140, KEPT_SIDE) and wide.anomaly_map.max() == 1
    assert wide.parts["pixel"].max() == 1 and wide.reconstruction.shape == (140, KEPT_SIDE, 3)
    assert (small.image == drawn(1, (40, 20))).all()
    shown = list(inspected("*.png", detector=Brightness(patching=True)).gallery.shown.values())
    assert [each.shape for each in shown] == [(300, 1100), (40, 20)] and shown[0].input_side == 1100
    assert Image.open(io.BytesIO(shown[0].files["map"] or b"")).width == 256
    assert Image.open("out/overlays/a.png").size == (1100, 300)


def test_images_are_decoded_one_batch_ahead_at_most(monkeypatch):
    decoded, ahead = [], []
    read = reading.read_image
    monkeypatch.setattr(reading, "read_image", lambda path, intensity: decoded.append(path) or read(path, intensity))

    class Watched(Brightness):
        def parts(self, images):
            ahead.append(len(decoded) - self.num_seen - len(images))
            return super().parts(images)

    for index in range(11):
        save_grey(f"in/{index:02}.png", 20 * index)
    assert len(inspected("in", detector=Watched(batch_size=3)).rows) == 11
    assert len(ahead) == 4 and max(ahead) <= 3


def test_an_interrupted_run_keeps_what_it_has_done():
    class Stopped(Brightness):
        def parts(self, images):
            if self.num_seen == 4:
                raise KeyboardInterrupt
            return super().parts(images)

    for index in range(9):
        save_grey(f"in/{index}.png", 20 * index)
    with pytest.raises(KeyboardInterrupt):
        inspected("in", detector=Stopped())
    assert [line["path"] for line in table("out/scores.csv")] == [f"in/{index}.png" for index in range(4)]
    assert sorted(os.listdir("out/overlays")) == [f"{index}.png" for index in range(4)]


# ------------------------------------------------------------------------------------------ broken files

def test_a_broken_file_costs_one_line_and_no_more(capsys):
    for index in range(5):
        save_grey(f"in/{index}.png", 50 * index)
    whole = save_drawn(Path("in/1.png"), 1, 64).read_bytes()
    Path("in/1.png").write_bytes(whole[:len(whole) // 2])
    write_text("in/4.png", "no image")
    new = inspected("in")
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "left out" in line]
    assert [line.split(": ")[0].strip() for line in lines] == ["in/1.png", "in/4.png"]
    assert "in/4.png: left out: not an image that can be read" in lines[1]
    assert [row.path for row in new.rows] == ["in/0.png", "in/2.png", "in/3.png"]
    assert [str(path) for path, _ in new.unreadable] == ["in/1.png", "in/4.png"]
    assert [line["path"] for line in table("out/unreadable.csv")] == ["in/1.png", "in/4.png"]
    assert "truncated" in table("out/unreadable.csv")[0]["reason"]
    assert sorted(os.listdir("out/overlays")) == ["0.png", "2.png", "3.png"]
    assert last_line(new) == "5 images: 2 good, 1 defective, 2 unreadable"


def test_the_results_of_a_second_run_are_its_own():
    save_grey("in/0.png", 9)
    save_grey("in/1.png", 9)
    save_grey("in/2.png", 9)
    write_text("in/3.png", "no image")
    inspected("in")
    write_text("in/0.png", "no image any more")
    os.remove("in/1.png")
    save_grey("out/overlays/mine.png", 1)
    inspected("in")
    assert sorted(os.listdir("out/overlays")) == ["2.png", "mine.png"]      # what it has not drawn it leaves alone
    os.remove("in/0.png")
    os.remove("in/3.png")
    assert last_line(inspected("in")) == "1 image: 1 good, 0 defective"
    assert not os.path.exists("out/unreadable.csv")


@pytest.mark.parametrize("failure", [struct.error("unpack"), IndexError(), EOFError(), MemoryError()])
def test_whatever_a_decoder_fails_with_only_its_file_is_left_out(failure, monkeypatch):
    read = reading.read_image

    def fails(path, intensity):
        if path.name == "a.png":
            raise failure
        return read(path, intensity)

    monkeypatch.setattr(reading, "read_image", fails)
    made("in/a.png", "in/b.png")
    new = inspected("in")
    assert [row.path for row in new.rows] == ["in/b.png"] and new.unreadable[0][1]


def test_files_of_which_none_can_be_read_are_an_error_and_leave_nothing():
    write_text("in/a.png", "no image")
    write_text("in/b.png", "no image")
    with pytest.raises(UserError, match="none of 2 files could be read: in/a.png: not an image") as error:
        inspected("in")
    one_line(error)
    assert not os.path.exists("out")


def test_a_name_that_is_no_text_is_written_out():
    made("in/a.png")
    try:
        os.rename("in/a.png", b"in/caf\xe9.png")
    except OSError:
        pytest.skip("this file system has no such names")
    assert inspected("in").rows[0].path == table("out/scores.csv")[0]["path"] == r"in/caf\udce9.png"
    assert os.listdir("out/overlays") == ["caf_.png"]


def test_images_among_the_results_are_refused():
    made("in/a.png")
    inspected("in")
    with pytest.raises(UserError, match="out/overlays/a.png: lies in the results folder out") as error:
        inspect_new(Brightness(), find_images(["."], True), Path("out"), 1)
    one_line(error)


# ------------------------------------------------------------------------------------------ overlays

def overlay_of(name: str, detector=None) -> np.ndarray:
    inspected(name, detector=detector)
    return np.array(Image.open("out/overlays/" + os.listdir("out/overlays")[0]))


def test_an_overlay_shows_image_colours_and_outline():
    """Brightness 1 is twice the pixel threshold: the highest colour covers 85 % of the white square."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[4:8, 6:10] = 255
    Image.fromarray(pixels).save("a.png")
    shown = overlay_of("a.png")
    highest = colours.heat(np.ones((1, 1), np.float32), 1.0)[0, 0].astype(float)
    assert np.abs(shown[4:8, 6:10] - (0.85 * highest + 0.15 * 255)).max() <= 1
    ring = np.zeros((16, 16), bool)
    ring[3:9, 5:11] = True
    ring[4:8, 6:10] = False
    assert (shown[ring] == OUTLINE).all()
    assert (shown[(pixels.max(2) == 0) & ~ring] == 0).all()


def test_colours_mean_the_same_whatever_else_is_inspected():
    save_grey("in/a.png", 90)
    alone = overlay_of("in/a.png")
    save_grey("in/b.png", 255)
    inspected("in")
    assert (np.array(Image.open("out/overlays/a.png")) == alone).all()
    assert not (alone == OUTLINE).all(axis=2).any()


def test_the_map_is_enlarged_smoothly_to_the_size_of_the_image():
    pixels = np.zeros((90, 160, 3), np.uint8)
    pixels[:, 80:] = 255
    Image.fromarray(pixels).save("a.png")
    shown = overlay_of("a.png", Brightness(size=8)).astype(int)
    assert shown.shape == (90, 160, 3)
    column = int(np.flatnonzero((shown[45] == OUTLINE).all(axis=1))[0])
    assert abs(column - 79) <= 2        # where the map passes the threshold, with cells of 20 px


@pytest.mark.parametrize("save, size", [
    (lambda: Image.new("L", (1024, 768), 99).save("a.png"), (1024, 768)),
    (lambda: Image.fromarray(np.full((30, 20), 40_000, np.uint16)).save("a.png"), (20, 30)),
    (lambda: Image.new("RGBA", (64, 64), (200, 20, 20, 9)).save("a.png"), (64, 64)),
    (lambda: Image.new("P", (5, 3), 7).save("a.png"), (5, 3)),
    (lambda: Image.new("RGB", (40, 20), (9, 9, 9)).save("a.png", exif=turned()), (20, 40)),
], ids=["grey", "16 bit", "transparent", "palette", "portrait"])
def test_an_overlay_has_the_size_of_its_upright_image(save, size):
    save()
    for patching in (False, True):
        shown = overlay_of("a.png", Brightness(patching=patching))
        assert shown.dtype == np.uint8 and shown.shape == (size[1], size[0], 3)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def named(*paths: str) -> dict[str, str]:
    return dict(zip(paths, overlay_names([Path(path) for path in paths]), strict=True))


def test_the_name_of_an_overlay_tells_the_image():
    assert named("in/a.png") == {"in/a.png": "a.png"}
    assert list(named("in/1/a.png", "in/2/a.png", "in/b c.jpg").values()) == ["1_a.png", "2_a.png", "b_c_jpg.png"]


def test_the_name_of_an_overlay_stays_when_other_images_come_and_go():
    few = named("in/b.png", "in/1/a.png")
    many = named("in/a.png", "in/b.bmp", "in/b.jpg", "in/b.png", "in/c.png", "in/1/a.png", "in/2/a.png")
    assert few.items() <= many.items()


def test_names_are_unique_safe_and_short_even_where_they_collide():
    paths = ["in/a/b.png", "in/a_b.png", "in/A_b.png", "in/a b.png", "in/a?b.png", "in/-x.png", "in/...png",
             "in/" + "long" * 30 + ".png", "in/long/" + "long" * 30 + ".png", "in/\N{SNOWMAN}.png", "in/B.PNG"]
    names = list(named(*paths).values())
    assert len({name.casefold() for name in names}) == len(paths)
    for name in names:
        assert len(name.encode()) < 200 and name.endswith(".png") and not name.startswith(("-", "."))
        assert name[:-4].replace("_", "").replace("-", "").isalnum() or set(name[:-4]) <= {"_"}
    assert names == list(named(*paths).values())
