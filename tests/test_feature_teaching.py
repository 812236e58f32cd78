"""What pseudo-anomalies teach a LafitE detector: which images are damaged, and who judges which of them."""

from dataclasses import replace

import pytest
import torch

from dbad.families.lafite.lessons import Lesson, first_of_each, set_aside, teach
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
    lessons = {"bolt": lesson(3), "nut": lesson(4, seed=1)}
    judges = teach(lessons, 0)
    assert judges.keys() == {"bolt", "nut", None}
    assert len({judge.mean[0].item() for judge in judges.values()}) == 3
    alone = teach({"bolt": lessons["bolt"]}, 0)
    assert alone[None] is alone["bolt"] and torch.equal(alone[None].mean, judges["bolt"].mean)
