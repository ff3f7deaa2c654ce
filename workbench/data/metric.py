"""`Metric`: what decides "accuracy", sample by sample, and how sure the figure is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from workbench.errors import DataError

_Z95 = 1.959963984540054  # the 97.5 % point of the standard normal distribution


@dataclass(frozen=True)
class Metric(ABC):
    """A score per sample, whose mean is the task's accuracy; 0 is worst, 1 is best.

    Attributes
    ----------
    name
        What a person reads in a table's header: ``accuracy``.
    """

    name: ClassVar[str] = ""

    @abstractmethod
    def per_sample(self, outputs: np.ndarray | tuple[np.ndarray, ...], labels: np.ndarray) -> np.ndarray:
        """One score per sample of a batch.

        Parameters
        ----------
        outputs
            What an engine returned for the batch: one array, or a tuple of several.
        labels
            ``(N,)`` int64.

        Returns
        -------
        numpy.ndarray
            ``(N,)`` float64.

        Raises
        ------
        DataError
            If the outputs do not fit the labels.
        """

    @abstractmethod
    def interval(self, values: np.ndarray) -> tuple[float, float, float]:
        """Mean of the scores of all samples, and the two ends of its 95 % interval."""


@dataclass(frozen=True)
class Accuracy(Metric):
    """Top-1 accuracy: the share of samples whose largest output is at their label.

    Only the first output counts, over its last axis. A row that holds NaN counts as wrong.
    """

    name: ClassVar[str] = "accuracy"

    def per_sample(self, outputs: np.ndarray | tuple[np.ndarray, ...], labels: np.ndarray) -> np.ndarray:
        logits = np.asarray(outputs[0] if isinstance(outputs, (tuple, list)) else outputs)
        if logits.ndim != 2 or len(logits) != len(labels) or logits.shape[1] < 2:
            raise DataError(
                f"The model's first output has the shape {logits.shape}; accuracy over {len(labels)} labels needs "
                f"({len(labels)}, classes) with two classes or more."
            )
        if len(labels) and int(labels.max()) >= logits.shape[1]:
            raise DataError(
                f"The label {int(labels.max())} lies beyond the model's {logits.shape[1]} outputs; "
                "the model was made for another set of classes."
            )
        right = logits.argmax(axis=1) == labels
        if logits.dtype.kind == "f":
            right &= ~np.isnan(logits).any(axis=1)
        return right.astype(np.float64)

    def interval(self, values: np.ndarray) -> tuple[float, float, float]:
        """Share of right samples with its Wilson score interval at 95 %.

        With ``p`` the share among ``n`` and ``z`` = 1.96 the interval is
        ``(p + z²/2n ± z √(p(1 - p)/n + z²/4n²)) / (1 + z²/n)``.

        Raises
        ------
        DataError
            If there are no values, or one is neither 0 nor 1.

        References
        ----------
        E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the American
        Statistical Association 22 (1927), 209-212.
        """
        values = np.asarray(values, np.float64)
        n = values.size
        if n == 0 or not np.isin(values, (0.0, 1.0)).all():
            raise DataError(f"Accuracy needs one 0 or 1 per sample, of at least one sample; given {n} values.")
        right = int(values.sum())
        p = right / n
        centre = p + _Z95**2 / (2 * n)
        half = _Z95 * math.sqrt(p * (1 - p) / n + _Z95**2 / (4 * n * n))
        scale = 1 + _Z95**2 / n
        # the formula gives these two ends exactly; rounding would leave them a hair inside
        low = 0.0 if right == 0 else (centre - half) / scale
        high = 1.0 if right == n else (centre + half) / scale
        return p, low, high
