"""The summary of several runs: means and spreads worked out by hand, what is left out and said, files that are kept."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from dbad.report.published import PUBLISHED
from dbad.report.runs import COLUMNS, Run, over_categories
from dbad.report.summary import dataset_of, write_summary

ABOUT = {"Data set": "data/parts", "Preset": "demo"}
HOSTILE = 'a|b <img src=x onerror=alert(1)>"#?%41'


def a_run(img_dir, item, seed=0, status="done", error=None, auroc=0.9, missed=1, ms=250, pixel=True, reason=None,
          protocol="full frame", commit="abc"):
    """A run with the files that an evaluation leaves; 10 of its test images are defective and 5 are good."""
    folder = img_dir / f"{item}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {
        "num_images": 15, "image": {"auroc": auroc, "ap": 0.8, "f1_max": 0.7, "f1_max_threshold": 1.5},
        "image_rates": {"tp": 10 - missed, "fn": missed, "fp": 2, "tn": 3, "f1": None},
        "pixel": {"auroc": 0.95, "ap": 0.5, "f1_max": 0.4, "aupro_0.3": 0.91, "aupro_0.05": 0.6} if pixel else None,
        "protocol": protocol, "seconds_per_image": ms / 1000} | ({"reason": reason} if reason else {})
    (folder / "metrics.json").write_text(json.dumps(metrics), "utf-8")
    (folder / "options.json").write_text(json.dumps({"options": {}, "commit": commit}), "utf-8")
    (folder / "report.html").write_text("a report", "utf-8")
    return Run(item, seed, folder, status, error, 60.0)


def markdown_tables(img_dir):
    """Every table of summary.md as {first cell: {head: text}}; equal heads get a ' behind the later ones."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", (img_dir / "summary.md").read_text("utf-8"), re.MULTILINE)
    tables = []
    for block in blocks:
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        assert len({len(row) for row in rows}) == 1, "every row has a cell for every head"
        heads = [head + "'" * rows[0][:index].count(head) for index, head in enumerate(rows[0])]
        tables.append({row[0]: dict(zip(heads, row, strict=True)) for row in rows[2:]})
    return tables


def csv_rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Page(HTMLParser):
    """The addresses that a page links, the names of its elements and their text."""

    def __init__(self, path):
        super().__init__()
        self.links, self.tags, self.text = [], [], ""
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name == "href" and tag == "a"]

    def handle_data(self, data):
        self.text += data


# Numbers


def test_a_category_shows_the_mean_and_the_standard_deviation_over_its_seeds(tmp_path):
    """0.90, 0.92, 0.97: mean 0.93, deviations -3, -1, 4 points, sqrt((9 + 1 + 16) / 2) = 3.606."""
    seeds = ((0, 0.90, 1, 100), (1, 0.92, 2, 200), (2, 0.97, 6, 300))
    write_summary(tmp_path, [a_run(tmp_path, "bolt", seed, auroc=auroc, missed=missed, ms=ms)
                             for seed, auroc, missed, ms in seeds], ABOUT)
    row = markdown_tables(tmp_path)[0]["bolt"]
    assert row["Seeds"] == "3"
    assert row["Image AUROC"] == "93.0 ± 3.6"
    assert row["Missed defects"] == "3.0 ± 2.6 of 10"       # sqrt((4 + 1 + 9) / 2) = 2.646
    assert row["False alarms"] == "2.0 ± 0.0 of 5"
    assert row["ms per image"] == "200 ± 100"


def test_the_last_row_has_the_mean_over_categories_and_the_spread_of_the_seeds_own_means(tmp_path):
    """Seed 0: (0.90 + 0.80) / 2 = 0.85; seed 1: (0.94 + 0.86) / 2 = 0.90; their deviation is 0.05 / sqrt(2) = 0.0354.

    Missed: 1 + 4 = 5 with seed 0 and 2 + 7 = 9 with seed 1, 7 in the mean of 20, deviation 4 / sqrt(2) = 2.83.
    """
    write_summary(tmp_path, [a_run(tmp_path, item, seed, auroc=auroc, missed=missed) for item, seed, auroc, missed in (
        ("bolt", 0, 0.90, 1), ("nut", 0, 0.80, 4), ("bolt", 1, 0.94, 2), ("nut", 1, 0.86, 7))], ABOUT)
    mean = markdown_tables(tmp_path)[0]["**Mean**"]
    assert mean["Image AUROC"] == "87.5 ± 3.5"
    assert mean["Missed defects"] == "7.0 ± 2.8 of 20"
    assert mean["ms per image"] == "250 ± 0"


def test_with_one_seed_nothing_is_said_of_spread_and_counts_are_whole(tmp_path):
    index = write_summary(tmp_path, [a_run(tmp_path, "bolt", missed=4), a_run(tmp_path, "nut", ms=12.34)], ABOUT)
    table = markdown_tables(tmp_path)[0]
    assert "Seeds" not in table["bolt"] and table["bolt"]["Missed defects"] == "4 of 10"
    assert table["**Mean**"]["Missed defects"] == "5 of 20" and table["nut"]["ms per image"] == "12.3"
    assert "±" not in (tmp_path / "summary.md").read_text("utf-8") + index.read_text("utf-8")


def test_the_spread_of_the_mean_does_not_show_which_categories_a_seed_lacks():
    """Seed 2 lacks b; the mean takes what there is, the spread only seeds 0 and 1, whose means are 2 and 3."""
    values = {"a": {0: 1.0, 1: 2.0, 2: 6.0}, "b": {0: 3.0, 1: 4.0}, "c": {}}
    mean, spread = over_categories(values, lambda numbers: sum(numbers) / len(numbers))
    assert mean == (3.0 + 3.5) / 2 and spread == pytest.approx(0.5 ** 0.5)
    assert over_categories({"c": {}}, sum) == (None, None)


def test_what_a_category_has_not_is_a_dash_and_left_out_of_a_mean_that_says_so(tmp_path):
    reason = "no pixel metrics: some defective test images have no mask"
    write_summary(tmp_path, [a_run(tmp_path, "bolt"), a_run(tmp_path, "nut", auroc=0.7, pixel=False, reason=reason)],
                  ABOUT)
    table, text = markdown_tables(tmp_path)[0], (tmp_path / "summary.md").read_text("utf-8")
    assert table["nut"]["Pixel AUROC"] == table["nut"]["AUPRO 0.05"] == "–" and table["nut"]["Image AUROC"] == "70.0"
    assert table["**Mean**"]["Pixel AUROC"] == "95.0" and table["**Mean**"]["Image AUROC"] == "80.0"
    assert ("Means of Pixel AUROC, Pixel AP, Pixel F1-max, AUPRO 0.3, AUPRO 0.05 are over 1 of 2 categories; "
            "the others have no value.") in text
    assert f"nut: {reason}." in text
    assert [row["pixel.auroc"] for row in csv_rows(tmp_path / "summary.csv")] == ["0.95", ""]


def test_the_csv_has_every_run_with_numbers_that_read_back_exactly(tmp_path):
    third = 1 / 3
    write_summary(tmp_path, [a_run(tmp_path, "bolt", 0, auroc=third), a_run(tmp_path, "bolt", 7, "finished before"),
                             a_run(tmp_path, "nut", 0, "failed", "no memory"), a_run(tmp_path, "nut", 7, "skipped")],
                  ABOUT)
    rows = csv_rows(tmp_path / "summary.csv")
    assert [(row["item"], row["seed"], row["status"], row["error"]) for row in rows] == [
        ("bolt", "0", "done", ""), ("bolt", "7", "finished before", ""), ("nut", "0", "failed", "no memory"),
        ("nut", "7", "skipped", "")]
    assert float(rows[0]["image.auroc"]) == third and rows[0]["commit"] == "abc" and rows[0]["folder"] == "bolt-0"
    assert (rows[0]["image_rates.fn"], rows[0]["image_rates.tp"], rows[0]["num_images"]) == ("1", "9", "15")
    names = [name for column in COLUMNS for name in (column.name, column.rest) if name]
    assert all(rows[1][name] and not rows[2][name] for name in names), "numbers on disk are not those of a failed run"


# What is said beside the numbers


def test_failed_and_missing_runs_are_told_with_their_reason(tmp_path):
    runs = [a_run(tmp_path, "bolt"), a_run(tmp_path, "nut", 0, "failed", "no memory"),
            a_run(tmp_path, "pin", 0, "skipped"), a_run(tmp_path, "rod")]
    (tmp_path / "rod-0" / "metrics.json").unlink()
    index = write_summary(tmp_path, runs, ABOUT)
    for text in ((tmp_path / "summary.md").read_text("utf-8"), Page(index).text):
        assert "1 of 4 runs finished, 1 failed, 1 not run" in text and "All means are over 1 of 4 categories" in text
        for item, why in (("nut", "failed: no memory"), ("pin", "not run"), ("rod", "metrics.json: no such file")):
            assert re.search(f"{item}, seed 0: .*{why}", text)


def test_a_category_that_misses_a_seed_says_how_many_it_has(tmp_path):
    write_summary(tmp_path, [a_run(tmp_path, "bolt", 0), a_run(tmp_path, "bolt", 1, "failed", "no memory")], ABOUT)
    row = markdown_tables(tmp_path)[0]["bolt"]
    assert (row["Seeds"], row["Image AUROC"]) == ("1 of 2", "90.0")


def test_facts_and_protocol_are_shown_and_runs_measured_otherwise_are_named(tmp_path):
    index = write_summary(tmp_path, [a_run(tmp_path, "bolt"), a_run(tmp_path, "nut", commit="def", protocol={
        "crop": "central 224 px", "resolution": "files"})], ABOUT)
    for text in ((tmp_path / "summary.md").read_text("utf-8"), Page(index).text):
        assert "data/parts" in text and "Preset" in text
        assert "full frame (bolt)" in text and "crop: central 224 px; resolution: files (nut)" in text
        assert "different commits: abc, def" in text


def test_a_summary_without_any_result_is_written_too(tmp_path):
    index = write_summary(tmp_path, [Run("bolt", 0, tmp_path / "bolt", "skipped")], ABOUT, "MVTec AD")
    assert markdown_tables(tmp_path)[0]["**Mean**"]["Image AUROC"] == "–" and "0 of 1 run finished" in Page(index).text


# Published results


@pytest.mark.parametrize(("dataset", "num_categories", "stated"), [
    ("MVTec AD", 15, (99.8, 98.1, 92.3)), ("VisA", 12, (98.9, 97.6, 92.7))])
def test_the_published_rows_are_complete_and_have_the_mean_that_the_paper_states(dataset, num_categories, stated):
    rows = PUBLISHED[dataset].rows
    assert len(rows) == num_categories and all(50 < value <= 100 for row in rows.values() for value in row)
    means = [sum(column) / num_categories for column in zip(*rows.values(), strict=True)]
    assert means == pytest.approx(stated, abs=0.05)


def test_a_data_set_is_known_by_its_categories():
    assert dataset_of(["screw", "zipper"]) == dataset_of(PUBLISHED["MVTec AD"].rows) == "MVTec AD"
    assert dataset_of({"pcb1"}) == "VisA"
    assert dataset_of(["screw", "pcb1"]) is dataset_of(["screw", "bolt"]) is dataset_of([]) is None


def test_published_means_are_over_the_categories_that_we_have_too(tmp_path):
    """Image AUROC: screw 99.0 and cable 99.4, mean 99.2; PRO: screw alone, as we have none of cable; never all 15."""
    runs = [a_run(tmp_path, "screw"), a_run(tmp_path, "cable", pixel=False), a_run(tmp_path, "pill", 0, "failed", "no"),
            a_run(tmp_path, "bolt", auroc=0.1)]
    index = write_summary(tmp_path, runs, ABOUT, "MVTec AD")
    table, text = markdown_tables(tmp_path)[1], (tmp_path / "summary.md").read_text("utf-8")
    assert list(table) == ["screw", "cable", "pill", "**Mean**"]
    assert table["screw"] == {"Category": "screw", "Image AUROC": "90.0", "DDAD": "99.0", "Pixel AUROC": "95.0",
                              "DDAD'": "99.3", "AUPRO 0.3": "91.0", "DDAD''": "96.3"}
    mean = table["**Mean**"]
    assert (mean["Image AUROC"], mean["DDAD"]) == ("90.0", "99.2"), "ours without bolt, which was not published"
    assert (mean["AUPRO 0.3"], mean["DDAD''"]) == ("91.0", "96.3")
    for said in (text, Page(index).text):
        assert "arXiv:2305.15956" in said and PUBLISHED["MVTec AD"].caveat in said
    assert "(−9.2)" in Page(index).text
    assert "DDAD" not in (tmp_path / "summary.csv").read_text("utf-8")


# Files


def test_a_summary_of_other_runs_is_kept_under_a_number(tmp_path, capsys):
    bolt, nut, pin = (a_run(tmp_path, item) for item in ("bolt", "nut", "pin"))
    write_summary(tmp_path, [bolt], ABOUT)
    write_summary(tmp_path, [bolt, nut], ABOUT)
    assert not list(tmp_path.glob("*.1.*")) and not capsys.readouterr().out, "nothing is lost by a larger summary"
    before = {name: (tmp_path / name).read_text("utf-8") for name in ("summary.csv", "summary.md", "index.html")}
    (tmp_path / "index.1.html").write_text("mine", "utf-8")
    write_summary(tmp_path, [bolt, pin], ABOUT)
    assert [(tmp_path / name).read_text("utf-8") for name in ("summary.2.csv", "summary.2.md", "index.2.html")] == list(
        before.values())
    assert (tmp_path / "index.1.html").read_text("utf-8") == "mine" and "summary.2.csv" in capsys.readouterr().out
    assert [row["item"] for row in csv_rows(tmp_path / "summary.csv")] == ["bolt", "pin"]


def test_every_link_of_the_page_leads_to_the_report_of_a_finished_run(tmp_path):
    img_dir = tmp_path / "results"
    runs = [a_run(img_dir, name, seed) for name in ("bolt", "ä #1 50%?") for seed in (0, 1)]
    runs += [a_run(img_dir, "nut", 0, "failed", "no memory"), a_run(tmp_path / "elsewhere", "nut", 1)]
    page = Page(write_summary(img_dir, runs, ABOUT))
    assert not any(":" in link or link.startswith("/") for link in page.links)
    linked = [(img_dir / unquote(urlsplit(link).path)).resolve() for link in page.links]
    assert linked == [(run.folder / "report.html").resolve() for run in runs if run.status == "done"]
    assert all(path.is_file() for path in linked)


def test_names_stand_for_themselves_in_both_documents(tmp_path):
    run = a_run(tmp_path, "bolt")
    runs = [Run(HOSTILE, 0, run.folder, "done"), Run("nut", 0, tmp_path, "failed", "<script>|\nsecond line")]
    page = Page(write_summary(tmp_path, runs, {HOSTILE: HOSTILE}))
    assert page.text.count(HOSTILE) == 3 and "<script>|" in page.text
    assert "img" not in page.tags and page.tags.count("script") == 1
    text = (tmp_path / "summary.md").read_text("utf-8")
    assert r'a\|b &lt;img src=x onerror=alert(1)>"#?%41' in markdown_tables(tmp_path)[0]
    assert "<" not in text and r"failed: &lt;script>\| second line" in text


def test_the_page_loads_nothing_from_elsewhere(tmp_path):
    text = write_summary(tmp_path, [a_run(tmp_path, "screw")], ABOUT, "MVTec AD").read_text("utf-8")
    assert text.startswith("<!doctype html>") and "default-src 'none'" in text
    assert not re.search(r"(src=|url\(|https?://|@import|<link rel=\"stylesheet)", text)


# The page in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium with its chromedriver was found")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-dev-shm-usage",
                 "no-first-run", f"user-data-dir={tmp_path_factory.mktemp('profile')}", "window-size=1280,1000"):
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def test_a_click_on_a_head_sorts_by_it_and_leaves_what_is_missing_last(browser, tmp_path):
    runs = [a_run(tmp_path, "m10", auroc=0.8), a_run(tmp_path, "m9", auroc=0.99), a_run(tmp_path, "m1", auroc=1.0),
            a_run(tmp_path, "gone", 0, "failed", "no memory")]
    browser.get(write_summary(tmp_path, runs, ABOUT).as_uri())

    def sorted_by(column):
        browser.find_elements("css selector", "#categories thead button")[column].click()
        return [row.text for row in browser.find_elements("css selector", "#categories tbody th")]
    assert sorted_by(1) == ["m10", "m9", "m1", "gone"] and sorted_by(1) == ["m1", "m9", "m10", "gone"]
    assert sorted_by(0) == ["gone", "m1", "m9", "m10"]
    assert [head.get_attribute("aria-sort") for head in browser.find_elements("css selector", "thead th")][:2] == [
        "ascending", None]
    assert browser.find_element("css selector", "#categories tfoot th").text == "Mean"
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_phone_shows_the_page_without_scrolling_sideways(browser, tmp_path):
    runs = [a_run(tmp_path, item, seed) for item in ("screw", "metal_nut", "x" * 90) for seed in (0, 1)]
    path = write_summary(tmp_path, runs, {"Changed from the preset": "word" * 60}, "MVTec AD")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True})
    try:
        browser.get(path.as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
