"""The search for the settings of LafitE; see `dbad.families.search`.

It varies neighbours, editing, start, steps, power, contributions, blur and image score. It begins with the
discriminator alone, whose maps are given. A map that does not help is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from dbad.families.lafite.detector import FeatureDetector, LookedUp
from dbad.families.lafite.model import Context
from dbad.families.lafite.options import DIFFUSED, PARTS, FeatureSettings
from dbad.families.search import Parts, PseudoValidation, Search, Trial

NEIGHBOURS = (1, 3, 5, 9)
STARTS = (50, 150, 400, 800)
STEPS = (1, 3, 5)
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0)
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
FIRST_WEIGHT = 0.5      # of the denoised map while its start is searched
BLURS = (2.0, 4.0, 8.0)
SHARES = (0.0, 0.001, 0.005, 0.02)

Maps = dict[str, Tensor]        # by name, (N, 1, G, G) each


@dataclass
class _Known:
    """The features and maps of some images: as looked up, on the CPU except the neighbours, and the maps by name."""

    found: LookedUp
    maps: Maps


class FeatureSearch(Search[FeatureSettings, FeatureDetector]):
    """Coordinate search over distances, contributions, blur and image score.

    `judged` holds maps of a discriminator that was not trained on these images, (N, 1, G, G) of the "good" ones and of
    the "pseudo" ones; without them the discriminator's weight is not searched.
    """

    least_gain = 0.005

    def __init__(self, detector: FeatureDetector, images: PseudoValidation, fixed: Collection[str] = (),
                 minutes: float = 30.0, judged: Mapping[str, Tensor] | None = None):
        super().__init__(detector, images, fixed, minutes)
        self.neighbours = [k for k in NEIGHBOURS if k <= len(detector.bank.vectors)]
        self.judged = judged
        self.known: dict[str, _Known] = {}

    def most(self) -> int:
        """See `Search.most`; settings whose maps do not count are not tried."""
        values = {"neighbours": 2 * len(self.neighbours), "blur_sigma": len(BLURS), "top_share": len(SHARES)}
        values |= {f"{part}_contrib": 2 * len(WEIGHTS) for part in PARTS if self._searched(part)}
        if self.detector.net is not None:
            values |= {"context_power": 2 * len(POWERS), "feature_steps_back": len(STEPS)}
        number = sum(1 if name in self.fixed else count for name, count in values.items())
        editing, starts = (1 if name in self.fixed else count for name, count in (
            ("editing", 2), ("feature_start", len(STARTS))))
        return number + editing * starts * (self.detector.net is not None)

    def _searched(self, part: str) -> bool:
        """True for a map that the detector can make here."""
        return (self.detector.net is not None or part not in DIFFUSED) and (
            part != "discriminator" or bool(self.judged))

    def search(self) -> None:
        """See `Search.search`."""
        self.known = {name: self._look_up(getattr(self.images, name)) for name in ("good", "pseudo")}
        for name, maps in (self.judged or {}).items():
            self.known[name].maps["discriminator"] = maps
        self.best = self.try_out(self.detector.settings)
        self._vary_distances()
        if self.detector.net is not None:
            self._denoise()
            if self.best.settings.denoise_contrib:
                self._vary("feature_steps_back", [n for n in STEPS if n <= self.best.settings.feature_start])
        self._mix()
        self._vary("blur_sigma", BLURS)
        self._vary("top_share", SHARES)
        self._mix()
        self._vary_distances()

    def merit(self, settings: FeatureSettings) -> float:
        """The merit of another search's settings on these images, even if the time is over."""
        return Trial(settings, *self.judge(settings)).merit

    def _denoise(self) -> None:
        """Try the denoised map with every start, with and without editing, beside the maps that count already."""
        begun = self.best
        before = begun.settings
        weight = before.denoise_contrib or self.free(begun, "denoise_contrib", [FIRST_WEIGHT])[0]
        for editing in self.free(begun, "editing", (True, False)):
            for start in self.free(begun, "feature_start", [t for t in STARTS if t >= before.feature_steps_back]):
                self._attempt(replace(before, editing=editing, feature_start=start, denoise_contrib=weight))

    def _vary(self, name: str, values: Sequence[Any]) -> None:
        """Try all `values` around the best so far."""
        around = self.best
        for value in self.free(around, name, values):
            self._attempt(replace(around.settings, **{name: value}))

    def _attempt(self, settings: FeatureSettings) -> None:
        """Try settings, if any map has a weight and there is time."""
        if settings.contributions and not self.out_of_time():
            self.best = self.better(self.best, self.try_out(settings))
            self.bar.update()
            self.bar.set_postfix(best=f"{self.best.merit:.4f}")

    def _mix(self) -> None:
        """Vary the contributions, one after the other."""
        for part in PARTS:
            if self._searched(part):
                self._vary(f"{part}_contrib", WEIGHTS)

    def _vary_distances(self) -> None:
        """Vary the settings that distances depend on, if those distances count."""
        counting = self.best.settings.contributions.keys()
        if "edit" in counting or ("denoise" in counting and self.best.settings.editing):
            self._vary("neighbours", self.neighbours)
        if self.detector.net is not None and counting & {"knn", "edit", "denoise"}:
            self._vary("context_power", POWERS)

    def parts(self, settings: FeatureSettings) -> Parts:
        """See `Search.parts`."""
        detector = replace(self.detector, settings=settings)
        return {name: detector.blurred(detector.relative(_maps(detector, known), _context(detector, known)))
                for name, known in self.known.items()}

    def _look_up(self, images: Tensor) -> _Known:
        """The features, and the largest number of neighbours that is tried; the bank is searched only here."""
        most = max(*self.neighbours, self.detector.settings.neighbours)
        batches = [self.detector.look_up(batch, most) for batch in images.split(self.detector.machine.batch_size)]
        features, distances, indices = (torch.cat([getattr(found, name) for found in batches])
                                        for name in ("features", "distances", "indices"))
        return _Known(LookedUp(images, features.cpu(), distances, indices), {})


def _maps(detector: FeatureDetector, known: _Known) -> Maps:
    """The maps that count under the detector's settings; those that are not known yet are computed."""
    found = {}
    for part in detector.settings.contributions:
        key = _key(part, detector.settings)
        if key not in known.maps:
            known.maps[key] = torch.cat([detector.compare(batch, [part])[part].cpu()
                                         for batch in _batches(detector, known.found)])
        found[part] = known.maps[key]
    return found


def _context(detector: FeatureDetector, known: _Known) -> Context | None:
    """The errors of patches predicted from their surroundings, computed once; None where they are not needed."""
    if not detector.settings.context_power:
        return None
    if known.found.context is None:
        found = [detector.context(batch) for batch in _batches(detector, known.found)]
        known.found = known.found._replace(context=Context(*(torch.cat(maps).cpu() for maps in zip(
            *found, strict=True))))
    return known.found.context


def _batches(detector: FeatureDetector, found: LookedUp) -> Iterator[LookedUp]:
    """Yield what was looked up in batches, with the features on the device."""
    size, grid = detector.machine.batch_size, found.features.shape[-1]
    for first in range(0, len(found.images), size):
        images, rows = slice(first, first + size), slice(first * grid ** 2, (first + size) * grid ** 2)
        yield LookedUp(found.images[images], found.features[images].to(detector.machine.device),
                       found.distances[rows], found.indices[rows])


def best_on_average(searches: Sequence[FeatureSearch]) -> FeatureSettings:
    """The settings with the highest mean merit in all searches, among those that a search chose."""
    chosen = list(dict.fromkeys(search.best.settings for search in searches))
    if len(chosen) == 1:
        return chosen[0]
    return max(chosen, key=lambda settings: fmean(search.merit(settings) for search in searches))


def _key(part: str, settings: FeatureSettings) -> str:
    """A key of the settings that a map depends on."""
    neighbours = settings.neighbours if settings.editing or part == "edit" else 0
    return {"knn": "knn", "discriminator": "discriminator", "inversion": "inversion", "edit": f"edit {neighbours}",
            "denoise": f"denoise {neighbours} {settings.feature_start} {settings.feature_steps_back}"}[part]
