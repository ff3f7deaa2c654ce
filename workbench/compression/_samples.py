"""The samples a training uses: which are held out, in which order the others come, and what noise is put on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.compression._losses import Batch
from workbench.data.task import Task
from workbench.errors import StepError

_VALIDATION_BATCH = 256
_FIRST = 32  # samples; enough that no logits add up to 1 by chance in each


class Samples:
    """The task's training split in memory, one share of it held out.

    Parameters
    ----------
    task
        Its training split is taken whole, preprocessed.
    batch_size
        Samples per update; a single one left over at the end of an epoch is left out.
    validation
        Share held out, 0 to 1, drawn with `seed`.
    step
        Label of the step that trains, for the error.
    device
        Where the batches are to lie.

    Raises
    ------
    StepError
        If nothing is left to train on.
    """

    def __init__(self, task: Task, batch_size: int, validation: float, seed: int, step: str, device: torch.device):
        self._inputs = [torch.from_numpy(x) for x in task.inputs("train", task.count("train"))]
        self.labels = torch.from_numpy(task.labels("train"))
        self._task, self._device = task, device
        self._order = torch.Generator().manual_seed(seed)
        self._noise = np.random.default_rng(seed)
        mixed = torch.randperm(len(self.labels), generator=self._order)
        held = round(validation * len(mixed))
        if held == len(mixed):
            raise StepError(
                f"{step}: validation {validation:g} of {len(mixed)} training samples holds all of them out. Give a "
                "smaller share; 0 trains on all and keeps the last epoch."
            )
        self.held_out, self._used = mixed[:held].sort().values, mixed[held:].sort().values
        self._slices = list(_slices(len(self._used), batch_size))

    @property
    def updates(self) -> int:
        """Batches per epoch."""
        return len(self._slices)

    def epoch(self) -> Iterator[Batch]:
        """The batches of one epoch, in an order of its own."""
        shuffled = self._used[torch.randperm(len(self._used), generator=self._order)]
        for part in self._slices:
            yield self._batch(shuffled[part], augmented=True)

    def validation(self) -> Iterator[Batch]:
        """The held-out samples."""
        for chosen in self.held_out.split(_VALIDATION_BATCH):
            yield self._batch(chosen)

    def first(self) -> Batch:
        """Samples to try the network on before it is trained."""
        return self._batch(torch.arange(min(len(self.labels), _FIRST)))

    def _batch(self, chosen: Tensor, *, augmented: bool = False) -> Batch:
        inputs = [x[chosen] for x in self._inputs]
        if augmented and self._task.augment:
            inputs = map(torch.from_numpy, self._task.augmented([x.numpy() for x in inputs], self._noise))
        return Batch(tuple(x.to(self._device) for x in inputs), self.labels[chosen].to(self._device), chosen)

    def state(self) -> dict[str, Any]:
        """Where its random choices are."""
        return {"order": self._order.get_state(), "noise": self._noise.bit_generator.state}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was called."""
        self._order.set_state(state["order"])
        self._noise.bit_generator.state = state["noise"]


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        # batch normalisation has no variance over a single sample
        if start == 0 or count - start > 1:
            yield slice(start, start + size)
