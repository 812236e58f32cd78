"""The benchmark that tries every method on a GPU, rehearsed on the CPU."""

import os
from pathlib import Path

import pytest
from helpers import json_of

from benchmarks import gpu, throughput
from dbad.families.diad import autoencoder, model
from dbad.families.diad.model import Size

REHEARSAL = "--device cpu --tiny --jobs 1 --dataset_path data --out out".split()


@pytest.fixture
def rehearse(workplace, script, monkeypatch):
    """`rehearse(words...)`: the benchmark with scripts that run in this process; gives what gpu.json says."""
    monkeypatch.setitem(autoencoder.SIZES, "tiny", autoencoder.Size((8, 8, 8, 8), 1, 4))
    monkeypatch.setitem(model.SIZES, "tiny", Size(128, (32, 32, 32, 32), 8, "tiny", (8, 8, 8, 8), 2))

    def run(words, folder, timeout):
        folder.mkdir(parents=True, exist_ok=True)
        before = Path.cwd()
        os.chdir(folder)
        try:
            script(*words)
        except SystemExit as stop:
            raise gpu.Failed(f"{words[0]} ended with {stop.code}") from None
        finally:
            os.chdir(before)

    def rehearse(*words):
        try:
            gpu.main([*REHEARSAL, *words], run)
        except SystemExit as stop:
            assert stop.code == 1
        return json_of("out/gpu.json")
    return rehearse


@pytest.mark.parametrize("method, checks", [
    ("ddim", ("runs", "twice", "images", "cpu")), ("knn", ("runs", "cpu")), ("lafite", ("runs", "images")),
    ("diad", ("runs",))])
def test_every_method_passes_on_the_cpu(method, checks, rehearse):
    """Each check for one method at least: all for all take a minute, and CI has them once."""
    found = rehearse("--methods", method, "--no_throughput", "--checks", *checks)
    assert [(each["check"], each["status"]) for each in found["checks"]] == [(each, "ok") for each in checks], found
    assert found["machine"]["device"] == "cpu" and found["throughput"] == []


def test_a_method_that_fails_does_not_keep_the_others_from_being_tried(rehearse, monkeypatch, capsys):
    monkeypatch.setitem(gpu.TINY, "ddim", "--preset demo --resolution 7")
    found = rehearse("--methods", "ddim", "knn", "--no_throughput", "--checks", "runs", "images")
    assert [each["status"] for each in found["checks"]] == ["failed", "failed", "ok", "ok"]
    assert "2 of 4 failed: ddim runs, ddim images" in capsys.readouterr().out


def test_files_and_scores_that_differ_are_told(tmp_path):
    for name, content in (("one", b"1"), ("other", b"2")):
        path = tmp_path / name / "checkpoints" / "bolt" / "final.pt"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        path.with_name("last.pt").write_bytes(name.encode())       # holds times, and does not count
    assert gpu.same_files(tmp_path / "one", tmp_path / "one") == "1 files are equal"
    with pytest.raises(gpu.Failed, match="1 of 1 files differ: checkpoints/bolt/final.pt"):
        gpu.same_files(tmp_path / "one", tmp_path / "other")
    assert gpu.agreement({"a": 2.0}, {"a": 2.001}).startswith("1 scores differ by at most 0.0005")
    for found in ({"a": 2.01}, {"a": float("nan")}, {"b": 2.0}, {}):
        with pytest.raises(gpu.Failed):
            gpu.agreement({"a": 2.0}, found)


def test_every_figure_of_the_throughput_can_be_had(capsys, monkeypatch):
    monkeypatch.setitem(model.SIZES, "tiny", Size(128, (32, 32, 32, 32), 8, "tiny", (8, 8, 8, 8), 2))
    rates = throughput.measure(gpu.torch.device("cpu"), tiny=True)
    assert len(rates) == 14 and all(rate.value > 0 and not rate.error for rate in rates), rates
    none = throughput.measure(gpu.torch.device("cpu"), tiny=True, limit_s=-1)
    assert {rate.error for rate in none} == {"no time was left"} and "no time was left" in throughput.table(none)
