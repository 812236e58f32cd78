"""What a run folder says of itself: which script makes what, so that messages send users to the right one."""

import json
import os
from pathlib import Path

import pytest
from helpers import one_line, tiny_detector

import evaluation
from dbad.calibration.drift import drift
from dbad.calibration.thresholds import Calibration
from dbad.checkpoints.weights import load_pickle
from dbad.errors import UserError
from dbad.families.ddim.detector import DdimDetector
from dbad.families.ddim.options import ProcessOptions
from dbad.families.ddim.process import trained_process
from dbad.families.detector import load_detector
from dbad.families.diad.detector import DiadDetector
from dbad.families.diad.weights import is_diad_file
from dbad.families.digests import check_digests, digests
from dbad.families.lafite.detector import FeatureDetector
from dbad.families.registry import FAMILIES, recorded_method
from dbad.families.runs import family_in, learnt_categories, load_calibration, trained_options
from dbad.files.atomic import read_json, write_json
from dbad.files.checksums import read_tensors
from dbad.files.names import MODEL_CONFIG, TRAIN_OPTIONS
from dbad.networks.extractors import build_extractor

SCRIPTS = {"ddim": "evaluation.py", "lafite": "train_lafite.py", "knn": "train_lafite.py", "diad": "train_diad.py"}
SETTINGS = {method: FAMILIES[method].settings.read({}) for method in SCRIPTS}
each_method = pytest.mark.parametrize("method", SCRIPTS)


def run_of(folder: Path, method: str) -> Path:
    """A run folder as far as its training has noted its method."""
    own = {"ddim": {"noise_kind": "gaussian"}, "lafite": {"bank_mb": 8.0}, "knn": {"bank_mb": 8.0},
           "diad": {"steps_latent": 0}}
    noted = {"method": method} if method != "ddim" else {}
    write_json(folder / TRAIN_OPTIONS, {"item": "bolt"} | own[method] | noted)
    return folder


def calibration_of(folder: Path, method: str) -> Calibration:
    """A calibration that belongs to the files in a folder."""
    return Calibration({}, 1.0, 1.0, settings=SETTINGS[method].record(), method=method,
                       digests=digests(folder, FAMILIES[method], SETTINGS[method]))


@each_method
def test_a_missing_calibration_names_the_script_of_its_method(method, tmp_path):
    assert family_in(run_of(tmp_path, method)) is FAMILIES[method]
    with pytest.raises(UserError, match=f"no such file; run {SCRIPTS[method]} first") as error:
        load_calibration(tmp_path / "calibration-bolt.json")
    message = one_line(error)
    assert str(tmp_path / "calibration-bolt.json") in message and ("--pxl_threshold" in message) == (method == "ddim")


@each_method
def test_a_broken_calibration_names_the_script_of_its_method(method, tmp_path):
    run_of(tmp_path, method)
    (tmp_path / "calibration.json").write_text("{}")
    with pytest.raises(UserError, match=f"run {SCRIPTS[method]} again"):
        load_calibration(tmp_path / "calibration.json")


@each_method
def test_a_file_that_has_changed_is_told_with_the_calibration_that_was_read(method, tmp_path):
    for name in ("final.pt", "extractor.pt", "features.pt", "bank.pt", "autoencoder.safetensors", "unet.safetensors",
                 "guide.safetensors", "prompt.safetensors"):
        (tmp_path / name).write_text(name)
    write_json(tmp_path / MODEL_CONFIG, {"sample_size": 16})
    write_json(tmp_path / TRAIN_OPTIONS, {"noise_kind": "gaussian"})
    calibration = calibration_of(tmp_path, method)
    path = tmp_path / "calibration-bolt.json"
    check_digests(calibration, path)
    changed = tmp_path / {"ddim": "extractor.pt", "diad": "guide.safetensors"}.get(method, "bank.pt")
    changed.write_text("another")
    with pytest.raises(UserError) as error:
        check_digests(calibration, path)
    assert one_line(error) == (f"{changed}: differs from the file that {path} was measured with; run {SCRIPTS[method]} "
                               "again")


@pytest.mark.parametrize("name", [MODEL_CONFIG, TRAIN_OPTIONS])
def test_another_training_is_told_with_the_files_that_say_so_and_the_calibration(name, tmp_path):
    for file in ("final.pt", "extractor.pt"):
        (tmp_path / file).write_text("")
    for file in (MODEL_CONFIG, TRAIN_OPTIONS):
        write_json(tmp_path / file, {"noise_kind": "gaussian", "sample_size": 16})
    calibration = calibration_of(tmp_path, "ddim")
    write_json(tmp_path / name, {"noise_kind": "simplex", "sample_size": 32})
    with pytest.raises(UserError) as error:
        check_digests(calibration, tmp_path / "calibration.json")
    message = one_line(error)
    assert all(part in message for part in (name, str(tmp_path / "calibration.json"), "evaluation.py"))


@pytest.mark.parametrize("method, name, script", [
    ("ddim", "final.pt", "train_ddim.py"), ("ddim", "extractor.pt", "train_extractor.py"),
    ("lafite", "bank.pt", "train_lafite.py"), ("diad", "unet.safetensors", "train_diad.py")])
def test_a_file_that_is_missing_is_told_with_the_script_that_makes_it(method, name, script, tmp_path):
    for other in ("final.pt", "extractor.pt", "features.pt", "bank.pt", "autoencoder.safetensors", "unet.safetensors",
                  "guide.safetensors", "prompt.safetensors"):
        (tmp_path / other).write_text("")
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name}: no such file; run {script} first"):
        digests(tmp_path, FAMILIES[method], SETTINGS[method])
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: a named pipe; expected a file"):
            digests(tmp_path, FAMILIES[method], SETTINGS[method])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("read", [read_json, load_pickle, read_tensors, is_diad_file],
                         ids=["json", "pickle", "tensors", "weights"])
def test_a_named_pipe_in_a_run_folder_is_refused_and_not_waited_for(read, tmp_path):
    path = tmp_path / "file"
    os.mkfifo(path)
    if read is is_diad_file:
        assert not read(path)
        return
    with pytest.raises(UserError, match="file: a named pipe; expected a file"):
        read(path)


def test_a_detector_that_is_not_calibrated_names_the_script_of_its_family(monkeypatch):
    assert (FeatureDetector.family, DiadDetector.family) == ("lafite", "diad")
    detector = tiny_detector(build_extractor("efficientnet_lite0", (1,), 32), calibration=None)
    for method, script in SCRIPTS.items():
        monkeypatch.setattr(DdimDetector, "family", method)
        with pytest.raises(UserError, match=f"not calibrated; run {script} on its run folder"):
            detector(None)


@each_method
def test_a_test_for_drift_without_scores_names_the_script_of_the_method(method):
    with pytest.raises(UserError, match=f"run {SCRIPTS[method]}, and do not set thresholds"):
        drift(Calibration({}, 1.0, 1.0), [1.0], script=FAMILIES[method].scripts.calibration)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"method": null}'])
def test_a_run_that_does_not_say_its_method_is_taken_for_one_of_ddim(content, tmp_path):
    (tmp_path / TRAIN_OPTIONS).write_text(content)
    assert family_in(tmp_path) is None and family_in(tmp_path / "nowhere") is None
    with pytest.raises(UserError, match="run evaluation.py first"):
        load_calibration(tmp_path / "calibration.json")


@each_method
def test_a_run_from_before_methods_were_recorded_is_known_by_its_options(method, tmp_path):
    """But for knn, which has those of lafite."""
    path = run_of(tmp_path, method) / TRAIN_OPTIONS
    options = {name: value for name, value in read_json(path).items() if name != "method"}
    assert recorded_method(options, path) == ("lafite" if method == "knn" else method)


@pytest.mark.parametrize("method", ["nosuch", ["lafite"], 3])
def test_a_run_of_an_unknown_method_is_refused_with_the_known_ones(method, tmp_path):
    write_json(tmp_path / "bolt" / TRAIN_OPTIONS, {"method": method, "noise_kind": "gaussian"})
    options = evaluation.Options(item="bolt", diffusion_checkpoint_dir=tmp_path)
    for read in (lambda: family_in(tmp_path / "bolt"), lambda: trained_options(options, "ddim")):
        with pytest.raises(UserError, match="expected one of ddim, lafite, knn, diad") as error:
            read()
        assert str(tmp_path / "bolt" / TRAIN_OPTIONS) in one_line(error)


def test_the_categories_are_those_of_one_or_of_several(tmp_path):
    assert learnt_categories({"item": "bolt"}, tmp_path) == ("bolt",)
    assert learnt_categories({"item": ["bolt", "nut"]}, tmp_path) == ("bolt", "nut")
    with pytest.raises(UserError, match="train_arg_config.json: lacks item"):
        learnt_categories({}, tmp_path)


@pytest.mark.parametrize("limit, reachable", [({}, 500), ({"max_timestep": 0}, 500), ({"max_timestep": 250}, 250)])
def test_the_process_of_a_training_is_read_with_its_reach(limit, reachable, tmp_path):
    trained = {"train_steps": 500, "beta_schedule": "linear", "noise_kind": "simplex"}
    write_json(tmp_path / TRAIN_OPTIONS, trained | limit)
    process = trained_process(tmp_path)
    assert process.reachable == reachable
    assert (process.train_steps, process.beta_schedule, process.noise_kind) == (500, "linear", "simplex")
    assert isinstance(process, ProcessOptions)


def test_a_folder_that_is_not_there_is_no_run(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such run folder"):
        load_detector(tmp_path / "nowhere")


def test_a_run_that_was_trained_on_all_timesteps_is_tuned(trained, script, tiny_flags, monkeypatch):
    """As those of the preset base and those that were imported: their --max_timestep is 0."""
    from dbad.families.ddim import search
    for name in ("STARTS", "WEIGHTS", "STEPS"):
        monkeypatch.setattr(search, name, getattr(search, name)[:2])
    path = Path("checkpoints/hazelnut") / TRAIN_OPTIONS
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_timestep": 0}))
    flags = [word for word in tiny_flags("evaluation.py") if word != "--no_tune"]
    script("evaluation.py", *flags, "--tune", "--tune_minutes", "0")
    assert (path.parent / "tuned.json").is_file()
