"""What every family owes the rest of the project, whatever its method; tiny runs, each made once by its own command."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, _draw_category, _inside, _run_script
from helpers import complaint, json_of, one_line, random_images, rows_of, save_drawn, stamps

import train_tune_eval
from benchmarks.tiny_runs import FINISH
from dbad import load_detector
from dbad.declared import types_of
from dbad.errors import UserError
from dbad.families.registry import FAMILIES
from dbad.families.runs import load_calibration
from dbad.files.names import CALIBRATION

each_family = pytest.mark.parametrize("name", FAMILIES)
SUFFIX = {"ddim": ""}       # of the run's name, behind that of the category
BEFORE = ("intensity", "intensity_bits", "patching")     # settings that the first calibrations lacked
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder in which every family has a finished run on ./data; only to be read."""
    folder = tmp_path_factory.mktemp("contract")
    _draw_category(folder / "data", width=32, height=32)
    with _inside(folder):
        for name in FAMILIES:
            _run_script(*FINISH[name])
    return folder


@pytest.fixture
def work(runs, tmp_path, monkeypatch) -> Path:
    """A copy of `runs` to change, entered."""
    for name in ("data", "checkpoints", "results"):
        shutil.copytree(runs / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_id(name: str) -> str:
    return "hazelnut" + SUFFIX.get(name, f"-{name}")


def opened(folder: Path, name: str, batch_size: int = 8):
    return load_detector(folder / "checkpoints" / run_id(name), device="cpu", precision="fp32", batch_size=batch_size)


def test_images(folder: Path) -> list[Path]:
    return sorted((folder / "data" / "hazelnut" / "test").rglob("*.png"))


test_images.__test__ = False


def assert_same(one, other):
    assert one.score == pytest.approx(other.score, rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(one.anomaly_map, other.anomaly_map, rtol=1e-3, atol=1e-5)


@each_family
def test_a_prediction_depends_on_neither_batch_nor_order(name, runs):
    images = test_images(runs)[:3]
    together, backwards = opened(runs, name)(images), opened(runs, name)(images[::-1])
    alone = [opened(runs, name, batch_size=1)(image) for image in images]
    for number, one in enumerate(alone):
        assert_same(one, together[number])
        assert_same(one, backwards[len(images) - 1 - number])


@each_family
def test_a_result_for_one_image_and_a_detector_are_told_in_one_line(name, runs):
    detector = opened(runs, name)
    found = detector(test_images(runs)[0])
    assert repr(detector).startswith(f"{name} detector of hazelnut: {detector.size} px, image threshold ")
    assert re.fullmatch(r"(good|defective): score \S+, threshold \S+, p \S+, map \d+x\d+", repr(found))
    assert "\n" not in repr(detector) and found.maps and all(
        part.shape == found.anomaly_map.shape for part in found.maps.values())


@each_family
def test_a_prediction_has_the_promised_fields(name, runs):
    detector = opened(runs, name)
    side = detector.size
    found = detector.predict(random_images(2, side))
    assert found.score.shape == (2,) and found.score.dtype == torch.float32
    assert found.decision.dtype == torch.bool and found.p_value.dtype == torch.float64
    assert found.maps.keys() == {part for part, weight in detector.settings.contributions.items() if weight}
    for part in (found.anomaly_map, *found.maps.values()):
        assert part.shape == (2, 1, side, side) and part.dtype == torch.float32 and part.device.type == "cpu"
        assert part.min() >= 0 and part.isfinite().all()
    assert found.reconstruction.shape == (2, 3, side, side) and found.reconstruction.abs().max() <= 1


@each_family
def test_from_python_scores_and_decisions_are_those_of_the_scripts(name, runs):
    rows = rows_of(runs / "results" / run_id(name))
    found = opened(runs, name)([runs / "data" / row["path"] for row in rows])
    assert [one.score for one in found] == pytest.approx([float(row["score"]) for row in rows], rel=1e-4)
    assert [one.decision for one in found] == [row["decision"] == "1" for row in rows]
    assert [one.p_value for one in found] == [float(row["p_value"]) for row in rows]


@each_family
def test_files_that_changed_after_the_calibration_or_are_missing_are_named(name, work):
    folder, family = work / "checkpoints" / run_id(name), FAMILIES[name]
    settings = family.settings.read(load_calibration(folder / CALIBRATION).settings)
    for file in {CALIBRATION, *family.files(settings).values()}:
        path = folder / file
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(UserError, match="no such file") as error:
            opened(work, name)
        assert str(path) in one_line(error)
        if file != CALIBRATION:
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            with pytest.raises(UserError, match=f"run {family.scripts.calibration}") as error:
                opened(work, name)
            assert str(path) in one_line(error)
        path.write_bytes(content)
    opened(work, name)


@each_family
def test_a_detector_is_replaced_and_never_changed(name, runs):
    detector = opened(runs, name)
    before = detector(test_images(runs)[0])
    other = replace(detector, settings=replace(detector.settings, seed=1), calibration=None)
    with pytest.raises(UserError, match=f"not calibrated; run {FAMILIES[name].scripts.calibration}"):
        other(test_images(runs)[0])
    assert_same(detector(test_images(runs)[0]), before)


@each_family
def test_a_calibration_is_read_as_it_was_written(name, runs, tmp_path):
    path = runs / "checkpoints" / run_id(name) / CALIBRATION
    calibration = load_calibration(path)
    assert calibration.method == name and json_of(path)["format"] == 1
    assert FAMILIES[name].settings.read(calibration.settings).record() == calibration.settings
    assert calibration.settings.keys() == types_of(FAMILIES[name].settings).keys()
    calibration.save(tmp_path / CALIBRATION)
    assert (tmp_path / CALIBRATION).read_bytes() == path.read_bytes()


@each_family
def test_an_older_calibration_stays_usable(name, work):
    """One without a format has its method among the settings, or none for ddim, and fewer settings."""
    image, path = test_images(work)[0], work / "checkpoints" / run_id(name) / CALIBRATION
    expected = opened(work, name)(image)
    values = json_of(path)
    del values["format"], values["method"]
    for setting in BEFORE:
        values["settings"].pop(setting, None)
    if name != "ddim":
        values["settings"]["method"] = name
    path.write_text(json.dumps(values))
    assert_same(opened(work, name)(image), expected)


@each_family
@pytest.mark.parametrize("damage, message", [
    (lambda v: v.update(method="nosuch"), "method 'nosuch'; expected one of ddim, lafite, knn, diad"),
    (lambda v: v.update(format=2), "format 2: expected 1"),
    (lambda v: v["settings"].pop("seed"), "settings lack seed"),
    (lambda v: v["settings"].update(sharpness=1.0), "sharpness: no setting of this method"),
    (lambda v: v["settings"].update(seed=-1), "seed -1: expected at least 0")])
def test_a_calibration_that_is_none_is_refused_in_one_line(name, damage, message, work):
    path = work / "checkpoints" / run_id(name) / CALIBRATION
    values = json_of(path)
    damage(values)
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        opened(work, name)
    assert str(path) in one_line(error)


@each_family
def test_new_images_have_the_scores_of_test_images(name, work, script):
    words = ["--item", "hazelnut", "--dataset_path", "data", "--device", "cpu", "--precision", "fp32",
             "--num_workers", "0"]
    script(FAMILIES[name].scripts.inspection, *words, "--run_id", run_id(name), "--images", "data/hazelnut/test",
           "--recursive")
    found = {Path(row["path"]).parts[-2:]: row["score"] for row in rows_of(f"results/{run_id(name)}-images")}
    expected = {Path(row["path"]).parts[-2:]: row["score"] for row in rows_of(f"results/{run_id(name)}")}
    assert found == expected and len(found) == 7


def inspected(script, name: str, *words: object, folder: str = "") -> list[dict[str, str]]:
    """The lines of scores.csv after an inspection by the script of the family."""
    script(FAMILIES[name].scripts.inspection, "--item", "hazelnut", "--dataset_path", "data", "--device", "cpu",
           "--precision", "fp32", "--num_workers", 0, "--run_id", run_id(name), *words)
    return rows_of(f"results/{run_id(name)}{folder}")


@each_family
def test_every_script_inspects_with_a_run_of_any_method_as_its_own_script_does(name, work, script):
    inspected(script, name)
    own = Path(f"results/{run_id(name)}")
    expected = (own / "scores.csv").read_bytes(), json_of(own / "options.json")["options"]
    for other in {family.scripts.inspection for family in FAMILIES.values()} - {FAMILIES[name].scripts.inspection}:
        shutil.rmtree(own)
        script(other, "--item", "hazelnut", "--dataset_path", "data", "--device", "cpu",
               "--precision", "fp32", "--num_workers", 0, "--run_id", run_id(name))
        found = (own / "scores.csv").read_bytes(), json_of(own / "options.json")["options"]
        assert found == expected, other
    assert sorted(path.name for path in Path("results").iterdir()) == sorted(map(run_id, FAMILIES))


@each_family
def test_an_option_that_the_method_of_the_run_lacks_is_refused_by_name(name, work, script, capsys):
    foreign = {"ddim": ("inference_lafite.py", "--neighbours", "5"), "lafite": ("inference_ddim.py", "--eta", "0.0"),
               "knn": ("inference_ddim.py", "--pxl_threshold", "1.0"),
               "diad": ("inference_lafite.py", "--knn_contrib", "1.0")}
    which, flag, value = foreign[name]
    before = stamps(work)
    says = complaint(capsys, script, which, "--item", "hazelnut", "--run_id", run_id(name), flag, value)
    assert says == (f"{flag} {value}: checkpoints/{run_id(name)} is a run of --method {name}, which has no such option")
    assert stamps(work) == before


def test_a_run_is_found_without_its_name(work, script, capsys):
    """The script's own methods first, then the only one of the others; several of these are listed."""
    words = ["--item", "hazelnut", "--dataset_path", "data", "--device", "cpu", "--dry_run"]

    def found(which: str, *more: str) -> str:
        script(which, *words, *more)
        return re.search(r"run_id = (\S+)", capsys.readouterr().out)[1]
    assert [found(which) for which in ("inference_ddim.py", "inference_lafite.py", "inference_diad.py")] == [
        "hazelnut", "hazelnut-lafite", "hazelnut-diad"]
    for which in ("inference_ddim.py", "inference_lafite.py", "inference_diad.py"):
        assert found(which, "--method", "knn") == "hazelnut-knn"
    shutil.rmtree("checkpoints/hazelnut-lafite")
    shutil.rmtree("checkpoints/hazelnut")
    assert found("inference_lafite.py") == "hazelnut-knn"
    assert complaint(capsys, script, "inference_ddim.py", *words) == (
        "--item hazelnut: no run of ddim, but 2 of other methods: checkpoints/hazelnut-knn, checkpoints/hazelnut-diad; "
        "expected --run_id or --method")
    assert complaint(capsys, script, "inference_ddim.py", *words, "--run_id", "hazelnut-knn", "--method", "diad") == (
        "--method diad: checkpoints/hazelnut-knn is a run of --method knn")
    shutil.rmtree("checkpoints/hazelnut-diad")
    assert found("inference_ddim.py") == found("inference_diad.py") == "hazelnut-knn"


@pytest.mark.parametrize("name", ["ddim", "lafite"])
def test_the_threshold_is_moved_by_a_score_or_a_rate_and_the_calibration_stays(name, work, script):
    path = work / "checkpoints" / run_id(name) / CALIBRATION
    before, calibration = path.read_bytes(), load_calibration(path)
    scores = sorted(float(row["score"]) for row in rows_of(f"results/{run_id(name)}"))
    middle = scores[3]
    new = ("--images", "data/hazelnut/test", "--recursive")
    for folder, images in (("", ()), ("-images", new)):
        rows = inspected(script, name, "--image_threshold", middle, *images, folder=folder)
        assert [int(row["decision"]) for row in rows] == [int(float(row["score"]) >= middle) for row in rows]
        assert json_of(f"results/{run_id(name)}{folder}/options.json")["options"]["image_threshold"] == middle
        page = Path(f"results/{run_id(name)}{folder}/report.html").read_text(encoding="utf-8")
        assert f"{middle:g} (given)" in page
    rate = 0.7
    rows = inspected(script, name, "--false_alarm_rate", rate)
    threshold = calibration.with_rate(rate).image_threshold
    assert [int(row["decision"]) for row in rows] == [int(float(row["score"]) >= threshold) for row in rows]
    assert f"at most {rate:.1%} of good images, from {len(calibration.scores)} held-out ones (given)" in Path(
        f"results/{run_id(name)}/report.html").read_text(encoding="utf-8")
    assert path.read_bytes() == before


@each_family
def test_a_threshold_that_cannot_be_is_refused_in_one_line_and_leaves_all_as_it_was(name, work, script, capsys):
    before = stamps(work)
    for words, says in ((("--false_alarm_rate", 0.01), "held-out good images can promise no less than"),
                        (("--image_threshold", 1, "--false_alarm_rate", 0.5), "are both given: expected one of them"),
                        (("--image_threshold", 0), "--image_threshold 0.0: expected a number above 0")):
        with pytest.raises(SystemExit) as stop:
            inspected(script, name, *words)
        assert stop.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]
    assert stamps(work) == before


@each_family
def test_the_report_says_by_what_the_images_were_inspected(name, runs):
    folder = runs / "results" / run_id(name)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert FAMILIES[name].about in page and "held-out" in page
    assert {"scores.csv", "metrics.json", "metrics.csv", "options.json", "images", "overview.png", "curves.png"} <= {
        path.name for path in folder.iterdir()}
    scores = np.array([float(row["score"]) for row in rows_of(folder)])
    assert np.isfinite(scores).all() and len(scores) == 7


@each_family
def test_every_run_records_its_method(name, runs):
    assert json_of(runs / "checkpoints" / run_id(name) / "train_arg_config.json")["method"] == name


@each_family
def test_a_category_that_nobody_has_learnt_is_said(name, runs, script, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    with pytest.raises(UserError, match="no thresholds for bolt; expected one of hazelnut"):
        load_detector(f"checkpoints/{run_id(name)}", device="cpu", category="bolt")
    with pytest.raises(SystemExit):
        script(FAMILIES[name].scripts.inspection, "--item", "bolt", "--dataset_path", "data", "--device", "cpu",
               "--run_id", run_id(name))
    assert "bolt" in capsys.readouterr().err


@each_family
def test_a_category_that_fails_spares_the_others(name, tmp_path, monkeypatch, script, capsys):
    """Whatever the method: a test image of one is broken, the others are finished, and the summary is written."""
    monkeypatch.chdir(tmp_path)
    for item in ("hazelnut", "bolt"):
        _draw_category(tmp_path / "data", item, 32, 32)
    broken = tmp_path / "data" / "bolt" / "test" / "good" / "000.png"
    broken.write_bytes(broken.read_bytes()[:60])
    words = FINISH[name]
    place = words.index("hazelnut") + 1
    command = [*words[:place], "bolt", *words[place:]]
    with pytest.raises(SystemExit) as stop:
        script(*command)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "1 of 2 runs failed" in said and str(broken.relative_to(tmp_path)) in said
    summary = Path("results/summary.csv").read_text()
    assert "hazelnut" in summary and "bolt" in summary and len(list(Path("results").glob("*/metrics.json"))) == 1

    if name != "knn":       # the driver is the same for all
        return
    _draw_category(tmp_path / "data", "bolt", 32, 32)       # mended: the one that is finished is skipped
    script(*command)
    assert "hazelnut: finished before" in capsys.readouterr().out
    assert len(list(Path("results").glob("*/metrics.json"))) == 2


@pytest.mark.parametrize("name", ["ddim", "knn"])
def test_photographs_of_good_parts_are_enough_and_new_ones_are_inspected_by_the_command_that_is_printed(
        name, tmp_path, monkeypatch, script, capsys):
    monkeypatch.chdir(tmp_path)
    for index in range(12):
        save_drawn(tmp_path / "photos" / f"{index:03}.jpg", index, 32)
    words = [{"hazelnut": "bolt", "data": "photos"}.get(word, word) for word in FINISH[name]]
    script("train_tune_eval.py", *words[1:], "--checkpoint_dir", "my runs")
    said = capsys.readouterr().out
    run = "my runs/bolt" + SUFFIX.get(name, f"-{name}")
    assert said.splitlines()[-1] == f"Everything is in {run}" and not Path("results").exists()
    command = re.search(r"^bolt: no test images: inspect new ones with python (.*) --images PATH$", said, re.MULTILINE)
    script(*shlex.split(command[1]), "--images", "photos/000.jpg", "--device", "cpu")
    assert len(rows_of(f"results/{Path(run).name}-images")) == 1

    single = shlex.split(command[1])        # on test images, which there are none of
    says = complaint(capsys, script, *single, "--dataset_path", "photos", "--device", "cpu")
    assert says == ("photos: no test images; expected folders such as photos/good and photos/crack, or new images: "
                    "--images PATH")


def test_of_several_categories_those_without_test_images_are_trained_and_the_summary_says_so(
        tmp_path, monkeypatch, script, capsys):
    monkeypatch.chdir(tmp_path)
    for item in ("bolt", "hazelnut"):
        _draw_category(tmp_path / "data", item, 32, 32)
    shutil.rmtree(tmp_path / "data" / "bolt" / "test")
    words = FINISH["knn"]
    place = words.index("hazelnut") + 1
    script(*words[:place], "bolt", *words[place:])
    assert "bolt: no test images: inspect new ones with python inference_lafite.py --item bolt --run_id " in (
        capsys.readouterr().out)
    assert [(row["item"], row["status"], row["error"]) for row in rows_of("results", "summary.csv")] == [
        ("bolt", "no test images", ""), ("hazelnut", "done", "")]
    text = Path("results/summary.md").read_text(encoding="utf-8")
    assert "1 of 2 runs finished, 1 without test images." in text and "- bolt, seed 0: no test images" in text
    assert load_detector("checkpoints/hazelnut-bolt-knn", device="cpu", category="bolt").calibration.scores


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_help_of_every_script_has_true_headings(name, script, capsys):
    words = ["--method", "ddim"] if name == "train_tune_eval.py" else []
    with pytest.raises(SystemExit) as stop:
        script(name, *words, "--help_all")
    page = capsys.readouterr().out
    assert page.startswith(f"usage: {name} {'--out PATH' if name == 'build_diad.py' else '--item NAME'} [options]")
    page = page[page.index("First of all:"):]
    headings = re.findall(r"^([A-Z][^:\n]*(?:: [^:\n]*)?):$", page, flags=re.MULTILINE)
    assert stop.value.code == 0 and len(set(headings)) == len(headings)
    assert ("--out" if name == "build_diad.py" else "--item") in page.split("\n\n")[0]
    assert headings[0] == "First of all" and headings[-2] in ("Hardware", "Run") and headings[-1] == "Help"


@each_family
def test_every_method_has_the_help_of_its_own_options_only(name, capsys):
    with pytest.raises(SystemExit):
        train_tune_eval.main(["--method", name, "--help_all"])
    page = capsys.readouterr().out
    own = {"ddim": "--recon_weight", "lafite": "--bank_mb", "knn": "--bank_mb", "diad": "--latent_start"}
    assert own[name] in page
    assert not any(flag in page for flag in set(own.values()) - {own[name]})


def test_without_a_method_the_help_is_one_screen_that_names_them_all(capsys):
    with pytest.raises(SystemExit):
        train_tune_eval.main(["--help"])
    page = capsys.readouterr().out
    assert page.count("\n") < 50
    for name, family in FAMILIES.items():
        assert family.about in page and f"--method {name} --help" in page


@each_family
def test_the_restoration_is_measured_where_there_is_a_reconstruction(name, runs):
    """Of the images here, at 16 px, damage can be seen on some."""
    known = runs / "checkpoints" / run_id(name) / "restoration.json"
    metrics = json_of(runs / "results" / run_id(name) / "metrics.json")
    if name in ("lafite", "knn"):
        assert not known.exists() and "restoration" not in metrics
        return
    found = json_of(known)
    assert metrics["restoration"] == found and found["gone"] <= 1.01 and found["elsewhere"] >= 0
    assert 2 <= found["num_images"] <= 2 * 3 and found["by_kind"]
    assert "of the damage removed" in (runs / "results" / run_id(name) / "report.html").read_text(encoding="utf-8")
