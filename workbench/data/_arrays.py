"""Checks and conversions of the arrays a `Task` is made from; every refusal is a `DataError` before work starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from workbench.errors import DataError

_IDS = ("int32", "int64", "bool")
_VALUES = ("float16", "float32", "float64", "uint8", "int8", "int16", "uint16")
_CHUNK_BYTES = 16 * 2**20

IMAGES = ("NHW", "NHWC", "NCHW")  # the layouts of images


def read_inputs(x: Any, what: str, *, missing: bool = False) -> tuple[tuple[str, ...], tuple[np.ndarray, ...]]:
    """Names (none where given by position) and C-contiguous arrays of one split's inputs, batch axis first.

    Parameters
    ----------
    x
        An array, tensor or nested list; or a dict or tuple of them for a model with several inputs.
    what
        What an error calls it, e.g. ``x_train``.
    missing
        Whether NaN is accepted, as a missing value that preprocessing deals with.
    """
    if isinstance(x, Mapping):
        names, given = tuple(str(name) for name in x), list(x.values())
    else:
        names, given = (), list(x) if isinstance(x, tuple) else [x]
    if not given:
        raise DataError(f"{what} holds no array; give an array, or a dict or tuple of arrays for several inputs.")
    labels = [f"{what}[{name!r}]" for name in names] or (
        [f"{what}[{i}]" for i in range(len(given))] if len(given) > 1 else [what]
    )
    arrays = tuple(
        _input(value, label, single=len(given) == 1, missing=missing)
        for value, label in zip(given, labels, strict=True)
    )
    for array, label in zip(arrays, labels, strict=True):
        if len(array) != len(arrays[0]):
            raise DataError(
                f"{labels[0]} has {len(arrays[0])} samples but {label} has {len(array)}; they must be as many."
            )
    return names, arrays


def read_labels(y: Any, what: str) -> np.ndarray:
    """Labels as ``(N,)`` int64; refuses what is not a whole number per sample, or is negative."""
    labels = _array(y, what)
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise DataError(
            f"{what} has the shape {labels.shape}; labels are (N,). From one-hot rows: {what}.argmax(axis=1)."
        )
    if labels.ndim != 1:
        raise DataError(f"{what} has the shape {labels.shape}; labels are (N,): {what}.ravel().")
    if labels.dtype.kind not in "iu":
        hint = f"{what}.astype('int64')"
        if labels.dtype.kind in "OSU":
            hint = f"classes, {what} = numpy.unique({what}, return_inverse=True)"
        raise DataError(f"{what} holds {labels.dtype} values; labels are whole numbers from 0 on: {hint}.")
    if len(labels) == 0:
        raise DataError(f"{what} is empty; every split needs at least one sample.")
    labels = labels.astype(np.int64)
    if int(labels.min()) < 0:
        first = int(np.argmax(labels < 0))
        raise DataError(f"{what} holds the label {int(labels[first])} at index {first}; labels count from 0.")
    return labels


def layout(array: np.ndarray) -> str:
    """How an input is read: ``ids``, ``values``, or as images ``NHW``, ``NHWC``, ``NCHW``."""
    if array.dtype.name in _IDS:
        return "ids"
    if array.dtype == np.uint8 and array.ndim == 3:
        return "NHW"
    if array.ndim == 4:
        return "NHWC" if array.dtype == np.uint8 and array.shape[-1] in (1, 3, 4) else "NCHW"
    return "values"


def sample_shape(array: np.ndarray) -> tuple[int, ...]:
    """Shape of one sample once `to_values` has put the channels first; no batch axis."""
    shape = array.shape[1:]
    return {"NHW": (1, *shape), "NHWC": (shape[-1], *shape[:-1])}.get(layout(array), shape)


def to_values(array: np.ndarray) -> np.ndarray:
    """A new C-contiguous array: ids as they are, everything else float32, images as NCHW."""
    kind = layout(array)
    if kind == "ids":
        return array.copy(order="C")
    if kind == "NHW":
        array = array[:, None]
    elif kind == "NHWC":
        array = array.transpose(0, 3, 1, 2)
    return array.astype(np.float32, order="C")


def stratified(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Indices of `count` samples, each class as frequent as in `labels` (to the nearest whole sample), shuffled.

    The same labels, count and seed give the same indices in every process and NumPy version: `RandomState` is the
    generator whose stream NumPy promises not to change.
    """
    random = np.random.RandomState(seed)
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * (count / len(labels))
    quotas = np.floor(exact + 1e-9).astype(int)
    missing = count - quotas.sum()
    quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1
    picked = [random.permutation(np.flatnonzero(labels == c))[:quota] for c, quota in zip(classes, quotas, strict=True)]
    return random.permutation(np.concatenate(picked))


def _array(value: Any, what: str) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise DataError(f"{what} is not one array ({error}); give samples of equal shape.") from None
    # a byte order that is not the machine's would slip through as another dtype
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _input(value: Any, what: str, *, single: bool, missing: bool) -> np.ndarray:
    array = _array(value, what)
    if array.dtype.name not in _IDS + _VALUES:
        raise DataError(
            f"{what} holds {array.dtype} values; accepted: {', '.join(_VALUES)} (numbers), {', '.join(_IDS)} "
            "(token ids, masks). Convert it first, e.g. numpy.stack(list_of_images)."
        )
    if array.ndim < (2 if single else 1):
        raise DataError(
            f"{what} has the shape {array.shape}; give the batch axis first and at least one axis after it."
        )
    if len(array) == 0:
        raise DataError(f"{what} is empty; every split needs at least one sample.")
    if array.size == 0:
        raise DataError(f"{what} has the shape {array.shape}: its samples hold no values.")
    _refuse_non_finite(array, what, missing=missing)
    return np.ascontiguousarray(array)


def _refuse_non_finite(array: np.ndarray, what: str, *, missing: bool) -> None:
    if array.dtype.kind != "f":
        return
    rows = max(1, _CHUNK_BYTES // max(array[0].nbytes, 1))
    bad, first = 0, None
    for start in range(0, len(array), rows):
        with np.errstate(over="ignore"):  # a float64 beyond float32's range becomes inf, and is reported as such
            values = array[start : start + rows].astype(np.float32, copy=False)
        finite = np.isfinite(values)
        if missing:
            finite |= np.isnan(values)
        if not finite.all():
            if first is None:
                offset = np.unravel_index(int(np.argmin(finite)), finite.shape)
                first = (start + int(offset[0]), *(int(i) for i in offset[1:]))
            bad += int(finite.size - np.count_nonzero(finite))
    if bad:
        kind = "infinite" if missing else "NaN or infinite"
        hint = (
            ""
            if missing
            else (
                " If NaN stands for a missing value, let preprocess begin with wb.data.DropMissing(), "
                'wb.data.FillMissing("mean") or wb.data.Interpolate().'
            )
        )
        raise DataError(
            f"{what} holds {bad} value{'s' if bad > 1 else ''} that are {kind} in float32, the first at index "
            f"{first}; repair them (numpy.nan_to_num) or leave those samples out.{hint}"
        )
