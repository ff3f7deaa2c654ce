"""Raw arrays preprocessed on demand, batch by batch, and what was asked for as a whole kept up to a limit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from workbench.data import _arrays
from workbench.data.preprocess import Preprocess

_CACHE_BYTES = 256 * 2**20
_CHUNK = 256


class Prepared:
    """Preprocessed samples of several splits.

    Parameters
    ----------
    raw
        Raw input arrays of each split, alike in number, layout and dtype.
    steps
        Preprocessing in order.

    Attributes
    ----------
    changed
        Which inputs the steps act on: the images where there are any, else all that are not ids.
    samples
        Shape without the batch axis, and dtype, of each preprocessed input.
    """

    def __init__(self, raw: Mapping[str, Sequence[np.ndarray]], steps: Sequence[Preprocess]):
        self._raw, self._steps = raw, tuple(steps)
        self._whole: dict[str, tuple[np.ndarray, ...]] = {}
        first = next(iter(raw.values()))
        kinds = [_arrays.layout(x) for x in first]
        images = [kind in _arrays.IMAGES for kind in kinds]
        self.changed = tuple(images if any(images) else [kind != "ids" for kind in kinds])
        self.samples = tuple(self._sample(x, changed) for x, changed in zip(first, self.changed, strict=True))

    def _sample(self, raw: np.ndarray, changed: bool) -> tuple[tuple[int, ...], str]:
        shape = _arrays.sample_shape(raw)
        for step in self._steps if changed else ():
            shape = step.shape_after(shape)
        return shape, raw.dtype.name if _arrays.layout(raw) == "ids" else "float32"

    def slice(self, split: str, start: int, stop: int) -> tuple[np.ndarray, ...]:
        """Samples `start` to `stop` as C-contiguous arrays that are the caller's own."""
        whole = self._whole.get(split)
        if whole is not None:
            return tuple(x[start:stop].copy() for x in whole)
        prepared = tuple(np.empty((stop - start, *shape), dtype) for shape, dtype in self.samples)
        for raw, changed, into in zip(self._raw[split], self.changed, prepared, strict=True):
            for low in range(start, stop, _CHUNK):  # in chunks: what the steps make in between stays small
                high = min(low + _CHUNK, stop)
                values = _arrays.to_values(raw[low:high])
                for step in self._steps if changed else ():
                    values = step.apply(values)
                into[low - start : high - start] = values
        return prepared

    def chunks(self, split: str) -> Iterator[tuple[np.ndarray, ...]]:
        """All samples of a split in order, some at a time."""
        count = len(self._raw[split][0])
        return (self.slice(split, start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))

    def remember(self, split: str) -> None:
        """Keep a whole split preprocessed if it fits the limit, letting go of the one kept longest.

        Two threads that ask at once prepare it twice, and nothing worse.
        """
        if split in self._whole:
            return
        count = len(self._raw[split][0])
        room = _CACHE_BYTES - count * sum(int(np.prod(s)) * np.dtype(d).itemsize for s, d in self.samples)
        if room < 0:
            return
        for kept in list(self._whole):
            if sum(x.nbytes for arrays in list(self._whole.values()) for x in arrays) > room:
                self._whole.pop(kept, None)
        self._whole[split] = self.slice(split, 0, count)
