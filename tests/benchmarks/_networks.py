"""The four networks the profiling benchmarks look at, each with a task to quantise it with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import workbench as wb

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10"
NAMES = ("resnet20", "lenet5", "transformer", "lstm")


class Transformer(nn.Module):
    """Two encoder layers of width 64 over 32 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class Recurrent(nn.Module):
    """An LSTM of width 64 over 32 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 64, batch_first=True)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.lstm(x)
        return self.head(steps[:, -1])


def network(name: str) -> tuple[wb.Model, wb.Task]:
    """One of `NAMES`. ResNet-20 has its published weights where ../shared/data is there, which changes no time."""
    torch.manual_seed(0)
    if name == "resnet20":
        path = DATA / "resnet20-12fca82f.th"
        model = wb.load(path, architecture="resnet20") if path.exists() else wb.load("resnet20")
        return model, random_task((3, 32, 32))
    if name == "lenet5":
        return wb.load("lenet5"), wb.tasks.digits()
    module = Transformer() if name == "transformer" else Recurrent()
    return wb.load(module, inputs=torch.randn(2, 32, 16), name=name), random_task((32, 16))


def random_task(shape: tuple[int, ...]) -> wb.Task:
    """Numbers to calibrate on."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(96, *shape)).astype(np.float32), np.arange(96) % 2
    return wb.Task.from_arrays(x, y, x, y, calibration=32)
