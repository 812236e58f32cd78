"""The pictures, tables and HTML report of an evaluation run."""

import csv
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from dbad import metrics
from dbad.calibration.thresholds import Calibration
from dbad.families.ddim.options import DdimSettings
from dbad.families.runs import load_calibration
from dbad.inspection.options import InspectionRun
from dbad.metrics import verdicts
from dbad.metrics.verdicts import Thresholds
from dbad.records import Pictures, ScoreRow
from dbad.report import colours, curves, panels
from dbad.report import page as report
from dbad.report.again import Again, command_of
from dbad.report.drawing import BAR_HEIGHT, INK, OUTLINE
from dbad.report.gallery import IMAGE_BYTES, MOST_BYTES, Gallery, encode
from dbad.report.overview import AROUND, ROWS, Overview, small_pictures, telling
from dbad.report.sentences import result_sentence, usual_range

SUMMARY = {"what": "a test", "data": "drawn"}
LIMITS = Thresholds(image=2.0, pixel=1.5)
SCALES = {"anomaly map": 3.0, "pixel map": 1.5, "feature map": 1.0}
HOSTILE = "test/<script>alert(1)</script>/</script><img src=x onerror=alert(2)>.png"


class Found(NamedTuple):
    """An image of a run that is over: its row and its arrays."""

    row: ScoreRow
    pictures: Pictures


def drawn(number, defect, peak, size=32, path=None):
    """An image whose map is `peak` on a square, which is its defect, and less than 1 elsewhere."""
    random = np.random.default_rng(number)
    anomaly_map = random.uniform(0, 0.9, (size, size)).astype(np.float32)
    mask = np.zeros((size, size), bool)
    mask[size // 4:size // 2, size // 4:size // 2] = True
    anomaly_map[mask] = peak
    image = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
    label = None if defect is None else int(defect != "good")
    row = ScoreRow(path or f"test/{defect}/{number:03d}.png", "nut", defect, label, float(peak), 1 / (number + 1),
                   peak / (peak + 2), int(peak >= 2))
    parts = {"pixel": anomaly_map ** 2 / 4, "feature": anomaly_map.T}
    return Found(row, Pictures(image, 255 - image, anomaly_map, parts, mask & bool(label)))


@pytest.fixture(scope="module")
def run():
    """Twelve images: five good, one of them a false alarm, and seven defective, two of them misses."""
    good = [drawn(k, "good", peak) for k, peak in enumerate((1.0, 1.2, 1.3, 1.5, 2.5))]
    bad = [drawn(10 + k, kind, peak) for k, (kind, peak) in enumerate([
        ("crack", 1.1), ("crack", 2.75), ("crack", 4.0), ("hole", 1.75), ("hole", 3.0), ("hole", 5.0)])]
    return [*good, *bad, drawn(20, "<b>bold</b>", 2.0, path=HOSTILE)]


def unknown(run):
    """The same without ground truth and calibration."""
    nothing = dict.fromkeys(("label", "defect", "p_value", "normalised", "decision"))
    return [Found(row._replace(**nothing), replace(pictures, mask=None)) for row, pictures in run]


def rows(run):
    return [found.row for found in run]


def curves_of(run):
    """ROC and PRO of a run, as far as there is ground truth."""
    known = [found for found in run if found.row.label is not None]
    masks, maps = [pictures.mask for _, pictures in known], [pictures.anomaly_map for _, pictures in known]
    return verdicts.curves(rows(run), metrics.pro_curve(masks, maps) if known else None)


def gallery_of(run, most=2000):
    """What a report shows of images that come in their order."""
    gallery = Gallery(len(run), most)
    for number, (row, pictures) in enumerate(run):
        if gallery.wants(number, row.score):
            gallery.put(number, row.score, encode(pictures, 3.0, gallery.side))
    return gallery


def write_report(path, run, numbers, summary=SUMMARY, thresholds=LIMITS, most=2000):
    return report.write_report(path, rows(run), gallery_of(run, most), numbers, summary, thresholds, curves_of(run))


def write_curves(path, run, thresholds=LIMITS):
    return curves.write_curves(path, rows(run), thresholds, curves_of(run))


def overview_of(run, thresholds=LIMITS):
    """The overview of images that come in their order, each drawn if it was asked for."""
    found = Overview(rows(run), thresholds)
    for number, (row, pictures) in enumerate(run):
        if found.offer(number, row):
            found.put(number, small_pictures(pictures, 3.0))
    return found


def told(run, most=ROWS):
    """The rows that the overview shows, each with the reason."""
    found = overview_of(run)
    return [(reason, run[number].row) for reason, number in telling(found.rows, found.kinds, found.candidates, most)]


def report_data(path):
    """What the report's script reads, through a parser that knows only where a script element ends."""
    page = path.read_text("utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])


# Tables


def test_scores_read_back_exactly_as_they_were(run, tmp_path):
    with open(report.write_scores(tmp_path / "scores.csv", rows(run)), encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["path", "category", "defect", "label", "score", "p_value", "normalised", "decision"]
    assert [line["path"] for line in lines] == [i.row.path for i in run]
    for name, kind in (("label", int), ("decision", int), ("score", float), ("p_value", float), ("normalised", float)):
        assert [kind(line[name]) for line in lines] == [getattr(i.row, name) for i in run]


def test_what_is_not_known_is_an_empty_field(run, tmp_path):
    with open(report.write_scores(tmp_path / "scores.csv", rows(unknown(run))), encoding="utf-8", newline="") as file:
        row = next(csv.DictReader(file))
    assert [row[name] for name in ("defect", "label", "p_value", "normalised", "decision")] == [""] * 5


def test_the_same_run_writes_the_same_bytes(run, tmp_path):
    def files(name):
        folder = tmp_path / name
        report.write_scores(folder / "scores.csv", rows(run))
        report.write_metrics(folder, {"image": {"auroc": 0.1 + 0.2}})
        write_report(folder / "report.html", run, {"auroc": 0.5})
        for panel_name, found in zip(panels.panel_names(rows(run)), run, strict=True):
            panels.write_panel(folder / panel_name, *found, LIMITS, SCALES)
        overview_of(run).write(folder / "overview.png")
        write_curves(folder / "curves.png", run)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    first = files("a")
    assert len(first) == 6 + len(run) and first == files("b")


def test_metrics_keep_their_nesting_in_json_and_get_dotted_names_in_csv(tmp_path):
    given = {"image": {"auroc": np.float64(0.75), "num_good": np.int64(4)}, "pixel": {"aupro_0.3": float("nan")},
             "seconds": [1.5, 2.0]}
    json_path, csv_path = report.write_metrics(tmp_path, given)
    assert json.loads(json_path.read_text()) == {
        "image": {"auroc": 0.75, "num_good": 4}, "pixel": {"aupro_0.3": None}, "seconds": [1.5, 2.0]}
    assert csv_path.read_text() == (
        "metric,value\nimage.auroc,0.75\nimage.num_good,4\npixel.aupro_0.3,\nseconds.0,1.5\nseconds.1,2.0\n")


@pytest.mark.parametrize(("name", "value", "shown"), [
    (("image", "auroc"), 0.98765, ("Image AUROC", "98.77 %")),
    (("pixel", "aupro_0.3"), 1.0, ("Pixel AUPRO 0.3", "100.00 %")),
    (("false_positive_rate",), 0.125, ("False positive rate", "12.50 %")),
    (("image", "f1_max_threshold"), 0.123456, ("Image F1 max threshold", "0.1235")),
    (("num_good",), 40, ("Num good", "40")),
    (("accuracy",), None, ("Accuracy", "–")),
])
def test_metrics_are_shown_in_words_and_with_their_unit(name, value, shown):
    assert (report.readable_name(name), report.readable_value(name, value)) == shown


# Pictures


def test_the_colours_run_from_zero_to_the_scale_and_stop_there():
    shown = colours.heat(np.float32([[0, 0.5, 1, 2]]), scale=1.0)
    assert shown.shape == (1, 4, 3) and shown.dtype == np.uint8
    assert (shown[0, 2] == shown[0, 3]).all() and not (shown[0, 0] == shown[0, 2]).all()
    brightness = colours.colour_bar(64, 1)[0] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(brightness) > 0).all(), "the order of values is seen without telling colours apart"


def test_an_overlay_tints_only_what_is_near_the_threshold_or_above(run):
    """The threshold is half the scale."""
    image, values = run[0].pictures.image, np.full((32, 32), 0.39, np.float32)
    np.testing.assert_array_equal(colours.overlay(image, values, 1.0), image)
    np.testing.assert_array_equal(colours.overlay(image, values, 0.0), image)
    values[3, 4], values[5, 6] = 1, 0.5
    changed = (colours.overlay(image, values, 1.0) != image).any(-1)
    assert changed[3, 4] and changed[5, 6] and changed.sum() == 2
    tint = np.asarray(colours.tint(values, 1.0, 32).convert("RGBA"))
    np.testing.assert_array_equal(tint[..., 3] > 0, changed)
    assert abs(tint[3, 4, 3] - 255 * colours.MOST_TINT) < 1 and tint[5, 6, 3] < tint[3, 4, 3]


def test_a_reduced_tint_keeps_single_pixels_of_the_map():
    values = np.zeros((100, 60), np.float32)
    values[71, 33] = 1
    assert np.asarray(colours.tint(values, 1.0, 30).convert("RGBA"))[..., 3].astype(bool).sum() == 1


def test_a_part_that_is_the_anomaly_map_is_not_shown_beside_it(run):
    pictures = run[0].pictures
    once = replace(pictures, parts={"feature": 2.5 * pictures.anomaly_map})
    assert list(colours.maps_of(once)) == ["anomaly map"]
    assert list(colours.maps_of(pictures)) == ["pixel map", "feature map", "anomaly map"]


def test_what_the_calibration_knows_is_in_the_middle_of_the_colours():
    """The pixel threshold, and for the parts as different as good images get."""
    scales = colours.map_scales(Calibration({"pixel": 0.25, "feature": 4.0}, 1.5, 2.0))
    assert scales == {"anomaly map": 3.0, "pixel map": 0.5, "feature map": 8.0}


@pytest.mark.parametrize(("shape", "tile"), [
    ((32, 32), (256, 256)), ((300, 600), (256, 128)), ((256, 256), (256, 256))])
def test_a_panel_shows_seven_tiles_at_one_size(shape, tile):
    values = np.zeros(shape, np.float32)
    image = np.zeros((*shape, 3), np.uint8)
    pictures = Pictures(image, image, values, {"pixel": values, "feature": values}, np.ones(shape, bool))
    picture = panels.panel(drawn(1, "crack", 3.0).row, pictures, LIMITS)
    assert picture.size == (8 + 7 * (tile[0] + 8), 26 + 20 + tile[1] + BAR_HEIGHT + 8)
    last = picture.crop((8 + 6 * (tile[0] + 8), 46, 8 + 6 * (tile[0] + 8) + tile[0], 46 + tile[1]))
    assert np.asarray(last).min() == 255, "the last tile is the mask, all of it defective"


def test_a_panel_leaves_out_what_is_not_there(run):
    row, pictures = unknown(run)[0]
    bare = replace(pictures, reconstruction=None, parts={})
    assert panels.panel(row, bare, Thresholds()).width == 8 + 2 * (256 + 8)


def test_the_decision_of_an_image_called_good_has_no_outline():
    row, pictures = drawn(1, "crack", 3.0, size=256)
    pixels = np.asarray(panels.panel(row._replace(score=1.9), pictures, Thresholds(2.0, 3.0)))
    assert not (pixels == OUTLINE).all(-1).any()


@pytest.mark.parametrize("called", [True, False])
def test_only_the_overlay_of_an_image_called_defective_has_contours(called, tmp_path):
    _, pictures = drawn(1, "crack", 3.0)
    panels.write_overlay(tmp_path / "a.png", Image.fromarray(pictures.image), pictures.anomaly_map, 2.0, called)
    assert (np.asarray(Image.open(tmp_path / "a.png")) == OUTLINE).all(-1).any() == called


def test_the_threshold_is_marked_in_the_middle_of_the_bar_under_a_map():
    row, pictures = drawn(1, "crack", 3.0, size=256)
    sheet = np.asarray(panels.panel(row, pictures, LIMITS, SCALES))
    left, top = 8 + 4 * 264, 46 + 256 + 4
    np.testing.assert_array_equal(sheet[top + 4, left:left + 120], colours.colour_bar(256, 1)[0, :120])
    assert (sheet[top + 4, left + 128] == INK).all()


def test_the_decision_outlines_what_reaches_the_pixel_threshold():
    row, pictures = drawn(1, "crack", 3.0, size=256)
    size = 256 + 8
    pixels = np.asarray(panels.panel(row, pictures, Thresholds(2.0, 3.0)))[46:46 + 256]
    decision = pixels[:, 8 + 5 * size:8 + 5 * size + 256]
    painted = (decision == OUTLINE).all(-1)
    border = np.zeros((256, 256), bool)
    border[64:128, 64:128] = True
    border[66:126, 66:126] = False
    np.testing.assert_array_equal(painted, border)
    np.testing.assert_array_equal(decision[~pictures.mask], pictures.image[~pictures.mask])


def test_panel_names_are_safe_and_differ_even_where_case_is_ignored(run):
    paths = ["a/1.png", "b/1.jpg", "c/1.PNG", "x/CON?.png", "../..", "C:\\x\\ä b.png", HOSTILE, "y" * 400 + ".png"]
    names = panels.panel_names([run[0].row._replace(path=path) for path in paths])
    assert names[:2] == ["good_1.png", "good_1_2.png"] and names[5] == "good_ä_b.png"
    assert len({name.casefold() for name in names}) == len(paths)
    assert all(re.fullmatch(r"[\w.-]{1,200}\.png", name) and not name.startswith(".") for name in names)


def test_panel_names_tell_categories_apart(run):
    bolt = run[0].row._replace(category="bolt")
    assert panels.panel_names([run[0].row, bolt]) == ["nut_good_000.png", "bolt_good_000.png"]


def test_there_is_a_readable_panel_for_every_image(run, tmp_path):
    names = panels.panel_names(rows(run))
    for name, found in zip(names, run, strict=True):
        panels.write_panel(tmp_path / "images" / name, *found, LIMITS, SCALES)
    paths = list((tmp_path / "images").iterdir())
    assert len(paths) == len(run) and {path.name for path in paths} == set(names)
    assert {Image.open(path).convert("RGB").size for path in paths} == {(8 + 7 * 264, 310 + BAR_HEIGHT)}


def test_the_overview_shows_the_worst_good_and_the_best_defective_images_and_every_kind(run):
    chosen = told(run, 8)
    assert [row.score for reason, row in chosen if reason == "highest-scoring good"][:2] == [2.5, 1.5]
    assert [row.score for reason, row in chosen if reason == "lowest-scoring defective"][:2] == [1.1, 1.75]
    typical = {reason: row.score for reason, row in chosen if reason.startswith("typical")}
    assert typical == {"typical crack": 2.75, "typical hole": 3.0, "typical <b>bold</b>": 2.0}
    assert len({row.path for _, row in told(run, 100)}) == len(told(run, 100)) == 12


def test_the_overview_does_not_depend_on_the_order_of_a_usual_run(run):
    assert told(run) == told(run[::-1]) == told(run[::2] + run[1::2])


@pytest.mark.parametrize("order", ["as they come", "rising", "falling"])
def test_of_many_images_few_are_kept_for_the_overview_and_the_telling_ones_among_them(order, run):
    scores = np.random.default_rng(0).random(900)
    scores = {"rising": np.sort(scores), "falling": np.sort(scores)[::-1]}.get(order, scores)
    found, most = Overview([ScoreRow(str(k), "nut", "crack" if k % 3 else "good", int(k % 3 > 0), 0, None, None, None)
                            for k in range(900)], LIMITS), 0
    for number, score in enumerate(scores):
        if found.offer(number, run[0].row._replace(path=str(number), label=int(number % 3 > 0), score=float(score))):
            found.put(number, {})
        most = max(most, len(found.candidates))
    assert most <= 2 * ROWS + 2 * AROUND
    chosen = telling(found.rows, found.kinds, found.candidates)
    assert len(chosen) == ROWS
    good, bad = np.sort(scores[::3])[::-1], np.sort(np.delete(scores, np.s_[::3]))
    assert [scores[number] for _, number in chosen[:6]] == [*good[:3], *bad[:3]]
    reason, typical = chosen[6]
    assert reason == "typical crack" and chosen[7][0] != reason
    if order == "as they come":
        assert abs(np.searchsorted(bad, scores[typical]) - len(bad) // 2) <= 1


def test_pictures_that_come_when_others_have_taken_their_place_are_not_kept(run):
    found = Overview(rows(run) * 4, LIMITS)
    assert found.offer(0, run[0].row)
    for number in range(1, 48):
        found.offer(number, run[0].row._replace(score=float(number)))
    found.put(0, {"input": b""})
    assert 0 not in found.candidates and len(found.candidates) == ROWS


@pytest.mark.parametrize("labels", ["known", "unknown"])
def test_the_overview_has_a_row_for_every_chosen_image(run, labels, tmp_path):
    found = overview_of(run[:5] if labels == "known" else unknown(run[:5]))
    found.write(tmp_path / "overview.png")
    assert Image.open(tmp_path / "overview.png").size == (230 + 4 * 184, 66 + 30 + 5 * 184)


def test_the_overview_shows_a_copy_of_an_image_once(run, tmp_path):
    copy = Found(run[0].row._replace(path="test/good/copy.png"), run[0].pictures)
    overview_of([*run[:5], copy]).write(tmp_path / "overview.png")
    assert Image.open(tmp_path / "overview.png").height == 66 + 30 + 5 * 184


def test_the_overview_has_a_heading_for_every_group(run, tmp_path):
    overview_of(run).write(tmp_path / "overview.png")
    assert Image.open(tmp_path / "overview.png").height == 66 + 3 * 30 + 12 * 184


def test_the_overview_has_no_column_of_reconstructions_where_there_are_none(run, tmp_path):
    found = overview_of([Found(row, replace(pictures, reconstruction=None)) for row, pictures in run[:5]])
    found.write(tmp_path / "overview.png")
    assert Image.open(tmp_path / "overview.png").size == (230 + 3 * 184, 66 + 30 + 5 * 184)


def test_without_ground_truth_the_curves_are_left_out_and_the_reason_is_given(run, tmp_path):
    found = verdicts.curves(rows(unknown(run)))
    assert found.roc is None and found.pro is None
    assert "no ROC curve" in found.notes[0] and "no PRO curve" in found.notes[1]
    wide = Image.open(write_curves(tmp_path / "all.png", run)).width
    assert Image.open(write_curves(tmp_path / "one.png", unknown(run), Thresholds())).width < wide / 2


def test_the_pro_curve_shows_the_limit_of_its_area(run, tmp_path, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn_axes = []
    whole = FigureCanvasAgg.print_figure
    monkeypatch.setattr(FigureCanvasAgg, "print_figure",
                        lambda self, *a, **k: (drawn_axes.extend(self.figure.axes), whole(self, *a, **k)))
    write_curves(tmp_path / "all.png", run)
    marked = {axis.get_title(): axis.get_legend_handles_labels()[1] for axis in drawn_axes}
    assert "limit of AUPRO, 0.3" in marked["PRO"] and "limit of AUPRO, 0.3" not in marked["ROC"]


def test_the_marked_point_of_the_roc_curve_is_what_the_threshold_does(run):
    labels, scores = [row.label for row in rows(run)], [row.score for row in rows(run)]
    curve = metrics.roc_curve(labels, scores)
    for threshold in curve[2][1:]:
        rates = metrics.rates(labels, scores, threshold)
        assert verdicts.point_at(curve, threshold) == [rates.false_positive_rate, rates.true_positive_rate]
    assert verdicts.point_at(curve, None) is None


def test_without_a_screen_show_says_so_in_one_line_and_goes_on(run, tmp_path, capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    path = tmp_path / "overview.png"
    overview_of(run).write(path)
    assert panels.show([path]) is False
    output = capsys.readouterr().out
    assert output.startswith("No screen") and output.count("\n") == 1
    assert not pyplot.get_fignums()


# The report as a file


def test_the_report_needs_nothing_from_outside(run, tmp_path):
    harmless = [i for i in run if i.row.path != HOSTILE]
    page = write_report(tmp_path / "report.html", harmless, {"auroc": 0.9}).read_text("utf-8")
    assert not re.search(r"\s(src|href)=(?![\"']?data:)|@import|url\(|\bfetch\(", page)
    assert re.findall(r"https?://[^\"'\s]+", page) == ["http://www.w3.org/2000/svg"], "a namespace, which nothing loads"


def test_names_cannot_leave_their_place_in_the_report(run, tmp_path):
    text = "</script><script>alert(3)</script>"
    named = [Found(row._replace(category=text), pictures) for row, pictures in run]
    path = write_report(tmp_path / "report.html", named, {text: 0.5}, {text: text})
    page = path.read_text("utf-8")
    assert page.count("<script") == 2 and "<img" not in page and "<b>" not in page
    assert report_data(path)["images"][-1]["path"] == HOSTILE


def test_two_hundred_images_of_pure_noise_stay_below_15_mb(tmp_path):
    path = write_report(tmp_path / "report.html", [drawn(k, "crack", 3.0, size=300) for k in range(4)], {})
    frame = len(path.read_bytes()) - sum(len(json.dumps(image)) for image in report_data(path)["images"])
    assert frame + 50 * (len(path.read_bytes()) - frame) < 15e6


def test_more_than_two_hundred_images_get_smaller_pictures():
    assert [Gallery(count).side for count in (1, 200, 800, 2000, 10 ** 6)] == [256, 256, 128, 81, 81]
    assert Gallery(10 ** 6, most=200).side == 256
    pictures = drawn(1, "crack", 3.0, size=300).pictures
    shown = encode(pictures, 3.0, 128)
    sizes = {name: Image.open(io.BytesIO(file)).size for name, file in shown.files.items()}
    assert {sizes[name] for name in ("reconstruction", "map", "truth")} == {(128, 128)} and shown.shape == (300, 300)
    assert sum(map(len, shown.files.values())) <= IMAGE_BYTES


def test_an_input_is_shown_at_its_own_size_where_the_bytes_allow():
    smooth = np.linspace(0, 255, 900 * 600 * 3).astype(np.uint8).reshape(600, 900, 3) // 8
    pictures, original = drawn(1, "crack", 3.0).pictures, Image.fromarray(smooth)
    shown = encode(pictures, 3.0, 128, 400_000, original)
    assert shown.shape == (600, 900) and shown.input_side == 900
    assert Image.open(io.BytesIO(shown.files["input"])).size == (900, 600)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 900, 3), dtype=np.uint8))
    shown = encode(pictures, 3.0, 128, 100_000, noise)
    width, height = Image.open(io.BytesIO(shown.files["input"])).size
    assert 128 <= width == shown.input_side < 900 and abs(width / height - 1.5) < 0.02
    assert sum(map(len, shown.files.values())) <= 100_000


def test_few_images_get_more_bytes_each():
    assert [Gallery(count).image_bytes for count in (1, 100, 200, 2000)] == [MOST_BYTES, 100_000, IMAGE_BYTES, 5_000]


@pytest.mark.parametrize("most", [1, 3, 5, 12, 40])
def test_a_report_has_the_pictures_of_the_highest_scoring_images_and_counts_all(run, most, tmp_path):
    """Of equal scores those that came first."""
    run = [*run, Found(run[0].row._replace(path="twice.png", score=4.0), run[0].pictures)]
    path = write_report(tmp_path / "r.html", run, {}, most=most)
    images = report_data(path)["images"]
    assert [image["path"] for image in images] == [row.path for row in rows(run)]
    ranked = sorted(rows(run), key=lambda row: -row.score)
    assert {image["path"] for image in images if image["pictures"]} == {row.path for row in ranked[:most]}
    told = f"Pictures of the {most} highest-scoring of 13 images" in path.read_text("utf-8")
    assert told == (most < 13)


def test_only_pictures_that_a_report_may_show_are_asked_for(run):
    gallery = Gallery(100, most=2)
    asked = []
    for number, score in enumerate([5, 1, 3, 2, 3, 4, 0, 5]):
        if gallery.wants(number, score):
            asked.append(number)
            gallery.put(number, score, encode(run[0].pictures, 3.0))
    assert asked == [0, 1, 2, 5, 7] and sorted(gallery.shown) == [0, 7]


def test_images_without_ground_truth_have_no_label_in_the_report(run, tmp_path):
    data = report_data(write_report(tmp_path / "r.html", unknown(run), {}, thresholds=Thresholds()))
    for image in data["images"]:
        assert (image["label"], image["pictures"]["truth"], image["kind"]) == (None, None, "unknown")
    assert data["roc"] is None and data["pro"] is None and data["threshold"] is None


# The report in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium, without network habits of its own."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium, driver = next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium with its chromedriver was found")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", "disable-dev-shm-usage",
                 f"user-data-dir={tmp_path_factory.mktemp('profile')}", "window-size=1280,1000"):
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser, run, tmp_path):
    path = write_report(tmp_path / "report.html", run, {"auroc": 0.9})
    browser.get(path.as_uri())
    return browser


def text(page, selector):
    return page.find_element("css selector", selector).text


def settle(page):
    """Wait for the next drawn frame, in which the page follows its threshold."""
    page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def counts(page):
    settle(page)
    return {name: int(text(page, f"#{name}")) for name in ("true-good", "false-alarms", "misses", "true-defective")}


def expected(run, threshold):
    rates = metrics.rates([row.label for row in rows(run)], [row.score for row in rows(run)], threshold)
    return {"true-good": rates.tn, "false-alarms": rates.fp, "misses": rates.fn, "true-defective": rates.tp}


def shown_paths(page):
    return [node.text for node in page.find_elements("css selector", "#gallery .path bdi")]


def test_the_counts_start_at_the_saved_threshold_which_counts_as_defective(page, run):
    assert counts(page) == expected(run, 2.0) == {"true-good": 4, "false-alarms": 1, "misses": 2, "true-defective": 5}
    assert text(page, "#false-alarm-rate") == "20.0 %" and text(page, "#miss-rate") == "28.6 %"
    assert page.find_element("id", "threshold-number").get_attribute("value") == "2"
    assert not [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    loaded = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith("data:") for name in loaded)


def test_dragging_the_threshold_moves_the_counts(page, run):
    from selenium.webdriver import ActionChains

    plot = page.find_element("id", "histogram")
    seen = set()
    for offset in (-200, -60, 90, 300):
        ActionChains(page).move_to_element(plot).click_and_hold().move_by_offset(offset, 0).release().perform()
        found = counts(page)
        threshold = page.execute_script("return state.threshold")
        assert found == expected(run, threshold)
        seen.add(tuple(found.values()))
    assert len(seen) == 4, "every place tried here gives other counts"


def test_the_threshold_can_be_moved_with_the_keyboard_and_typed_and_reset(page, run):
    slider, field = page.find_element("id", "threshold-range"), page.find_element("id", "threshold-number")
    assert "hreshold" in slider.get_attribute("aria-label")
    slider.send_keys("\ue014" * 10)  # arrow right
    moved = page.execute_script("return state.threshold")
    assert moved > 2 and counts(page) == expected(run, moved)
    field.clear()
    field.send_keys("2.75")
    assert counts(page) == expected(run, 2.75)
    page.find_element("id", "threshold-reset").click()
    assert counts(page) == expected(run, 2.0)


def test_the_gallery_is_sorted_by_score_and_filtered_by_outcome_and_kind(page, run):
    ranked = sorted(rows(run), key=lambda row: -row.score)
    highest_first = [i.path for i in ranked]
    assert sorted(shown_paths(page)) == sorted(highest_first)
    assert shown_paths(page)[0] == highest_first[0] and shown_paths(page)[-1] == highest_first[-1]
    for result in ("false alarm", "miss"):
        page.find_element("css selector", f"[data-outcome='{result}']").click()
        assert shown_paths(page) == [
            i.path for i in ranked if verdicts.outcome(i.label, verdicts.decide(i, 2.0)) == result]
    kind = page.find_element("id", "kind")
    kind.send_keys("hole")
    assert shown_paths(page) == ["test/hole/013.png"]
    page.find_element("css selector", "[data-outcome=all]").click()
    assert len(shown_paths(page)) == 3 and text(page, "#shown") == "3 of 12 images"


def test_a_filtered_gallery_follows_the_threshold(page):
    page.find_element("css selector", "[data-outcome='false alarm']").click()
    page.execute_script("setThreshold(1.3)")
    settle(page)
    assert shown_paths(page) == ["test/good/004.png", "test/good/003.png", "test/good/002.png"]


def test_arrow_keys_walk_through_the_images_and_escape_closes(page, run):
    from selenium.webdriver import ActionChains

    def press(key):
        ActionChains(page).send_keys(key).perform()

    right, left, up, escape = "\ue014", "\ue012", "\ue013", "\ue00c"
    order = shown_paths(page)
    page.find_element("css selector", ".entry").click()
    assert text(page, "#viewer-path") == order[0]
    press(right)
    press(right)
    press(left)
    assert text(page, "#viewer-path") == order[1]
    overlay = page.find_element("css selector", "#viewer-pictures [data-name=overlay]")
    assert overlay.value_of_css_property("opacity") == "0"
    press(up)
    assert overlay.value_of_css_property("opacity") == "0.1"
    press(escape)
    assert not page.find_element("id", "viewer").is_displayed()
    assert page.execute_script("return document.activeElement.image.path") == order[1]
    press(right)
    assert page.execute_script("return document.activeElement.image.path") == order[2]


def test_hostile_names_are_shown_as_text(page):
    assert HOSTILE in shown_paths(page)
    assert not page.find_elements("css selector", "img[src=x]") and not page.find_elements("css selector", "b")


def test_pictures_are_made_only_when_they_come_near(browser, run, tmp_path):
    many = [Found(run[k % 12].row._replace(path=f"{k}.png"), run[k % 12].pictures) for k in range(120)]
    browser.get(write_report(tmp_path / "r.html", many, {}).as_uri())
    settle(browser)
    at_first = len(browser.find_elements("css selector", ".entry"))
    browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    settle(browser)
    settle(browser)
    assert 0 < at_first < len(browser.find_elements("css selector", ".entry")) <= 120


def test_without_ground_truth_there_are_no_confusion_counts(browser, run, tmp_path):
    browser.get(write_report(tmp_path / "r.html", unknown(run), {}).as_uri())
    settle(browser)
    for name in ("confusion", "curves-card", "roc-block"):
        assert not browser.find_element("id", name).is_displayed()
    assert text(browser, "#called") == "6 of 12 images are called defective."
    assert "unknown" in text(browser, "#legend")
    buttons = browser.find_elements("css selector", "#outcomes button")
    assert [b.text.split()[0] for b in buttons if b.text] == ["All", "Called"], "no label tells false alarms and misses"
    browser.find_element("css selector", "[data-outcome=defective]").click()
    called = sorted((row.path for row in rows(run) if row.score >= 2), reverse=True)
    assert sorted(shown_paths(browser), reverse=True) == called
    assert text(browser, "#shown") == "6 of 12 images"


def test_images_are_found_by_parts_of_their_name(page):
    field = page.find_element("id", "search")
    field.send_keys("HOLE 01")
    assert sorted(shown_paths(page)) == ["test/hole/013.png", "test/hole/014.png", "test/hole/015.png"]
    field.send_keys("nosuch")
    assert not shown_paths(page) and text(page, "#end") == "No such images."


def test_images_can_be_sorted_by_name_and_by_distance_to_the_threshold(page, run):
    from selenium.webdriver.support.select import Select

    order = Select(page.find_element("id", "order"))
    order.select_by_value("name")
    paths = [row.path for row in rows(run)]
    assert shown_paths(page)[-1] == HOSTILE or shown_paths(page)[0] == HOSTILE
    assert [path for path in shown_paths(page) if path != HOSTILE] == sorted(set(paths) - {HOSTILE})
    order.select_by_value("near")
    assert shown_paths(page)[:2] == [HOSTILE, "test/hole/013.png"], "scores of 2 and 1.75 at a threshold of 2"
    page.execute_script("setThreshold(4.8)")
    settle(page)
    assert shown_paths(page)[0] == "test/hole/015.png", "the order follows the threshold"


def test_all_pictures_of_the_viewer_are_enlarged_together(page):
    page.find_element("css selector", ".entry").click()
    page.find_element("id", "viewer").send_keys("++")
    shown = {picture.get_attribute("style") for picture in page.find_elements("css selector", "#viewer-pictures img")
             if picture.get_attribute("data-name") != "overlay"}
    assert len(shown) == 1 and "scale(2.25)" in shown.pop()
    page.find_element("id", "viewer").send_keys("\ue014")
    assert page.execute_script("return view.zoom") == 1, "the next image is seen whole"
    page.find_element("id", "zoom-own").click()
    assert page.execute_script("return view.zoom") == 1, "an image of 32 px is shown larger than its own size"


def test_all_images_asked_for_are_printed(browser, run, tmp_path):
    many = [Found(run[k % 12].row._replace(path=f"{k:03d}.png"), run[k % 12].pictures) for k in range(90)]
    browser.get(write_report(tmp_path / "r.html", many, {}).as_uri())
    settle(browser)
    assert len(browser.find_elements("css selector", ".entry")) < 90
    browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert len(browser.find_elements("css selector", ".entry")) == 90


def test_without_javascript_no_control_is_shown(browser, run, tmp_path):
    path = write_report(tmp_path / "r.html", run, {"image_rates": {"fn": 2, "tp": 5, "fp": 1, "tn": 4}})
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(path.as_uri())
        controls = browser.find_elements("css selector", "button, input, select")
        assert controls and not any(control.is_displayed() for control in controls)
        body = browser.find_element("css selector", "body").text
        assert "Found 5 of 7 defective parts; 1 false alarm among 5 good ones." in body and "need JavaScript" in body
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


# Another threshold


@pytest.fixture
def calibrated():
    """Nineteen good scores from 0.1 to 1.9; a threshold of 2 promises one false alarm in twenty."""
    return Calibration({"pixel": 1.0, "feature": 1.0}, 1.5, 2.0, tuple(round(0.1 * k, 1) for k in range(1, 20)), 100,
                       0.99, 0.05, DdimSettings.read({"recon_weight": 1.0}).record())


def test_the_command_inspects_again_with_the_threshold_that_is_set(browser, run, calibrated, tmp_path):
    from selenium.webdriver.support.wait import WebDriverWait

    options = InspectionRun(item="nut", dataset_path=Path("my data"), run_id="nut", preset="demo", seed=0)
    command = command_of(options, "inference_ddim.py")
    assert command == "python inference_ddim.py --item nut --dataset_path 'my data'"
    path = report.write_report(tmp_path / "r.html", rows(run), gallery_of(run), {}, SUMMARY, LIMITS, curves_of(run),
                               Again(command, calibrated))
    browser.get(path.as_uri())
    browser.execute_script("setThreshold(1.5432123)")
    settle(browser)
    assert text(browser, "#command") == f"{command} --image_threshold 1.543"
    assert "at most 25.0" in text(browser, "#again-note"), "4 of 19 good scores and the new one reach it"
    browser.find_element("id", "copy-command").click()
    WebDriverWait(browser, 5).until(lambda page: "command is" in text(page, "#again-done"))


def test_the_saved_calibration_has_the_threshold_that_is_set_and_is_read(browser, run, calibrated, tmp_path):
    path = report.write_report(tmp_path / "r.html", rows(run), gallery_of(run), {}, SUMMARY, LIMITS, curves_of(run),
                               Again("python x.py", calibrated))
    browser.get(path.as_uri())

    def saved(threshold):
        browser.execute_script(f"setThreshold({threshold})")
        settle(browser)
        (tmp_path / "calibration.json").write_text(browser.execute_script("return calibrationText()"))
        return load_calibration(tmp_path / "calibration.json")

    assert saved(2) == calibrated
    assert saved(1.65) == replace(saved(2), image_threshold=1.65, false_alarm_rate=0.2)
    assert saved(3) == replace(saved(2), image_threshold=3.0, false_alarm_rate=0.05)
    assert saved(0.01) == replace(saved(2), image_threshold=0.01, false_alarm_rate=None)


# The sentence and the figures


def test_the_report_begins_with_what_was_found_and_what_was_promised(run, calibrated, tmp_path):
    numbers = {"image": {"auroc": 0.98765}, "image_rates": {"fn": 4, "tp": 56, "fp": 3, "tn": 37,
                                                            "true_negative_rate": 0.925},
               "pixel": {"ap": 0.5, "aupro_0.3": 0.9}}
    path = report.write_report(tmp_path / "r.html", rows(run), gallery_of(run), numbers, SUMMARY, LIMITS,
                               curves_of(run), Again("", calibrated))
    page = path.read_text("utf-8")
    assert ("Found 56 of 60 defective parts; 3 false alarms among 40 good ones; promised at most 5 % on average."
            in page)
    assert "usually has 0 to 5 false alarms" in page and "7.5 %" in page
    shown = re.findall(r'class="name">(.*?)</div><div class="value number">(.*?)</div>', page)
    assert shown == [("Image AUROC", "98.8 %"), ("Pixel AP", "50.0 %"), ("AUPRO", "90.0 %"), ("Missed", "4 of 60"),
                     ("False alarms", "3 of 40")]
    assert "true negative rate" not in page, "it is 1 less the false-positive rate"


def test_without_labels_the_report_says_how_many_are_called_defective(run):
    assert result_sentence(rows(run), {}, 0.05) == (
        "6 of 12 images called defective; at most 5 % false alarms promised on average.")
    assert "not calibrated" in result_sentence(rows(unknown(run)), {}, None)


@pytest.mark.parametrize(("count", "rate", "usual"), [
    (40, 0.05, (0, 5)), (1000, 0.05, (37, 64)), (10, 0.0, (0, 0)), (10, 1.0, (10, 10)), (1, 0.5, (0, 1))])
def test_the_usual_numbers_of_false_alarms_are_those_of_the_binomial_distribution(count, rate, usual):
    """Compared with scipy.stats.binom.interval(0.95, count, rate)."""
    assert usual_range(count, rate) == usual


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_a_phone_shows_the_report_without_scrolling_sideways(page, colours):
    scheme = {"name": "prefers-color-scheme", "value": colours}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                         {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True})
    try:
        settle(page)
        assert page.execute_script("return document.documentElement.scrollWidth") == 390
        background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", background))) / 3
        assert brightness > 200 if colours == "light" else brightness < 50
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
