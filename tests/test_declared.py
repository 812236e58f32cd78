"""Values out of JSON files: what is no JSON, what is not as it was declared, and what came later than a file."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from helpers import json_of, one_line

import evaluation
from dbad.calibration import thresholds
from dbad.calibration.thresholds import Calibration
from dbad.checkpoints.weights import trim_log
from dbad.declared import check_declared, described, fits, types_of
from dbad.errors import UserError
from dbad.families import runs
from dbad.families.ddim import DDIM
from dbad.families.ddim.options import DdimSettings
from dbad.families.registry import FAMILIES
from dbad.families.runs import load_calibration
from dbad.fields import opt
from dbad.files.atomic import read_json, write_json

SETTINGS = DdimSettings.read({"recon_weight": 1.0, "extractor_path": "extractor.pt"}).record()


@dataclass(frozen=True, kw_only=True)
class Sharper(DdimSettings):
    """Settings of a version to come."""

    sharpness: float = opt("of the maps, which today's files do not say", later=1.0)


@pytest.mark.parametrize("content, says", [
    (b'{"a": NaN}', "NaN is not a number"), (b'{"a": 1e999}', "1e999 is not a number"),
    (b'{"a": -Infinity}', "-Infinity"),
    (b'{"a": ' + b"9" * 5000 + b"}", "is not a number"), (b'{"a": 1, "a": 2}', "a occurs twice"),
    (b'{"a": ' + b"[" * 100000, "nested too deeply"), (b'{"a": ' + b"[" * 50 + b"]" * 50 + b"}", "nested too deeply"),
    ('{"a": 1}'.encode("utf-16"), "codec can't decode"), (b"\xff", "codec can't decode"), (b"", "Expecting value"),
    (b"[1]", "expected a JSON object, found list"), (b"{", "Expecting property name")])
def test_what_is_no_json_is_refused_in_one_line(content, says, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in one_line(error) and says in str(error.value)


def test_a_mark_of_the_byte_order_is_no_damage(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + '{"ä": 1}'.encode())
    assert read_json(tmp_path / "a.json") == {"ä": 1}


def test_a_path_that_is_no_utf_8_comes_back_from_json(tmp_path):
    write_json(tmp_path / "a.json", {"path": "a\udcffb"})
    assert read_json(tmp_path / "a.json") == {"path": "a\udcffb"}


def test_lines_of_a_log_that_nobody_can_read_are_dropped(tmp_path):
    good = b'{"phase": "diffusion", "step": 3}'
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([
        good, b"[1]", b'{"phase": "diffusion"}', b'{"phase": "diffusion", "step": "x"}', b"\xff\xfe", b"[" * 9999, b"7",
        b'{"phase": "diffusion", "step": 9}', good[:20]]))
    trim_log(tmp_path, "diffusion", 5)
    assert (tmp_path / "log.jsonl").read_bytes() == good + b"\n"


# Settings that came later

def test_a_setting_that_came_later_than_a_calibration_takes_its_default(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "ddim", replace(DDIM, settings=Sharper))
    path = tmp_path / "calibration.json"
    Calibration({"pixel": 0.1, "feature": 0.5}, 1.1, 2.0, settings=SETTINGS).save(path)
    for module in (runs, thresholds):
        monkeypatch.setattr(module, "FORMAT", 2)
    found = Sharper.read(load_calibration(path).settings)
    assert (found.sharpness, found.recon_weight, found.intensity) == (1.0, 1.0, "auto")
    write_json(path, json_of(path) | {"settings": SETTINGS | {"sharpness": 3.0}})
    assert Sharper.read(load_calibration(path).settings).sharpness == 3.0
    write_json(path, json_of(path) | {"settings": SETTINGS, "format": 2})
    with pytest.raises(UserError, match="settings lack sharpness"):
        load_calibration(path)


def test_a_calibration_from_before_there_was_an_intensity_was_made_without_one(tmp_path):
    path = tmp_path / "calibration.json"
    Calibration({"pixel": 0.1, "feature": 0.5}, 1.1, 2.0, settings=SETTINGS).save(path)
    older = {name: value for name, value in SETTINGS.items() if not name.startswith("intensity")}
    write_json(path, {name: value for name, value in json_of(path).items() if name not in ("format", "method")}
               | {"settings": older})
    found = load_calibration(path).settings
    assert (found["intensity"], found["intensity_bits"]) == ("full", 8)
    assert DdimSettings.read(found) == replace(DdimSettings.read(SETTINGS), intensity="full", intensity_bits=8)


@pytest.mark.parametrize("bits", [9, 8.0, "8", True])
def test_a_bit_depth_that_no_camera_has_is_refused(bits, tmp_path):
    path = tmp_path / "calibration.json"
    Calibration({"pixel": 0.1}, 1.1, 2.0, settings=SETTINGS | {"intensity_bits": bits}).save(path)
    with pytest.raises(UserError, match="intensity_bits .*: expected one of 8, 10, 12, 14, 16 or null"):
        load_calibration(path)


# The check itself

@pytest.mark.parametrize("value, hint, right", [
    (1, int, True), (True, int, False), (1.0, int, False), (2 ** 63, int, False), (1, float, True),
    (True, float, False), (float("inf"), float, False), ("a", str, True), ("a\0", str, False),
    ("\ud800", str, False), ("\udcff", str, True),
    (None, int | None, True), (None, int, False), ([1, 2], tuple[int, ...], True), ([1, "a"], tuple[int, ...], False),
    ({"a": 1.0}, dict[str, float], True), ({"a": None}, dict[str, float], False), ([], dict[str, float], False),
    ("x", Path, True), ("x", str | tuple[str, ...], True), (["x"], str | tuple[str, ...], True), ({}, Any, True),
    ([[1], [2]], tuple[tuple[int]], True), ("none", types_of(evaluation.Options)["map_norm"], True),
    (["none"], types_of(evaluation.Options)["map_norm"], False)])
def test_a_value_fits_its_annotation_or_not(value, hint, right):
    assert fits(value, hint) is right


@pytest.mark.parametrize("hint, words", [
    (int | None, "a whole number or null"), (tuple[str, ...], "a list, each entry a text"),
    (dict[str, float], "an object"), (bool, "true or false")])
def test_an_annotation_is_said_in_words(hint, words):
    assert described(hint) == words


def test_only_declared_names_are_looked_at():
    check_declared({"seed": 3, "other": object()}, {"seed": int}, "file")
    with pytest.raises(UserError, match="^file: lacks seed; expected a whole number$"):
        check_declared({}, {"seed": int}, "file", ("seed",))
