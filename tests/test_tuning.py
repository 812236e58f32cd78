"""The search for settings: what it varies, what it keeps, when it stops, and that it finds what is better."""
import csv
import json
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import pytest
import torch
from helpers import SETTINGS, random_images, tiny_detector, with_settings
from PIL import Image

from dbad.families.ddim import search as tuning
from dbad.families.ddim.detector import DdimDetector, Differences
from dbad.families.ddim.options import MapOptions, Reconstruction
from dbad.families.ddim.search import DdimSearch, plot_trials
from dbad.families.detector import load_detector
from dbad.families.search import NUM_PSEUDO, PseudoValidation, Trial, pseudo_validation, within, write_trials
from dbad.networks.extractors import build_extractor
from dbad.options.resolve import subset

RUN = Path("checkpoints/hazelnut")


@dataclass(frozen=True, eq=False, kw_only=True)
class Known(DdimDetector):
    """A detector whose differences depend on the start alone: the defect shows at 100 and drowns in noise elsewhere.

    `calls` are shared with all that are made of it.
    """

    calls: list[tuple[Reconstruction, int]] = field(default_factory=list)

    def differences(self, images: torch.Tensor) -> Differences:
        how = way(self)
        self.calls.append((how, len(images)))
        start = how.start_at_timestep
        generator = torch.Generator().manual_seed(start)
        noise = torch.rand(len(images), 1, 16, 16, generator=generator) * (0.01 if start == 100 else 1)
        defect = (images.amax(dim=1, keepdim=True) > 0.9).float()
        return Differences(images, noise + defect * 0.5, (noise + defect * 0.5).repeat(1, 3, 1, 1))


def known() -> Known:
    """`Known` with the settings of `tiny_detector`."""
    found = tiny_detector(build_extractor("efficientnet_lite0", None, 32))
    return Known(**{each.name: getattr(found, each.name) for each in fields(found)})


def way(of: DdimDetector | Trial) -> Reconstruction:
    """How a detector, or one of a trial, reconstructs."""
    return subset(Reconstruction, of.settings)


@pytest.fixture
def images() -> PseudoValidation:
    """Dark images, and the same with a bright square of 4 x 4 px."""
    good, masks = torch.zeros(6, 3, 16, 16), torch.zeros(6, 1, 16, 16)
    for index in range(6):
        masks[index, :, 4:8, 2 + index:6 + index] = 1
    return PseudoValidation(good, good + masks, masks, good.clone())


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(tuning, "STARTS", (50, 100, 250))
    monkeypatch.setattr(tuning, "WEIGHTS", (0.0, 2.0))
    monkeypatch.setattr(tuning, "STEPS", (1, 2, 5))


def test_the_start_that_shows_the_defects_is_found(images):
    detector = known()
    search = DdimSearch(detector, images)
    best = search.run()
    assert best.settings.start_at_timestep == 100 and best.aupro > 0.99 and best.auroc == 1 and best.pixel_ap > 0.9
    assert best is search.best and detector.settings == SETTINGS        # a detector never changes


def test_of_equally_good_ones_the_cheapest_number_of_steps_is_taken(images):
    assert DdimSearch(known(), images).run().settings.steps_to_regenerate == 1


def test_what_is_fixed_is_not_varied(images):
    names = {"start_at_timestep", "recon_weight", "blur_sigma", "map_norm"}
    search = DdimSearch(known(), images, names)
    search.run()
    for name in names:
        assert {getattr(trial.settings, name) for trial in search.trials} == {getattr(SETTINGS, name)}
    assert len({trial.settings.steps_to_regenerate for trial in search.trials}) > 1


def test_every_way_to_reconstruct_is_computed_once(images):
    detector = known()
    search = DdimSearch(detector, images)
    search.run()
    asked = [how for how, _ in detector.calls]
    assert all(asked.count(how) == 3 for how in asked)          # reference, good, pseudo
    assert len(search.trials) > 10 * len(set(asked))            # everything else is searched on the same differences


def test_a_start_that_the_network_was_not_trained_for_is_not_tried(images):
    detector = with_settings(known(), start_at_timestep=100)
    detector = replace(detector, denoiser=detector.denoiser._replace(reachable=100))
    DdimSearch(detector, images).run()
    assert max(how.start_at_timestep for how, _ in detector.calls) == 100


def test_after_the_minutes_the_best_so_far_is_taken(images, monkeypatch):
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    search = DdimSearch(known(), images, minutes=5)
    best = search.run()
    assert search.stopped and best in search.trials and 1 < len({way(trial) for trial in search.trials}) < 6


@pytest.mark.parametrize("left_s, good", [(1e9, 30), (120.0, 30), (60.0, 15), (0.0, 10), (-1.0, 10)])
def test_fewer_images_are_looked_at_where_time_is_short(left_s, good):
    many = PseudoValidation(torch.arange(30), torch.arange(60), torch.arange(60), torch.arange(30))
    few = within(many, 1.0, left_s)
    assert [len(part) for part in (few.good, few.pseudo, few.masks, few.reference)] == [good, 2 * good, 2 * good, good]
    assert (few is many) == (good == 30) and torch.equal(few.pseudo, many.pseudo[:2 * good])


@pytest.mark.parametrize("fixed", [set(), {"start_at_timestep"}, {"recon_weight", "steps_to_regenerate"}])
def test_the_bar_of_a_search_has_a_total_that_is_enough(images, fixed, capsys):
    search = DdimSearch(known(), images, fixed)
    search.run()
    assert 1 < search.bar.n <= search.most()
    assert f" 0/{search.most()} [" in capsys.readouterr().err


def test_chance_does_not_change_a_setting(images, monkeypatch):
    """Where every trial is as good as the next, what was set stays."""
    monkeypatch.setattr(DdimSearch, "judge", lambda self, settings: (0.5 + 1e-4 * settings.top_share, 0.5, 0.5))
    assert DdimSearch(known(), images, {"steps_to_regenerate"}).run().settings == SETTINGS


def test_the_search_comes_to_the_same_end_every_time(images):
    one, other = (DdimSearch(known(), images) for _ in range(2))
    assert one.run() == other.run() and one.trials == other.trials


def test_the_pseudo_validation_shows_every_image_with_exact_masks():
    good = random_images(5, 32)
    found = pseudo_validation(good, [f"{i}.png" for i in range(5)], good, seed=0)
    per_image = len(found.pseudo) // 5
    assert len(found.pseudo) == len(found.masks) >= NUM_PSEUDO
    originals = good.repeat_interleave(per_image, dim=0)
    outside = found.masks.expand_as(originals) == 0
    assert torch.equal(found.pseudo[outside], originals[outside]) and found.masks.flatten(1).any(dim=1).all()


def test_trials_are_written_as_a_table_and_a_picture(images, tmp_path, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figures = []
    whole = FigureCanvasAgg.print_figure
    monkeypatch.setattr(FigureCanvasAgg, "print_figure",
                        lambda self, *a, **k: (figures.append(self.figure), whole(self, *a, **k)))
    search = DdimSearch(known(), images)
    best = search.run()
    write_trials(tmp_path / "tuning.csv", search.trials, best, (Reconstruction, MapOptions))
    plot_trials(tmp_path / "tuning.png", search.trials, best)
    with open(tmp_path / "tuning.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(search.trials) and [row["chosen"] for row in rows].count("1") == 1
    chosen = next(row for row in rows if row["chosen"] == "1")
    assert int(chosen["start_at_timestep"]) == best.settings.start_at_timestep
    assert [float(chosen[name]) for name in ("aupro", "image_auroc", "pixel_ap", "merit")] == [
        best.aupro, best.auroc, best.pixel_ap, best.merit]
    Image.open(tmp_path / "tuning.png").load()
    (axis,), (legend,) = figures[0].axes, figures[0].legends
    assert "higher is better" in axis.get_xlabel() and axis.get_legend() is None
    assert legend.get_window_extent().y1 <= axis.get_window_extent().y0, "the legend covers no point"


def test_merit_is_the_mean_of_the_three_figures():
    assert Trial(SETTINGS, aupro=0.5, auroc=1.0, pixel_ap=0.3).merit == pytest.approx(0.6)


def test_a_tuned_run_is_inspected_with_its_settings(trained, script, tiny_flags):
    flags = tiny_flags("evaluation.py")
    script("evaluation.py", *flags, "--tune", "--map_norm", "contrast")
    settings = json.loads((RUN / "calibration.json").read_text())["settings"]
    with open(RUN / "tuning.csv", newline="") as file:
        chosen = next(row for row in csv.DictReader(file) if row["chosen"] == "1")
    assert settings["map_norm"] == chosen["map_norm"] == "contrast"             # given, so kept
    assert settings["steps_to_regenerate"] == 2                                 # likewise
    assert settings["recon_weight"] == float(chosen["recon_weight"])
    assert (RUN / "normalisation.safetensors").is_file()
    script("inference_ddim.py", "--item", "hazelnut", "--dataset_path", "data", "--precision", "fp32")
    with open("results/hazelnut/scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    predictions = load_detector(RUN, precision="fp32")([Path("data") / row["path"] for row in rows])
    assert [float(row["score"]) for row in rows] == pytest.approx([found.score for found in predictions], rel=1e-3)


def test_settings_once_tuned_stay_until_they_are_tuned_again_or_refused(trained, script, tiny_flags, capsys):
    flags = [word for word in tiny_flags("evaluation.py") if word != "--no_tune"]
    script("evaluation.py", *flags, "--tune")

    def settings() -> dict:
        return json.loads((RUN / "calibration.json").read_text())["settings"]
    tuned = settings()
    script("evaluation.py", *flags, "--pixel_quantile", "0.9")
    assert settings() == tuned and "settings tuned before are used" in capsys.readouterr().out
    script("evaluation.py", *flags, "--blur_sigma", "3")
    assert settings() == tuned | {"blur_sigma": 3.0}
    script("evaluation.py", *flags, "--no_tune")
    assert settings()["recon_weight"] == 2.0 and settings()["map_norm"] == "none"
    (RUN / "tuned.json").write_text((RUN / "tuned.json").read_text().replace('"unet": "', '"unet": "0'))
    script("evaluation.py", *flags)
    assert settings()["recon_weight"] == 2.0 and "was tuned for other weights" in capsys.readouterr().out


def test_a_normalisation_that_has_changed_is_refused(trained, script, tiny_flags, capsys):
    script("evaluation.py", *tiny_flags("evaluation.py"), "--map_norm", "location")
    path = RUN / "normalisation.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"0000")
    with pytest.raises(SystemExit):
        script("inference_ddim.py", "--item", "hazelnut", "--dataset_path", "data")
    assert "normalisation.safetensors: differs from the file" in capsys.readouterr().err
