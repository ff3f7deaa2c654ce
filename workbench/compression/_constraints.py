"""What must hold of the weights while they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


class Constraint:
    """What must hold of the weights while they are trained; the base class asks nothing."""

    def before_update(self, share: float) -> None:
        """Called before each update with the share of the training done, 0 to 1."""

    def after_gradients(self) -> None:
        """Called once the gradients are there, before the update: change them where weights must move alike."""

    def after_update(self) -> None:
        """Called after each update, without gradients: put the weights back to where they may be."""

    def state(self) -> dict[str, Any]:
        """What it changed in itself since it was made, in tensors, numbers, words, and lists and dicts of them.

        Saved with each epoch, so that a training that was broken off goes on with the same masks or centroids.
        """
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave; called on a constraint made as the first one was."""


class KeepZeros(Constraint):
    """Weights that pruning set to zero stay zero; a layer that is all zero may still learn."""

    def __init__(self, weights: Sequence[nn.Parameter]):
        masks = [(weight, weight.detach() != 0) for weight in weights]
        self._masks = [(w, mask) for w, mask in masks if bool(mask.any()) and not bool(mask.all())]

    def after_update(self) -> None:
        for weight, mask in self._masks:
            weight.mul_(mask)
