"""How a training updates the weights: its settings, optimiser, learning rate and precision."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

OPTIMISERS = ("adam", "sgd")
_MOMENTUM = 0.9


@dataclass(frozen=True)
class Plan:
    """How to train; the settings of a step that trains have the same names and meaning."""

    epochs: int
    learning_rate: float
    batch_size: int = 32
    optimizer: str = "adam"
    weight_decay: float = 0.0
    patience: int = 0
    validation: float = 0.1
    mixed_precision: bool = False

    @classmethod
    def of(cls, settings: object, **changed: Any) -> Plan:
        """The plan that a step's settings of the same names make; those it does not have keep their defaults."""
        given = {f.name: getattr(settings, f.name) for f in fields(cls) if hasattr(settings, f.name)}
        return cls(**given | changed)

    def rate(self, share: float) -> float:
        """The learning rate once this share of the training is done: it falls to zero along half a cosine."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * share))

    def optimiser(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW, or SGD with Nesterov momentum."""
        if self.optimizer == "adam":
            return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            parameters, lr=self.learning_rate, momentum=_MOMENTUM, nesterov=True, weight_decay=self.weight_decay
        )


def reduced_precision(device: torch.device) -> torch.dtype:
    """What mixed precision computes in: bfloat16 keeps float32's range and needs no scaling; old GPUs lack it."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16
