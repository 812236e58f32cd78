"""Options: what is on the command line, where a value comes from, and which values are refused; and the machine."""

import collections
import dataclasses
import json
import re
import resource
import subprocess
import sys
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from conftest import ROOT
from helpers import one_line

import build_diad
import evaluation
import finetune_autoencoder
import inference_ddim
import inference_diad
import inference_lafite
import train_ddim
import train_diad
import train_extractor
import train_lafite
import train_tune_eval
from dbad.errors import UserError
from dbad.families.registry import FAMILIES, Method
from dbad.families.runs import trained_options
from dbad.fields import EACH_PRESET, PRESETS, default_of, fields_of
from dbad.files.atomic import write_json
from dbad.files.names import TRAIN_OPTIONS
from dbad.inspection.run import results_of
from dbad.options.command_line import main, parse
from dbad.options.resolve import (
    announce,
    changed,
    check_options,
    default_preset,
    plain,
    resolve,
    run_folder,
    run_name,
    subset,
)
from dbad.runtime.device import pick_device, pick_precision
from dbad.runtime.failures import one_line_failures

CHAINS = {name: train_tune_eval.options_of(family) for name, family in FAMILIES.items()}
SCRIPTS = [train_ddim, train_extractor, evaluation, inference_ddim, train_lafite, inference_lafite, train_diad,
           inference_diad, train_tune_eval, *(
               SimpleNamespace(__name__=f"train_tune_eval-{name}", __doc__=train_tune_eval.__doc__, Options=chain)
               for name, chain in CHAINS.items() if name in ("lafite", "diad"))]
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
Train, Everything, Inspect = train_ddim.Options, train_tune_eval.Options, inference_ddim.Options
DEMO = {name: default_of(field, "demo") for name, field in fields_of(*CHAINS.values()).items()}


def flagged(cls) -> list[dataclasses.Field]:
    """The options that have a flag; the others are recorded and never asked for."""
    return [field for field in dataclasses.fields(cls) if field.metadata["flag"]]


def status_and_line(capsys, cls, *words) -> tuple[int, str]:
    """How the command line ends, and its only line on stderr."""
    with pytest.raises(SystemExit) as ended:
        parse(cls, words)
    captured = capsys.readouterr()
    assert not captured.out and captured.err.endswith("\n") and captured.err.count("\n") == 1
    return ended.value.code, captured.err.strip()


# Help

@each_script
def test_every_option_has_a_help_text(script):
    for field in dataclasses.fields(script.Options):
        text = field.metadata["help"]
        assert len(text) > 10 and "\n" not in text and not text.endswith("."), field.name


def page(capsys, *words) -> str:
    """What a command line prints that asks for help."""
    parse_, *rest = words
    with pytest.raises(SystemExit) as ended:
        parse_(*rest)
    assert ended.value.code == 0
    return capsys.readouterr().out


def listed(text: str) -> dict[str, list[str]]:
    """The flags of a page of help by their headings."""
    found, heading = collections.defaultdict(list), ""
    for line in text.splitlines():
        heading = line.rstrip(":") if re.fullmatch(r"[A-Z].*:", line) else heading
        if flag := re.match(r"  (-[-\w]+)", line):
            found[heading].append(flag[1])
    return dict(found)


HELP = ["-h", "--help_all"]


@each_script
def test_the_whole_help_mentions_every_option_once_and_the_script_itself(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = page(capsys, parse, script.Options, ["--help_all"], script.__doc__)
    flags = [flag for group in listed(text).values() for flag in group]
    assert sorted(flags) == sorted(HELP + [f"--{f.name}" for f in flagged(script.Options)])
    assert script.__doc__.strip().splitlines()[0] in text and "MISSING" not in text and "None" not in text


@each_script
def test_the_help_shows_the_ten_options_that_matter_first(script, capsys):
    text = page(capsys, parse, script.Options, ["--help"], script.__doc__)
    found = listed(text)
    assert list(found) == ["First of all", "Help"] and found["Help"] == HELP
    assert len(found["First of all"]) == 10 and found["First of all"][0] == "--item"
    assert {"--dataset_path", "--run_id", "--dry_run"} <= set(found["First of all"])
    assert text.endswith("all options: --help_all\n")
    assert list(listed(page(capsys, parse, script.Options, ["--help-all"], "")).values())[0] == found["First of all"]


def test_the_options_of_a_model_that_is_built_begin_with_where_and_of_what(capsys):
    found = listed(page(capsys, parse, build_diad.Options, ["-h"], ""))["First of all"]
    assert found[0] == "--out" and {"--random", "--size", "--stable_diffusion", "--autoencoder"} <= set(found)
    assert len(found) <= 10


@pytest.mark.parametrize("cls, heading, flags", [
    (CHAINS["diad"], "Training of the guided latent diffusion model", ["--latent_batch_size", "--steps_latent"]),
    (CHAINS["diad"], "Backbone", ["--extractor", "--feature_resolution"]),
    (CHAINS["diad"], "Course of the training", ["--resume", "--log_dir"]),
    (CHAINS["diad"], "Thresholds", ["--pixel_quantile"]),
    (CHAINS["ddim"], "Training of the diffusion model", ["--channels", "--noise_kind"]),
    (CHAINS["ddim"], "Training of the feature extractor", ["--objective", "--epochs_extractor"]),
    (CHAINS["lafite"], "Features and memory bank", ["--bank_mb", "--grid"]),
    (CHAINS["lafite"], "Training of the denoiser", ["--steps_features", "--prediction"]),
    (inference_ddim.Options, "Data", ["--layout", "--masks", "--patching"]),
    (inference_ddim.Options, "Run", ["--extractor_path"]),
    (inference_diad.Options, "Run", ["--resume_path"]),
    (train_extractor.Options, "Data", ["--resolution"])])
def test_an_option_stands_under_the_phase_or_thing_it_belongs_to(cls, heading, flags, capsys):
    assert set(flags) <= set(listed(page(capsys, parse, cls, ["--help_all"], ""))[heading])


@pytest.mark.parametrize("flag, default", [
    ("--batch_size", "demo 4, small 4, base 8"), ("--attention_levels", "demo none, small none, base 4"),
    ("--steps_diffusion", "demo 900, small 3000"), ("--epochs_diffusion", "base 1000"), ("--flip", "off"),
    ("--rotate", "0"), ("--adam_betas", "demo 0.9 0.99, small 0.9 0.99, base 0.95 0.999"), ("--recon_weight", "2"),
    ("--log_dir", "logs"), ("--resolution", "demo 64, small 128, base 256")])
def test_a_default_is_one_value_or_that_of_each_preset(flag, default, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    text = page(capsys, parse, Train, ["--help_all"], "")
    entry = text[text.index(f"  {flag}"):]
    assert re.search(r"\(default: (.*?)\)", entry)[1] == default


def test_the_help_of_every_script_comes_at_once():
    """In under a second of processor time, since it loads no torch."""
    for script in (train_ddim, inference_diad, train_tune_eval):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        words = [sys.executable, f"{script.__name__}.py", "--method", "ddim", "--help_all"]
        run = subprocess.run(words if script is train_tune_eval else [*words[:2], "--help_all"], cwd=ROOT,
                             capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run.returncode == 0 and "--item" in run.stdout
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1, script.__name__


@each_script
def test_no_two_options_share_a_flag(script):
    flags = [flag for field in dataclasses.fields(script.Options)
             for flag in (f"--{field.name}", f"--no_{field.name}", *field.metadata["aliases"])]
    assert len(flags) == len(set(flags))


@pytest.mark.parametrize("method", FAMILIES)
def test_the_script_of_all_phases_has_the_options_of_each(method):
    """But for the building of a model: its options follow from those of the chain."""
    names = {f.name for f in dataclasses.fields(CHAINS[method])}
    for script in train_tune_eval.modules(FAMILIES[method]):
        cls = getattr(script, "ChainOptions", script.Options)
        assert {f.name for f in dataclasses.fields(cls)} <= names
        options = subset(cls, CHAINS[method](item="bolt", seed=3))
        assert type(options) is cls and getattr(options, "seed", 3) == 3


@pytest.mark.parametrize("method, flag", [
    ("ddim", "--bank_mb"), ("ddim", "--latent-start=5"), ("lafite", "--recon_weight"), ("knn", "--skip_extractor"),
    ("diad", "--no_editing")])
def test_a_flag_of_another_method_is_refused_as_such(method, flag, capsys):
    with pytest.raises(SystemExit) as ended:
        train_tune_eval.main(["--item", "bolt", "--method", method, flag, "1"])
    line, name = capsys.readouterr().err, flag.partition("=")[0].replace("t-s", "t_s")
    assert ended.value.code == 2 and line.count("\n") == 1
    assert f"{name}: not an option of --method {method}" in line


def test_a_flag_of_no_method_gets_the_nearest_of_this_one(capsys):
    with pytest.raises(SystemExit) as ended:
        train_tune_eval.main(["--item", "bolt", "--method", "lafite", "--bank_mbb", "3"])
    assert ended.value.code == 2 and "--bank_mbb: no such option; did you mean --bank_mb?" in capsys.readouterr().err


def test_an_unknown_method_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as ended:
        train_tune_eval.main(["--item", "bolt", "--method", "nosuch"])
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.count("\n") == 1
    assert "--method" in line and all(name in line for name in FAMILIES)


def test_the_help_of_all_phases_fits_a_screen_and_names_the_methods(capsys):
    text = page(capsys, train_tune_eval.main, ["--help"])
    assert text.count("\n") <= 40 and text.endswith("all options: --help_all\n")
    assert all(f"--method {name} --help" in text and family.about in text for name, family in FAMILIES.items())


@pytest.mark.parametrize("method", FAMILIES)
def test_the_help_of_a_method_has_its_options_and_no_others(method, capsys):
    found = listed(page(capsys, train_tune_eval.main, ["--method", method, "--help_all"]))
    flags = {flag for group in found.values() for flag in group}
    assert flags == {*HELP, *(f"--{field.name}" for field in flagged(CHAINS[method]))}


def test_the_whole_help_without_a_method_is_that_of_the_default(capsys):
    text = page(capsys, train_tune_eval.main, ["--help_all"])
    assert text == page(capsys, train_tune_eval.main, ["--method", "ddim", "--help_all"])


def test_the_methods_to_choose_from_are_the_families():
    assert get_args(Method) == tuple(FAMILIES)


def test_an_option_has_the_same_default_and_the_same_flags_in_every_script():
    """But for what the networks of ddim and lafite predict: noise, and clean features."""
    seen = {}
    for script in SCRIPTS:
        for field in dataclasses.fields(script.Options):
            if field.name == "prediction":
                continue
            same = field.default, field.metadata["aliases"], field.metadata.get(EACH_PRESET)
            assert seen.setdefault(field.name, same) == same, field.name


# Command line

@each_script
def test_only_the_item_is_required(script, capsys):
    found = parse(script.Options, ["--item", "bolt"])
    assert found.item in ("bolt", ("bolt",)) and found == script.Options(item=found.item)
    status, line = status_and_line(capsys, script.Options)
    assert status == 2 and "--item" in line


def test_flags_are_read_with_underscores_with_dashes_and_with_an_equals_sign():
    expected = Train(item="bolt", learning_rate=0.01, run_id="a-b_c", diffusion_checkpoint_dir=Path("my-runs/x_y"))
    for words in (["--item", "bolt", "--learning_rate", "0.01", "--run_id", "a-b_c",
                   "--diffusion_checkpoint_dir", "my-runs/x_y"],
                  ["--item=bolt", "--learning-rate=0.01", "--run-id=a-b_c", "--diffusion-checkpoint-dir=my-runs/x_y"],
                  ["--item", "bolt", "--learning-rate", "1e-2", "--run-id", "a-b_c", "--diffusion-checkpoint_dir",
                   "my-runs/x_y"]):
        assert parse(Train, words) == expected


@pytest.mark.parametrize("words, name, value", [
    (["--epochs", "3"], "epochs_diffusion", 3),
    (["--reconstruction_weight", "2"], "recon_weight", 2.0),
    (["--run-name", "x"], "run_id", "x"),
    (["--checkpoint_dir", "x"], "diffusion_checkpoint_dir", Path("x")),
    (["--num_inference_steps", "7"], "steps_to_regenerate", 7),
    (["--patch_imgs"], "patching", True),
    (["--crop"], "patching", True),
    (["--patching"], "patching", True),
    (["--no_patching"], "patching", False),
    (["--no-patching"], "patching", False),
    (["--patching", "--no-patching"], "patching", False),
    (["--no_resume"], "resume", False),
    (["--no-calc-val-loss"], "calc_val_loss", False),
    (["--channels", "32", "64"], "channels", (32, 64)),
    (["--adam_betas", "0.9", "0.99"], "adam_betas", (0.9, 0.99)),
    (["--dataset_path", "data"], "dataset_path", Path("data")),
    (["--noise_kind", "simplex"], "noise_kind", "simplex"),
    (["--seed", "7"], "seed", 7),
    (["--precision", "bf16"], "precision", "bf16"),
])
def test_a_flag_or_another_spelling_of_it_sets_its_option(words, name, value):
    options = parse(Train, ["--item", "bolt", *words])
    assert options == Train(item="bolt", **{name: value}) and type(getattr(options, name)) is type(value)


def test_other_spellings_of_the_inspection():
    options = parse(Inspect, ["--mvtec_item", "bolt", "-fsk", "5", "--mvtec_item_states", "good", "crack",
                              "--pl_threshold", "0.1", "--fl-threshold", "0.2"])
    assert options == Inspect(item="bolt", feature_smoothing_kernel=5, item_states=("good", "crack"), pxl_threshold=0.1,
                              feature_threshold=0.2)


def test_every_alias_is_known_to_its_script():
    value_of = {bool: [], int: ["3"], float: ["0.5"]}
    for script in SCRIPTS:
        for field in dataclasses.fields(script.Options):
            for flag in field.metadata["aliases"]:
                kind = next((k for k in value_of if k.__name__ in str(field.type)), None)
                words = [flag, *value_of.get(kind, ["x"])]
                given = ["--item", "bolt"] if field.name != "item" else []
                assert getattr(parse(script.Options, given + words), field.name) is not None


@pytest.mark.parametrize("words, message", [
    (["--recon_wieght", "3"], "--recon_wieght: no such option; did you mean --recon_weight?"),
    (["--recon-wieght=3"], "--recon_wieght: no such option; did you mean --recon_weight?"),
    (["--recon", "3"], "--recon: no such option"),
    (["--qqqq"], "--qqqq: no such option; see --help"),
    (["stray"], "stray: no such option; see --help"), ([" "], "' ': no such option; see --help"),
    (["--recon_weight=--"], "--recon_weight: expected a value, found --"),
])
def test_an_unknown_flag_ends_in_one_line_with_the_nearest_one_and_status_2(words, message, capsys):
    status, line = status_and_line(capsys, Train, "--item", "bolt", *words)
    assert status == 2 and message in line


@pytest.mark.parametrize("words, named", [(["--seed", "many"], "--seed"), (["--learning_rate", "x"], "--learning_rate"),
                                          (["--noise_kind", "pink"], "--noise_kind"), (["--channels"], "--channels"),
                                          (["--preset", "huge"], "--preset"), (["--seed"], "--seed"),
                                          (["--channels", "32", "x"], "--channels"), (["--resume", "x"], "x")])
def test_a_value_of_the_wrong_kind_ends_in_one_line_that_names_the_option(words, named, capsys):
    status, line = status_and_line(capsys, Train, "--item", "bolt", *words)
    assert status == 2 and named in line


def test_training_on_all_timesteps_can_be_asked_for_as_the_help_says():
    """The help of --max_timestep: 0 for all; it must win over a preset that has a limit."""
    options = resolve(parse(Train, ["--item", "bolt", "--preset", "demo", "--max_timestep", "0"]))
    assert (options.max_timestep or options.train_steps) == 1000


# Where a value comes from

@pytest.mark.parametrize("preset", PRESETS)
@each_script
def test_every_preset_completes_every_script(preset, script):
    options = resolve(script.Options(item="bolt", preset=preset))
    for field in dataclasses.fields(options):
        if EACH_PRESET in field.metadata:
            assert getattr(options, field.name) == default_of(field, preset)
    assert options.run_id == "bolt" and resolve(options) == options


def test_every_preset_has_a_value_for_every_option_that_asks_for_one():
    """A length is given in epochs or in steps; the other one is None."""
    lengths = ("epochs_diffusion", "steps_diffusion")
    for name, field in fields_of(*(script.Options for script in SCRIPTS)).items():
        values = field.metadata.get(EACH_PRESET, dict.fromkeys(PRESETS, 0))
        assert values.keys() == set(PRESETS)
        assert name in lengths or None not in values.values(), name
    for preset in PRESETS:
        assert [default_of(fields_of(Train)[name], preset) for name in lengths].count(None) == 1


def test_the_preset_follows_from_the_data_unless_it_is_given():
    assert resolve(Train(item="bolt")).preset == "demo"
    assert resolve(Train(item="bolt", dataset_path=Path("data"), device="cpu")).preset == "small"
    assert resolve(Train(item="bolt", dataset_path=Path("data"), preset="small")).preset == "small"
    assert resolve(Inspect(item="bolt", dataset_path=Path("data")), {"preset": "small"}).preset == "small"
    assert resolve(Inspect(item="bolt", preset="demo"), {"preset": "small"}).preset == "demo"


@pytest.mark.parametrize("device, method, expected", [
    ("cpu", "ddim", "small"), ("cpu", "diad", "small"), ("cpu", "lafite", "small"), ("cpu", "knn", "small"),
    ("cuda", "ddim", "base"), ("auto", "diad", "base"), ("cuda", "lafite", "small"), ("auto", "knn", "small")])
def test_real_data_take_what_the_machine_can_train(device, method, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert default_preset(Path("data"), device, FAMILIES[method].on_gpu) == expected
    assert default_preset(None, device, FAMILIES[method].on_gpu) == "demo"


def test_the_smaller_preset_is_said_to_be_chosen_for_the_machine(capsys):
    announce(resolve(Train(item="bolt", dataset_path=Path("data"), device="cpu")))
    assert "; preset small (the default for real data without a CUDA GPU) with" in capsys.readouterr().out
    for options in (Train(item="bolt"), Train(item="bolt", dataset_path=Path("data"), device="cpu", preset="base")):
        announce(resolve(options))
        assert "default" not in capsys.readouterr().out


@pytest.mark.parametrize("changes, expected", [
    ({}, "base"), ({"resume": False}, "small"), ({"dataset_path": Path("other")}, "small"),
    ({"preset": "demo"}, "demo")])
def test_a_training_that_was_stopped_goes_on_with_its_preset(changes, expected, tmp_path):
    """It may have been begun on a GPU, or when base was the default."""
    options = Train(item="bolt", dataset_path=Path("data"), device="cpu", diffusion_checkpoint_dir=tmp_path)
    before = plain(resolve(dataclasses.replace(options, preset="base")))
    write_json(tmp_path / "bolt" / TRAIN_OPTIONS, before)
    assert train_ddim.resolve_all(options).preset == "small"        # nothing to go on from
    (tmp_path / "bolt" / "last.pt").touch()
    assert train_ddim.resolve_all(dataclasses.replace(options, **changes)).preset == expected


def test_what_is_given_comes_before_what_was_trained_and_that_before_the_preset():
    trained = {"preset": "small", "batch_size": 5, "recon_weight": 0.5, "seed": 9}
    options = resolve(Inspect(item="bolt", recon_weight=0.25), trained)
    assert options.recon_weight == 0.25 and options.batch_size == 5 and options.seed == 9
    assert options.blur_sigma == default_of(fields_of(Inspect)["blur_sigma"], "small")


@pytest.mark.parametrize("name, given", [("batch_size", 1), ("patching", False), ("seed", 0), ("eta", 0.0),
                                         ("recon_weight", 0.0), ("pl_contrib", 0.0)])
def test_a_given_value_that_looks_like_nothing_still_counts(name, given):
    other = {"batch_size": 5, "patching": False, "seed": 9, "eta": 1.0, "recon_weight": 3.0, "pl_contrib": 2.0}
    assert getattr(resolve(Inspect(item="bolt", **{name: given}), other), name) == given


def test_lists_of_a_training_come_back_as_tuples():
    trained = json.loads(json.dumps(plain(resolve(Train(item="bolt", channels=(32, 64), resolution=16)))))
    options = resolve(Train(item="bolt"), trained)
    assert options.channels == (32, 64) and options.adam_betas == DEMO["adam_betas"]


@pytest.mark.parametrize("given, expected", [({"epochs_diffusion": 3}, (3, None)), ({"steps_diffusion": 4}, (None, 4)),
                                             ({}, (None, DEMO["steps_diffusion"]))])
def test_a_length_in_epochs_replaces_one_in_steps_and_the_other_way_round(given, expected):
    options = resolve(Train(item="bolt", **given))
    assert (options.epochs_diffusion, options.steps_diffusion) == expected
    base = resolve(Train(item="bolt", preset="base", **given))
    assert (base.epochs_diffusion, base.steps_diffusion) == (expected if given else (1000, None))


@pytest.mark.parametrize("name, given, trained", [
    ("holdout", 0.2, 0.1), ("patching", True, False), ("resolution", 32, 64), ("item", "bolt", "nut")])
def test_what_contradicts_the_training_is_refused(name, given, trained):
    options = train_extractor.Options(**{"item": "bolt", name: given})
    with pytest.raises(UserError, match=f"--{name} {given}: .*was trained with {trained}") as error:
        resolve(options, {"preset": "demo", name: trained})
    assert str(run_folder(options)) in one_line(error)
    assert getattr(resolve(options, {"preset": "demo", name: given}), name) == given


def test_the_options_of_a_training_are_read_from_its_run_folder(tmp_path):
    options = Inspect(item="bolt", diffusion_checkpoint_dir=tmp_path)
    assert trained_options(options, "ddim") == {}
    trained = resolve(Train(item="bolt", diffusion_checkpoint_dir=tmp_path, batch_size=3))
    write_json(tmp_path / "bolt" / TRAIN_OPTIONS, plain(trained))
    assert resolve(options, trained_options(options, "ddim")).batch_size == 3


def test_the_run_folder_is_called_after_the_run_or_the_item():
    assert run_folder(Train(item="bolt")) == Path("checkpoints/bolt")
    assert run_folder(Train(item="bolt", run_id="x", diffusion_checkpoint_dir=Path("y"))) == Path("y/x")


# Which values are refused

@pytest.fixture(scope="module")
def resolved():
    return resolve(Everything(item="bolt"))


def refused(options, changes) -> str:
    with pytest.raises(UserError) as error:
        check_options(dataclasses.replace(options, **changes))
    return one_line(error)


@pytest.mark.parametrize("name, bad, good", [
    ("batch_size", 0, 1), ("seed", -1, 0), ("num_workers", -1, 0), ("resolution", 7, 8), ("feature_resolution", 31, 32),
    ("steps_diffusion", -1, 0), ("epochs_extractor", -1, 0), ("save_n_epochs", 0, 1), ("start_at_timestep", 0, 5),
    ("steps_to_regenerate", 0, 1), ("feature_smoothing_kernel", 0, 1), ("feature_smoothing_kernel", 2, 3),
    ("warmup_steps", -1, 0), ("layers_per_block", 0, 1), ("recon_weight", -0.1, 0.0), ("blur_sigma", -1.0, 0.0),
    ("pl_contrib", -0.1, 0.0), ("fl_contrib", -0.1, 0.0), ("rotate", -1.0, 0.0), ("color_jitter", -0.1, 0.0),
    ("eta", -0.1, 0.0), ("eta", 1.1, 1.0), ("holdout", 0.0, 0.01), ("holdout", 1.0, 0.99), ("pixel_quantile", 0.0, 0.5),
    ("pixel_quantile", 1.0, 0.999), ("false_alarm_rate", 0.0, 0.01), ("false_alarm_rate", 1.0, 0.5),
    ("learning_rate", 0.0, 1e-6), ("learning_rate", 1.0, 0.5), ("extractor_learning_rate", 0.0, 1e-6),
    ("pxl_threshold", 0.0, 1e-9), ("feature_threshold", -1.0, 2.0), ("steps_to_regenerate", 251, 250),
    ("start_at_timestep", 1001, 250), ("start_at_timestep", 251, 250), ("max_timestep", 1001, 1000),
    ("max_timestep", 249, 250), ("train_steps", 249, 250), ("run_id", "a/b", "a.b"), ("run_id", "..", "..."),
    ("run_id", "", "a"), ("run_id", ".", "a"), ("diffusion_checkpoint_name", "x/y.pt", "y.pt"),
    ("adam_betas", (0.9,), (0.9, 0.99)), ("adam_betas", (0.9, 1.0), (0.0, 0.5)),
    ("adam_betas", (0.9, 0.9, 0.9), (0.5, 0.9)), ("resolution", 4097, 4096), ("num_workers", 1025, 1024),
    ("channels", (32,) * 11, (32,) * 10), ("channels", (), (32,)), ("blur_sigma", 257.0, 256.0), ("bank_mb", 0.0, 1.0),
    ("tune_minutes", -1.0, 0.0), ("train_steps", 100_001, 100_000), ("layer_weights", (1.0, float("nan")), (1.0, 0.0)),
    ("run_id", "x" * 121, "x" * 120),
    ("layers_per_block", 17, 16), ("log_dir", Path("\udcff"), Path("ü")), ("dataset_path", Path("a\0b"), Path("a")),
])
def test_a_value_out_of_range_is_refused_in_one_line_that_names_its_option(name, bad, good, resolved):
    options = resolved if hasattr(resolved, name) else resolve(CHAINS["lafite"](item="bolt"))
    assert f"--{name} " in refused(options, {name: bad}) + " "
    check_options(dataclasses.replace(options, **{name: good}))


def numeric_fields() -> list[tuple[object, str, bool]]:
    """Every option of a number, or of several, with a script that has it."""
    found = {}
    for script in (*SCRIPTS, finetune_autoencoder, build_diad):
        for name, hint in typing.get_type_hints(script.Options).items():
            if "int" in str(hint) or "float" in str(hint):
                found.setdefault(name, (script.Options, name, "tuple" in str(hint)))
    return list(found.values())


@pytest.mark.parametrize("cls, name, several", numeric_fields(), ids=[name for _, name, _ in numeric_fields()])
@pytest.mark.parametrize("value", [10 ** 400, 1e308, float("nan"), float("inf")], ids=str)
def test_no_number_is_endless(cls, name, several, value):
    """Whatever option comes, it has a bound: computing with more would end in an overflow or without memory."""
    options = cls(**{"out": Path("x")} if cls is build_diad.Options else {"item": ("bolt",)})
    assert f"--{name} " in refused(options, {name: (value, value) if several else value})


def test_the_command_line_is_checked_before_anything_else(capsys):
    """Of all phases at once: what only the last one needs is not found after the others' hours."""
    def never(options):
        raise AssertionError("the work began")
    for words in (["--blur_sigma", "nan"], ["--seeds", "-1"], ["--device", "cuda:99"], ["--top_share", "2"]):
        with pytest.raises(SystemExit) as ended:
            main(Everything, never, "All.", ["--item", "bolt", *words])
        line = capsys.readouterr().err
        assert ended.value.code == 2 and words[0] in line and line.count("\n") == 1


def test_a_solver_without_noise_refuses_fresh_noise(resolved):
    assert "--eta 0.5: --sampler dpm++ adds no noise" in refused(resolved, {"sampler": "dpm++", "eta": 0.5})
    check_options(dataclasses.replace(resolved, sampler="dpm++"))


@pytest.mark.parametrize("name", ["eta", "recon_weight", "blur_sigma", "holdout", "learning_rate", "rotate",
                                  "color_jitter", "pl_contrib", "pixel_quantile"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_finite_number_is_refused(name, value, resolved):
    assert f"--{name} " in refused(resolved, {name: value})


def test_options_that_contradict_each_other_are_refused(resolved):
    assert "one of them" in refused(resolved, {"epochs_diffusion": 3, "steps_diffusion": 4})
    assert "empty" in refused(resolved, {"pl_contrib": 0.0, "fl_contrib": 0.0})
    with pytest.raises(UserError, match="--epochs_diffusion and --steps_diffusion are both given"):
        resolve(Train(item="bolt", epochs_diffusion=3, steps_diffusion=4))


def test_an_empty_item_is_refused():
    with pytest.raises(UserError, match="--item") as error:
        resolve(Train(item=""))
    one_line(error)


# What is said and saved

def test_options_are_saved_as_json_values():
    options = Train(item="bolt", dataset_path=Path("a/b"), channels=(32, 64))
    values = json.loads(json.dumps(plain(options)))
    assert values["dataset_path"] == str(Path("a/b")) and values["channels"] == [32, 64]
    assert values.keys() == {f.name for f in dataclasses.fields(options)}


def test_only_what_differs_from_the_preset_counts_as_changed():
    assert changed(resolve(Everything(item="bolt"))) == {"item": "bolt", "preset": "demo", "run_id": "bolt"}
    options = resolve(Train(item="bolt", eta=0.5, noise_kind="simplex", channels=(32, 64)))
    assert changed(options) == {"item": "bolt", "preset": "demo", "run_id": "bolt", "eta": 0.5, "noise_kind": "simplex",
                                "channels": [32, 64]}


def test_a_dry_run_shows_all_options_and_what_would_be_written(capsys):
    options = resolve(Train(item="bolt", eta=0.5, dry_run=True))
    assert not announce(options, Path("x/final.pt"), "y.json")
    text = capsys.readouterr().out
    assert all(f"  {field.name} = " in text for field in flagged(Train))
    assert "x/final.pt" in text and "y.json" in text and "eta 0.5" in text and "demo data" in text
    assert announce(dataclasses.replace(options, dry_run=False)) and "final.pt" not in capsys.readouterr().out


def test_main_prints_what_the_run_returns(capsys):
    main(Train, lambda options: f"trained {options.item}", "Train.", ["--item", "bolt"])
    assert capsys.readouterr().out == "trained bolt\n"


@pytest.mark.parametrize("failure, status", [(UserError("no such file"), 2), (KeyboardInterrupt(), 130),
                                             (torch.OutOfMemoryError(), 2), (OSError(28, "No space left", "x"), 2)])
def test_a_failure_that_a_user_can_cause_ends_in_one_line(failure, status, capsys):
    def run(options):
        raise failure
    with pytest.raises(SystemExit) as ended:
        main(Train, run, "Train.", ["--item", "bolt"])
    assert ended.value.code == status and capsys.readouterr().err.count("\n") == 1


def test_any_other_failure_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), one_line_failures():
        _ = 1 // 0
    with pytest.raises(FileNotFoundError), one_line_failures():
        open("/no/such/file")


# The machine

@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:99", "meta", ""])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match=f"--device {name}") as error:
        pick_device(name)
    one_line(error)


def test_a_device_and_a_number_format_are_picked_for_the_machine():
    assert pick_device("cpu") == torch.device("cpu") and pick_device("auto").type in ("cpu", "cuda", "mps")
    for precision in ("fp32", "bf16"):
        assert pick_precision(precision, torch.device("cpu")) == precision
    assert pick_precision("auto", torch.device("cpu")) in ("fp32", "bf16")
    assert pick_precision("auto", torch.device("mps")) == "fp32"


# Names

@pytest.mark.parametrize("items, run_id, name", [
    (("screw",), None, "screw-diad"), (("all",), None, "all-diad"), (("screw", "bolt"), None, "screw-bolt-diad"),
    (tuple("abcd"), None, "4-categories-diad"), (("screw",), "mine", "mine")])
def test_a_run_is_called_as_its_categories_and_its_method_or_as_it_is_told(items, run_id, name):
    assert run_name(train_diad.Options(item=items, run_id=run_id), "diad") == name


@pytest.mark.parametrize("learnt, item, images, name", [
    (["screw"], "screw", None, "mine"), (["screw"], "bolt", None, "mine-bolt"), (["bolt", "screw"], "bolt", None,
     "mine-bolt"), (["screw"], "screw", ("new/",), "mine-images"), (["screw"], "bolt", ("new/",), "mine-bolt-images")])
def test_results_are_called_as_the_run_and_where_it_knows_other_categories_as_the_category(learnt, item, images, name,
                                                                                         tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / TRAIN_OPTIONS).write_text(json.dumps({"item": learnt, "bank_mb": 1.0}))
    options = inference_lafite.Options(item=item, run_id="mine", images=images, diffusion_checkpoint_dir=tmp_path)
    assert results_of(options, "lafite", "knn") == Path("results", name)
