"""Maps and scores have to be finite numbers: not-a-number is at or above no threshold, and would pass for good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dbad.errors import UserError


class NotFinite(UserError):
    """What was found of an image is no finite number.

        what      the map or score
        number    of the image, from 0
        name      of the image, or None where it is not known
    """

    def __init__(self, what: str, number: int, name: object = None):
        self.what, self.number = what, number
        image = f"image {number + 1}" if name is None else name
        super().__init__(f"{image}: its {what} has values that are not finite; the weights of the run are damaged, or "
                         "its numbers overflow: try --precision fp32, or train it again")


def check_finite(found: Mapping[str, Tensor]) -> None:
    """Raise `NotFinite` for the first of N images that has another value in one of these tensors (N, ...), by name."""
    for what, values in found.items():
        finite = torch.isfinite(values).reshape(len(values), -1).all(dim=1)
        if not finite.all():
            raise NotFinite(what, int(finite.logical_not().nonzero()[0]))


@contextmanager
def naming(names: Sequence[object], first: int = 0) -> Iterator[None]:
    """Name the image of a `NotFinite`, whose number counts from `first`; it keeps the number if `names` end before."""
    try:
        yield
    except NotFinite as error:
        number = first + error.number
        raise NotFinite(error.what, number, names[number] if number < len(names) else None) from None
