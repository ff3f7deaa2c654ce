"""Pruning a part at a time: how far to go each time, and how long to train in between."""

from __future__ import annotations


def cubic(share: float) -> float:
    """How far of the final sparsity to be after this share of the schedule: fast at first, slow where it hurts.

    Zhu & Gupta, "To prune, or not to prune", 2017, equation 1 with an initial sparsity of 0.
    """
    return 1 - (1 - share) ** 3


def epochs_of_rounds(epochs: int, rounds: int) -> list[int]:
    """`epochs` divided over the rounds; where it does not go up, the last ones have one more."""
    each, left = divmod(epochs, rounds)
    return [each + (number >= rounds - left) for number in range(rounds)]
