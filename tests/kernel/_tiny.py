"""Networks, data and a checkpoint small enough that a training takes a moment."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

import workbench as wb
from workbench.compression import Checkpoint
from workbench.errors import Cancelled
from workbench.jobs import Progress, on_progress


def blobs(classes: int = 3, count: int = 65, seed: int = 0, spread: float = 1.0) -> wb.Task:
    """Points around one centre per class; 65 samples leave a last batch of one."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    x = (np.eye(classes, 6)[labels] * 3 + spread * rng.normal(size=(count, 6))).astype(np.float32)
    return wb.Task.from_arrays(x, labels, x, labels, calibration=8)


def few_digits() -> wb.Task:
    """Noise of the shape that LeNet-5 takes, in ten classes."""
    x = np.random.default_rng(0).normal(size=(48, 1, 28, 28)).astype(np.float32)
    y = np.arange(48) % 10
    return wb.Task.from_arrays(x, y, x[:20], y[:20], calibration=10)


def mlp(*last: nn.Module, classes: int = 3) -> wb.Model:
    """A layer with batch normalisation and dropout, and one more."""
    torch.manual_seed(0)
    layers = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, classes), *last
    return wb.load(nn.Sequential(*layers), inputs=torch.zeros(2, 6))


class Memory(Checkpoint):
    """A checkpoint that outlives the call, with a count of what was saved."""

    def __init__(self) -> None:
        self.data: bytes | None = None
        self.saved = 0

    def load(self) -> bytes | None:
        return self.data

    def save(self, data: bytes) -> None:
        self.data, self.saved = data, self.saved + 1

    def clear(self) -> None:
        self.data = None


def stop_at(words: str) -> Progress:
    """A cancel at the first report that says these words."""

    def report(_: float, message: str) -> None:
        if words in message:
            raise Cancelled("stopped by hand.")

    return on_progress(report)


def heard() -> tuple[Progress, list[str]]:
    """A progress, and the words it is told."""
    words: list[str] = []
    return on_progress(lambda _, message: words.append(message)), words


def fails(work: Callable[[], object], error: type[Exception]) -> Exception:
    """The error that `work` ends in."""
    try:
        work()
    except error as caught:
        return caught
    raise AssertionError(f"no {error.__name__} was raised")
