"""From named maps to one anomaly map and a score: the one way that all families go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dbad import maps
from dbad.finite import check_finite

if TYPE_CHECKING:
    from typing_extensions import Self


class Settings(ABC):
    """What the settings of the families' detectors, dataclasses each, have in common.

    They are picked out of those of a calibration, and they make the anomaly map and the score.
    """

    center_crop: int

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """Out of a larger set of settings."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})

    @property
    @abstractmethod
    def contributions(self) -> dict[str, float]:
        """Weights of the parts in the anomaly map, by name; 0 for those that do not count."""

    @abstractmethod
    def score(self, anomaly_map: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N,)."""

    def combine(self, parts: dict[str, Tensor], scales: dict[str, float]) -> tuple[Tensor, Tensor]:
        """Parts, each (N, 1, H, W), and their scales -> anomaly map (N, 1, H, W) and score (N,).

        What is not finite is a `NotFinite`: it would be below every threshold, and its image called good.
        """
        weights = self.contributions
        check_finite({f"{name} map": part for name, part in parts.items() if weights[name]})
        anomaly_map = maps.cropped(maps.fuse(parts, scales, weights), self.center_crop)
        score = self.score(anomaly_map)
        check_finite({"anomaly map": anomaly_map, "score": score})
        return anomaly_map, score
