"""Settings of the LafitE family by pseudo-validation: K, editing, start, steps, power, contributions, blur, score.

It begins with the discriminator alone, whose maps are given; a part that does not help is left out. As in ddim,
the search sees good training images alone, some with anomalies drawn on them, and what the networks give
is computed once for every setting that it depends on.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from tqdm import tqdm

from dbad import metrics
from dbad.families.ddim.search import PseudoValidation, combined
from dbad.families.lafite.detector import DIFFUSED, PARTS, FeatureDetector, FeatureSettings
from dbad.families.lafite.model import Context
from dbad.files.tables import write_table
from dbad.maps import central_window
from dbad.networks.features import to_patches

NEIGHBOURS = (1, 3, 5, 9)
STARTS = (50, 150, 400, 800)
STEPS = (1, 3, 5)
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0)
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
FIRST_WEIGHT = 0.5      # of the denoised part while its start is searched
BLURS = (2.0, 4.0, 8.0)
SHARES = (0.0, 0.001, 0.005, 0.02)
LEAST_GAIN = 0.005      # of merit: less is chance, and the setting in force stays
JUDGED_SIDE = 128       # px; of larger maps every second pixel, or every third, is enough to tell which is better

Maps = dict[str, Tensor]        # by part, (N, 1, G, G) each


@dataclass(frozen=True)
class FeatureTrial:
    """Settings that were tried, and how they did on the pseudo-validation."""

    settings: FeatureSettings
    aupro: float
    auroc: float
    pixel_ap: float

    @property
    def merit(self) -> float:
        return (self.aupro + self.auroc + self.pixel_ap) / 3


@dataclass
class _Known:
    """What is known of some images: themselves, their features, their nearest vectors in the bank, their maps."""

    images: Tensor
    features: Tensor
    distances: Tensor
    indices: Tensor
    maps: Maps
    context: Context | None = None      # what the network makes of them, once it is asked for


class FeatureSearch:
    """Coordinate search; `fixed` are names of options that keep their value. All that was tried is in `trials`.

    `judged` are maps of a discriminator that has not been taught by these images, (N, 1, G, G) of the "good" ones and
    of the "pseudo" ones; without them none counts.
    """

    def __init__(self, detector: FeatureDetector, images: PseudoValidation, fixed: Collection[str] = (),
                 minutes: float = 30.0, judged: Maps | None = None):
        self.detector, self.images, self.fixed = detector, images, set(fixed)
        self.neighbours = [k for k in NEIGHBOURS if k <= len(detector.bank.vectors)]
        self.judged, self.deadline = judged, time.monotonic() + 60 * minutes
        self.trials: list[FeatureTrial] = []

    def run(self) -> FeatureTrial:
        """Search, set the detector to what was found, and return it."""
        self.bar = tqdm(desc="tuning", unit="map")
        with self.bar:
            self.known = {name: self._look_up(getattr(self.images, name)) for name in ("good", "pseudo")}
            for name, maps in (self.judged or {}).items():
                self.known[name].maps["discriminator"] = maps
            self.best = self._try(self.detector.settings)
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
        self.detector.settings = self.best.settings
        return self.best

    def merit(self, settings: FeatureSettings) -> float:
        """What settings of another search would be worth here, whatever the time."""
        return FeatureTrial(settings, *self._judge(settings)).merit

    def _denoise(self) -> None:
        """The denoised part with every start, edited and not, beside what counts already."""
        before = self.best.settings
        weight = before.denoise_contrib or self._free("denoise_contrib", [FIRST_WEIGHT])[0]
        for editing in self._free("editing", (True, False)):
            for start in self._free("feature_start", [t for t in STARTS if t >= before.feature_steps_back]):
                self._attempt(replace(before, editing=editing, feature_start=start, denoise_contrib=weight))

    def _vary(self, name: str, values: Sequence) -> None:
        """Try all `values` around the best so far."""
        around = self.best.settings
        for value in self._free(name, values):
            self._attempt(replace(around, **{name: value}))

    def _free(self, name: str, values: Sequence) -> Sequence:
        """The values that a setting may take: one that was given keeps its own."""
        return [getattr(self.best.settings, name)] if name in self.fixed else values

    def _attempt(self, settings: FeatureSettings) -> None:
        """Try settings, if anything counts under them and there is time."""
        if settings.contributions and time.monotonic() < self.deadline:
            self._try(settings)

    def _mix(self) -> None:
        """The contributions, one after the other."""
        for part in PARTS:
            if self.detector.net is not None or part not in DIFFUSED:
                if part != "discriminator" or self.judged:
                    self._vary(f"{part}_contrib", WEIGHTS)

    def _vary_distances(self) -> None:
        """What distances depend on, as far as they count."""
        counting = self.best.settings.contributions.keys()
        if "edit" in counting or ("denoise" in counting and self.best.settings.editing):
            self._vary("neighbours", self.neighbours)
        if self.detector.net is not None and counting & {"knn", "edit", "denoise"}:
            self._vary("context_power", POWERS)

    def _try(self, settings: FeatureSettings) -> FeatureTrial:
        done = next((trial for trial in self.trials if trial.settings == settings), None)
        if done is not None:
            return done
        trial = FeatureTrial(settings, *self._judge(settings))
        self.trials.append(trial)
        if len(self.trials) == 1 or trial.merit > self.best.merit + LEAST_GAIN:
            self.best = trial
        self.bar.update()
        self.bar.set_postfix(best=f"{self.best.merit:.4f}")
        return trial

    def _judge(self, settings: FeatureSettings) -> tuple[float, float, float]:
        """AUPRO to 0.3, image AUROC and pixel AP."""
        self.detector.settings, side = settings, self.detector.size
        parts = {name: settings.blurred(settings.relative(self._maps(known), self._context(known)), side)
                 for name, known in self.known.items()}
        window = (..., *central_window((side, side), settings.center_crop))
        (good, low), (pseudo, high) = combined(settings, parts, window)
        masks = torch.cat([torch.zeros_like(good), self.images.masks])[window].bool()
        stride = max(1, side // JUDGED_SIDE)
        masks, maps = (values[:, 0, ::stride, ::stride].numpy() for values in (
            masks, torch.cat([good, pseudo])[window]))
        pixel = metrics.pixel_metrics(masks, maps, "exact")
        auroc = metrics.auroc([0] * len(low) + [1] * len(high), torch.cat([low, high]).numpy())
        return pixel["aupro_0.3"], auroc, pixel["ap"]

    def _maps(self, known: _Known) -> Maps:
        """The parts that count under the detector's settings, computed where they are not known yet."""
        settings, found = self.detector.settings, {}
        for part in settings.contributions:
            key = _key(part, settings)
            if key not in known.maps:
                known.maps[key] = torch.cat([found_part[part] for found_part in self._compare(known, part)])
            found[part] = known.maps[key]
        return found

    def _context(self, known: _Known) -> Context | None:
        """What the network makes of the patches by their surroundings, where it counts; asked for once."""
        if not self.detector.settings.context_power:
            return None
        if known.context is None:
            size, device = self.detector.batch_size, self.detector.device
            found = [self.detector.context(images, features.to(device)) for images, features in zip(
                known.images.split(size), known.features.split(size), strict=True)]
            known.context = Context(*(torch.cat(maps).cpu() for maps in zip(*found, strict=True)))
        return known.context

    def _compare(self, known: _Known, part: str) -> Iterator[Maps]:
        size, grid = self.detector.batch_size, known.features.shape[-1]
        for first in range(0, len(known.images), size):
            images, rows = slice(first, first + size), slice(first * grid ** 2, (first + size) * grid ** 2)
            found = self.detector.compare(known.images[images], known.features[images].to(self.detector.device),
                                          known.distances[rows], known.indices[rows], [part])
            yield {name: maps.cpu() for name, maps in found.items()}

    def _look_up(self, images: Tensor) -> _Known:
        """Features and the most neighbours that will be asked for; all searches of the bank are made here."""
        features, distances, indices = [], [], []
        most = max(*self.neighbours, self.detector.settings.neighbours)
        for batch in images.split(self.detector.batch_size):
            features.append(self.detector.features(batch))
            found = self.detector.bank.nearest(to_patches(features[-1]), most)
            distances.append(found[0])
            indices.append(found[1])
        return _Known(images, torch.cat(features).cpu(), torch.cat(distances), torch.cat(indices), {})


def best_on_average(searches: Sequence[FeatureSearch]) -> FeatureSettings:
    """Of the settings that a search chose, those of the highest mean merit in all of them."""
    chosen = list(dict.fromkeys(search.best.settings for search in searches))
    if len(chosen) == 1:
        return chosen[0]
    return max(chosen, key=lambda settings: fmean(search.merit(settings) for search in searches))


def _key(part: str, settings: FeatureSettings) -> str:
    """What a part depends on."""
    neighbours = settings.neighbours if settings.editing or part == "edit" else 0
    return {"knn": "knn", "discriminator": "discriminator", "inversion": "inversion", "edit": f"edit {neighbours}",
            "denoise": f"denoise {neighbours} {settings.feature_start} {settings.feature_steps_back}"}[part]


def changes(first: FeatureTrial, best: FeatureTrial) -> Mapping[str, object]:
    """The settings in which the best trial differs from the first."""
    before = asdict(first.settings)
    return {name: value for name, value in asdict(best.settings).items() if value != before[name]}


def write_feature_trials(path: Path, trials: Sequence[FeatureTrial], best: FeatureTrial) -> None:
    """Write tuning.csv, a row per trial."""
    names = [field.name for field in fields(FeatureSettings)]
    write_table(path, [*names, "aupro", "image_auroc", "pixel_ap", "merit", "chosen"], (
        [*asdict(trial.settings).values(), trial.aupro, trial.auroc, trial.pixel_ap, trial.merit, int(trial is best)]
        for trial in trials))
