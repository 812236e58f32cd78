"""The search for the settings of conditioned denoising; see `dbad.families.search`.

The networks run once for every way to reconstruct (weight, start, number of steps). All ways to make maps are tried on
the same differences.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dbad.families.ddim.detector import DdimDetector, Differences, plain_parts
from dbad.families.ddim.normalise import Normalisation, fit
from dbad.families.ddim.options import DdimSettings, Reconstruction
from dbad.families.search import Parts, PseudoValidation, Search, Trial
from dbad.files.atomic import atomic_write
from dbad.maps import pixel_map
from dbad.options.resolve import subset

STARTS = (50, 100, 150, 200, 250, 300, 400)         # timesteps, as far as the network was trained for them
WEIGHTS = (0.0, 1.0, 2.0, 4.0, 8.0)
STEPS = (1, 2, 3, 5, 10)
CHEAP_LOSS = 0.003                                  # of merit that fewer denoising steps may lose
SEARCH_STEPS = 2                                    # denoising steps while start and weight are searched

DdimTrial = Trial[DdimSettings]


class DdimSearch(Search[DdimSettings, DdimDetector]):
    """Coordinate search over reconstructions, each judged with the best way to make maps of it."""

    least_gain = 0.002
    unit = "reconstruction"

    def __init__(self, detector: DdimDetector, images: PseudoValidation, fixed: Collection[str] = (),
                 minutes: float = 30.0):
        super().__init__(detector, images, fixed, minutes)
        self._found: dict[str, Differences] = {}        # of the current reconstruction

    def most(self) -> int:
        """See `Search.most`; every start and weight in both rounds, and the steps, if they are not fixed."""
        names = [("start_at_timestep", 2 * len(STARTS)), ("steps_to_regenerate", len(STEPS))]
        if self.detector.settings.conditioning == "ddad":
            names.append(("recon_weight", 2 * len(WEIGHTS)))
        return 1 + sum(count for name, count in names if name not in self.fixed)

    def search(self) -> None:
        """Start and weight in few steps, twice, since the best start depends on the weight; then the steps."""
        begun = self.detector.settings
        self.best = self._reconstruct(begun)
        given = begun.steps_to_regenerate
        steps = given if "steps_to_regenerate" in self.fixed else min(given, SEARCH_STEPS)
        starts = [start for start in STARTS if steps <= start <= self.detector.denoiser.reachable]
        for _ in range(2):
            self._vary("start_at_timestep", starts, steps)
            if begun.conditioning == "ddad":
                self._vary("recon_weight", WEIGHTS, steps)
        if "steps_to_regenerate" not in self.fixed:
            self._fewer_steps()

    def _vary(self, name: str, values: Sequence[Any], num_steps: int | None = None) -> None:
        """Try all `values` around the best so far, in `num_steps` where they are given."""
        if name in self.fixed:
            return
        around = self.best.settings
        if num_steps is not None and around.start_at_timestep >= num_steps:
            around = replace(around, steps_to_regenerate=num_steps)
        for value in values:
            settings = replace(around, **{name: value})
            how = subset(Reconstruction, settings)
            tried = any(subset(Reconstruction, trial.settings) == how for trial in self.trials)
            if not tried and not self.out_of_time():
                maps = {field: getattr(self.best.settings, field) for field in MAPPED}
                self.best = self.better(self.best, self._reconstruct(replace(settings, **maps)))
                self.bar.set_postfix(best=f"{self.best.merit:.4f}")

    def _fewer_steps(self) -> None:
        """Try more steps; then take the fewest that lose at most `CHEAP_LOSS`."""
        reach = self.best.settings.start_at_timestep
        self._vary("steps_to_regenerate", [count for count in STEPS if count <= reach])
        good_enough = [trial for trial in self.trials if trial.merit >= self.best.merit - CHEAP_LOSS]
        self.best = min(good_enough, key=lambda trial: (trial.settings.steps_to_regenerate, -trial.merit))

    def _reconstruct(self, settings: DdimSettings) -> DdimTrial:
        """The best trial of one way to reconstruct; it begins with the maps of `settings`."""
        detector = replace(self.detector, settings=settings)
        self._found = {name: detector.differences(getattr(self.images, name))
                       for name in ("reference", "good", "pseudo")}
        self._pixel_difference = settings.pixel_difference
        best = self.try_out(settings)
        for names, values in self._choices():
            for value in values if not self.fixed & set(names) else ():
                trial = self.try_out(replace(best.settings, **dict(zip(names, value, strict=True))))
                best = self.better(best, trial)
        self.bar.update()
        return best

    def _choices(self) -> Iterator[tuple[tuple[str, ...], list[tuple]]]:
        """Settings of the maps, with the values they may take, in the order in which they are varied."""
        begun = self.detector.settings
        num_layers = self._found["good"].layers.shape[1]
        total = begun.pl_contrib + begun.fl_contrib
        single = [tuple(float(i == k) for i in range(num_layers)) for k in range(num_layers)] * (num_layers > 1)
        mixtures = [(round(total * share, 3), round(total * (1 - share), 3)) for share in (0, .25, .5, .75, 1)]
        norms = [("none",), ("contrast",)] + [("location",)] * (not self.detector.patching)
        yield ("map_norm",), norms
        yield ("pl_contrib", "fl_contrib"), mixtures
        yield ("pixel_difference",), [("max_square",), ("mean_abs",)]
        yield ("layer_weights",), [((1.0,) * num_layers,), *((weights,) for weights in single)]
        yield ("blur_sigma",), [(1.0,), (2.0,), (4.0,), (8.0,)]
        yield ("top_share",), [(0.0,), (0.001,), (0.005,), (0.02,)]
        yield ("map_norm",), norms
        yield ("pl_contrib", "fl_contrib"), mixtures

    def parts(self, settings: DdimSettings) -> Parts:
        """See `Search.parts`; those of the current reconstruction."""
        kept = {name: self._with_pixel_map(name, found, settings) for name, found in self._found.items()}
        normalisation = normalisation_of(settings, kept["reference"])
        detector = replace(self.detector, settings=settings, normalisation=normalisation)
        return {name: detector.parts_of(kept[name]) for name in ("good", "pseudo")}

    def _with_pixel_map(self, name: str, found: Differences, settings: DdimSettings) -> Differences:
        """The differences with the kind of pixel map that the settings ask for."""
        if settings.pixel_difference == self._pixel_difference:
            return found
        images = getattr(self.images, name)
        return found._replace(pixel=pixel_map(images, found.reconstruction, settings.pixel_difference))


# What is searched of the maps, and goes on from one reconstruction to the next.
MAPPED = ("map_norm", "pl_contrib", "fl_contrib", "pixel_difference", "layer_weights", "blur_sigma", "top_share")


def normalisation_of(settings: DdimSettings, reference: Differences) -> Normalisation | None:
    """The statistics of good images that the settings ask for."""
    if settings.map_norm == "none":
        return None
    return fit(settings.map_norm, plain_parts(reference, settings.layer_weights), reference.reconstruction)


def _label(trial: DdimTrial) -> str:
    settings = trial.settings
    return (f"weight {settings.recon_weight:g}, start {settings.start_at_timestep}, {settings.steps_to_regenerate} "
            "steps")


def plot_trials(path: Path, trials: Sequence[DdimTrial], best: DdimTrial) -> None:
    """Draw tuning.png, the merit of the ways to reconstruct."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    reached: dict[Reconstruction, DdimTrial] = {}
    for trial in trials:
        how = subset(Reconstruction, trial.settings)
        reached[how] = max(reached.get(how, trial), trial, key=lambda t: t.merit)
    order = sorted(reached.values(), key=lambda trial: trial.merit)
    figure = Figure(figsize=(8, 1.9 + 0.28 * len(order)), layout="constrained")
    axis = figure.subplots()
    labels = [_label(trial) for trial in order]
    for name, marker in (("aupro", "o"), ("auroc", "s"), ("pixel_ap", "^"), ("merit", "|")):
        axis.plot([getattr(t, name) for t in order], labels, marker, label={
            "aupro": "AUPRO", "auroc": "image AUROC", "pixel_ap": "pixel AP", "merit": "their mean"}[name])
    axis.axhline(labels.index(_label(best)), color="#1b1f24", linewidth=0.8, linestyle="--")
    axis.set(title="Pseudo-validation: the best map of every reconstruction; dashed: chosen",
             xlabel="measured on pseudo-anomalies; higher is better")
    axis.set_ylim(-0.6, len(order) - 0.4)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=4)
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, format="png", dpi=110, metadata={"Software": None})
