"""Mean losses, times and how long a training takes."""

from types import SimpleNamespace

import pytest
import torch

from dbad.training import progress
from dbad.training.progress import Clock, EpochSums, forecast


def processes(count: int) -> list[SimpleNamespace]:
    """Stand-ins for accelerate's view of `count` processes; what is gathered has to be put into `others` first."""
    def of(number: int) -> SimpleNamespace:
        each = SimpleNamespace(process_index=number, num_processes=count, device=torch.device("cpu"), others={})
        each.gather = lambda value: torch.cat([value if k == number else each.others[k] for k in range(count)])
        each.reduce = lambda value, how: value
        return each
    return [of(number) for number in range(count)]


def sums_of(*losses: float) -> EpochSums:
    found = EpochSums()
    for loss in losses:
        found.add({"loss": torch.tensor(loss)})
    return found


def test_the_mean_is_over_the_batches_of_an_epoch():
    sums, (alone,) = sums_of(1.0, 2.0, 6.0), processes(1)
    assert sums.means(alone) == {"loss": 3.0}
    sums.restart()
    assert sums.means(alone) == {} and sums.count == 0


def test_an_epoch_that_is_gone_on_with_has_the_mean_of_all_its_batches_in_every_process():
    two = processes(2)
    parts = [sums_of(1.0, 2.0), sums_of(3.0, 5.0)]
    two[0].others[1] = parts[1].sums["loss"].reshape(1)
    state = parts[0].state(two[0])
    assert state["count"] == 2 and state["sums"]["loss"].tolist() == [3.0, 8.0]
    for number, expected in enumerate([3.0, 8.0]):
        resumed = EpochSums()
        resumed.restore(state, two[number])
        assert resumed.count == 2 and float(resumed.sums["loss"]) == expected


@pytest.mark.parametrize("count", [1, 4])
def test_with_another_number_of_processes_the_mean_over_all_is_still_the_same(count):
    state = {"count": 2, "sums": {"loss": torch.tensor([3.0, 8.0])}}        # mean 11 / 4
    means = []
    for process in processes(count):
        resumed = EpochSums()
        resumed.restore(state, process)
        means += resumed.means(process).values()
    assert sum(means) / count == 11 / 4 and len(means) == count


class Time:
    """time.monotonic that goes on only when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)

    def steps(self, clock: Clock, *seconds: float) -> list[float | None]:
        found = []
        for took in seconds:
            self.now += took
            found.append(clock.step())
        return found


def test_the_time_of_a_step_is_told_once_and_does_not_count_the_first_ones(monkeypatch):
    time = Time(monkeypatch)
    clock = Clock()
    assert clock.longest_step_s is None
    assert time.steps(clock, 9, 2, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5) == [None] * 6 + [0.5, None, None]
    assert clock.longest_step_s == 9


def test_a_very_long_step_is_not_waited_for_again(monkeypatch):
    time = Time(monkeypatch)
    assert time.steps(Clock(), 637, 600, 600, 600, 600) == [637] + [None] * 4


def test_validations_pictures_and_saves_are_no_part_of_a_step(monkeypatch):
    time = Time(monkeypatch)
    clock = Clock()
    time.steps(clock, 1, 1, 1, 1)
    for block in (clock.aside, clock.saving):
        with block():
            time.now += 50
    assert time.steps(clock, 1) == [1.0]
    assert clock.longest_step_s == 101          # who stops a training may have to wait for all of it


@pytest.mark.parametrize("step_s, num_steps, expected", [
    (0.48, 1500, "about 12 minutes (0.48 s/step, 1500 steps)"), (0.1, 30, "about 3 seconds (0.1 s/step, 30 steps)"),
    (637.0, 3400, "about 25 days (637 s/step, 3400 steps)"), (1.0, 9000, "about 2.5 hours (1 s/step, 9000 steps)"),
    (0.0001, 2, "about 1 seconds (0.0001 s/step, 2 steps)"), (1.0, 119, "about 119 seconds (1 s/step, 119 steps)")])
def test_how_long_a_training_takes_is_told_in_words(step_s, num_steps, expected):
    assert forecast(step_s, num_steps) == expected
    assert forecast(step_s, num_steps, at_most=True) == f"at most {expected}"


def test_more_than_a_day_is_refused_in_one_line_that_says_what_to_try():
    assert progress.refusal(720.0, 3000) == (
        "about 25 days (720 s/step, 3000 steps) on this CPU; expected less than a day: try --preset small, or give "
        "--yes")
    assert progress.refusal(720.0, 3000, at_most=True).startswith("at most about 25 days")
    assert progress.refusal(1.0, 86_400) is None
