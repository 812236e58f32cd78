"""What pseudo-anomalies teach a LafitE detector: which images are damaged, and who judges which of them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import MACHINE, random_images

from dbad.families.lafite import lessons
from dbad.families.lafite.comparing import affordable
from dbad.families.lafite.lessons import Lesson, first_of_each, prepare_lessons, set_aside, teach
from dbad.families.search import PseudoValidation


@pytest.mark.parametrize("count", [1, 2, 3, 5, 17, 60, 240, 1000])
@pytest.mark.parametrize("share", [1.0, 0.5, 1 / 15])
def test_of_the_training_images_at_most_a_third_is_set_aside(count, share):
    aside = set_aside(count, share)
    assert aside and len(set(aside)) == len(aside) and set(aside) <= set(range(count))
    assert len(aside) <= max(1, count // 3) and len(aside) <= 40 * share + 1


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr("dbad.families.lafite.discriminator.train_discriminator.__defaults__", (30,))


def lesson(images, per_image=3, seed=0):
    """Evidence of which the first plane tells damage."""
    stream = torch.Generator().manual_seed(seed)
    damaged = images * per_image
    masks = torch.zeros(damaged, 1, 8, 8)
    for index in range(damaged):
        masks[index, :, index % 4:index % 4 + 4, 2:6] = 1
    good, known = (torch.randn(count, 3, 4, 4, generator=stream) for count in (images, damaged))
    known[:, :1] += 5 * torch.nn.functional.max_pool2d(masks, 2)
    shown = PseudoValidation(torch.zeros(images, 3, 8, 8), None, None, None)
    return Lesson(shown, torch.arange(damaged), masks, (good, known))


def test_settings_are_chosen_by_what_is_said_of_images_that_were_not_known():
    """What the even images teach changes what is said of the odd ones alone, and the other way round."""
    before = lesson(4)
    changed = lesson(4)
    changed.shares[0:3], changed.shares[6:9] = 0, 0           # images 0 and 2 are told to be good
    one, other = before.surprises(0), changed.surprises(0)
    assert one["good"].shape == (4, 1, 4, 4) and one["pseudo"].shape == (12, 1, 4, 4)
    even = torch.arange(4) % 2 == 0
    assert torch.equal(one["good"][even], other["good"][even])
    assert not torch.isclose(one["good"][~even], other["good"][~even]).any()
    rows = even.repeat_interleave(3)
    assert torch.equal(one["pseudo"][rows], other["pseudo"][rows])
    assert not torch.isclose(one["pseudo"][~rows], other["pseudo"][~rows]).any()


@pytest.mark.parametrize("count, rows", [(12, range(12)), (4, (0, 3, 6, 9)), (5, (0, 1, 3, 4, 6, 7, 9, 10)),
                                         (99, range(12))])
def test_settings_are_chosen_by_the_first_anomalies_of_each_image(count, rows):
    places, whole = first_of_each(4, 3, count), lesson(4)
    assert places.tolist() == list(rows)
    maps = replace(whole, places=places).surprises(0)["pseudo"]
    assert torch.equal(maps, whole.surprises(0)["pseudo"][list(rows)])


def test_a_single_image_is_judged_by_who_knows_it():
    found = lesson(1).surprises(0)
    judge = lesson(1).taught(torch.tensor([True]), 0)
    assert torch.equal(found["good"], judge.surprise(lesson(1).evidence[0]))


def test_each_category_has_a_discriminator_and_so_have_all_together():
    each = {"bolt": lesson(3), "nut": lesson(4, seed=1)}
    judges = teach(each, 0)
    assert judges.keys() == {"bolt", "nut", None}
    assert len({judge.mean[0].item() for judge in judges.values()}) == 3
    alone = teach({"bolt": each["bolt"]}, 0)
    assert alone[None] is alone["bolt"] and torch.equal(alone[None].mean, judges["bolt"].mean)


# ------------------------------------------------------------------------------------------ within the time

@pytest.mark.parametrize("left_s, expected", [
    (1e9, (40, 16)), (640.0, (40, 16)), (639.0, (40, 15)), (80.0, (40, 2)), (40.0, (40, 1)), (39.0, (39, 1)),
    (3.0, (10, 1)), (-5.0, (10, 1)), (float("inf"), (40, 16))])
def test_as_many_anomalies_are_compared_as_there_is_time_for_and_always_some(left_s, expected):
    assert affordable(40, 16, 1.0, left_s) == expected
    assert affordable(4, 16, 1.0, -5.0) == (4, 1)


class Compared:
    """A detector whose comparisons take a second an image, on the clock `now`."""

    def __init__(self, now):
        self.now, self.images = now, 0
        self.machine, self.settings = MACHINE, SimpleNamespace(seed=0)
        self.space = SimpleNamespace(patches=SimpleNamespace(grid=4))

    def look_up(self, batch, judged):
        return batch

    def evidence(self, batch):
        self.now[0] += len(batch)
        self.images += len(batch)
        return torch.zeros(len(batch), 3, 4, 4)


@pytest.mark.parametrize("minutes, good, each", [(30.0, 24, 10), (1.5, 24, 2), (0.4, 10, 1), (0.01, 10, 1)])
def test_the_comparisons_of_a_search_keep_to_its_time(minutes, good, each, monkeypatch, capfd):
    now = [0.0]
    monkeypatch.setattr(lessons.time, "monotonic", lambda: now[0])
    detector = Compared(now)
    part = SimpleNamespace(images=lambda numbers: (random_images(24, 16), [f"{n}.png" for n in numbers]))
    made = prepare_lessons(detector, {"bolt": part}, {"bolt": list(range(24))}, 240, 24, 60 * minutes)["bolt"]
    assert len(made.shown.good) == len(made.evidence[0]) == good and made.per_image == each
    assert len(made.shares) == len(made.evidence[1]) == good * each and len(made.shown.pseudo) == good
    assert detector.images == (24 if minutes > 1 else 16) + good * each and now[0] <= max(60 * minutes, 26)
    assert ("--tune_minutes leaves time for" in capfd.readouterr().out) == (each < 10)


def test_a_short_search_is_served_by_discriminators_that_are_trained_for_less(monkeypatch):
    steps = []
    monkeypatch.setattr(lessons, "train_discriminator", lambda *_, **more: steps.append(more) or SimpleNamespace(
        surprise=lambda known: known[:, :1]))
    for share in (2.0, 1.0, 0.5, 0.0):
        lesson(4).surprises(0, share)
    assert steps == 2 * [{}] + 2 * [{}] + 2 * [{"steps": lessons.STEPS // 2}] + 2 * [{"steps": lessons.LEAST_STEPS}]
