"""Damaged files of tensors are told, wherever the wrong bit is."""

import random
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import one_line
from safetensors.torch import load_file, save_file

from dbad.checkpoints.weights import load_pickle, save_pickle
from dbad.errors import UserError
from dbad.files.checksums import check_archive, read_tensors, write_tensors

STATE = {"a.weight": torch.randn(4, 8), "half": torch.randn(5).bfloat16(), "number": torch.tensor(3),
         "empty": torch.zeros(0, 2), "on": torch.tensor([True, False])}
SAVED = {"model": {f"k{i}": torch.randn(16, 16) for i in range(4)}, "step": 3, "settings": {"seed": 1, "name": "bolt"}}


def same(one, other) -> bool:
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def with_a_wrong_bit(path: Path, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_a_wrong_bit_in_a_checkpoint_is_told_or_does_no_harm(tmp_path):
    path, numbers = tmp_path / "last.pt", random.Random(0)
    save_pickle(SAVED, path)
    whole, told, silent_in_torch = path.read_bytes(), 0, 0
    for _ in range(400):
        path.write_bytes(whole)
        with_a_wrong_bit(path, numbers.randrange(len(whole)), numbers.randrange(8))
        try:
            assert same(load_pickle(path, "begin again"), SAVED)
        except UserError as error:
            told += 1
            message = str(error)
            assert str(path) in message and "\n" not in message
            assert "damaged" not in message or message.endswith("begin again")
        try:
            silent_in_torch += not same(torch.load(path, weights_only=True), SAVED)
        except Exception:       # torch refuses broken archives in many ways
            continue
    assert silent_in_torch > 100 and told >= silent_in_torch


def test_a_damaged_part_is_named(tmp_path):
    path = tmp_path / "bank.pt"
    save_pickle({"vectors": torch.zeros(1000)}, path)
    with_a_wrong_bit(path, path.stat().st_size // 2, 3)
    with pytest.raises(UserError, match="bank.pt: damaged .its part .*data/0 does not match its checksum.; copy it"
                       ) as error:
        load_pickle(path)
    one_line(error)


def test_what_is_no_archive_is_left_to_the_reader(tmp_path):
    (tmp_path / "text.pt").write_text("to do")
    torch.save({"a": 1}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("text.pt", "old.pt", "missing.pt"):
        check_archive(tmp_path / name)
    assert load_pickle(tmp_path / "old.pt") == {"a": 1}


def test_an_archive_that_was_cut_together_wrongly_is_damaged(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"0123456789")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[0] ^= 255           # no longer the beginning of a part
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UserError, match="a.pt: damaged"):
        check_archive(tmp_path / "a.pt")


def test_tensors_come_back_as_they_were_with_what_is_told_about_them(tmp_path):
    write_tensors(STATE, tmp_path / "w.safetensors", {"kind": "location"})
    state, about = read_tensors(tmp_path / "w.safetensors")
    assert same(state, STATE) and about == {"kind": "location"}
    assert same(load_file(tmp_path / "w.safetensors"), STATE)       # for everyone else it is a file like any other


def test_a_wrong_bit_in_a_tensor_is_told(tmp_path):
    path = tmp_path / "w.safetensors"
    write_tensors(STATE, path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in range(header, len(whole)):
        path.write_bytes(whole)
        with_a_wrong_bit(path, place, place % 8)
        with pytest.raises(UserError, match="w.safetensors: damaged") as error:
            read_tensors(path)
        one_line(error)


def test_files_without_a_checksum_are_read_as_before(tmp_path):
    save_file(STATE, tmp_path / "w.safetensors", {"format": "pt"})
    state, about = read_tensors(tmp_path / "w.safetensors")
    assert same(state, STATE) and about == {"format": "pt"}


def test_equal_tensors_give_equal_bytes(tmp_path):
    for name in "ab":
        write_tensors(dict(reversed(STATE.items())) if name == "b" else STATE, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
