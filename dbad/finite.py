"""Checks that maps and scores are finite: not-a-number is never at or above a threshold, and would count as good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dbad.errors import UserError


class NotFinite(UserError):
    """Error for a map or score of an image that is not finite.

        what      the map or score
        number    number of the image, from 0
        name      name of the image, or None if it is not known
    """

    def __init__(self, what: str, number: int, name: object = None):
        self.what, self.number = what, number
        image = f"image {number + 1}" if name is None else name
        super().__init__(f"{image}: its {what} has values that are not finite; the weights of the run are damaged, or "
                         "its numbers overflow: try --precision fp32, or train it again")


def check_finite(found: Mapping[str, Tensor]) -> None:
    """Raise `NotFinite` for the first of N images with a value that is not finite in one of the named (N, ...)."""
    for what, values in found.items():
        finite = torch.isfinite(values).reshape(len(values), -1).all(dim=1)
        if not finite.all():
            raise NotFinite(what, int(finite.logical_not().nonzero()[0]))


@contextmanager
def naming(names: Sequence[object], first: int = 0) -> Iterator[None]:
    """Add the image's name to a `NotFinite` raised in the block.

    The numbers of the images count from `first`; an image beyond the end of `names` keeps its number only.
    """
    try:
        yield
    except NotFinite as error:
        number = first + error.number
        raise NotFinite(error.what, number, names[number] if number < len(names) else None) from None
