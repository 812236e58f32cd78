"""Two runs on the same test images, side by side."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dbad import compare, metrics
from dbad.errors import UserError
from dbad.metrics import verdicts
from dbad.metrics.bootstrap import Ranked, Scored, difference_intervals, image_numbers
from dbad.metrics.verdicts import Thresholds
from dbad.records import Pictures, ScoreRow
from dbad.report import comparison, page
from dbad.report.gallery import Gallery, encode

NUM_IMAGES, LIMIT = 12, 0.52
PIXEL = ("auroc", "ap", "f1_max", "aupro_0.3", "aupro_0.05")
HOSTILE = "nut/test/<b>crack</b>/<script>alert(1)</script>.png"


def masks_and_maps(seed: int, strength: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Half the images are good; defects are squares of 6 px, brighter by `strength` than noise with few levels."""
    random, masks, maps = np.random.default_rng(seed), [], []
    for number in range(NUM_IMAGES):
        mask = np.zeros((24, 24), bool)
        if number % 2:
            mask[number:number + 6, 5:11] = True
        masks.append(mask)
        maps.append((random.integers(0, 20, mask.shape) / 20 + strength * mask).astype(np.float32))
    return masks, maps


def write_run(folder: Path, strength: float, maps_too: bool = False) -> Path:
    """A folder of results, whose maps find defects the better, the higher `strength`."""
    gallery, rows = Gallery(NUM_IMAGES), []
    masks, maps = masks_and_maps(0, strength)
    for number, (mask, values) in enumerate(zip(masks, maps, strict=True)):
        kind = "crack" if mask.any() else "good"
        path = HOSTILE if number == 11 else f"nut/test/{kind}/{number:03d}.png"
        score = float(values.mean())
        rows.append(ScoreRow(path, "nut", kind, int(mask.any()), score, 0.5, score / (score + LIMIT),
                             int(score >= LIMIT)))
        image = np.full((24, 24, 3), 20 * number, np.uint8)
        gallery.put(number, score, encode(Pictures(image, None, values, {}, mask), 2.0))
        if maps_too:
            file = folder / "anomaly_maps" / Path(path).with_suffix(".tiff")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(file)
    labels, scores = [row.label for row in rows], [row.score for row in rows]
    found = {"image": metrics.image_metrics(labels, scores),
             "image_rates": metrics.rates(labels, scores, LIMIT).as_dict(),
             "pixel": metrics.pixel_metrics(masks, maps), "seconds_per_image": 0.25, "protocol": {"crop": "none"}}
    page.write_scores(folder / "scores.csv", rows)
    page.write_metrics(folder, found)
    page.write_report(folder / "report.html", rows, gallery, found, {}, Thresholds(LIMIT, 1.0), verdicts.curves(rows))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return write_run(folder / "weak", 0.05, True), write_run(folder / "strong", 3.0, True)


# Intervals


def test_the_metrics_of_all_images_are_those_of_the_exact_functions():
    masks, maps = masks_and_maps(1, 0.4)
    everything, exact = np.arange(NUM_IMAGES), metrics.pixel_metrics(masks, maps)
    found = Ranked(masks, maps).numbers(everything)
    assert found == pytest.approx({f"pixel.{name}": exact[name] for name in PIXEL})
    labels, scores = np.array([mask.any() for mask in masks]), np.array([values.mean() for values in maps])
    found = image_numbers(Scored(labels, scores, scores >= 0.5), everything)
    assert found["image.auroc"] == metrics.auroc(labels, scores)
    assert found["image_rates.false_positive_rate"] == metrics.rates(labels, scores, 0.5).false_positive_rate


def test_the_pixels_of_an_image_that_is_drawn_twice_count_twice():
    masks, maps = masks_and_maps(2, 0.4)
    chosen = np.array([0, 1, 1, 5, 6, 6])
    exact = metrics.pixel_metrics([masks[k] for k in chosen], [maps[k] for k in chosen])
    assert Ranked(masks, maps).numbers(chosen)["pixel.ap"] == pytest.approx(exact["ap"])
    assert Ranked(masks, maps).numbers(chosen)["pixel.aupro_0.3"] == pytest.approx(exact["aupro_0.3"])


def test_an_image_without_mask_is_left_out_of_pixel_metrics():
    masks, maps = masks_and_maps(2, 0.4)
    found = Ranked([None, *masks[1:]], maps).numbers(np.arange(NUM_IMAGES))
    assert found["pixel.auroc"] == pytest.approx(metrics.pixel_metrics(masks[1:], maps[1:])["auroc"])


def test_maps_of_many_values_are_measured_almost_exactly():
    masks, maps = masks_and_maps(3, 0.4)
    random = np.random.default_rng(0)
    maps = [np.float32(values + random.uniform(0, 0.05, values.shape)) for values in maps]
    exact = metrics.pixel_metrics(masks, maps)
    found = Ranked(masks, maps).numbers(np.arange(NUM_IMAGES))
    assert found == pytest.approx({f"pixel.{name}": exact[name] for name in PIXEL}, abs=2e-3)


def test_a_run_does_not_differ_from_itself_and_the_interval_is_the_same_every_time():
    labels = np.arange(40) % 2
    scores = np.random.default_rng(0).normal(labels, 1.0)
    one = Scored(labels, scores, scores > 0.5)
    other = Scored(labels, np.random.default_rng(1).normal(2 * labels, 1.0), scores > 1)

    def numbers(run):
        return lambda chosen: image_numbers(run, chosen)
    assert set(difference_intervals(numbers(one), numbers(one), 40).values()) == {(0.0, 0.0)}
    first, second = (difference_intervals(numbers(one), numbers(other), 40) for _ in range(2))
    low, high = first["image.auroc"]
    truth = metrics.auroc(labels, other.scores) - metrics.auroc(labels, scores)
    assert first == second and low < truth < high


# The page


def test_the_page_has_the_differences_with_intervals_and_the_largest_change_first(runs, tmp_path, capsys):
    compare.main([*map(str, runs), "--out", str(tmp_path / "out.html")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "out.html")
    found, other = map(comparison.read_run, runs)
    pairs = comparison.pairs_of(found, other)
    changes = [abs(pair.change) for pair in pairs]
    assert changes == sorted(changes, reverse=True) and len(pairs) == NUM_IMAGES
    assert {pair.first.label for pair in pairs[:6]} == {1}, "only the scores of defective images differ"
    assert all(set(pair.pictures) == {"input", "first", "second", "truth"} for pair in pairs)
    text = (tmp_path / "out.html").read_text("utf-8")
    assert text.count("<img") == 4 * NUM_IMAGES and "<script" not in text and "<b>crack" not in text
    rows = text.split('<tr class="clear">')[1:]
    assert any("Image AUROC" in row for row in rows) and any("Pixel AP" in row for row in rows)
    assert "no intervals" not in text


def test_without_exported_maps_pixel_metrics_have_no_interval_and_the_page_says_so(runs, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(runs[0], plain, ignore=shutil.ignore_patterns("anomaly_maps"))
    text = comparison.write_comparison(plain, runs[1], tmp_path / "out.html").read_text("utf-8")
    assert "Pixel metrics have no intervals" in text


def test_runs_of_different_test_images_are_refused_in_one_line(runs, tmp_path, capsys):
    fewer = tmp_path / "fewer"
    shutil.copytree(runs[0], fewer)
    lines = (fewer / "scores.csv").read_text().splitlines(keepends=True)
    (fewer / "scores.csv").write_text("".join(lines[:-2]))
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(fewer), str(runs[1]), "--out", str(tmp_path / "out.html")])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1 and "different test images" in message
    assert not (tmp_path / "out.html").exists()
    relabelled = [line.replace(",good,0,", ",good,1,") for line in lines]
    (fewer / "scores.csv").write_text("".join(relabelled))
    with pytest.raises(UserError, match="different labels of nut/test/good/000.png"):
        comparison.write_comparison(fewer, runs[1], tmp_path / "out.html")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("scores.csv", None, "no such file"), ("scores.csv", "path,score\na,b\n", "not a table of scores"),
    ("scores.csv", "path,defect,score,label,normalised,decision\n", "no images"),
    ("report.html", '<script type="application/json" id="data">{"images": [7]}</script>', "not a report"),
    ("metrics.json", "{", "not readable as JSON")])
def test_a_broken_folder_of_results_is_told_by_file(runs, tmp_path, name, content, message):
    broken = tmp_path / "broken"
    shutil.copytree(runs[0], broken)
    (broken / name).unlink()
    if content is not None:
        (broken / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}: {message}"):
        comparison.write_comparison(broken, runs[1], tmp_path / "out.html")


def test_pictures_of_a_report_that_are_no_pictures_are_left_out(runs, tmp_path):
    path = tmp_path / "report.html"
    path.write_text('<script type="application/json" id="data">{"images": [{"path": "a", "pictures": '
                    '{"input": "http://elsewhere/x.png", "map": "data:image/png;base64,AAAA"}}]}</script>')
    assert comparison.report_pictures(path) == {"a": {"map": "data:image/png;base64,AAAA"}}


def test_the_page_may_not_have_the_name_of_another_file_of_a_run(runs):
    with pytest.raises(SystemExit):
        compare.main([*map(str, runs), "--out", str(runs[0] / "scores.csv")])
