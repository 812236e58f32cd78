"""train_tune_eval.py finds every wrong option before it works: with every method, also with --dry_run."""

from pathlib import Path

import pytest
from helpers import complaint

WRONG = ["--false_alarm_rate 5", "--false_alarm_rate 0.001", "--pixel_quantile 5", "--extractor nosuchnet",
         "--extractor_layers 9", "--center_crop 500", "--num_samples 0", "--layer_weights 1 2", "--tune_minutes -1",
         "--blur_sigma 999", "--holdout 2", "--seed -1"]
SMALL = "--item hazelnut --dataset_path data --preset demo --device cpu --precision fp32 --num_workers 0".split()


@pytest.mark.parametrize("wrong, dry_run", [(wrong, []) for wrong in WRONG] + [
    (wrong, ["--dry_run"]) for wrong in WRONG[3:5]])        # the others are found before either begins
@pytest.mark.parametrize("method", ["ddim", "lafite", "knn", "diad"])
def test_a_wrong_option_is_named_before_anything_is_trained_or_written(workplace, script, capsys, method, wrong,
                                                                       dry_run):
    before = sorted(Path().rglob("*"))
    line = complaint(capsys, script, "train_tune_eval.py", "--method", method, *SMALL, *wrong.split(), *dry_run)
    assert wrong.split()[0] in line
    assert sorted(Path().rglob("*")) == before
