"""train_lafite.py, inference_lafite.py and --method of train_tune_eval.py, through their command lines."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from deep_files import deepen, forget_intensity
from helpers import MACHINE as ON_CPU
from helpers import complaint, everything, json_of, make_category, rows_of, stamps
from PIL import Image

import train_lafite
from dbad.calibration.thresholds import Calibration
from dbad.checkpoints.weights import load_pickle, save_pickle
from dbad.data.categories import open_category, split_holdout
from dbad.data.categories import test_images as images_to_test
from dbad.data.images import read_items
from dbad.errors import UserError
from dbad.families.detector import load_detector
from dbad.families.lafite import lessons, model, training
from dbad.families.lafite import search as feature_tuning
from dbad.families.lafite.options import FeatureSettings
from dbad.families.lafite.run_folder import open_features
from dbad.files.names import BANK, SPACE, is_declared
from dbad.inspection.calibrate import PLACED, is_whole
from dbad.training import progress

MACHINE = "--dataset_path data --precision fp32 --device cpu --num_workers 0".split()
TINY = ("--preset demo --feature_resolution 32 --grid 4 --extractor_layers 0 1 --bank_mb 0.008 --components 8 "
        "--feature_channels 32 --steps_features 6 --feature_batch_size 4 --holdout 0.25 --batch_size 4 --no_tune "
        "--feature_cache cache").split() + MACHINE
EDITED = "--discriminator_contrib 0 --edit_contrib 1".split()       # as fast as it gets
BOTH = ["--item", "bolt", "hazelnut", "--run_id", "both", "--denoise_contrib", 0.5, *EDITED]
RUN, ONE = Path("checkpoints/both"), Path("checkpoints/bolt-knn")


@pytest.fixture
def both(made_once, draw_category, script):
    """To work in and to spoil: a model of two categories and a bank of one, with results, as train_tune_eval.py leaves
    them. The images of one, bolt, have 12 bits. Gives the folder they were made in."""
    def make():
        make_category(draw_category(Path("data")), "bolt", num_train=8)
        deepen(Path("data/bolt/train"))
        deepen(Path("data/bolt/test"))
        script("train_tune_eval.py", "--method", "lafite", *BOTH, *TINY)
        script("train_tune_eval.py", "--method", "knn", "--item", "bolt", *TINY)

    return made_once(make)


def is_finished(record: dict) -> bool:
    """Whether train_lafite.py would find that the run of these options is there."""
    return is_whole(RUN, record, (SPACE, BANK), PLACED | {"feature_cache"})


def scores_of(folder: Path | str) -> list[float]:
    return [float(row["score"]) for row in rows_of(folder)]


# ------------------------------------------------------------------------------------------ what a run leaves

def test_the_run_folder_holds_every_promised_file(both):
    assert sorted(path.name for path in RUN.iterdir()) == [
        "bank.pt", "calibration-bolt.json", "calibration-hazelnut.json", "calibration.json", "features.pt",
        "features_last.pt", "final.pt", "log.jsonl", "model_config.json", "train_arg_config.json"]
    bank = load_pickle(RUN / "bank.pt")
    assert bank["vectors"].nbytes <= 8000 and bank["counts"] == {"bolt": 50, "hazelnut": 50}
    assert json_of(RUN / "train_arg_config.json")["item"] == ["bolt", "hazelnut"]
    for path in (RUN, ONE):
        calibration = json_of(path / "calibration.json")
        assert (calibration["format"], calibration["method"]) == (1, "lafite" if path == RUN else "knn")
        for values in (json_of(path / "train_arg_config.json"), calibration["settings"]):
            assert (values["intensity"], values["intensity_bits"]) == ("auto", 12)
    assert load_pickle(RUN / "features.pt")["categories"] == ["bolt", "hazelnut"]
    assert load_pickle(RUN / "features_last.pt")["step"] == 6
    last = json.loads((RUN / "log.jsonl").read_text().splitlines()[-1])
    assert last["phase"] == "features" and last["step"] == 6 and np.isfinite([last["loss"], last["val_loss"]]).all()
    assert list(Path("logs/both/features").glob("events.out.tfevents.*"))
    assert len(list(Path("cache").glob("*.npy"))) == 4           # train and held out, of two categories


def test_each_category_is_decided_by_its_own_thresholds(both):
    thresholds = {}
    for name, count, held_out in (("bolt", 3, 2), ("hazelnut", 7, 3)):
        folder, calibration = Path(f"results/both-{name}"), json_of(RUN / f"calibration-{name}.json")
        assert len(rows_of(folder)) == json_of(folder / "metrics.json")["num_images"] == count
        assert calibration["num_images"] == held_out
        for row in rows_of(folder):
            assert int(row["decision"]) == (float(row["score"]) >= calibration["image_threshold"])
        assert (folder / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
        assert len(list((folder / "images").glob("*.png"))) == count
        thresholds[name] = calibration["image_threshold"]
    assert thresholds["bolt"] != thresholds["hazelnut"] and json_of(RUN / "calibration.json")["num_images"] == 5


def test_one_command_for_several_categories_leaves_a_summary(both):
    assert {row["item"] for row in rows_of("results", "summary.csv")} >= {"bolt", "hazelnut"}
    assert Path("results/index.html").is_file()


# ------------------------------------------------------------------------------------------ the same again

def test_a_finished_run_is_not_repeated_and_is_inspected_to_the_same_bytes(both, script, capsys):
    """The data have moved, so that the run is looked at once more, but the network is not trained again."""
    network, last = stamps(RUN)[str(RUN / "features_last.pt")], (RUN / "final.pt").read_bytes()
    script("train_lafite.py", *BOTH, *TINY)
    assert "is finished" not in capsys.readouterr().out
    before = everything()
    assert before[str(RUN / "features_last.pt")] == network and (RUN / "final.pt").read_bytes() == last
    script("train_lafite.py", *BOTH, *TINY)
    assert "checkpoints/both is finished" in capsys.readouterr().out and everything() == before
    script("train_tune_eval.py", "--method", "lafite", *BOTH, *TINY, "--skip_evaluation")
    assert "checkpoints/both is finished" in capsys.readouterr().out and everything() == before
    expected = (both / "results/both-bolt/scores.csv").read_bytes()
    script("inference_lafite.py", "--item", "bolt", "--run_id", "both", *MACHINE)
    assert Path("results/both-bolt/scores.csv").read_bytes() == expected
    forget_intensity(*RUN.glob("calibration*.json"), RUN / "train_arg_config.json")     # from before there was one
    script("train_lafite.py", *BOTH, *TINY)
    assert "checkpoints/both is finished" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bank.pt", "features.pt", "final.pt", "calibration.json", "calibration-bolt.json",
                                  "train_arg_config.json"])
def test_a_run_that_lost_a_file_is_not_finished(both, name):
    record = json_of(RUN / "train_arg_config.json")
    assert is_finished(record)
    (RUN / name).unlink()
    assert not is_finished(record)


def test_a_run_is_finished_for_the_same_options_and_images_wherever_and_however_it_is_started(both):
    record = json_of(RUN / "train_arg_config.json")
    for same in ({"device": "cuda"}, {"num_workers": 4}, {"resume": False}, {"feature_cache": None}):
        assert is_finished(record | same)
    for other in ({"blur_sigma": 3.0}, {"seed": 1}, {"data": "other images"}, {"given": ["blur_sigma"]}):
        assert not is_finished(record | other)


def test_a_run_of_fewer_categories_leaves_no_thresholds_of_the_others_behind(both, script):
    mine = [RUN / name for name in ("calibration-mine.json", "discriminator-mine.pt", "tuning-mine.csv")]
    for path in [*mine, RUN / "discriminator-bolt.pt"]:
        path.write_text("of a run before, or of a user")
    script("train_lafite.py", "--item", "bolt", "--run_id", "both", "--method", "knn", *TINY)
    assert sorted(path.name for path in RUN.glob("calibration*")) == ["calibration-mine.json", "calibration.json"]
    assert sorted(path.name for path in RUN.glob("discriminator*")) == ["discriminator-mine.pt"]
    assert all(path.read_text() == "of a run before, or of a user" for path in mine)
    assert load_detector(RUN, "cpu").bank.counts.keys() == {"bolt"}


def test_files_of_two_runs_are_never_taken_for_one(both, script, capsys, monkeypatch):
    """Stopped between the thresholds of two categories, a folder has those of two runs of the same weights."""
    saved, save = [], Calibration.save

    def stopped(self, path):
        if saved:
            raise KeyboardInterrupt
        saved.append(save(self, path))

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(Calibration, "save", stopped)
        script("train_lafite.py", *BOTH, *TINY, "--false_alarm_rate", 0.5)
    assert stop.value.code == 130
    rates = {json_of(RUN / f"calibration-{name}.json")["false_alarm_rate"] for name in ("bolt", "hazelnut")}
    assert len(rates) == 2
    line = complaint(capsys, script, "inference_lafite.py", "--item", "bolt", "--run_id", "both", *MACHINE)
    assert line == ("checkpoints/both: train_lafite.py was stopped while writing the files of this run; run its "
                    "command again")
    with pytest.raises(UserError, match="its training was stopped"):
        load_detector(RUN, "cpu")
    script("train_lafite.py", *BOTH, *TINY, "--false_alarm_rate", 0.5)
    assert json_of(RUN / "calibration-bolt.json")["false_alarm_rate"] == 0.5
    assert load_detector(RUN, "cpu").calibration.false_alarm_rate == 0.5


def test_until_a_run_is_finished_the_one_before_serves(both, script, capsys, monkeypatch):
    """A training of other weights, with another network, that is stopped before it has thresholds changes nothing."""
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    (RUN / "log.jsonl").unlink()        # it is that of the training that has begun
    before = stamps(RUN)
    monkeypatch.setattr(model, "feature_loss", stopped)
    with pytest.raises(SystemExit):
        script("train_lafite.py", *BOTH, *TINY, "--seed", 1, "--no_resume")
    assert stamps(RUN) == before
    script("inference_lafite.py", "--item", "bolt", "--run_id", "both", *MACHINE)


@pytest.mark.parametrize("where, flags", [
    (".lock", ("train_lafite.py", "--item", "bolt", "hazelnut", "--run_id", "both", "--no_resume")),
    ("../../results/.both-bolt.lock", ("inference_lafite.py", "--item", "bolt", "--run_id", "both")),
    ("../../results/.both-bolt-images.lock", ("inference_lafite.py", "--item", "bolt", "--run_id", "both", "--images",
                                              "data/bolt/test/good"))])
def test_a_second_command_in_one_folder_is_refused_and_leaves_all_as_it_was(both, script, capsys, where, flags):
    fcntl = pytest.importorskip("fcntl")
    with open(RUN / where, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        before = everything()
        words = TINY if flags[0].startswith("train") else MACHINE
        assert "another process is writing there; wait" in complaint(capsys, script, *flags, *words)
        assert everything() == before
    (RUN / where).unlink()
    if flags[0].startswith("inference"):
        script(*flags, *words)


def test_a_run_is_inspected_without_permission_to_write_in_its_folder(both, script):
    if not hasattr(os, "geteuid") or os.geteuid() == 0:
        pytest.skip("permissions do not bind the superuser")
    RUN.chmod(0o500)
    try:
        script("inference_lafite.py", "--item", "bolt", "--run_id", "both", *MACHINE)
    finally:
        RUN.chmod(0o700)


def test_whatever_lies_in_the_run_folder_is_on_the_list_of_names(both):
    assert {path.name for path in RUN.iterdir() if not is_declared(path.name)} == {"final.pt"}


def test_a_stopped_training_goes_on_and_ends_with_the_weights_of_an_unbroken_one(both, script, capsys):
    shutil.rmtree("checkpoints")
    loss, calls = model.feature_loss, iter(range(1, 100))

    def interrupting(*args):
        if torch.is_grad_enabled() and next(calls) == 4:        # else it is a validation
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "feature_loss", interrupting)
        patch.setattr(progress, "SAVE_EVERY_S", 0)
        with pytest.raises(SystemExit) as stop:
            script("train_lafite.py", *BOTH, *TINY)
    assert stop.value.code == 130 and "stopped; finished parts are kept" in capsys.readouterr().err
    assert load_pickle(RUN / "features_last.pt")["step"] == 4 and not (RUN / "final.pt").exists()
    script("train_lafite.py", *BOTH, *TINY)
    for name in ("final.pt", "features.pt", "bank.pt", "calibration-bolt.json", "calibration.json"):
        assert (RUN / name).read_bytes() == (both / RUN / name).read_bytes(), name


def test_features_are_extracted_once_and_where_the_system_keeps_such_files(both, script, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("elsewhere").absolute()))
    flags = [word for word in TINY if word not in ("--feature_cache", "cache")]
    script("train_lafite.py", "--item", "bolt", "--method", "knn", *flags)
    before = stamps("elsewhere/dbad/features")
    assert len(before) == 4             # train and held out, each with what they were made of
    script("train_lafite.py", "--item", "bolt", "--method", "knn", *flags, "--run_id", "again")
    assert stamps("elsewhere/dbad/features") == before


# ------------------------------------------------------------------------------------------ kinds of runs

def test_the_memory_bank_alone_trains_no_network_and_says_so(both):
    assert sorted(path.name for path in ONE.iterdir()) == [
        "bank.pt", "calibration.json", "features.pt", "train_arg_config.json"]
    found = load_detector(ONE, "cpu", "fp32")([Path("data") / row["path"] for row in rows_of("results/bolt-knn")])
    assert [image.score for image in found] == pytest.approx(scores_of("results/bolt-knn"), rel=1e-4)
    assert all(image.maps.keys() == {"knn"} for image in found)
    pages = [Path("results", name, "report.html").read_text(encoding="utf-8") for name in ("both-bolt", "bolt-knn")]
    assert "LafitE" in pages[0] and "LafitE" not in pages[1] and "nearest good patch" in pages[1]


def test_without_a_name_of_its_own_the_one_run_that_is_there_is_taken(both, script):
    shutil.rmtree("results/bolt-knn")
    for name in ("inference_lafite.py", "inference_ddim.py"):
        script(name, "--item", "bolt", *MACHINE)
        assert len(rows_of("results/bolt-knn")) == len(rows_of(both / "results/bolt-knn"))
        shutil.rmtree("results/bolt-knn")


def test_settings_that_are_not_given_are_tuned_and_those_that_are_stay(both, script, monkeypatch):
    for name, few in (("STARTS", (100,)), ("STEPS", (1,)), ("WEIGHTS", (0.0, 1.0)), ("SHARES", (0.0, 0.02))):
        monkeypatch.setattr(feature_tuning, name, few)
    monkeypatch.setattr(lessons, "NUM_PSEUDO", 4)
    monkeypatch.setattr(lessons, "NUM_TAUGHT", 8)
    made, build_bank = [], lessons.build_bank
    for module in (training, lessons):
        monkeypatch.setattr(module, "build_bank", lambda features, *args, **more: made.append(features) or build_bank(
            features, *args, **more))
    flags = [word for word in TINY if word != "--no_tune"]
    script("train_lafite.py", *BOTH[:-len(EDITED)], *flags, "--blur_sigma", 3, "--neighbours", 2)
    for name in ("bolt", "hazelnut"):
        rows = rows_of(RUN, f"tuning-{name}.csv")
        chosen, = (row for row in rows if row["chosen"] == "1")
        assert {(row["blur_sigma"], row["neighbours"]) for row in rows} == {("3.0", "2")} and len(rows) > 5
        settings = json_of(RUN / f"calibration-{name}.json")["settings"]
        assert settings.items() >= {"blur_sigma": 3.0, "neighbours": 2}.items()
        assert {key: str(settings[key]) for key in chosen if key in settings}.items() <= chosen.items()
    first = [rows_of(RUN, f"tuning-{name}.csv")[0] for name in ("bolt", "hazelnut")]
    given = [[row[key] for key in row if key in settings] for row in first]
    assert given[0] == given[1], "no search begins with what was found for another category"
    settings, *own = (json_of(RUN / f"calibration{name}.json")["settings"] for name in ("", "-bolt", "-hazelnut"))
    assert settings | {"discriminator": ""} in [each | {"discriminator": ""} for each in own]
    whole, others = made        # what is damaged, every third image, is not in the bank that it is compared with
    for name, features in whole.items():
        kept = np.delete(features, np.s_[::3], axis=0)
        assert len(kept) > 3 and np.array_equal(others[name], kept)


def test_every_category_is_judged_by_a_discriminator_of_its_own(both, script, monkeypatch):
    monkeypatch.setattr(lessons, "NUM_TAUGHT", 8)
    script("train_lafite.py", *BOTH, *TINY, "--discriminator_contrib", 1, "--edit_contrib", 1)
    detectors = {name: load_detector(RUN, "cpu", "fp32", category=name) for name in ("bolt", "hazelnut", None)}
    assert sorted(path.name for path in RUN.glob("discriminator*")) == [
        "discriminator-bolt.pt", "discriminator-hazelnut.pt", "discriminator.pt"]
    means = [detector.judge.mean for detector in detectors.values()]
    assert not torch.allclose(means[0], means[1]) and torch.allclose((2 * means[0] + 3 * means[1]) / 5, means[2])
    script("inference_lafite.py", *BOTH[:2], "--run_id", "both", *MACHINE)
    samples = images_to_test(open_category(train_lafite.Options(item="bolt", dataset_path=Path("data"))))
    found = detectors["bolt"](torch.stack([item.image for item in read_items(
        samples, 32, intensity=detectors["bolt"].intensity)]))
    assert scores_of("results/both-bolt") == pytest.approx(found.score.tolist(), rel=1e-4)
    assert found.maps.keys() == {"discriminator", "edit", "denoise"}
    record = json_of(RUN / "train_arg_config.json")
    assert is_finished(record)
    (RUN / "discriminator-bolt.pt").unlink()
    assert not is_finished(record)
    script("train_lafite.py", *BOTH, *TINY)
    assert not list(RUN.glob("discriminator*")) and load_detector(RUN, "cpu", "fp32").judge is None


def test_a_single_category_has_one_discriminator(both, script, monkeypatch, capsys):
    monkeypatch.setattr(lessons, "NUM_TAUGHT", 8)
    words = ["--item", "bolt", "--run_id", "one", *TINY]
    script("train_lafite.py", *words, "--dry_run")
    assert "checkpoints/one/discriminator.pt" in capsys.readouterr().out
    script("train_lafite.py", *words)
    assert [path.name for path in Path("checkpoints/one").glob("discriminator*")] == ["discriminator.pt"]
    detector = load_detector("checkpoints/one", "cpu", "fp32", category="bolt")
    assert detector.settings.contributions == {"discriminator": 1.0} and detector.judge is not None


def test_every_category_has_settings_of_its_own_and_thresholds_to_match(both, script, monkeypatch):
    sides, search_all = iter((2.0, 8.0)), feature_tuning.FeatureSearch.run

    def run(search):
        search.best = search.try_out(replace(search_all(search).settings, blur_sigma=next(sides)))
        return search.best
    monkeypatch.setattr(feature_tuning.FeatureSearch, "run", run)
    for name in ("STARTS", "STEPS", "WEIGHTS", "POWERS", "NEIGHBOURS"):
        monkeypatch.setattr(feature_tuning, name, (1,))
    monkeypatch.setattr(lessons, "NUM_PSEUDO", 4)
    script("train_lafite.py", *BOTH, *[word for word in TINY if word != "--no_tune"])
    for name, chosen in (("bolt", {2.0}), ("hazelnut", {8.0}), (None, {2.0, 8.0})):
        detector = load_detector(RUN, device="cpu", precision="fp32", category=name)
        assert detector.settings.blur_sigma in chosen
        samples = [sample for each in ([name] if name else ["bolt", "hazelnut"]) for sample in split_holdout(
            open_category(train_lafite.Options(item=each, dataset_path=Path("data"))).train, 0.25)[1]]
        images = torch.stack([item.image for item in read_items(samples, 32, intensity=detector.intensity)])
        found = detector.combine(detector.parts(images)[0], detector.calibration.scales)[1]
        assert sorted(found.tolist()) == pytest.approx(detector.calibration.scores, rel=1e-4)
    script("inference_lafite.py", *BOTH[:2], "--run_id", "both", *MACHINE)
    detector = load_detector(RUN, device="cpu", precision="fp32", category="bolt")
    samples = images_to_test(open_category(train_lafite.Options(item="bolt", dataset_path=Path("data"))))
    found = detector(torch.stack([item.image for item in read_items(samples, 32, intensity=detector.intensity)]))
    assert scores_of("results/both-bolt") == pytest.approx(found.score.tolist(), rel=1e-4)


def test_images_that_belong_to_no_data_set_are_inspected(both, script):
    Path("camera").mkdir()
    for name in ("000.png", "001.png"):
        shutil.copy(Path("data/bolt/test/crack") / name, Path("camera") / name)
    Image.open("camera/000.png").rotate(90).resize((50, 40)).save("camera/turned.jpg")
    script("inference_lafite.py", "--item", "bolt", "--run_id", "both", "--images", "camera", "--drift_check",
           *MACHINE)
    folder = Path("results/both-bolt-images")
    assert [row["path"] for row in rows_of(folder)] == ["camera/000.png", "camera/001.png", "camera/turned.jpg"]
    assert scores_of(folder)[:2] == pytest.approx(scores_of("results/both-bolt")[:2], rel=1e-4)
    assert (folder / "report.html").is_file() and (folder / "drift.json").is_file()


def test_every_seed_has_a_model_of_its_own(both, script):
    script("train_tune_eval.py", "--method", "knn", "--item", "bolt", *TINY, "--seeds", 0, 1, "--bank_mb", 0.004,
           "--skip_evaluation")
    one, other = (load_pickle(Path(f"checkpoints/bolt-knn-seed{seed}/bank.pt"))["vectors"] for seed in (0, 1))
    assert one.shape == other.shape == (50, 40) and not torch.equal(one, other)


# ------------------------------------------------------------------------------------------ what a user gets wrong

@pytest.mark.parametrize("name, flags, says", [
    ("train_tune_eval.py", "--method lafite --recon_weight 3", "--recon_weight: not an option of --method lafite"),
    ("train_tune_eval.py", "--method knn --skip_extractor", "--skip_extractor: not an option of --method knn"),
    ("train_tune_eval.py", "--method ddim --bank_mb 4", "--bank_mb: not an option of --method ddim"),
    ("train_tune_eval.py", "--neighbours 4", "--neighbours: not an option of --method ddim"),
    ("train_tune_eval.py", "--method lafite --images nowhere/*.png", "nowhere/*.png"),
    ("train_lafite.py", "--bank_mb 0.00001", "--bank_mb 1e-05: room for 0 vectors of 40 channels"),
    ("train_lafite.py", "--bank_mb 0.0004 --neighbours 9", "--neighbours 9"),
    ("train_lafite.py", "--extractor_layers 1 7", "--extractor_layers 7: efficientnet_lite0 has the layers 0 1 2 3 4"),
    ("train_lafite.py", "--extractor no_such_net", "--extractor no_such_net"),
    ("train_lafite.py", "--patching", "--patching: features are taken from whole images"),
    ("train_lafite.py", "--item bolt nut", "--item nut"),
    ("train_lafite.py", "--method knn --denoise_contrib 1", "--denoise_contrib 1.0: --method knn has no denoiser"),
    ("train_lafite.py", "--run_id new --grid 6 --feature_channels 32 32 32", "--grid 6"),
    ("train_lafite.py", "--run_id new --feature_channels 30", "--feature_channels 30"),
    ("train_lafite.py", "--item bolt hazelnut --run_id both --steps_features 7", "--steps_features 6, now it is 7"),
    ("train_lafite.py", "--recon_weight 3", "--recon_weight: no such option"),
    ("train_lafite.py", "--run_id new --diffusion_checkpoint_name discriminator.pt", "discriminator.pt: this name is"),
    ("train_lafite.py", "--run_id new --method knn --diffusion_checkpoint_name calibration-bolt.json",
     "calibration-bolt.json: this name is reserved"),
    ("train_lafite.py", "--run_id new --false_alarm_rate 0.1", "2 held-out good images of bolt can promise no less"),
    ("train_lafite.py", "--run_id new --false_alarm_rate 0.1 --dry_run", "2 held-out good images of bolt can promise"),
    ("train_tune_eval.py", "--method lafite --run_id new --drift_check", "--drift_check: works only with --images"),
    ("train_tune_eval.py", "--method knn --run_id new --recursive --dry_run", "--recursive: works only with --images"),
    ("inference_lafite.py", "--run_id both --diffusion_checkpoint_name bank.pt", "bank.pt: checkpoints/both/calib"),
    ("inference_lafite.py", "--run_id bolt-knn --img_dir checkpoints", "--img_dir checkpoints: the results would be"),
    ("inference_lafite.py", "--run_id both --blur_sigma 3", "--blur_sigma 3.0: checkpoints/both/calibration-bolt.json"),
    ("inference_lafite.py", "--run_id both --patching", "--patching"),
    ("inference_lafite.py", "--run_id nothing", "checkpoints/nothing: no run of train_lafite.py"),
    ("inference_ddim.py", "--run_id both --pxl_threshold 1 --feature_threshold 1", "--pxl_threshold 1.0: checkpoints/"
     "both is a run of --method lafite, which has no such option"),
    ("inference_lafite.py", "--run_id both --method knn", "--method knn: checkpoints/both is a run of --method lafite"),
    ("evaluation.py", "--run_id both", "checkpoints/both: a run of train_lafite.py"),
])
def test_a_mistake_is_told_in_one_line_and_leaves_all_as_it_was(both, script, capsys, name, flags, says):
    words = TINY if name.startswith("train") else MACHINE
    if name == "train_tune_eval.py" and "lafite" not in flags and "knn" not in flags:
        words = MACHINE
    before = everything()
    assert says in complaint(capsys, script, name, "--item", "bolt", *words, *flags.split())
    assert everything() == before


def test_a_run_of_another_family_is_not_written_over(both, script, capsys, tiny_flags):
    flags = tiny_flags("train_ddim.py")
    script("train_ddim.py", *flags, "--steps_diffusion", 1)
    before = everything()
    words = ["--item", "hazelnut", "--run_id", "hazelnut", *MACHINE]
    for line in (complaint(capsys, script, "train_lafite.py", *words, *TINY),
                 complaint(capsys, script, "train_ddim.py", *flags, "--run_id", "both")):
        assert re.search(r"checkpoints/(hazelnut|both): .*train_(ddim|lafite).py", line)
    assert everything() == before


def test_a_broken_test_image_is_found_before_the_training(both, script, capsys):
    path = Path("data/bolt/test/crack/000.png")
    path.write_bytes(path.read_bytes()[:60])
    before = everything()
    line = complaint(capsys, script, "train_tune_eval.py", "--method", "knn", "--item", "bolt", *TINY)
    assert str(path) in line and everything() == before


@pytest.mark.parametrize("backbone, layers", [("efficientnet_lite0", [0, 1, 2, 3]), ("resnet18", [0, 1, 2, 3]),
                                              ("convnext_atto", [0, 1, 2]), ("levit_128s", [0]),
                                              ("vit_tiny_patch16_224", [2, 5, 8])])
def test_features_are_by_default_those_of_strides_2_to_16_whatever_the_backbone_has(backbone, layers):
    assert training.default_layers(backbone) == layers


@pytest.mark.parametrize("name", ["bank.pt", "features.pt", "final.pt"])
def test_files_of_another_run_are_not_mixed_in(both, script, capsys, name):
    state = load_pickle(RUN / name)
    save_pickle(state | {"more": torch.zeros(1)}, RUN / name)
    line = complaint(capsys, script, "inference_lafite.py", "--item", "bolt", "--run_id", "both", *MACHINE)
    assert f"checkpoints/both/{name}" in line and "train_lafite.py" in line


def test_features_of_other_layers_are_never_compared_with_a_bank(both, script):
    """Also where the calibration is not asked."""
    script("train_lafite.py", "--item", "bolt", "--method", "knn", *TINY, "--extractor_layers", 1, 2, "--run_id",
           "other")
    shutil.copy("checkpoints/other/bank.pt", RUN / "bank.pt")
    settings = FeatureSettings.read(json_of(RUN / "calibration.json")["settings"])
    with pytest.raises(UserError, match="bank.pt: a bank of features with"):
        open_features(RUN, settings, ON_CPU)
