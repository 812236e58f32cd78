"""JSON files in run folders that were edited by hand or damaged: each is read, or refused in one line that names it."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from edits import edit
from helpers import complaint, json_of, one_line, random_images, tiny_unet

import evaluation
import inference_lafite
import train_ddim
import train_diad
from dbad.calibration.thresholds import Calibration
from dbad.checkpoints.blueprints import MOST_PARAMETERS
from dbad.checkpoints.weights import load_unet, model_config, save_weights
from dbad.data.demo.draw import Parameters, is_complete, write_demo
from dbad.errors import UserError
from dbad.families.ddim.options import DdimSettings
from dbad.families.ddim.process import trained_process
from dbad.families.ddim.tuning import tuned_before
from dbad.families.diad.autoencoder import build_autoencoder, load_autoencoder, reconstruct, save_autoencoder
from dbad.families.diad.files import read_built
from dbad.families.diad.model import Size, random_diad
from dbad.families.diad.storage import load_diad, save_diad
from dbad.families.registry import FAMILIES
from dbad.families.runs import learnt_categories, load_calibration, trained_options
from dbad.files.atomic import write_json
from dbad.files.names import BUILD_OPTIONS, MODEL_CONFIG, TRAIN_OPTIONS
from dbad.networks.extractors import build_extractor
from dbad.networks.features import PatchExtractor, extract_features
from dbad.options.resolve import plain, resolve
from dbad.report.runs import Run
from dbad.report.summary import write_summary

OWN = {"ddim": {"extractor_path": "extractor.pt"}, "lafite": {}, "knn": {},
       "diad": {"extractor": "resnet50", "extractor_layers": [1, 2], "extractor_weights": "00ff"}}


class Case(NamedTuple):
    """A JSON file, what reads it, and how many edits of it are tried."""

    path: Path
    read: Callable[[], Any]
    count: int


def settings_of(method: str) -> dict[str, Any]:
    """Valid settings of a family."""
    return FAMILIES[method].settings.read(OWN[method]).record()


def save_calibration(folder: Path, method: str) -> Path:
    path = folder / f"calibration-{method}.json"
    Calibration({"pixel": 0.1, "feature": 0.5}, 1.1, 2.0, (0.5, 1.0, 1.5), 4096, 0.999, 0.25, settings_of(method),
                {"unet": "00ff"}, method).save(path)
    return path


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    """A folder with every kind of JSON file that the scripts read again."""
    root = tmp_path_factory.mktemp("files")
    cases = {f"calibration of {method}": Case(path := save_calibration(root, method),
                                              lambda path=path: load_calibration(path), 60) for method in OWN}

    # ddim
    folder, net = root / "runs" / "bolt", tiny_unet()
    trained = resolve(train_ddim.Options(item="bolt", resolution=16, channels=(32, 32), steps_diffusion=2,
                                         diffusion_checkpoint_dir=root / "runs"))
    write_json(folder / TRAIN_OPTIONS, plain(trained))
    write_json(folder / MODEL_CONFIG, model_config(net))
    save_weights(net.state_dict(), folder / "final.pt")
    write_json(folder / "tuned.json", {"settings": settings_of("ddim"), "digests": {"unet": "00ff"}})
    options = evaluation.Options(item="bolt", diffusion_checkpoint_dir=root / "runs")
    save_weights({}, folder / "extractor.pt")
    cases |= {
        "options of a training": Case(folder / TRAIN_OPTIONS, lambda: (
            resolve(options, trained_options(options, "ddim")), trained_process(folder)), 60),
        "configuration of a U-Net": Case(folder / MODEL_CONFIG, lambda: load_unet(folder, "final.pt")(
            random_images(1), 5).sample, 60),
        "settings chosen before": Case(folder / "tuned.json", lambda: tuned_before(
            folder, DdimSettings.read(settings_of("ddim")), set()), 40)}

    # one model for several
    write_json(root / "runs" / "two-lafite" / TRAIN_OPTIONS, {"item": ["bolt", "nut"], "method": "lafite",
                                                             "bank_mb": 8.0, "preset": "demo", "seed": 0})
    lafite = inference_lafite.Options(item="bolt", run_id="two-lafite", diffusion_checkpoint_dir=root / "runs")

    def settled():
        trained = trained_options(lafite, "lafite", "knn")
        learnt_categories(trained, root / "runs" / "two-lafite")
        resolve(lafite, {name: value for name, value in trained.items() if name != "item"})
    cases["options of a training of several"] = Case(root / "runs" / "two-lafite" / TRAIN_OPTIONS, settled, 40)

    # latent diffusion
    torch.manual_seed(0)
    save_autoencoder(build_autoencoder("tiny", 32), root / "autoencoder")
    save_diad(random_diad(Size(128, (32, 32, 32, 32), 8, "tiny", (8, 8, 8, 8), 2)), root / "diad")
    write_json(root / "diad" / BUILD_OPTIONS, {"autoencoder": "x", "random": True, "size": "tiny"})
    latent = train_diad.Options(item=("hazelnut",), model=root / "diad", run_id="new")
    cases |= {
        "configuration of an auto-encoder": Case(root / "autoencoder" / MODEL_CONFIG, lambda: reconstruct(
            load_autoencoder(root / "autoencoder"), random_images(1, 32), "fp32"), 30),
        "configuration of a latent diffusion": Case(root / "diad" / MODEL_CONFIG, lambda: load_diad(root / "diad"), 25),
        "what a model was built from": Case(root / "diad" / BUILD_OPTIONS, lambda: (
            read_built(root / "diad"), train_diad.resolve_all(latent)), 25)}

    # results, drawings, features
    results = root / "results" / "bolt"
    write_json(results / "metrics.json", {"num_images": 7, "image": {"auroc": 0.5, "ap": 0.4}, "pixel": None,
                                          "protocol": {"crop": "full frame"}, "reason": "no masks"})
    write_json(results / "options.json", {"options": {"item": "bolt"}, "versions": {}, "commit": "00ff"})
    runs = [Run("bolt", 0, results, "done"), Run("nut", 0, results, "done")]
    few = Parameters(16, 1, 1, 1)
    write_demo(root / "demo", "hazelnut", 16, 1, 1, 1)
    patches = PatchExtractor(build_extractor("efficientnet_lite0", (1,), 32), 4)
    pixels = [((image + 1) * 127.5).byte() for image in random_images(2)]

    def features():
        return extract_features(patches, pixels, root / "features", batch_size=2, device=torch.device("cpu"))
    features()
    cases |= {
        "metrics": Case(results / "metrics.json", lambda: write_summary(root / "results", runs, {}), 60),
        "options of results": Case(results / "options.json", lambda: write_summary(root / "results", runs, {}), 20),
        "record of drawings": Case(root / "demo" / "hazelnut" / "demo.json", lambda: is_complete(
            root / "demo" / "hazelnut", few), 30),
        "record of features": Case(next((root / "features").glob("*.json")), features, 10)}
    return cases


NAMES = (*(f"calibration of {method}" for method in OWN), "options of a training", "configuration of a U-Net",
         "settings chosen before", "options of a training of several", "configuration of an auto-encoder",
         "configuration of a latent diffusion", "what a model was built from", "metrics", "options of results",
         "record of drawings", "record of features")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_any_edit_is_read_or_refused_in_one_line_that_names_the_file(cases, name, capsys):
    case = cases[name]
    rng, whole = random.Random(name), case.path.read_bytes()
    case.read()             # as it is, it can be read
    refused = 0
    for number in range(case.count):
        content = edit(case.path, whole, rng)
        try:
            case.read()
        except UserError as error:
            refused += 1
            assert case.path.name in str(error) and "\n" not in str(error), (number, str(error))
        except BaseException as error:
            raise AssertionError(f"edit {number}: {type(error).__name__}: {error}; {content[:2000]!r}") from error
        finally:
            case.path.write_bytes(whole)
    tolerant = name in ("metrics", "options of results", "record of drawings", "record of features")
    assert refused == 0 if tolerant else refused > case.count / 3


def test_no_kind_of_file_is_forgotten(cases):
    assert set(NAMES) == set(cases)


# What the line says

@pytest.mark.parametrize("name, changes, says", [
    ("calibration of ddim", {"recon_weight": None}, "recon_weight null: expected a number"),
    ("calibration of ddim", {"recon_weight": -3}, "recon_weight -3: expected at least 0"),
    ("calibration of ddim", {"conditioning": "nosuch"}, 'conditioning "nosuch": expected one of ddad, blend'),
    ("calibration of ddim", {"layer_weights": [1.0, "a"]}, 'layer_weights [1.0, "a"]: expected a list, each entry a'),
    ("calibration of ddim", {"wheels": 4}, "wheels: no setting of this method"),
    ("calibration of lafite", {"neighbours": 1.5}, "neighbours 1.5: expected a whole number"),
    ("calibration of diad", {"paper_exact": 1}, "paper_exact 1: expected true or false"),
    ("calibration of knn", {"method": "knn"}, "method: no setting of this method"),
    ("calibration of ddim", {"steps_to_regenerate": 251}, "steps_to_regenerate 251: more steps than the 250"),
])
def test_a_setting_that_cannot_be_is_named_with_what_was_found_and_expected(cases, name, changes, says):
    path = cases[name].path
    whole = json_of(path)
    write_json(path, whole | {"settings": whole["settings"] | changes})
    try:
        with pytest.raises(UserError) as error:
            load_calibration(path)
    finally:
        write_json(path, whole)
    assert str(path) in one_line(error) and says in str(error.value)


@pytest.mark.parametrize("changes, says", [
    ({"pixel_threshold": 0}, "above 0"), ({"image_threshold": "NaN"}, 'image_threshold "NaN": expected a number'),
    ({"scales": {"pixel": -1.0}}, "above 0"), ({"scores": [2.0, 1.0]}, "sorted"), ({"scores": 3}, "expected a list"),
    ({"false_alarm_rate": 2}, "false_alarm_rate 2: expected a number between 0 and 1"),
    ({"digests": {"unet": None}}, "digests"),
    ({"method": "nosuch"}, "method 'nosuch'; expected one of ddim, lafite, knn, diad")])
def test_a_measured_number_that_cannot_be_is_refused(changes, says, tmp_path):
    path = save_calibration(tmp_path, "ddim")
    write_json(path, json_of(path) | changes)
    with pytest.raises(UserError) as error:
        load_calibration(path)
    assert str(path) in one_line(error) and says in str(error.value)


@pytest.mark.parametrize("changes, says", [
    ({"layers_per_block": 10 ** 6}, "layers_per_block 1000000: expected 1 to 64"),
    ({"layers_per_block": 64, "block_out_channels": [32] * 8, "down_block_types": ["DownBlock2D"] * 8,
      "up_block_types": ["UpBlock2D"] * 8}, "512 layers in all; expected at most 256"),
    ({"block_out_channels": [16384, 16384]}, "e+10 parameters; expected at most 3e+09"),
    ({"block_out_channels": [32] * 40}, "expected at most 10 levels"),
    ({"sample_size": -1}, "sample_size -1: expected 1 to 8192"), ({"sample_size": None}, "lacks sample_size"),
    ({"sample_size": [16, 16]}, "sample_size [16, 16]: expected a whole number"),
    ({"sample_size": 15}, "does not describe a UNet2DModel"),
    ({"down_block_types": ["Nothing", "DownBlock2D"]}, "Nothing"), ({"act_fn": "nosuch"}, "nosuch"),
    ({"downsample_padding": 7}, "does not describe a UNet2DModel"),
    ({"class_embed_type": "timestep"}, "does not describe a UNet2DModel"),
    ({"attention_heads": 0}, "attention_heads 0: expected 1 to 1024"), ({"norm_eps": "small"}, "norm_eps")])
def test_a_network_that_cannot_be_is_refused_before_it_is_made(cases, changes, says, monkeypatch):
    """Neither the memory for its weights nor the time to draw them is spent."""
    case = cases["configuration of a U-Net"]
    whole = json_of(case.path)
    write_json(case.path, whole | changes)

    def never(*args, **kwargs):
        raise AssertionError("weights were made")
    monkeypatch.setattr("dbad.checkpoints.weights.network_of", never)
    try:
        with pytest.raises(UserError) as error:
            case.read()
    finally:
        write_json(case.path, whole)
    assert str(case.path) in one_line(error) and says in str(error.value)


def test_a_network_larger_than_its_weights_is_never_made(cases, monkeypatch):
    case = cases["configuration of a U-Net"]
    whole = json_of(case.path)
    write_json(case.path, whole | {"block_out_channels": [2048, 2048]})
    monkeypatch.setattr("dbad.checkpoints.weights.network_of", None)
    try:
        with pytest.raises(UserError, match="final.pt: weights of another architecture") as error:
            case.read()
    finally:
        write_json(case.path, whole)
    one_line(error)
    assert MOST_PARAMETERS >= 2.6e9         # Stable Diffusion XL stays possible


# Whole scripts

@pytest.mark.parametrize("name, flags, file, spoil, says", [
    ("inference_ddim.py", "", "calibration.json", lambda v: v["settings"].update(recon_weight="strong"),
     'recon_weight "strong"'),
    ("inference_ddim.py", "", "calibration.json", lambda v: v.update(scales={"pixel": None}), "scales"),
    ("evaluation.py", "", "train_arg_config.json", lambda v: v.update(noise_kind="pink"), 'noise_kind "pink"'),
    ("train_extractor.py", "--extractor_use_diff", "train_arg_config.json", lambda v: v.update(batch_size=[]),
     "batch_size []"),
    ("inference_ddim.py", "--pxl_threshold 1 --feature_threshold 1", "model_config.json",
     lambda v: v.update(layers_per_block=10 ** 7), "layers_per_block 10000000"),
    ("evaluation.py", "", "model_config.json", lambda v: v.update(sample_size=-1), "sample_size -1")])
def test_scripts_refuse_an_edited_file(trained, script, capsys, name, flags, file, spoil, says):
    path = Path("checkpoints/hazelnut") / file
    values = json.loads(path.read_text())
    spoil(values)
    path.write_text(json.dumps(values))
    line = complaint(capsys, script, name, "--item", "hazelnut", "--dataset_path", "data", "--device", "cpu",
                     *flags.split())
    assert str(path) in line and says in line


def test_results_beside_a_damaged_record_are_kept_as_those_of_others(trained, script, capsys):
    """The inspection is done by then: it is not lost for a file that nobody can read."""
    Path("results/hazelnut/options.json").write_text("{")
    script("inference_ddim.py", "--item", "hazelnut", "--dataset_path", "data", "--device", "cpu")
    assert "had results of other options" in capsys.readouterr().out
    assert Path("results/hazelnut.1/scores.csv").is_file() and Path("results/hazelnut/scores.csv").is_file()
