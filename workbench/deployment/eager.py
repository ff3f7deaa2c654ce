"""`Eager`: the torch module itself, operation by operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from workbench.deployment._stopwatch import Stopwatch
from workbench.deployment._timing import Recorder
from workbench.deployment._torch import TorchBackend, TorchEngine


@dataclass(frozen=True)
class Eager(TorchBackend):
    """PyTorch as it is: what every other backend is compared with.

    Parameters
    ----------
    device
        ``cpu``, ``cuda`` or ``cuda:1``; inputs and outputs are numpy arrays either way.
    threads
        None for all physical cores. Torch has one thread count for the whole process: the engine sets it when it
        runs, and the last engine to close restores it.
    """

    title: ClassVar[str] = "PyTorch eager"

    device: str = "cpu"
    threads: int | None = None

    @property
    def _engine(self) -> type[EagerEngine]:
        return EagerEngine


class EagerEngine(TorchEngine):
    """The module, called."""

    def recorder(self, inputs: Sequence[np.ndarray]) -> Recorder:
        self._check(tuple(inputs))
        given = "; ".join(f"{spec.name}: {x.dtype} {x.shape}" for spec, x in zip(self.inputs, inputs, strict=True))
        about = f"{self.backend.label} with {given}"
        return Stopwatch(self._module, lambda: self(*inputs), self.name, about, self._device)
