"""Several categories and seeds in one command; and images that belong to no data set."""
import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from deep_files import forget_intensity
from helpers import json_of, one_line, rows_of, save_drawn
from PIL import Image

import train_tune_eval
from dbad.errors import UserError
from dbad.families.registry import FAMILIES
from dbad.inspection import chain, several
from dbad.inspection.several import Job, run_jobs
from dbad.records import Category, RunResults
from dbad.report.runs import Run
from train_tune_eval import Options

RUN, RESULTS, NEW = Path("checkpoints/hazelnut"), Path("results/hazelnut"), Path("results/hazelnut-images")


def fails_with(capsys, run, *words) -> str:
    """The one line on stderr of a command that must end with status 2."""
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 2
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("train_tune_eval.py: ")
            or line.startswith("inference_ddim.py: ")][-1]


# ------------------------------------------------------------------------------------------ several runs

def runs_of(method: str = "ddim", **changes) -> list[tuple[str, int | None, str]]:
    family = FAMILIES[method]
    options = train_tune_eval.options_of(family)(**changes)
    runs = chain.expand(options, family, train_tune_eval.modules(family))
    return [(run.item, run.seed, run.run_id) for run, _ in runs]


def test_every_category_and_seed_has_a_run_of_its_own():
    assert runs_of(item=("carpet",)) == [("carpet", None, "carpet")]
    assert runs_of(item=("carpet", "pcb"), run_id="x") == [("carpet", None, "x-carpet"), ("pcb", None, "x-pcb")]
    assert runs_of(item=("pcb",), seeds=(0, 3)) == [("pcb", 0, "pcb-seed0"), ("pcb", 3, "pcb-seed3")]
    assert runs_of(item=("pcb",), run_id="x", seeds=(1,)) == [("pcb", 1, "x-seed1")]
    assert [name for name, _, _ in runs_of(item=("all",))] == ["hazelnut", "carpet", "pcb"]
    assert runs_of(item=("pcb", "pcb"), seeds=(2, 2)) == [("pcb", 2, "pcb-seed2")]      # once is enough


@pytest.mark.parametrize("method", ["lafite", "knn", "diad"])
def test_one_model_for_all_has_a_run_for_every_seed(method):
    both = ("carpet", "pcb")
    assert runs_of(method, item=both, seeds=(0, 3)) == [(both, 0, f"carpet-pcb-{method}-seed0"),
                                                        (both, 3, f"carpet-pcb-{method}-seed3")]
    assert runs_of(method, item=("all",), run_id="x") == [(("all",), None, "x")]


def test_a_misspelt_category_stops_the_others_before_they_begin(monkeypatch):
    monkeypatch.setattr(several, "run_jobs", lambda *_: pytest.fail("it began"))
    with pytest.raises(UserError) as error:
        train_tune_eval.run(Options(item=("hazelnut", "carpt")))
    assert "carpt" in one_line(error) and "did you mean carpet" in one_line(error)


def test_all_categories_and_seeds_in_one_command_leave_a_summary(workplace, draw_category, script, tiny, capsys):
    draw_category(workplace / "data", "bolt")
    words = [*tiny, "--item", "all", "--seeds", "0", "1"]
    script("train_tune_eval.py", *words)
    rows = rows_of("results", "summary.csv")
    assert [(row["item"], row["seed"], row["status"]) for row in rows] == [
        ("bolt", "0", "done"), ("bolt", "1", "done"), ("hazelnut", "0", "done"), ("hazelnut", "1", "done")]
    for row in rows:
        metrics = json_of(Path("results", row["folder"], "metrics.json"))
        assert float(row["image.auroc"]) == metrics["image"]["auroc"]
    text = Path("results/summary.md").read_text()
    assert "±" in text and "| bolt |" in text and "full frame" in text
    page = Path("results/index.html").read_text()
    links = re.findall(r'href="([^"#]+report\.html)"', page)
    assert len(set(links)) == 4 and all(Path("results", link).is_file() for link in links)

    # Given again, nothing is done again; a category whose images have changed is.
    before = {row["folder"]: Path("results", row["folder"], "scores.csv").stat().st_mtime_ns for row in rows}
    shutil.copy("data/bolt/test/good/000.png", "data/bolt/test/good/009.png")
    forget_intensity(*Path("results").glob("*/finished.json"))      # written before there was the option
    capsys.readouterr()
    script("train_tune_eval.py", *words)
    assert capsys.readouterr().out.count("finished before") == 2
    after = {name: Path("results", name, "scores.csv").stat().st_mtime_ns for name in before}
    assert [name for name in before if before[name] != after[name]] == ["bolt-seed0", "bolt-seed1"]
    assert [row["status"] for row in rows_of("results", "summary.csv")] == ["done"] * 2 + ["finished before"] * 2


def test_a_category_that_fails_does_not_stop_the_others(workplace, draw_category, script, tiny, capsys):
    draw_category(workplace / "data", "bolt")
    Path("data/bolt/test/crack/001.png").write_bytes(b"no picture")
    line = fails_with(capsys, script, "train_tune_eval.py", *tiny, "--item", "all")
    assert line.startswith("train_tune_eval.py: 1 of 2 runs failed: bolt (") and "crack/001.png" in line
    rows = rows_of("results", "summary.csv")
    assert [(row["item"], row["status"]) for row in rows] == [("bolt", "failed"), ("hazelnut", "done")]
    assert "crack/001.png" in rows[0]["error"] and rows[0]["image.auroc"] == "" and float(rows[1]["image.auroc"]) > 0
    assert "## Without results" in Path("results/summary.md").read_text() and (RESULTS / "report.html").is_file()


@pytest.fixture
def imagined(monkeypatch, tmp_path):
    """Several runs of which nothing is real but the order; returns the function that stands for a run."""
    def pretend(run_category):
        def job_of(options, items, family, scripts):
            return Job({options.item: options}, {options.item: options.img_dir / options.run_id}, lambda _: None, None,
                       run_category)
        monkeypatch.setattr(chain, "job_of", job_of)
        options = Options(item=("hazelnut", "carpet", "pcb"), img_dir=tmp_path)
        monkeypatch.setattr(several, "open_category", lambda *_: Category("nothing", Path(), (), ()))
        found: list[Run] = []
        monkeypatch.setattr(several.summary, "write_summary", lambda folder, runs, about, known: found.extend(runs))
        return options, found
    return pretend


def made_folder(options: Options) -> RunResults:
    """The results of a run, in a folder made as its inspection does."""
    folder = options.img_dir / options.run_id
    folder.mkdir()
    return RunResults(folder)


def test_a_defect_of_the_program_in_one_category_spares_the_others(imagined, capsys):
    def run_category(options):
        folder = made_folder(options)
        if options.item == "carpet":
            raise ZeroDivisionError("of all things")
        return folder
    options, found = imagined(run_category)
    with pytest.raises(UserError) as error:
        train_tune_eval.run(options)
    assert "1 of 3 runs failed: carpet (ZeroDivisionError: of all things)" in one_line(error)
    assert [run.status for run in found] == ["done", "failed", "done"] and "Traceback" in capsys.readouterr().err


def test_ctrl_c_stops_all_runs_and_still_leaves_the_summary(imagined):
    def run_category(options):
        folder = made_folder(options)
        if options.item == "carpet":
            raise KeyboardInterrupt
        return folder
    options, found = imagined(run_category)
    with pytest.raises(KeyboardInterrupt):
        train_tune_eval.run(options)
    assert [run.status for run in found] == ["done", "skipped", "skipped"]


class Model:
    """Two categories of one model of which nothing is real but the order; `log` is what was done."""

    def __init__(self, folder: Path, fails: tuple[str, ...] = (), resume: bool = True):
        self.folder, self.fails, self.resume, self.log, self.summaries = folder, fails, resume, [], []

    def do(self, name: str) -> None:
        self.log.append(name)
        if name in self.fails:
            raise UserError(f"{name} cannot be")

    def inspect(self, options: Options) -> RunResults:
        self.do(f"inspect {options.item}")
        folder = self.folder / options.item
        folder.mkdir(exist_ok=True)
        return RunResults(folder)

    def run(self) -> list[Run]:
        items = ("bolt", "nut")
        job = Job({item: Options(item=item) for item in items}, {item: self.folder / item for item in items},
                  lambda options: self.do(f"check {options.item}"), lambda: self.do("train"), self.inspect,
                  resume=self.resume)
        return run_jobs([job], self.summaries.append)

    def outcome(self) -> list[tuple[str, str]]:
        (runs,) = self.summaries
        return [(run.item, run.status) for run in runs]


@pytest.fixture
def no_images(monkeypatch):
    monkeypatch.setattr(several, "open_category", lambda *_: Category("nothing", Path(), (), ()))


def test_categories_of_one_model_are_trained_once_and_not_again_when_they_are_finished(no_images, tmp_path, capsys):
    model = Model(tmp_path)
    assert [run.status for run in model.run()] == ["done", "done"]
    assert model.log == ["check bolt", "check nut", "train", "inspect bolt", "inspect nut"]
    again = Model(tmp_path)
    again.run()
    assert again.log == [] and again.outcome() == [("bolt", "finished before"), ("nut", "finished before")]
    (tmp_path / "nut" / "finished.json").unlink()
    again = Model(tmp_path)
    again.run()
    assert again.log == ["check nut", "train", "inspect nut"]
    anew = Model(tmp_path, resume=False)
    anew.run()
    assert anew.log == model.log


@pytest.mark.parametrize("fails, log, outcome", [
    ("inspect bolt", ["check bolt", "check nut", "train", "inspect bolt", "inspect nut"], ["failed", "done"]),
    ("check bolt", ["check bolt", "check nut", "train", "inspect nut"], ["failed", "done"]),
    ("train", ["check bolt", "check nut", "train"], ["failed", "failed"])])
def test_categories_of_one_model_spare_each_other_and_the_summary_is_written(fails, log, outcome, no_images, tmp_path):
    model = Model(tmp_path, (fails,))
    with pytest.raises(UserError) as error:
        model.run()
    assert f"{outcome.count('failed')} of 2 runs failed: bolt ({fails} cannot be)" in one_line(error)
    assert model.log == log and model.outcome() == list(zip(("bolt", "nut"), outcome, strict=True))


# ------------------------------------------------------------------------------------------ new images

@pytest.fixture
def camera(trained) -> Path:
    """A folder of new images: the test images of the category, one broken file, one in a sub-folder."""
    folder = trained / "camera"
    folder.mkdir()
    for path in sorted(Path("data/hazelnut/test").rglob("*.png")):
        shutil.copy(path, folder / f"{path.parent.name}_{path.name}")
    (folder / "torn.png").write_bytes((folder / "good_000.png").read_bytes()[:60])
    save_drawn(folder / "late" / "big.png", 3, (48, 80))
    return folder


def test_new_images_get_the_scores_they_have_in_the_test(camera, script, tiny_flags, capsys):
    script("inference_ddim.py", "--item", "hazelnut", "--images", "camera", "--device", "cpu", "--precision", "fp32")
    out, err = capsys.readouterr()
    rows = {Path(row["path"]).name: row for row in rows_of(NEW)}
    for row in rows_of(RESULTS):
        new = rows[f"{row['defect']}_{Path(row['path']).name}"]
        assert float(new["score"]) == pytest.approx(float(row["score"]), rel=1e-6)
        assert (new["decision"], new["p_value"], new["label"]) == (row["decision"], row["p_value"], "")
    num_defective = sum(row["decision"] == "1" for row in rows.values())
    assert out.startswith("hazelnut from camera; ")
    assert f"8 images: {7 - num_defective} good, {num_defective} defective, 1 unreadable" in out
    assert "torn.png" in err and not (NEW / "metrics.json").exists()
    assert len(list((NEW / "overlays").glob("*.png"))) == 7 and (NEW / "report.html").is_file()


def test_patterns_sub_folders_and_the_size_of_the_input(camera, script):
    script("inference_ddim.py", "--item", "hazelnut", "--images", "camera/crack_*.png", "camera/late", "--recursive")
    assert len(rows_of(NEW)) == 4
    sizes = {path.name: Image.open(path).size for path in (NEW / "overlays").iterdir()}
    assert (80, 48) in sizes.values() and list(sizes.values()).count((16, 16)) == 3


def test_results_of_other_new_images_are_kept(camera, script):
    words = ("--item", "hazelnut", "--images", "camera/good_*.png")
    script("inference_ddim.py", *words)
    script("inference_ddim.py", *words)
    assert not Path(f"{NEW}.1").exists()            # the same images again
    shutil.copy("camera/good_000.png", "camera/good_100.png")
    script("inference_ddim.py", *words)
    assert (len(rows_of(f"{NEW}.1")), len(rows_of(NEW))) == (4, 5)


def test_the_drift_check_says_whether_the_images_still_look_like_the_calibration_s(trained, script, capsys):
    """Forty images of noise score otherwise than good ones, forty of the good kind do not."""
    calibration = json_of(RUN / "calibration.json")
    rng = np.random.default_rng(0)
    for index in range(40):
        save_drawn(Path(f"same/{index}.png"))
        Path("noise").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(f"noise/{index}.png")
    calibration["scores"] = sorted(float(score) for score in np.linspace(0.5, 1.5, 40))
    (RUN / "calibration.json").write_text(json.dumps(calibration))
    script("inference_ddim.py", "--item", "hazelnut", "--images", "noise", "--drift_check")
    assert "Drift: the scores of 40 new images are higher" in capsys.readouterr().out
    found = json_of(NEW / "drift.json")
    assert found["drifted"] is True and found["direction"] == "higher" and found["p_value"] < 0.01


def test_what_cannot_be_read_is_named_and_skipped_whatever_it_is(camera, script, capsys):
    (camera / "broken.png").symlink_to("nowhere.png")
    (camera / "circular.png").symlink_to("circular.png")
    os.mkfifo(camera / "pipe.png")
    try:
        shutil.copy(camera / "good_000.png", os.fsencode(camera / "caf") + b"\xe9.png")
    except OSError:
        pytest.skip("this file system has no such names")
    shutil.copy(camera / "good_000.png", camera / "new\nline.png")
    script("inference_ddim.py", "--item", "hazelnut", "--images", "camera", "--device", "cpu", "--precision", "fp32")
    out, err = capsys.readouterr()
    assert re.search(r"13 images: \d good, \d defective, 4 unreadable", out)
    assert [line["path"] for line in rows_of(NEW, "unreadable.csv")] == [
        f"camera/{name}.png" for name in ("broken", "circular", "pipe", "torn")]
    assert [line for line in err.replace("\r", "\n").splitlines() if "left out" in line] == [
        "camera/broken.png: left out: a link to a file that is not there",
        f"camera/circular.png: left out: cannot be read ({os.strerror(errno.ELOOP)})",
        "camera/pipe.png: left out: a named pipe; expected an image file",
        f"camera/torn.png: left out: {rows_of(NEW, 'unreadable.csv')[3]['reason']}"]
    rows = {row["path"]: row["score"] for row in rows_of(NEW)}
    for name in (r"caf\udce9", r"new\nline"):
        assert float(rows[f"camera/{name}.png"]) == pytest.approx(float(rows["camera/good_000.png"]), rel=1e-5)
    words = ("--item", "hazelnut", "--images", "camera/pipe.png", "camera")
    said = fails_with(capsys, script, "inference_ddim.py", *words)
    assert said.endswith("--images camera/pipe.png: a named pipe; expected image files, or folders of them")


@pytest.mark.parametrize("words, said", [
    (["--images", "nowhere/*.png"], "nowhere/*.png"),
    (["--images", "camera", "--item_states", "good"], "--item_states: needs ground truth"),
    (["--images", "camera", "--export_maps", "mvtec"], "--export_maps: needs ground truth"),
    (["--images", "camera", "--eval_resolution", "original"], "--eval_resolution: needs ground truth"),
    (["--images", "camera", "--masks", "required"], "--masks: needs ground truth"),
    (["--images", "x" * 300 + ".png"], "xxx.png: matches nothing"),
    (["--images", "camera/no\nsuch.png"], r"camera/no\nsuch.png: matches nothing"),
    (["--recursive"], "--recursive: works only with --images"),
    (["--drift_check"], "--drift_check: works only with --images"),
    (["--images", "camera", "--drift_check", "--pxl_threshold", "1", "--feature_threshold", "1"], "--drift_check"),
    (["--images", "camera/torn.png"], "none of 1 files could be read"),
])
def test_contradicting_options_and_missing_images_are_told_in_one_line(camera, script, capsys, words, said):
    assert said in fails_with(capsys, script, "inference_ddim.py", "--item", "hazelnut", *words)
