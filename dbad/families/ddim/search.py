"""Settings that nobody has to choose: a search on good images, some with pseudo-anomalies (dbad.damage.pseudo).

The networks run once for every way to reconstruct (weight, start, number of steps); what is made of the differences
(normalisation, layers, fusion, blur, image score) is searched on the same differences and costs little more.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dbad import metrics
from dbad.calibration.thresholds import map_quantile
from dbad.damage.pseudo import make_all
from dbad.diffusion.ddim import Conditioning
from dbad.families.combining import Settings
from dbad.families.ddim.normalise import Normalisation, fit
from dbad.families.detector import DdimDetector, Differences, MapSettings
from dbad.files.atomic import atomic_write
from dbad.files.names import TUNING, TUNING_PLOT
from dbad.files.tables import write_table
from dbad.finite import check_finite, naming
from dbad.maps import central_window, pixel_map

NUM_PSEUDO = 80                                     # pseudo-anomalies, about
STARTS = (50, 100, 150, 200, 250, 300, 400)         # timesteps, as far as the network was trained for them
WEIGHTS = (0.0, 1.0, 2.0, 4.0, 8.0)
STEPS = (1, 2, 3, 5, 10)
LEAST_GAIN = 0.002                                  # of merit: less is chance, and the setting in force stays
CHEAP_LOSS = 0.003                                  # of merit that fewer denoising steps may lose
SEARCH_STEPS = 2                                    # denoising steps while start and weight are searched
NAMES = {"weight": "recon_weight", "start": "start_at_timestep", "num_steps": "steps_to_regenerate"}


@dataclass(frozen=True)
class PseudoValidation:
    """What settings are judged by, all in [-1, 1] at the network's size.

        good        good images (G, 3, S, S)
        pseudo      the same images with anomalies drawn on them (P, 3, S, S)
        masks       where these are (P, 1, S, S), in {0, 1}
        reference   other good images (R, 3, S, S), by which maps are normalised
    """

    good: Tensor
    pseudo: Tensor
    masks: Tensor
    reference: Tensor


@dataclass(frozen=True)
class Trial:
    """Settings that were tried, and how they did: AUPRO to 0.3 and image AUROC on the pseudo-validation."""

    how: Conditioning
    maps: MapSettings
    aupro: float
    auroc: float

    @property
    def merit(self) -> float:
        return (self.aupro + self.auroc) / 2

    def settings(self) -> dict[str, Any]:
        """By the names of the options."""
        return {NAMES.get(name, name): value for name, value in (asdict(self.how) | asdict(self.maps)).items()}


def pseudo_validation(good: Tensor, names: Sequence[str], reference: Tensor, seed: int,
                      count: int = NUM_PSEUDO) -> PseudoValidation:
    """Draw about `count` pseudo-anomalies on good images (G, 3, S, S) whose files are called `names`."""
    drawn = make_all(good, names, seed, per_image=-(-count // len(good)))
    pseudo, masks = (torch.stack([getattr(d, name) for d in drawn]) for name in ("image", "mask"))
    return PseudoValidation(good, pseudo, masks, reference)


class Search:
    """Coordinate search; `fixed` are names of options that keep their value. The outcome is `best`, all are `trials`.

    Stops before the next reconstruction when `minutes` have passed; the first is always made.
    """

    def __init__(self, detector: DdimDetector, images: PseudoValidation, fixed: Collection[str] = (),
                 minutes: float = 30.0, reach: int = 1000):
        self.detector, self.images, self.fixed, self.reach = detector, images, set(fixed), reach
        self.deadline = time.monotonic() + 60 * minutes
        self.trials: list[Trial] = []
        self.best: Trial | None = None
        self.stopped = False

    def run(self) -> Trial:
        """Search and return the best trial."""
        begun = self.detector.how
        with tqdm(desc="tuning", unit="reconstruction") as bar:
            self.bar = bar
            self._reconstruct(begun)
            steps = begun.num_steps if NAMES["num_steps"] in self.fixed else min(begun.num_steps, SEARCH_STEPS)
            starts = [start for start in STARTS if steps <= start <= self.reach]
            for _ in range(2):          # the best start depends on the weight
                self._vary("start", starts, steps)
                self._vary("weight", WEIGHTS, steps)
            self._fewer_steps()
        self.detector.how, self.detector.maps = self.best.how, self.best.maps
        return self.best

    def _vary(self, name: str, values: Sequence[float], num_steps: int | None = None) -> None:
        """Try all `values` around the best so far, in `num_steps` where they are given."""
        if NAMES[name] in self.fixed or (name == "weight" and self.best.how.conditioning != "ddad"):
            return
        around = self.best.how
        if num_steps is not None and around.start >= num_steps:
            around = replace(around, num_steps=num_steps)
        for value in values:
            self._reconstruct(replace(around, **{name: value}))

    def _fewer_steps(self) -> None:
        """More steps if they help; then as few as lose next to nothing."""
        if NAMES["num_steps"] in self.fixed:
            return
        self._vary("num_steps", [count for count in STEPS if count <= self.best.how.start])
        good_enough = [trial for trial in self.trials if trial.merit >= self.best.merit - CHEAP_LOSS]
        self.best = min(good_enough, key=lambda trial: (trial.how.num_steps, -trial.merit))

    def _reconstruct(self, how: Conditioning) -> None:
        """Try one way to reconstruct, with the best way to make maps of it."""
        if any(trial.how == how for trial in self.trials):
            return
        if self.best is not None and time.monotonic() > self.deadline:
            self.stopped = True
            return
        self.detector.how = how
        found = {name: self.detector.differences(getattr(self.images, name))
                 for name in ("reference", "good", "pseudo")}
        best = None
        for maps in self._maps(found):
            trial = Trial(how, maps, *self._judge(found, maps))
            self.trials.append(trial)
            if best is None or trial.merit > best.merit + LEAST_GAIN:
                best = self._current = trial
        if self.best is None or best.merit > self.best.merit + LEAST_GAIN:
            self.best = best
        self.bar.update()
        self.bar.set_postfix(best=f"{self.best.merit:.4f}")

    def _maps(self, found: dict[str, Differences]) -> Iterator[MapSettings]:
        """Ways to make a map, each varying one thing of the best so far (`_current`)."""
        num_layers = found["good"].layers.shape[1]
        total = self.detector.maps.pl_contrib + self.detector.maps.fl_contrib
        single = [tuple(float(i == k) for i in range(num_layers)) for k in range(num_layers)] * (num_layers > 1)
        mixtures = [(round(total * share, 3), round(total * (1 - share), 3)) for share in (0, .25, .5, .75, 1)]
        norms = [("none",), ("contrast",)] + [("location",)] * (not self.detector.patching)
        choices: list[tuple[tuple[str, ...], list[tuple]]] = [
            (("map_norm",), norms),
            (("pl_contrib", "fl_contrib"), mixtures),
            (("pixel_difference",), [("max_square",), ("mean_abs",)]),
            (("layer_weights",), [((1.0,) * num_layers,), *((weights,) for weights in single)]),
            (("blur_sigma",), [(1.0,), (2.0,), (4.0,), (8.0,)]),
            (("top_share",), [(0.0,), (0.001,), (0.005,), (0.02,)]),
            (("map_norm",), norms),
            (("pl_contrib", "fl_contrib"), mixtures),
        ]
        tried = set()
        start = self.best.maps if self.best else self.detector.maps
        yield start
        for names, values in choices:
            if self.fixed & set(names):
                continue
            for value in values:
                maps = replace(self._current.maps, **dict(zip(names, value, strict=True)))
                if maps not in tried:
                    tried.add(maps)
                    yield maps

    def _judge(self, found: dict[str, Differences], maps: MapSettings) -> tuple[float, float]:
        """AUPRO and image AUROC of one way to make maps."""
        kept = {name: self._with_pixel_map(name, found[name], maps) for name in found}
        normalisation = normalisation_of(maps, kept["reference"])
        parts = {name: maps.parts(kept[name], normalisation, self.detector.size) for name in ("good", "pseudo")}
        window = (..., *central_window((self.detector.size,) * 2, maps.center_crop))
        (good, low), (pseudo, high) = combined(maps, parts, window)
        masks = torch.cat([torch.zeros_like(good), self.images.masks])[window].bool().numpy()
        aupro = metrics.aupro(masks, torch.cat([good, pseudo])[window].numpy())
        labels = [0] * len(low) + [1] * len(high)
        return aupro, metrics.auroc(labels, torch.cat([low, high]).numpy())

    def _with_pixel_map(self, name: str, found: Differences, maps: MapSettings) -> Differences:
        """The differences with the kind of pixel map that `maps` asks for."""
        if maps.pixel_difference == self.detector.maps.pixel_difference:
            return found
        return found._replace(pixel=pixel_map(getattr(self.images, name), found.reconstruction, maps.pixel_difference))


def combined(settings: Settings, parts: Mapping[str, dict[str, Tensor]], window: tuple) -> list[tuple[Tensor, Tensor]]:
    """Anomaly maps (N, 1, H, W) and scores (N,) of the "good" images and of the "pseudo" ones, given their parts.

    The scales are those of the good ones within the `window`.
    """
    names = {kind: [f"image {number + 1} of the {kind} ones that settings are chosen with" for number in range(
        len(next(iter(found.values()))))] for kind, found in parts.items()}
    with naming(names["good"]):
        check_finite({f"{name} map": values for name, values in parts["good"].items()})
    scales = {name: map_quantile([values[window].numpy()], 0.999) for name, values in parts["good"].items()}
    found = []
    for kind in ("good", "pseudo"):
        with naming(names[kind]):
            found.append(settings.combine(parts[kind], scales))
    return found


def normalisation_of(maps: MapSettings, reference: Differences) -> Normalisation | None:
    """The statistics of good images that `maps` asks for."""
    if maps.map_norm == "none":
        return None
    return fit(maps.map_norm, maps.plain_parts(reference), reference.reconstruction)


def write_trials(folder: Path, trials: Sequence[Trial], best: Trial) -> None:
    """Write tuning.csv, a row per trial, and tuning.png, what the ways to reconstruct reached."""
    names = [NAMES.get(field.name, field.name) for kind in (Conditioning, MapSettings) for field in fields(kind)]
    rows = []
    for trial in trials:
        values = trial.settings()
        rows.append([*(" ".join(map(str, v)) if isinstance(v := values[name], tuple) else v for name in names),
                     trial.aupro, trial.auroc, trial.merit, int(trial is best)])
    write_table(folder / TUNING, [*names, "aupro", "image_auroc", "merit", "chosen"], rows)
    _plot(folder / TUNING_PLOT, trials, best)


def _plot(path: Path, trials: Sequence[Trial], best: Trial) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    reached = {how: max((t for t in trials if t.how == how), key=lambda t: t.merit) for how in dict.fromkeys(
        trial.how for trial in trials)}
    order = sorted(reached.values(), key=lambda trial: trial.merit)
    figure = Figure(figsize=(8, 1.2 + 0.28 * len(order)), layout="constrained")
    axis = figure.subplots()
    labels = [f"weight {t.how.weight:g}, start {t.how.start}, {t.how.num_steps} steps" for t in order]
    for name, marker in (("aupro", "o"), ("auroc", "s"), ("merit", "|")):
        axis.plot([getattr(t, name) for t in order], labels, marker, label={
            "aupro": "AUPRO", "auroc": "image AUROC", "merit": "their mean"}[name])
    chosen = f"weight {best.how.weight:g}, start {best.how.start}, {best.how.num_steps} steps"
    axis.axhline(chosen, color="#1b1f24", linewidth=0.8, linestyle="--")
    axis.set(title="Pseudo-validation: the best map of every reconstruction; dashed: chosen")
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, format="png", dpi=110, metadata={"Software": None})
