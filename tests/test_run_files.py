"""Names of files: what the project writes is on one list, and what a user names is none of it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import one_line

from dbad.errors import UserError
from dbad.files.names import (
    SUMMARY,
    check_categories,
    check_names,
    check_written,
    epoch_file,
    epoch_of,
    is_declared,
    last_file,
)

TAKEN = ["discriminator.pt", "discriminator-bolt.pt", "calibration.json", "Calibration-Bolt.json", "unet.safetensors",
         "tuning.csv", "tuning-bolt.csv", "tuning.PNG", "options.json", "last.pt", "Last.pt", "extractor_last.pt",
         "samples", "extractor.pt", "features.pt", "bank.pt", "model_config.json", "log.jsonl", "tuned.json",
         "train_arg_config.json", "report.html", "normalisation.safetensors", ".lock", ".last-0123abcd-1-abcdefgh.pt"]


def options(name: str = "final.pt", run_id: str = "bolt", item="bolt") -> SimpleNamespace:
    return SimpleNamespace(diffusion_checkpoint_name=name, run_id=run_id, item=item)


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("trained", [None, {}, {"diffusion_checkpoint_name": "final.pt"}])
def test_weights_cannot_be_called_like_another_file_of_a_run_whatever_the_case(name, trained):
    with pytest.raises(UserError, match="--diffusion_checkpoint_name .*expected a name such as final.pt") as error:
        check_names(options(name), trained)
    assert name in one_line(error)


@pytest.mark.parametrize("name", ["final.pt", "unet.pt", "weights.safetensors", "model", "epoch_1000.pt", "my_best.pt",
                                  "discriminators.pt", "calibrated.pt", "lasting.pt"])
def test_other_names_are_free(name):
    check_names(options(name))


def test_weights_that_an_older_training_has_written_are_still_read_by_their_name():
    check_names(options("unet.safetensors"), {"diffusion_checkpoint_name": "unet.safetensors"})


@pytest.mark.parametrize("epoch, name, expected", [(3, "final.pt", "epoch_3.pt"), (12, "w.safetensors",
                                                                                   "epoch_12.safetensors"),
                                                   (1, "plain", "epoch_1")])
def test_the_weights_of_an_epoch_end_like_the_final_ones_and_tell_their_epoch(epoch, name, expected):
    assert epoch_file(epoch, name) == expected and is_declared(expected)
    assert epoch_of(expected) == epoch_of(expected.upper()) == epoch
    assert epoch_of(name) is None


def test_every_phase_has_a_state_of_its_own():
    names = [last_file(phase) for phase in ("diffusion", "extractor", "features", "diad", "autoencoder")]
    assert names[0] == "last.pt" and len(set(names)) == 5 and all(map(is_declared, names))


@pytest.mark.parametrize("name", [*SUMMARY, "Index.HTML"])
def test_a_run_cannot_be_called_like_the_summary_beside_its_results(name):
    with pytest.raises(UserError, match="--run_id .*summary") as error:
        check_names(options(run_id=name))
    assert name in one_line(error)


def test_categories_of_one_model_differ_by_more_than_their_case():
    check_categories(["bolt", "nut", "bolt"])
    with pytest.raises(UserError, match="--item bolt Bolt: names that differ only in case") as error:
        check_names(options(item=("bolt", "nut", "Bolt")))
    one_line(error)


@pytest.mark.parametrize("name", ["last.pt", "BANK.pt", "epoch_3.pt", "calibration-x.json", ".hidden.pt"])
def test_an_extractor_is_not_written_under_the_name_of_another_file(name, tmp_path):
    with pytest.raises(UserError, match="--extractor_path .*expected a name such as extractor.pt") as error:
        check_written("extractor_path", tmp_path / name, "extractor.pt")
    assert name in one_line(error)
    check_written("extractor_path", tmp_path / "mine.pt", "extractor.pt")
    check_written("extractor_path", tmp_path / "extractor.pt", "extractor.pt")


def test_an_extractor_is_not_written_in_place_of_a_folder(tmp_path):
    with pytest.raises(UserError, match="--extractor_path .*: a folder; expected a file such as .*extractor.pt"):
        check_written("extractor_path", tmp_path, "extractor.pt")


def test_whatever_the_scripts_leave_in_a_run_folder_or_with_results_is_on_the_list(finished):
    names = {path.name for folder in ("checkpoints/hazelnut", "results/hazelnut")
             for path in Path(finished, folder).iterdir()}
    assert {name for name in names if not is_declared(name)} == {"final.pt"}
