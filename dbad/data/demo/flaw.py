"""The description of a defect that a picture function of the demo data draws."""
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Flaw:
    """The defect to draw into a scene: its kind, its random stream, its size."""
    kind: str
    rng: np.random.Generator
    span: float | None = None       # its diameter in scene units; None: the natural size of its kind

    def size(self, low, high):
        """The diameter to draw, in scene units: `span`, or a natural size between `low` and `high`."""
        natural = self.rng.uniform(low, high)
        return natural if self.span is None else self.span

    def width(self, length, low, high):
        """The width of a long defect; with a `span`, wide enough to be seen at that length."""
        ratio = self.rng.uniform(low, high)
        return length * (ratio if self.span is None else max(ratio, 0.3))
