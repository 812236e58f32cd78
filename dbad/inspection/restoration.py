"""How well a run restores damage, measured on held-out good images with pseudo-anomalies drawn on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dbad.damage.pseudo import make_all
from dbad.data.splits import names_of, some_of
from dbad.declared import check_types
from dbad.errors import UserError
from dbad.families.detector import Detector
from dbad.families.search import NUM_PSEUDO, network_images
from dbad.files.atomic import read_json, write_json
from dbad.files.names import RESTORATION
from dbad.metrics.restoration import by_kind, restorations, typical
from dbad.records import Sample

PER_IMAGE = 2           # pseudo-anomalies, at most
_FIELDS = {"gone": float, "elsewhere": float, "num_images": int, "by_kind": dict[str, dict[str, float]]}


def measure_restoration(detector: Detector, held_out: Sequence[Sample]) -> dict[str, Any]:
    """The restoration of pseudo-anomalies on held-out good images, as medians; about twice the work of calibrating.

    They are at most `PER_IMAGE` on each image, and about `NUM_PSEUDO` in all.

        gone, elsewhere   see `metrics.restoration`
        num_images        pseudo-anomalies
        by_kind           the same two by kind of damage
    """
    samples = some_of(held_out)
    good = network_images(detector, samples)
    per_image = min(PER_IMAGE, -(-NUM_PSEUDO // len(good)))
    drawn = make_all(good, names_of(samples), detector.settings.seed, per_image)
    damaged, masks = (torch.stack([getattr(one, name) for one in drawn]) for name in ("image", "mask"))
    _, found = detector.parts(damaged)
    assert found is not None, "this method makes no reconstruction"
    each = restorations(found, good.repeat_interleave(per_image, dim=0), damaged, masks)
    return {**typical(each)._asdict(), "num_images": len(each),
            "by_kind": {kind: one._asdict() for kind, one in by_kind(each, [one.kind for one in drawn]).items()}}


def in_words(found: dict[str, Any]) -> str:
    """A restoration in one line."""
    return (f"{found['gone']:.0%} of the damage removed, error of {found['elsewhere']:.1f} levels of 255 elsewhere "
            f"(medians of {found['num_images']} pseudo-anomalies on held-out images)")


def save_restoration(folder: Path, detector: Detector, held_out: Sequence[Sample], wanted: bool = True) -> None:
    """Measure the restoration of a run, print it and write restoration.json into the run folder.

    It stays unmeasured if it is not `wanted`, or if no damage can be seen on the images; an earlier file is removed.
    """
    (folder / RESTORATION).unlink(missing_ok=True)
    if not wanted:
        return
    try:
        found = measure_restoration(detector, held_out)
    except UserError as error:
        print(f"the restoration was not measured: {error}")
        return
    print(f"restoration: {in_words(found)}")
    write_json(folder / RESTORATION, found)


def read_restoration(folder: Path) -> dict[str, Any] | None:
    """The restoration of the run in a folder; None where it was not measured."""
    path = folder / RESTORATION
    if not path.is_file():
        return None
    found = read_json(path)
    check_types(found, _FIELDS, path, tuple(_FIELDS))
    return {name: found[name] for name in _FIELDS}
