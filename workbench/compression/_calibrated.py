"""Calibration samples in chunks, and how far a model's outputs on them are from those it should have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from workbench.data.metric import Metric
from workbench.data.task import Task
from workbench.deployment import Eager
from workbench.errors import DataError
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model
from workbench.profiling.sqnr import sqnr_db

_CHUNK = 32  # samples; what every layer puts out for one chunk is held at a time


@dataclass(frozen=True, eq=False)
class Samples:
    """Preprocessed inputs with their labels, given a chunk at a time.

    Attributes
    ----------
    inputs
        One array per input of the network, batch axis first.
    labels
        ``(n,)`` int64.
    size
        Samples per chunk; where `whole`, a rest that does not fill a chunk is left out.
    """

    inputs: tuple[np.ndarray, ...]
    labels: np.ndarray
    size: int = _CHUNK
    whole: bool = False

    def __len__(self) -> int:
        count = len(self.labels)
        return count - count % self.size if self.whole else count

    def chunks(
        self, words: str = "", progress: Progress = SILENT
    ) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
        """Inputs and labels of each chunk, in order; `progress` is told how many were used."""
        for start in range(0, len(self), self.size):
            progress(start / len(self), f"{words}, {start} of {len(self)} samples")
            part = slice(start, min(start + self.size, len(self)))
            yield tuple(np.ascontiguousarray(x[part]) for x in self.inputs), self.labels[part]
        progress(1.0)

    def picked(self, chosen: np.ndarray | slice) -> Samples:
        """Some of them."""
        return Samples(tuple(x[chosen] for x in self.inputs), self.labels[chosen], self.size, self.whole)


def samples(model: Model, task: Task, *, most: int | None = None) -> Samples:
    """The task's calibration split, or so many of it, in chunks the model takes.

    Raises
    ------
    DataError
        If there are none, or fewer than the network's fixed batch.
    """
    fixed = getattr(model.module, "fixed_batch", None)
    count = task.count("calibration")
    if count < (fixed or 1):
        raise DataError(
            f"{task.name} has {count} calibration samples to take ranges from, and at least {fixed or 1} are needed; "
            "build it with wb.Task.from_arrays(…, calibration=512)."
        )
    count = count if most is None else min(count, max(most, fixed or 1))
    return Samples(task.inputs("calibration", count), task.labels("calibration", count), fixed or _CHUNK, bool(fixed))


@dataclass(frozen=True)
class Score:
    """Distance of a model's outputs from the reference, in decibels, and its accuracy (0 to 1) on the same samples."""

    sqnr_db: float
    accuracy: float


class Judge:
    """Scores versions of a model by their outputs on the same samples.

    Parameters
    ----------
    reference
        What the outputs should be.

    Raises
    ------
    DataError
        If the reference's outputs are NaN, infinite, or all zero.
    """

    def __init__(self, reference: Model, held: Samples, metric: Metric):
        self._held, self._metric = held, metric
        outputs = _outputs(reference, held)
        self._expected = _flat(outputs)
        if not np.isfinite(self._expected).all() or not self._expected.any():
            what = "nothing but zeros" if np.isfinite(self._expected).all() else "NaN or infinity"
            raise DataError(
                f"{reference.name} puts out {what} on calibration samples, so that nothing can be compared with it. "
                "Check that preprocessing and weights belong together."
            )
        self.reference_accuracy = self._accuracy(outputs)

    def score(self, model: Model) -> Score:
        """How a version does."""
        outputs = _outputs(model, self._held)
        return Score(sqnr_db(self._expected, _flat(outputs)), self._accuracy(outputs))

    def _accuracy(self, outputs: Sequence[tuple[np.ndarray, ...]]) -> float:
        chunks = zip(outputs, self._held.chunks(), strict=True)
        return float(np.concatenate([self._metric.per_sample(out, labels) for out, (_, labels) in chunks]).mean())


def _outputs(model: Model, held: Samples) -> list[tuple[np.ndarray, ...]]:
    with Eager().compile(model) as engine:
        found = [engine(*inputs) for inputs, _ in held.chunks()]
    return [out if isinstance(out, tuple) else (out,) for out in found]


def _flat(outputs: Sequence[tuple[np.ndarray, ...]]) -> np.ndarray:
    return np.concatenate([array.ravel().astype(np.float64) for out in outputs for array in out])
