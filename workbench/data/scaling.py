"""Changes of scale: `MinMax` and `ZScore`, fitted on the training split, and `Shift`, which is given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from workbench.data.preprocess import Normalize, Preprocess, check_channels, numbers, per_channel
from workbench.errors import DataError


@dataclass(frozen=True)
class MinMax(Preprocess):
    """Bring each channel from the range it has in the training split to one range: min-max normalisation.

    ``y = (x - smallest) / (largest - smallest) · (high - low) + low``, in float32. Values outside the training range
    land outside the new one; they are not cut off. Missing values stay missing and do not count.

    Parameters
    ----------
    low, high
        The new range.
    smallest, largest
        What fitting fills in: a number per channel (axis 1: the channels of images, the columns of a table).

    Raises
    ------
    DataError
        If the range is empty, or the numbers per channel do not fit each other.
    """

    low: float = 0.0
    high: float = 1.0
    smallest: tuple[float, ...] = ()
    largest: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        (low,), (high,) = numbers("MinMax", "low", self.low, count=1), numbers("MinMax", "high", self.high, count=1)
        if low >= high:
            raise DataError(f"MinMax goes from {low:g} to {high:g}; give a low below the high, e.g. MinMax(0, 1).")
        smallest, largest = (
            numbers("MinMax", name, getattr(self, name)) if np.size(getattr(self, name)) else ()
            for name in ("smallest", "largest")
        )
        if len(smallest) != len(largest) or any(a >= b for a, b in zip(smallest, largest, strict=True)):
            raise DataError(
                f"MinMax has smallest={smallest} and largest={largest}; each channel needs a smallest value below its "
                "largest. Leave both out: a Task finds them in its training split."
            )
        for name, value in (("low", low), ("high", high), ("smallest", smallest), ("largest", largest)):
            object.__setattr__(self, name, value)

    @property
    def fitted(self) -> bool:
        return bool(self.smallest)

    def fit(self, chunks: Iterable[np.ndarray]) -> MinMax:
        """With the smallest and largest training value of each channel; refuses channels that hold one value only."""
        smallest = largest = None
        axes = 2
        for x in chunks:
            others, axes = _but_channels(x), x.ndim
            # fmin and fmax pass over NaN where there is a number
            low, high = np.fmin.reduce(x, axis=others), np.fmax.reduce(x, axis=others)
            smallest = low if smallest is None else np.fmin(smallest, low)
            largest = high if largest is None else np.fmax(largest, high)
        refuse_channels("MinMax", axes, np.isnan(smallest), "no value")
        refuse_channels("MinMax", axes, smallest == largest, "one value only")
        return replace(self, smallest=tuple(smallest.tolist()), largest=tuple(largest.tolist()))

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.fitted:
            check_channels("MinMax", len(self.smallest), shape)
        return shape

    def apply(self, x: np.ndarray) -> np.ndarray:
        if not self.fitted:
            raise unfitted("MinMax")
        smallest, largest = per_channel(self.smallest, x.ndim), per_channel(self.largest, x.ndim)
        changed = x - smallest
        changed /= largest - smallest
        changed *= np.float32(self.high - self.low)
        changed += np.float32(self.low)
        return changed


@dataclass(frozen=True)
class ZScore(Preprocess):
    """Bring each channel to mean 0 and standard deviation 1 on the training split: z-score normalisation.

    Fitted, it is a `Normalize` by the training split's mean and standard deviation, of each channel of images and each
    column of a table: ``y = (x - mean) / std`` with ``std² = mean((x - mean)²)``. Missing values stay missing and do
    not count.
    """

    @property
    def fitted(self) -> bool:
        return False

    def fit(self, chunks: Iterable[np.ndarray]) -> Normalize:
        """The `Normalize` of these samples; refuses channels that hold one value only."""
        count, mean, squares, axes = moments(chunks)
        refuse_channels("ZScore", axes, count == 0, "no value")
        std = np.sqrt(squares / count)
        refuse_channels("ZScore", axes, std.astype(np.float32) == 0, "one value only")
        return Normalize(mean, std)

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def apply(self, x: np.ndarray) -> np.ndarray:
        raise unfitted("ZScore")


def moments(chunks: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Count, mean and sum of squared deviations of each channel's values, NaN apart, and the number of axes.

    In float64 and in one pass: chunks are merged after Chan, Golub & LeVeque, "Algorithms for computing the sample
    variance", The American Statistician 37 (1983), equation 2.1.
    """
    count, mean, squares, axes = 0, 0.0, 0.0, 2
    for x in chunks:
        others, axes = _but_channels(x), x.ndim
        missing = np.isnan(x)
        values = np.where(missing, 0.0, x.astype(np.float64))
        added = x.size // x.shape[1] - missing.sum(axis=others)
        added_mean = values.sum(axis=others) / np.maximum(added, 1)
        deviation = np.where(missing, 0.0, values - np.expand_dims(added_mean, others))
        total = count + added
        share = added / np.maximum(total, 1)
        delta = added_mean - mean
        squares = squares + np.square(deviation).sum(axis=others) + delta**2 * count * share
        mean, count = mean + delta * share, total
    return count, mean, squares, axes


def refuse_channels(step: str, axes: int, bad: np.ndarray, held: str) -> None:
    """A `DataError` where a channel of the training split holds what no number can be taken from."""
    if not bad.any():
        return
    kind, first, more = "column" if axes == 2 else "channel", int(np.argmax(bad)), int(bad.sum()) - 1
    others = f", and so do {more} more" if more else ""
    remedy = "FillMissing(0)" if step == "FillMissing" else "Scale and Normalize, whose numbers you give,"
    raise DataError(
        f"{step}: {kind} {first} holds {held} in the training split{others}. Leave such {kind}s out of x, or use "
        f"wb.data.{remedy} instead."
    )


def unfitted(step: str) -> DataError:
    """The error of a step that is applied before it has seen training samples."""
    return DataError(f"{step} is not fitted: give it to a Task, whose preprocess then holds the fitted step.")


def _but_channels(x: np.ndarray) -> Sequence[int]:
    return (0, *range(2, x.ndim))


@dataclass(frozen=True)
class Shift(Preprocess):
    """Every value ``x`` the network sees becomes ``gain · x + offset``, in float32.

    Parameters
    ----------
    gain
        Above 0; contrast, exposure, loudness.
    offset
        In the units the network sees, so in standard deviations after `Normalize`; brightness.

    Raises
    ------
    DataError
        If the gain is not positive, or either is not finite.
    """

    gain: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        for name in ("gain", "offset"):
            value = getattr(self, name)
            real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not real or (name == "gain" and value <= 0):
                wanted = "a number above 0" if name == "gain" else "a finite number"
                raise DataError(f"Shift: {name} is {value!r}; {wanted} is needed.")

    @property
    def label(self) -> str:
        """``gain 0.25``, ``gain 2, offset -1``, ``as it is``."""
        parts = [f"gain {self.gain:g}"] if self.gain != 1 else []
        parts += [f"offset {self.offset:+g}"] if self.offset else []
        return ", ".join(parts) or "as it is"

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def apply(self, x: np.ndarray) -> np.ndarray:
        return x * np.float32(self.gain) + np.float32(self.offset)
