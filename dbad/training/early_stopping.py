"""Early stopping: the best epoch so far, and when to stop."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn


class Best:
    """Early stopping: the epoch with the lowest held-out loss so far, and its weights.

    The weights from before training count as epoch 0. Every epoch must be reported.

        patience    epochs in a row without a new lowest loss after which the training stops; 0 never stops it
        epoch       the best epoch
        loss        its held-out loss
        seen        the last epoch that was measured
        first       the held-out loss of epoch 0
    """

    def __init__(self, patience: int):
        self.patience, self.epoch, self.seen = patience, 0, 0
        self.first = self.loss = math.inf
        self.weights: list[Tensor] = []

    @property
    def exhausted(self) -> bool:
        return 0 < self.patience <= self.seen - self.epoch

    def judge(self, epoch: int, loss: float, weights: list[Tensor]) -> None:
        """Compare the held-out loss after `epoch` with the lowest one, and keep the weights if it is lower."""
        self.seen = epoch
        if epoch == 0:
            self.first = loss
        if epoch == 0 or loss < self.loss:
            self.epoch, self.loss, self.weights = epoch, loss, [w.detach().cpu().clone() for w in weights]

    def copy_to(self, parameters: list[nn.Parameter]) -> None:
        for parameter, weight in zip(parameters, self.weights, strict=True):
            parameter.data.copy_(weight)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
