"""Damage for training: a random kind at a random place of a good image, drawn anew for every training step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Generator, Tensor

from dbad.damage.foreground import as_picture
from dbad.damage.pseudo import KINDS, draw_on
from dbad.damage.site import Picture
from dbad.errors import UserError

KEPT_PICTURES = 256     # of which the foreground is not searched again in every step; about 25 bytes per pixel each


class Damage:
    """A function that damages good images.

        kinds    kinds of damage to draw, of `dbad.damage.pseudo.KINDS`
        whole    True if an index always stands for the same pixels, so that what is known of them can be kept
    """

    def __init__(self, kinds: Sequence[str] = KINDS, whole: bool = True):
        self.kinds, self.whole = tuple(kinds), whole
        self._pictures: dict[int, Picture] = {}

    def __call__(self, index: int, image: Tensor, stream: Generator) -> Tensor:
        """The image (3, H, W) in [-1, 1] with one damage, or as it is where no kind can be seen on it.

        `index` is the number of the image. All randomness follows from `stream`.
        """
        picture = self._picture(index, image)
        for kind in (self.kinds[place] for place in torch.randperm(len(self.kinds), generator=stream).tolist()):
            seed = int(torch.randint(2 ** 62, (), generator=stream))
            try:
                return draw_on(image, picture, kind, np.random.default_rng(seed), [picture]).image
            except UserError:       # it cannot be seen on this image
                continue
        return image

    def _picture(self, index: int, image: Tensor) -> Picture:
        if not self.whole:
            return as_picture(image)
        if index not in self._pictures:
            if len(self._pictures) >= KEPT_PICTURES:
                self._pictures.pop(next(iter(self._pictures)))
            self._pictures[index] = as_picture(image)
        return self._pictures[index]
