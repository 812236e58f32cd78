"""How well a reconstruction restores a damaged image whose good original is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

from torch import Tensor

WORTH = 0.1     # a mean error of one level elsewhere costs as much as this share of the damage left in place


class Restoration(NamedTuple):
    """The damage that is removed, and the error that is made elsewhere.

        gone         share of the damage that is removed: 1 for the good original, 0 for the damaged image
        elsewhere    mean absolute error outside the damage, in levels of 255
    """

    gone: float
    elsewhere: float

    @property
    def merit(self) -> float:
        """A single number to compare reconstructions by."""
        return self.gone - WORTH * self.elsewhere


def restored(found: Tensor, good: Tensor, damaged: Tensor, mask: Tensor) -> Restoration:
    """The restoration of one image.

        found           reconstruction r of the damaged image (3, H, W) in [-1, 1]
        good, damaged   the original x and the image with damage y'                 likewise
        mask            (1, H, W), 1 on the damage and 0 elsewhere; both occur
    With d = y' - x, gone = 1 - <r - x, d> / <d, d> over the mask: only what is left of the damage counts, and texture
    that cannot be guessed does not.
    """
    region = mask.bool().expand_as(good)
    d, error = (damaged - good)[region], found - good
    gone = 1 - float(error[region] @ d / (d @ d))
    return Restoration(gone, float(error[~region].abs().mean()) * 127.5)


def restorations(found: Tensor, good: Tensor, damaged: Tensor, masks: Tensor) -> list[Restoration]:
    """`restored` for each of N images; arguments (N, 3, H, W), masks (N, 1, H, W)."""
    return [restored(*each) for each in zip(found, good, damaged, masks, strict=True)]


def typical(each: Sequence[Restoration]) -> Restoration:
    """The medians over images."""
    return Restoration(*(median(values) for values in zip(*each, strict=True)))


def by_kind(each: Sequence[Restoration], kinds: Sequence[str]) -> Mapping[str, Restoration]:
    """The medians over the images of each kind of damage, kinds in their first order."""
    return {kind: typical([one for one, other in zip(each, kinds, strict=True) if other == kind])
            for kind in dict.fromkeys(kinds)}
