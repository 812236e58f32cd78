"""Files that are written whole, and weights that are read without trusting them."""

import dataclasses
import json
import os
import pickle
import stat
import warnings

import numpy as np
import pytest
import torch
from helpers import one_line, random_images, tiny_unet

from dbad.checkpoints.weights import (
    load_pickle,
    load_unet,
    load_weights,
    log_line,
    model_config,
    save_weights,
    trim_log,
)
from dbad.errors import UserError
from dbad.files.atomic import atomic_write, ensure_folders, read_json, write_json, write_text
from dbad.files.names import LOG, MODEL_CONFIG
from dbad.networks.unet import build_unet
from dbad.options.resolve import plain, resolve
from dbad.report.results import results_folder
from inference_ddim import Options

# Files


def test_a_file_takes_its_name_once_it_is_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        assert not path.exists() and temporary.parent == path.parent and temporary.suffix == ".txt"
        temporary.write_text("whole")
    assert path.read_text() == "whole" and os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("failure", [ValueError("x"), KeyboardInterrupt(), UserError("x"), OSError(28, "disk full")])
def test_when_writing_fails_the_old_file_stays_and_nothing_temporary_remains(failure, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UserError if isinstance(failure, OSError) else type(failure)):
        with atomic_write(path) as temporary:
            temporary.write_text("half of the new")
            raise failure
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    with pytest.raises(UserError, match="cannot be written .*disk full") as error:
        with atomic_write(tmp_path / "a.txt"):
            raise OSError(28, "disk full")
    assert str(tmp_path / "a.txt") in one_line(error)


def test_a_file_in_place_of_the_folder_is_one_line_that_names_it(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match="cannot be written") as error:
        write_text(tmp_path / "a" / "b.txt", "text")
    assert str(tmp_path / "a" / "b.txt") in one_line(error)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be written") as error:
        write_text(tmp_path / "folder", "text")
    one_line(error)
    assert sorted(os.listdir(tmp_path)) == ["a", "folder"]


def test_a_written_file_has_the_permissions_of_any_other(tmp_path):
    write_text(tmp_path / "a.txt", "text")
    (tmp_path / "b.txt").write_text("text")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == stat.S_IMODE((tmp_path / "b.txt").stat().st_mode)


def test_json_comes_back_as_it_was(tmp_path):
    value = {"a": 1, "b": [0.1, 1 / 3], "c": None, "d": {"ä": "µ"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value and "ä" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_not_a_number_is_refused_and_the_old_file_stays(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert read_json(tmp_path / "a.json") == {"a": 1} and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content, message", [
    (None, "no such file"), (b"", "not readable"), (b'{"a": 1', "not readable"), (b"\xff\xfe", "not readable"),
    (b"[1]", "expected a JSON object")])
def test_a_missing_or_broken_json_file_is_one_line_that_names_it(content, message, tmp_path):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_json(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in one_line(error)


def test_folders_are_made_and_left_empty(tmp_path):
    ensure_folders(img_dir=tmp_path / "a" / "b", log_dir=tmp_path / "c")
    ensure_folders(img_dir=tmp_path / "a" / "b", log_dir=tmp_path / "c")
    assert os.listdir(tmp_path / "a" / "b") == [] == os.listdir(tmp_path / "c")


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_a_file_in_place_of_a_folder_names_the_option_and_nothing_made_is_left(below, tmp_path):
    (tmp_path / "a").write_text("")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="--img_dir .*expected a folder") as error:
        ensure_folders(log_dir=tmp_path / "there" / "new" / "logs", img_dir=tmp_path / "a" / below)
    assert str(tmp_path / "a") in one_line(error)
    assert sorted(os.listdir(tmp_path)) == ["a", "there"] and os.listdir(tmp_path / "there") == []


# Weights

@pytest.mark.parametrize("name", ["final.pt", "final.safetensors"])
def test_weights_come_back_as_they_were_in_a_network_that_computes_the_same(name, tmp_path):
    unet, x = tiny_unet(), random_images(1)
    save_weights(unet.to(memory_format=torch.channels_last).state_dict(), tmp_path / name)
    write_json(tmp_path / MODEL_CONFIG, model_config(unet))
    loaded = load_unet(tmp_path, name)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in unet.state_dict().items()) and not loaded.training
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, 10).sample, unet(x, 10).sample, rtol=1e-4, atol=1e-5)
    assert sorted(os.listdir(tmp_path)) == sorted([name, MODEL_CONFIG])


def test_a_pt_file_opens_as_weights_only_and_a_safetensors_file_is_one(tmp_path):
    from safetensors.torch import load_file
    state = {"a": torch.arange(3.0), "b": torch.zeros(2, 2)}
    save_weights(state, tmp_path / "a.pt")
    save_weights(state, tmp_path / "a.safetensors")
    for loaded in (torch.load(tmp_path / "a.pt", weights_only=True), load_file(tmp_path / "a.safetensors")):
        assert loaded.keys() == state.keys() and all(torch.equal(loaded[k], state[k]) for k in state)


@pytest.mark.parametrize("attention", [(), (1,), (0, 1)])
@pytest.mark.parametrize("layers_per_block", [1, 2])
def test_the_model_config_builds_the_same_network(attention, layers_per_block):
    unet = build_unet(16, (32, 64), layers_per_block, attention)
    config = json.loads(json.dumps(model_config(unet)))
    again = type(unet)(**config)
    assert model_config(again) == model_config(unet)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in unet.state_dict().items()}


class Payload:
    """Unpickled by ordinary pickle, it makes the file `marker`."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


WRITERS = {"pickle": lambda value, path: path.write_bytes(pickle.dumps(value)),
           "torch": torch.save,
           "legacy torch": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False)}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_malicious_checkpoint_is_refused_and_never_run(writer, wrapped, tmp_path):
    path, marker = tmp_path / "final.pt", tmp_path / "executed"
    payload = Payload(marker)
    WRITERS[writer]({"conv_in.weight": torch.zeros(3), "x": payload} if wrapped else payload, path)
    with pytest.raises(UserError) as error:
        load_weights(tiny_unet(), path)
    assert str(path) in one_line(error)
    assert not marker.exists()
    payload.__reduce__()[0](*payload.__reduce__()[1])
    assert marker.exists()                              # it would have worked


def test_a_checkpoint_that_would_run_code_is_told_apart_from_a_broken_one(tmp_path):
    torch.save(Payload(tmp_path / "executed"), tmp_path / "final.pt")
    with pytest.raises(UserError, match="could run code"):
        load_pickle(tmp_path / "final.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_truncated_anywhere_is_refused_in_one_line_that_names_it(legacy, tmp_path):
    path = tmp_path / "final.pt"
    torch.save({"a": torch.randn(4), "b": torch.zeros(2)}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    for length in range(0, len(content), 9):
        path.write_bytes(content[:length])
        with pytest.raises(UserError) as error:
            load_pickle(path)
        assert str(path) in one_line(error)


def test_bytes_that_are_no_checkpoint_are_refused_whatever_they_are(tmp_path):
    path, random = tmp_path / "final.pt", np.random.default_rng(0)
    contents = [b"", b"hello\n", b"PK\x03\x04", b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x02."]
    contents += [random.integers(0, 256, random.integers(1, 60), dtype=np.uint8).tobytes() for _ in range(300)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # torch's, about unknown pickle protocols
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(UserError) as error:
                load_pickle(path)
            assert str(path) in one_line(error)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_safetensors_file_is_refused(share, tmp_path):
    path = tmp_path / "final.safetensors"
    save_weights(tiny_unet().state_dict(), path)
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with pytest.raises(UserError, match="not a safetensors file") as error:
        load_weights(tiny_unet(), path)
    assert str(path) in one_line(error)


@pytest.mark.parametrize("name", ["final.pt", "final.safetensors"])
def test_a_missing_checkpoint_lists_those_that_are_there(name, tmp_path):
    with pytest.raises(UserError, match="no such checkpoint$") as error:
        load_weights(tiny_unet(), tmp_path / name)
    save_weights({"a": torch.zeros(1)}, tmp_path / "epoch_4.pt")
    with pytest.raises(UserError, match="no such checkpoint; .* has epoch_4.pt") as error:
        load_weights(tiny_unet(), tmp_path / name)
    assert str(tmp_path / name) in one_line(error)


@pytest.mark.parametrize("name", ["final.pt", "final.safetensors"])
@pytest.mark.parametrize("channels, layers, example", [((32, 64), 1, "of another shape"), ((32, 32, 32), 1, "unknown"),
                                                       ((32, 32), 2, "unknown")])
def test_weights_of_another_architecture_are_refused(name, channels, layers, example, tmp_path):
    save_weights(build_unet(16, channels, layers, ()).state_dict(), tmp_path / name)
    unet = tiny_unet()
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    with pytest.raises(UserError, match=f"another architecture.*{example}") as error:
        load_weights(unet, tmp_path / name)
    assert str(tmp_path / name) in one_line(error)
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}, torch.zeros(3), "text"])
def test_a_file_that_holds_no_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "final.pt")
    with pytest.raises(UserError, match="expected a state dict") as error:
        load_weights(tiny_unet(), tmp_path / "final.pt")
    assert str(tmp_path / "final.pt") in one_line(error)


def test_a_run_that_was_not_trained_says_so(tmp_path):
    with pytest.raises(UserError, match="no such run folder.*train it first.*--run_id bolt") as error:
        load_unet(tmp_path / "bolt", "final.pt")
    one_line(error)


@pytest.mark.parametrize("config", [{"no_such_key": 1}, {"block_out_channels": 3}, {"down_block_types": ["Nothing"]},
                                    {"block_out_channels": [31, 31]}])
def test_a_foreign_model_config_is_refused(config, tmp_path):
    write_json(tmp_path / MODEL_CONFIG, model_config(tiny_unet()) | config)
    with pytest.raises(UserError, match="does not describe a UNet2DModel") as error:
        load_unet(tmp_path, "final.pt")
    assert str(tmp_path / MODEL_CONFIG) in one_line(error)


# The network

@pytest.mark.parametrize("resolution, channels, attention, message", [
    (18, (32, 32, 32), (), "--resolution 18: .*halves the image 2 times; expected a multiple of 4"),
    (16, (32, 48), (), "--channels 32 48: expected multiples of 32"),
    (16, (0, 32), (), "--channels 0 32: expected multiples of 32"),
    (16, (32, 32), (2,), "--attention_levels 2: expected numbers from 0 to 1"),
    (16, (32, 32), (-1,), "--attention_levels -1: expected numbers from 0 to 1"),
])
def test_a_network_that_cannot_be_built_names_the_option(resolution, channels, attention, message):
    with pytest.raises(UserError, match=message) as error:
        build_unet(resolution, channels, 1, attention)
    one_line(error)


@pytest.mark.parametrize("attention", [(), (0,), (1,)])
def test_attention_is_where_it_was_asked_for(attention):
    unet = build_unet(16, (32, 64), 1, attention)
    down = ["Attn" in type(block).__name__ for block in unet.down_blocks]
    up = ["Attn" in type(block).__name__ for block in unet.up_blocks]
    assert [level for level in (0, 1) if down[level]] == list(attention) == [k for k in (0, 1) if up[::-1][k]]
    attentions = [m for m in unet.modules() if type(m).__name__ == "Attention"]
    assert bool(attentions) == bool(attention)
    with torch.no_grad():
        assert unet(random_images(2), torch.tensor([3, 7])).sample.shape == (2, 3, 16, 16)


# The log

def lines_of(folder):
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def test_the_log_is_cut_back_to_the_step_that_training_goes_on_from(tmp_path):
    lines = [{"phase": phase, "step": step} for phase in ("diffusion", "extractor") for step in (10, 20, 30)]
    for line in lines:
        log_line(tmp_path, json.dumps(line))
    assert lines_of(tmp_path) == lines
    trim_log(tmp_path, "diffusion", 20)
    assert lines_of(tmp_path) == [line for line in lines if line != {"phase": "diffusion", "step": 30}]
    trim_log(tmp_path, "extractor", 0)
    assert [line["phase"] for line in lines_of(tmp_path)] == ["diffusion", "diffusion"]


def test_without_a_log_there_is_nothing_to_cut(tmp_path):
    trim_log(tmp_path, "diffusion", 0)
    assert not os.listdir(tmp_path)


def test_a_last_line_that_a_power_cut_left_unfinished_is_dropped(tmp_path):
    log_line(tmp_path, json.dumps({"phase": "diffusion", "step": 10}))
    with open(tmp_path / LOG, "a") as file:
        file.write('{"phase": "diffusion", "st')
    trim_log(tmp_path, "diffusion", 10)
    assert lines_of(tmp_path) == [{"phase": "diffusion", "step": 10}]


# Result folders

def test_results_of_other_options_are_kept_under_another_name(tmp_path, capsys):
    options = resolve(Options(item="bolt", img_dir=tmp_path))
    folder = results_folder(tmp_path / "bolt", options)
    (folder / "scores.csv").write_text("first")
    assert results_folder(tmp_path / "bolt", options) == folder and (folder / "scores.csv").read_text() == "first"
    assert not capsys.readouterr().out
    for number, seed in ((1, 1), (2, 2)):
        other = dataclasses.replace(options, seed=seed)
        assert results_folder(tmp_path / "bolt", other) == folder and os.listdir(folder) == ["options.json"]
        assert read_json(folder / "options.json")["options"] == plain(other)
        assert str(tmp_path / f"bolt.{number}") in capsys.readouterr().out
    assert (tmp_path / "bolt.1" / "scores.csv").read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == ["bolt", "bolt.1", "bolt.2"]


def test_results_of_the_same_options_on_other_images_are_kept_too(tmp_path):
    options, folder = resolve(Options(item="bolt", img_dir=tmp_path)), tmp_path / "bolt"
    for inputs, kept in (("monday", 0), ("monday", 0), ("tuesday", 1), ("tuesday", 1)):
        results_folder(folder, options, inputs)
        assert len(os.listdir(tmp_path)) == 1 + kept


def test_options_beside_results_say_what_made_them(tmp_path):
    options = resolve(Options(item="bolt", img_dir=tmp_path))
    record = read_json(results_folder(tmp_path / "bolt", options) / "options.json")
    assert record["options"] == plain(options) and record["versions"]["torch"] == torch.__version__
    assert record.keys() == {"options", "versions", "commit"}


@pytest.mark.parametrize("content", ["{}", "[1]", '{"options": 3'])
def test_results_whose_options_cannot_be_read_are_not_written_over(content, tmp_path):
    folder = tmp_path / "bolt"
    folder.mkdir()
    (folder / "options.json").write_text(content)
    (folder / "scores.csv").write_text("first")
    try:
        results_folder(tmp_path, resolve(Options(item="bolt", img_dir=tmp_path)))
    except UserError as error:
        assert str(folder / "options.json") in str(error)
    kept = [path for path in tmp_path.rglob("scores.csv") if path.read_text() == "first"]
    assert len(kept) == 1 and (kept[0].parent / "options.json").read_text() == content
