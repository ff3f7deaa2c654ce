"""Fully connected networks for 28 × 28 grey images."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import nn


def _dense(*widths: int) -> nn.Sequential:
    parts: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
    for i, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        parts.append((f"fc{i}", nn.Linear(inputs, outputs)))
        if outputs != widths[-1]:
            parts.append((f"relu{i}", nn.ReLU()))
    return nn.Sequential(OrderedDict(parts))


def lenet300() -> nn.Sequential:
    """LeNet-300-100: 784-300-100-10 (LeCun et al. 1998), the usual case of the pruning literature (Han et al. 2015)."""
    return _dense(784, 300, 100, 10)


def mlp() -> nn.Sequential:
    """784-128-10, the textbook's perceptron with one hidden layer."""
    return _dense(784, 128, 10)
