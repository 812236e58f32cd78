"""The settings of conditioned denoising, chosen by pseudo-anomalies on good images and kept for later."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dbad.data.splits import names_of, some_of
from dbad.declared import check_declared, check_types, types_of
from dbad.families.ddim import DDIM
from dbad.families.ddim.detector import DdimDetector
from dbad.families.ddim.options import DdimSettings, MapOptions, Reconstruction
from dbad.families.ddim.search import DdimSearch, plot_trials
from dbad.families.digests import digests
from dbad.families.search import changes, network_images, outcome, pseudo_validation, within, write_trials
from dbad.files.atomic import read_json, write_json
from dbad.files.names import TUNED, TUNING, TUNING_PLOT
from dbad.records import Sample
from dbad.report.results import listed

FIRST = 2 / 3       # share of the time for tuning that the first trial may take


def tune(detector: DdimDetector, train: Sequence[Sample], given: Collection[str], minutes: float,
         folder: Path) -> DdimSettings:
    """The best settings, found by pseudo-anomalies on good images; those that were `given` stay.

    The images are those of the training. Settings chosen on the held-out images would suit these better than new ones,
    and the promised false-alarm rate would not hold.
    """
    begun = time.monotonic()
    good, reference = some_of(train[::2]), reference_of(train)
    images = pseudo_validation(network_images(detector, good), names_of(good),
                               network_images(detector, reference), detector.settings.seed)
    everything, images = images, within(images, seconds_of_image(detector, images.reference), FIRST * 60 * minutes)
    if images is not everything:
        print(f"--tune_minutes {minutes:g} leaves time for {len(images.pseudo)} pseudo-anomalies instead of "
              f"{len(everything.pseudo)}")
    search = DdimSearch(detector, images, given, minutes - (time.monotonic() - begun) / 60)
    best, first = search.run(), search.trials[0]
    write_trials(folder / TUNING, search.trials, best, (Reconstruction, MapOptions))
    plot_trials(folder / TUNING_PLOT, search.trials, best)
    print(f"tuned on {len(images.pseudo)} pseudo-anomalies{' until --tune_minutes' * search.stopped}: "
          f"{outcome(first, best)}; changed: {listed(changes(first, best))}")
    return best.settings


def reference_of(train: Sequence[Sample]) -> Sequence[Sample]:
    """The training images by which maps are normalised: none that settings are judged by, unless there is only one."""
    return some_of(train[1::2] or train)


def seconds_of_image(detector: DdimDetector, images: Tensor) -> float:
    """The time that an image takes to be reconstructed and compared, measured on the first batch of images."""
    begun, batch = time.monotonic(), images[:detector.machine.batch_size]
    detector.differences(batch)
    return (time.monotonic() - begun) / len(batch)


def _weights(folder: Path, settings: DdimSettings) -> dict[str, str]:
    """The fingerprints of the weights that settings are chosen for; the normalisation follows from them."""
    return digests(folder, DDIM, replace(settings, map_norm="none"))


def save_tuned(folder: Path, settings: DdimSettings) -> None:
    """Write the chosen settings, and fingerprints of the weights that they are for."""
    write_json(folder / TUNED, {"settings": settings.record(), "digests": _weights(folder, settings)})


def tuned_before(folder: Path, settings: DdimSettings, given: Collection[str]) -> DdimSettings:
    """The settings with those that --tune has chosen for these weights, except the given ones; else unchanged."""
    path = folder / TUNED
    if not path.is_file():
        return settings
    known = read_json(path)
    check_types(known, {"settings": dict[str, Any], "digests": dict[str, str]}, path, ("settings", "digests"))
    check_declared(known["settings"], types_of(DdimSettings), path)
    now = _weights(folder, settings)
    if not known["digests"] or {**now, **known["digests"]} != now:      # older ones have fewer
        print(f"{path} was tuned for other weights; the preset's settings are used")
        return settings
    print(f"settings tuned before are used ({path}); --tune tunes again, --no_tune uses the preset's")
    chosen = types_of(Reconstruction, MapOptions).keys() - set(given)
    return replace(settings, **{name: tuple(value) if isinstance(value, list) else value
                                for name, value in known["settings"].items() if name in chosen})
