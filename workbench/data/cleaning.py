"""Missing values, which are NaN in floating inputs: `DropMissing`, `FillMissing`, `Interpolate`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from workbench.data.preprocess import Preprocess, check_channels, numbers, per_channel
from workbench.data.scaling import moments, refuse_channels, unfitted
from workbench.errors import DataError, nearest

_STATISTICS = ("mean", "median")


def has_missing(x: np.ndarray) -> bool:
    """Whether an array holds NaN; ids and bytes cannot."""
    # the smallest value is NaN where any is, and nothing of the array's size is made
    return x.dtype.kind == "f" and bool(x.size) and bool(np.isnan(x.min()))


def complete(x: np.ndarray) -> np.ndarray:
    """Which samples hold no NaN, ``(N,)`` bool."""
    return ~np.isnan(x).reshape(len(x), -1).any(axis=1)


@dataclass(frozen=True)
class DropMissing(Preprocess):
    """Leave out the samples that have missing values, from training, calibration and test split alike.

    A `Task` leaves them out when it is made, before it draws the calibration sample, and says in `Task.notes` how many
    there were. What an earlier step filled is not missing any more. In a package the step refuses such samples.
    """

    mends_missing: ClassVar[bool] = True

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def apply(self, x: np.ndarray) -> np.ndarray:
        if has_missing(x):
            kept = complete(x)
            raise DataError(
                f"{int((~kept).sum())} of {len(x)} samples have missing values, the first at {int(np.argmin(kept))}; "
                "this preprocessing takes complete samples only. Leave them out, or build the task with "
                "wb.data.FillMissing or wb.data.Interpolate."
            )
        return x.copy()


@dataclass(frozen=True)
class FillMissing(Preprocess):
    """Put a number where a value is missing.

    Parameters
    ----------
    with_
        ``mean`` or ``median`` of the training split's values, of each channel of images and each column of a table; or
        one number for all.
    values
        What fitting fills in: the number of each channel.

    Raises
    ------
    DataError
        If `with_` is another word or not finite.
    """

    mends_missing: ClassVar[bool] = True

    with_: str | float = "mean"
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.with_, str):
            object.__setattr__(self, "with_", numbers("FillMissing", "with_", self.with_, count=1)[0])
        elif self.with_ not in _STATISTICS:
            raise DataError(
                f"FillMissing cannot fill with {self.with_!r}. {nearest(self.with_, _STATISTICS)} Or give a number."
            )
        values = numbers("FillMissing", "values", self.values) if np.size(self.values) else ()
        if values and not isinstance(self.with_, str):
            raise DataError(f"FillMissing({self.with_:g}) fills with one number; leave out values={self.values!r}.")
        object.__setattr__(self, "values", values)

    @property
    def fitted(self) -> bool:
        return not isinstance(self.with_, str) or bool(self.values)

    def fit(self, chunks: Iterable[np.ndarray]) -> FillMissing:
        """With the training split's statistic of each channel; refuses channels without any value.

        The mean is taken in one pass; for the median all training samples are held in memory.
        """
        if self.with_ == "mean":
            count, values, _, axes = moments(chunks)
            refuse_channels("FillMissing", axes, count == 0, "no value")
        else:
            x = np.concatenate(list(chunks))
            channels, axes = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1), x.ndim
            refuse_channels("FillMissing", axes, np.isnan(channels).all(axis=1), "no value")
            values = np.nanmedian(channels, axis=1)
        return replace(self, values=tuple(values.tolist()))

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.values:
            check_channels("FillMissing", len(self.values), shape)
        return shape

    def apply(self, x: np.ndarray) -> np.ndarray:
        if not self.fitted:
            raise unfitted("FillMissing")
        fill = per_channel(self.values, x.ndim) if self.values else np.float32(self.with_)
        return np.where(np.isnan(x), fill, x)


@dataclass(frozen=True)
class Interpolate(Preprocess):
    """Draw a straight line over missing values, along the last axis: time in a series, a row of pixels in an image.

    Before the first value of a row and after the last, that value is repeated. A row without any value stays missing:
    let `FillMissing` or `DropMissing` follow where that happens.
    """

    mends_missing: ClassVar[bool] = True

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def apply(self, x: np.ndarray) -> np.ndarray:
        mended = x.copy()
        if has_missing(x):
            rows = mended.reshape(-1, x.shape[-1])
            gaps = np.isnan(rows)
            broken = gaps.any(axis=1) & ~gaps.all(axis=1)
            rows[broken] = _interpolated(rows[broken], ~gaps[broken])
        return mended


def _interpolated(rows: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Each row with its gaps filled from the nearest known values on both sides; every row has at least one."""
    place = np.arange(rows.shape[1])
    before = np.maximum.accumulate(np.where(known, place, -1), axis=1)
    after = np.minimum.accumulate(np.where(known, place, rows.shape[1])[:, ::-1], axis=1)[:, ::-1]
    before, after = np.where(before < 0, after, before), np.where(after == rows.shape[1], before, after)
    share = (place - before) / np.maximum(after - before, 1)
    low, high = (np.take_along_axis(rows, side, axis=1).astype(np.float64) for side in (before, after))
    return low * (1 - share) + high * share
