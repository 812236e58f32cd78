"""CSV files: what a spreadsheet opens runs nothing, and what is read back is what was written."""

import csv
import math

import pytest
from helpers import rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from dbad.files.tables import read_table, write_table
from dbad.records import ScoreRow
from dbad.report import page
from dbad.report.runs import Run
from dbad.report.summary import keep_earlier, write_summary

HOSTILE = ('=HYPERLINK("http://x")', "@SUM(1)", "+1+1", "-2+3", "\tx", "\rx", "\nx", "'=1", "''-x", "=")
PLAIN = ("bolt", "a=b", "it's", "'quoted'", "", "x\ty", "Ärger", "a,b", 'a"b', "a\nb")


def cells(path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_that_a_spreadsheet_would_run_begins_with_a_quote(text, tmp_path):
    write_table(tmp_path / "a.csv", ["name"], [[text]])
    assert cells(tmp_path / "a.csv") == [[f"'{text}"]]
    assert read_table(tmp_path / "a.csv") == [{"name": text}]


@pytest.mark.parametrize("text", PLAIN)
def test_any_other_text_stays_as_it_is(text, tmp_path):
    write_table(tmp_path / "a.csv", ["name", "other"], [[text, 1]])
    assert cells(tmp_path / "a.csv") == [[text, "1"]]


@pytest.mark.parametrize("number", [-0.5, 0.1 + 0.2, -3, 1e-300, -1e30, True, "-0.5", "+1e-05", "-.5"])
def test_numbers_stay_numbers(number, tmp_path):
    write_table(tmp_path / "a.csv", ["value"], [[number]])
    text, = cells(tmp_path / "a.csv")[0]
    assert text == str(number) and (isinstance(number, bool) or float(text) == float(number))


def test_what_is_unknown_is_an_empty_field_and_no_name_is_lost(tmp_path):
    write_table(tmp_path / "a.csv", ["a", "b"], [[None, "\udcff.png"]])
    assert cells(tmp_path / "a.csv") == [["", "\\udcff.png"]]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(text=st.text(alphabet=st.one_of(st.sampled_from("='+-@\t\r\n0.1e"), st.characters(codec="utf-8")), max_size=8))
def test_every_text_is_read_as_it_was_written(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("t") / "a.csv"
    write_table(path, ["a", "b"], [[text, 7]])
    assert read_table(path) == [{"a": text, "b": "7"}]


# The files of the project

def hostile_row() -> dict:
    return {"path": "=1.png", "category": "@bolt", "defect": "+crack", "label": 1, "score": -0.25, "p_value": None,
            "normalised": 0.0, "decision": 0}


def test_the_table_of_scores_has_quoted_names_and_plain_numbers(tmp_path):
    page.write_scores(tmp_path / "scores.csv", [ScoreRow(**hostile_row())])
    assert cells(tmp_path / "scores.csv") == [["'=1.png", "'@bolt", "'+crack", "1", "-0.25", "", "0.0", "0"]]


def test_the_table_of_metrics_keeps_negative_numbers(tmp_path):
    page.write_metrics(tmp_path, {"drop": -0.5, "protocol": "=full", "none": math.nan})
    assert cells(tmp_path / "metrics.csv") == [["drop", "-0.5"], ["protocol", "'=full"], ["none", ""]]


def test_a_summary_of_hostile_names_is_known_again(tmp_path, capsys):
    """`keep_earlier` reads it: the same runs replace it, others keep it."""
    runs = [Run("=cmd", 0, tmp_path / "=cmd", "failed", "-x")]
    write_summary(tmp_path, runs, {})
    assert rows_of(tmp_path, "summary.csv")[0]["item"] == "'=cmd"
    assert rows_of(tmp_path, "summary.csv")[0]["error"] == "'-x"
    keep_earlier(tmp_path, {("=cmd", "0")})
    assert (tmp_path / "summary.csv").exists() and not capsys.readouterr().out


def test_a_summary_that_is_no_table_is_kept_as_one_of_other_runs(tmp_path, capsys):
    (tmp_path / "summary.csv").write_bytes(b'"' + b"x" * 200_000)
    keep_earlier(tmp_path, {("bolt", "0")})
    assert not (tmp_path / "summary.csv").exists() and (tmp_path / "summary.1.csv").exists()
    assert "was moved to" in capsys.readouterr().out


def test_no_other_module_writes_csv_files():
    """One writer for all, so that none forgets."""
    from pathlib import Path
    root = Path(__file__).parent.parent
    users = [path for folder in (root, root / "dbad", root / "benchmarks") for path in (
             folder.glob("*.py") if folder == root else folder.rglob("*.py"))
             if "csv.writer" in path.read_text(encoding="utf-8")]
    assert users == [root / "dbad" / "files" / "tables.py"]
