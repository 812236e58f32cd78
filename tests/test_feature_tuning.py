"""The search for LafitE's settings: it finds the part that shows defects, keeps what is given, and stops."""

import csv
import math
import time
import zlib
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pytest
import torch
from helpers import MACHINE, one_line, random_images
from torch import nn
from torch.nn import functional as F

from dbad import metrics
from dbad.calibration.thresholds import map_quantile
from dbad.errors import UserError
from dbad.families.lafite import search as feature_tuning
from dbad.families.lafite.bank import Bank
from dbad.families.lafite.detector import FeatureDetector, FeatureSpace
from dbad.families.lafite.model import Components, Context
from dbad.families.lafite.options import PARTS, FeatureMapOptions, FeatureSettings
from dbad.families.lafite.search import FeatureSearch, best_on_average
from dbad.families.search import PseudoValidation, Trial, changes, write_trials
from dbad.fields import fields_of
from dbad.networks.extractors import Extractor, Stage
from dbad.networks.features import PatchExtractor, Standardisation, to_patches
from dbad.networks.unet import build_unet

BEGIN = FeatureSettings(neighbours=3, editing=True, feature_start=600, feature_steps_back=1, context_power=0.0,
                        discriminator_contrib=0.0, knn_contrib=0.0, edit_contrib=1.0, denoise_contrib=1.0,
                        inversion_contrib=0.0, blur_sigma=4.0, top_share=0.0, center_crop=0, seed=0, patching=False,
                        intensity="auto")


@dataclass(frozen=True, eq=False, kw_only=True)
class Known(FeatureDetector):
    """A detector with one part that shows the defects, under some settings only, and others that are noise.

    `calls` are the parts asked for, with the settings, and `asked` the numbers of images whose surroundings were.
    """

    telling: str | None
    only: dict[str, Any]
    calls: list[tuple[tuple[str, ...], FeatureSettings]] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)

    def __post_init__(self):
        pass

    @property
    def size(self):
        return 16

    def features(self, images):
        return F.avg_pool2d(images.mean(dim=1, keepdim=True), 4)

    def context(self, found, judged=False):
        self.asked.append(len(found.images))
        return Context(torch.ones_like(found.features), torch.ones_like(found.features))

    def compare(self, found, wanted):
        images, features, distances, indices, _ = found
        self.calls.append((tuple(wanted), self.settings))
        assert features.shape == (len(images), 1, 4, 4)
        assert distances.shape == indices.shape and len(indices) == len(images) * 16
        assert distances.shape[1] >= self.settings.neighbours
        shown = all(getattr(self.settings, name) == value for name, value in self.only.items())
        noise = {name: torch.rand(features.shape, generator=torch.Generator().manual_seed(place))
                 for place, name in enumerate(PARTS)}
        return {name: noise[name] + 5 * features.clamp_min(0) * (name == self.telling and shown) for name in wanted}


def known(telling, settings=BEGIN, num_vectors=20, kind=Known, net="a network", **only):
    """A detector of which nothing is real but how its maps are put together."""
    return kind(settings=settings, machine=MACHINE._replace(batch_size=4), space=None, net=net, telling=telling,
                only=only, bank=Bank(torch.zeros(num_vectors, 1), {"bolt": num_vectors}, {}))


@pytest.fixture
def images():
    """Dark images, and the same with one bright patch of 4 x 4 px."""
    good, masks = torch.zeros(6, 3, 16, 16), torch.zeros(6, 1, 16, 16)
    for index in range(6):
        masks[index, :, 4:8, 4 * (index % 4):4 * (index % 4) + 4] = 1
    return PseudoValidation(good, good + masks, masks, good[:0])


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(feature_tuning, "STARTS", (50, 100, 600))
    monkeypatch.setattr(feature_tuning, "WEIGHTS", (0.0, 2.0))
    monkeypatch.setattr(feature_tuning, "BLURS", (4.0, 8.0))
    monkeypatch.setattr(feature_tuning, "SHARES", (0.0, 0.02))


# ------------------------------------------------------------------------------------------ what is found

@pytest.mark.parametrize("telling", sorted(set(PARTS) - {"discriminator"}))
def test_the_part_that_shows_the_defects_is_found_where_the_others_are_noise(telling, images):
    detector = known(telling)
    best = FeatureSearch(detector, images).run()
    assert best.aupro > 0.99 and best.auroc == 1
    assert telling in best.settings.contributions and detector.settings == BEGIN


def test_a_discriminator_whose_maps_are_given_is_found_where_all_else_is_noise(images):
    judged = {name: 0.1 + F.avg_pool2d(getattr(images, name)[:, :1], 4) for name in ("good", "pseudo")}
    search = FeatureSearch(known(None), images, judged=judged)
    best = search.run()
    assert best.aupro > 0.99 and best.auroc == 1 and best.settings.discriminator_contrib > 0
    assert search.merit(best.settings) == best.merit
    assert not any("discriminator" in wanted for wanted, _ in search.detector.calls)


def test_without_maps_of_a_discriminator_none_is_tried(images):
    search = FeatureSearch(known("knn"), images)
    search.run()
    assert {trial.settings.discriminator_contrib for trial in search.trials} == {0.0}


@pytest.mark.parametrize("only", [{"feature_start": 100}, {"editing": False}, {"feature_steps_back": 5},
                                  {"neighbours": 9}])
def test_settings_under_which_the_defects_show_are_found(only, images):
    best = FeatureSearch(known("denoise", replace(BEGIN, edit_contrib=0.0), **only), images).run()
    assert best.aupro > 0.99 and asdict(best.settings).items() >= only.items()


def test_distances_are_taken_in_units_of_what_is_expected_where_those_tell_more(images):
    """Every other image is of a loud kind, on which all distances are 9 times as large, and expected to be."""
    class Loud(Known):
        def context(self, found, judged=False):
            loud = found.images[:, :1].amin(dim=(2, 3), keepdim=True)
            return super().context(found)._replace(expected=81 ** loud.expand_as(found.features))

        def compare(self, found, wanted):
            loud = found.images[:, :1].amin(dim=(2, 3), keepdim=True)
            spot = F.avg_pool2d(found.images[:, 2:], 4)
            return {name: 9 ** loud * (1 + 5 * spot) for name in wanted}

    good, pseudo = images.good.clone(), images.pseudo.clone()
    pseudo[:, :2] = 0
    good[::2, 0] = pseudo[::2, 0] = 1
    search = FeatureSearch(known("edit", kind=Loud), replace(images, good=good, pseudo=pseudo))
    best = search.run()
    assert search.trials[0].auroc < 1 == best.auroc and best.settings.context_power == 0.5
    assert sum(search.detector.asked) == 12          # good and pseudo images, once


def test_what_the_search_judges_by_is_what_the_detector_then_gives():
    """Although it looks up the neighbours of a patch once, for all numbers of them, and keeps maps."""
    good, pseudo = random_images(3, 16), random_images(4, 16, seed=1)
    masks = torch.zeros(4, 1, 16, 16)
    masks[..., :8, 4:] = 1
    detector = real_detector()
    search = FeatureSearch(detector, PseudoValidation(good, pseudo, masks, good[:0]), {"feature_start", "top_share"})
    search.run()
    for trial in (search.trials[0], search.best, *search.trials[1::4]):
        tried = replace(detector, settings=trial.settings)
        parts = [tried.parts(part)[0] for part in (good, pseudo)]
        scales = {name: map_quantile([part.numpy()], 0.999) for name, part in parts[0].items()}
        (low, few), (high, many) = (tried.combine(part, scales) for part in parts)
        found = torch.cat([torch.zeros_like(low), masks]).bool().numpy()
        assert trial.aupro == pytest.approx(metrics.aupro(found, torch.cat([low, high]).numpy()), abs=0.01)
        scores = torch.cat([few, many]).numpy()
        assert trial.auroc == pytest.approx(metrics.auroc([0] * 3 + [1] * 4, scores), abs=1e-6)


class Pooled(nn.Module):
    def forward(self, images):
        return [F.avg_pool2d(images, 4)]


def real_detector():
    """A detector of mean colours, with an untrained network."""
    patches = PatchExtractor(Extractor("pooled", Pooled(), {0: Stage(3, 4)}, (0.5,) * 3, (0.5,) * 3, 16), 4)
    vectors = to_patches(patches(random_images(2, 16, seed=2)))
    components = Components(torch.eye(3), 1.0, 1.0)
    space = FeatureSpace(patches, Standardisation(torch.zeros(3), torch.ones(3)), 0.1, components, "v", ("bolt",))
    torch.manual_seed(0)
    return FeatureDetector(settings=BEGIN, machine=MACHINE._replace(batch_size=2), space=space,
                           bank=Bank(vectors, {"bolt": len(vectors)}, {}), net=build_unet(4, (32,), 1, (), 3 + 1))


# ------------------------------------------------------------------------------------------ what is kept

def test_what_is_given_is_not_varied(images):
    given = {"neighbours", "feature_start", "blur_sigma", "denoise_contrib"}
    search = FeatureSearch(known("knn"), images, given | {"seed", "method"})
    search.run()
    for name in fields_of(FeatureMapOptions):
        tried = {getattr(trial.settings, name) for trial in search.trials}
        kept = given | {"center_crop", "discriminator_contrib"}     # no maps of a discriminator were given
        assert tried == {getattr(BEGIN, name)} if name in kept else len(tried) > 1, name


@pytest.mark.parametrize("seed", range(5))
def test_the_outcome_is_never_worse_than_the_beginning_nor_than_anything_tried(seed, images, monkeypatch):
    """But for a gain so small that it would be chance."""
    def judged(self, settings):
        number = zlib.crc32(repr((seed, settings)).encode())        # the same in every process
        return tuple(torch.rand(3, generator=torch.Generator().manual_seed(number)).tolist())

    monkeypatch.setattr(FeatureSearch, "judge", judged)
    search = FeatureSearch(known("knn"), images)
    best = search.run()
    assert search.trials[0].settings == BEGIN and best.merit >= search.trials[0].merit
    assert best.merit >= max(trial.merit for trial in search.trials) - FeatureSearch.least_gain


def test_chance_does_not_change_a_setting(images, monkeypatch):
    """Where every trial is as good as the next, what was set stays."""
    monkeypatch.setattr(FeatureSearch, "judge", lambda self, settings: (0.5 + 1e-4 * settings.neighbours, 0.5, 0.5))
    detector = known("knn")
    assert FeatureSearch(detector, images).run().settings == BEGIN


def test_the_search_comes_to_the_same_end_every_time(images):
    one, other = (FeatureSearch(known("knn"), images) for _ in range(2))
    assert one.run() == other.run() and one.trials == other.trials


# ------------------------------------------------------------------------------------------ what is tried

def test_no_map_is_computed_twice(images):
    detector = known("knn")
    search = FeatureSearch(detector, images)
    search.run()
    assert all(len(wanted) == 1 for wanted, _ in detector.calls)
    computed = [(wanted[0], *(getattr(settings, name) for name in depends_on(wanted[0], settings)))
                for wanted, settings in detector.calls]
    assert all(computed.count(one) == 4 for one in computed)       # two batches of good images, two of pseudo ones
    assert len(search.trials) > len(set(computed)) and len(set(computed)) > 9


def depends_on(part, settings):
    """The settings that the map of a part follows from."""
    edited = ["neighbours"] * settings.editing
    return {"discriminator": [], "knn": [], "inversion": [], "edit": ["neighbours"],
            "denoise": ["editing", "feature_start", "feature_steps_back", *edited]}[part]


def test_a_memory_bank_alone_is_never_asked_for_what_needs_a_network(images):
    detector = known("knn", replace(BEGIN, denoise_contrib=0.0), net=None)
    search = FeatureSearch(detector, images)
    search.run()
    assert {wanted[0] for wanted, _ in detector.calls} == {"knn", "edit"}
    assert {(t.settings.denoise_contrib, t.settings.inversion_contrib, t.settings.feature_start)
            for t in search.trials} == {(0.0, 0.0, 600)}


def test_at_least_one_part_always_counts(images):
    only = replace(BEGIN, edit_contrib=0.0, denoise_contrib=0.0, inversion_contrib=1.0)
    search = FeatureSearch(known("inversion", only), images)
    search.run()
    assert all(trial.settings.contributions for trial in search.trials)


def test_no_more_neighbours_are_tried_than_the_bank_has(images):
    search = FeatureSearch(known("edit", num_vectors=4), images)
    search.run()
    assert {trial.settings.neighbours for trial in search.trials} == {1, 3}


def test_more_neighbours_than_the_bank_has_are_refused_when_they_are_given(images):
    with pytest.raises(UserError, match="5 neighbours of every patch: expected 1 to 4") as error:
        FeatureSearch(known("edit", replace(BEGIN, neighbours=5), num_vectors=4), images).run()
    one_line(error)


def test_there_are_never_more_steps_than_timesteps_to_go_back(images):
    settings = replace(BEGIN, feature_steps_back=80)
    search = FeatureSearch(known("denoise", settings), images, {"feature_steps_back"})
    search.run()
    assert {trial.settings.feature_start for trial in search.trials} == {100, 600}


# ------------------------------------------------------------------------------------------ when it stops

def test_without_time_what_was_set_is_judged_and_kept(images):
    search = FeatureSearch(known("knn"), images, minutes=0)
    assert search.run().settings == BEGIN and len(search.trials) == 1


def test_after_the_minutes_the_best_so_far_is_taken(images, monkeypatch):
    whole = FeatureSearch(known("knn"), images)
    whole.run()
    clock = iter(range(0, 100_000, 60))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    search = FeatureSearch(known("knn"), images, minutes=8)
    best = search.run()
    assert search.trials == whole.trials[:len(search.trials)] and 1 < len(search.trials) <= 8
    assert best.merit == max(trial.merit for trial in search.trials)


@pytest.mark.parametrize("net, fixed", [("a network", set()), ("a network", {"editing", "blur_sigma", "knn_contrib"}),
                                        (None, {"edit_contrib"})])
def test_the_bar_of_a_search_has_a_total_that_is_enough(net, fixed, images, capsys):
    settings = BEGIN if net else replace(BEGIN, knn_contrib=1.0, edit_contrib=0.0, denoise_contrib=0.0)
    search = FeatureSearch(known("knn", settings, net=net), images, fixed)
    search.run()
    assert 1 < search.bar.n <= search.most()
    assert f" 0/{search.most()} [" in capsys.readouterr().err


def test_together_categories_take_the_settings_of_one_that_are_best_for_all_on_average():
    class Found:
        def __init__(self, settings, **merits):
            self.best, self.merits = Trial(settings, 0, 0, 0), merits

        def merit(self, settings):
            return self.merits[f"k{settings.neighbours}"]
    one, three = (replace(BEGIN, neighbours=k) for k in (1, 3))
    first, second = Found(one, k1=0.9, k3=0.8), Found(three, k1=0.5, k3=0.7)
    assert best_on_average([first, second, second]) == three and best_on_average([first, first]) == one


def test_settings_of_another_search_are_judged_as_if_they_were_tried_here(images):
    search, other = FeatureSearch(known("knn"), images), replace(BEGIN, blur_sigma=2.0)
    search.run()
    for trial in search.trials:
        assert search.merit(trial.settings) == trial.merit
    assert search.merit(other) < search.best.merit


# ------------------------------------------------------------------------------------------ what is told

def test_merit_is_the_mean_of_all_three_figures():
    for figures in ((0.9, 0.0, 0.0), (0.0, 0.9, 0.0), (0.0, 0.0, 0.9)):
        assert math.isclose(Trial(BEGIN, *figures).merit, 0.3)


def test_what_changed_is_what_differs_from_the_beginning():
    other = replace(BEGIN, neighbours=9, editing=False)
    first, best = Trial(BEGIN, 0.5, 0.5, 0.5), Trial(other, 0.6, 0.6, 0.6)
    assert changes(first, best) == {"neighbours": 9, "editing": False} and changes(first, first) == {}


def test_trials_are_written_as_a_table_with_one_chosen(images, tmp_path):
    search = FeatureSearch(known("knn"), images)
    best = search.run()
    write_trials(tmp_path / "tuning.csv", search.trials, best, (FeatureMapOptions,))
    with open(tmp_path / "tuning.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(search.trials) and [row["chosen"] for row in rows].count("1") == 1
    chosen = next(row for row in rows if row["chosen"] == "1")
    settings = {name: str(getattr(best.settings, name)) for name in fields_of(FeatureMapOptions)}
    assert settings.items() <= chosen.items()
    assert math.isclose(float(chosen["merit"]), (
        float(chosen["aupro"]) + float(chosen["image_auroc"]) + float(chosen["pixel_ap"])) / 3)
