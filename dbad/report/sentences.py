"""The result of an inspection in a sentence, the figures that matter most, and what chance alone does to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dbad.records import ScoreRow

Flat = Mapping[tuple[str, ...], Any]

SURE = 0.95         # of all tests lie in the range that is called usual


def result_sentence(rows: Sequence[ScoreRow], flat: Flat, promised: float | None) -> str:
    """What was found, and the false-alarm rate that was promised: the first line of a report."""
    missed, found, alarms, right = (flat.get(("image_rates", name)) for name in ("fn", "tp", "fp", "tn"))
    if found is not None and missed is not None and alarms is not None and right is not None:
        promise = "" if promised is None else f"; promised at most {percent(promised)} on average"
        return (f"Found {found} of {missed + found} defective parts; {counted(alarms, 'false alarm')} among "
                f"{alarms + right} good ones{promise}.")
    called = sum(row.decision == 1 for row in rows)
    if all(row.decision is None for row in rows):
        return f"{counted(len(rows), 'image')}, not calibrated: there is no saved threshold."
    promise = "" if promised is None else f"; at most {percent(promised)} false alarms promised on average"
    broken = f", {flat['num_unreadable',]} unreadable" if flat.get(("num_unreadable",)) else ""
    return f"{called} of {counted(len(rows), 'image')} called defective{broken}{promise}."


def figures(flat: Flat) -> list[tuple[str, str]]:
    """The five figures shown large, as far as they are known: areas under curves, and errors at the threshold."""
    shown = [(title, f"{100 * value:.1f} %") for title, name in (
        ("Image AUROC", ("image", "auroc")), ("Pixel AP", ("pixel", "ap")), ("AUPRO", ("pixel", "aupro_0.3")))
        if (value := flat.get(name)) is not None]
    for title, name, rest in (("Missed", "fn", "tp"), ("False alarms", "fp", "tn")):
        count, others = flat.get(("image_rates", name)), flat.get(("image_rates", rest))
        if count is not None and others is not None:
            shown.append((title, f"{count} of {count + others}"))
    return shown


def chance_note(flat: Flat, promised: float | None) -> str | None:
    """Why the false alarms of one test may be more than the promised rate; None where there is nothing to say."""
    alarms, right = flat.get(("image_rates", "fp")), flat.get(("image_rates", "tn"))
    if promised is None or alarms is None or right is None or alarms + right == 0:
        return None
    total = alarms + right
    (low, high), rate = usual_range(total, promised), percent(promised)
    return (f"{counted(alarms, 'false alarm')} among {total} good parts: {percent(alarms / total)}. The promised "
            f"{rate} hold on average over calibrations and tests. If the true rate is {rate}, "
            f"a test of {total} good parts usually has {low} to {high} false alarms ({percent(low / total)} to "
            f"{percent(high / total)}; {percent(SURE)} of such tests, binomial distribution).")


def usual_range(count: int, rate: float) -> tuple[int, int]:
    """The numbers of events out of `count` between which, both included, at least `SURE` of all binomial draws lie.

    At most (1 - SURE) / 2 of the draws are below, and as many above.
    """
    tail = (1 - SURE) / 2
    below, low, high = 0.0, None, count
    for events in range(count + 1):
        below += _probability(events, count, rate)
        if low is None and below > tail:
            low = events
        if below >= 1 - tail:
            high = events
            break
    return low or 0, high


def _probability(events: int, count: int, rate: float) -> float:
    """The probability of so many events out of `count`, by logarithms, since factorials of thousands overflow."""
    if rate in (0, 1):
        return float(events == count * rate)
    ways = math.lgamma(count + 1) - math.lgamma(events + 1) - math.lgamma(count - events + 1)
    return math.exp(ways + events * math.log(rate) + (count - events) * math.log1p(-rate))


def percent(share: float) -> str:
    """0.05 -> 5 %, 0.075 -> 7.5 %."""
    return f"{float(f'{100 * share:.1f}'):g} %"


def counted(number: int, noun: str) -> str:
    """1 image, 2 images."""
    return f"{number} {noun}{'s' * (number != 1)}"
