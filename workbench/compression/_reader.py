"""What a file of weights is read with: nothing is taken to be as long as it says before it is."""

from __future__ import annotations

import numpy as np

from workbench.compression import _bits


def varint(number: int) -> bytes:
    """A whole number of at least 0 in as many bytes as it needs, 7 bits each, the lowest first (LEB128)."""
    parts = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


class Reader:
    """What is left to be read; every method raises `ValueError` where it is not what it should be."""

    def __init__(self, data: bytes):
        self._data, self._at = memoryview(data), 0

    def take(self, count: int) -> bytes:
        """The next so many bytes."""
        if count > len(self._data) - self._at:
            raise ValueError("it ends early")
        self._at += count
        return bytes(self._data[self._at - count : self._at])

    def number(self, most: int) -> int:
        """The next `varint`, which may not be above `most`."""
        number = shift = 0
        while True:
            byte = self.take(1)[0]
            number |= (byte & 0x7F) << shift
            shift += 7
            if number > most or shift > 63:
                raise ValueError(f"a count above {most}, the most there can be")
            if byte < 0x80:
                return number

    def stream(self, count: int) -> np.ndarray:
        """The next stream, of so many symbols, u8."""
        return _bits.unpack(self.take(self.number(len(self._data))), count)

    def planes(self, count: int, dtype: np.dtype) -> np.ndarray:
        """The values whose bytes come next, the first of all, then the second, …"""
        streams = [self.stream(count) for _ in range(dtype.itemsize)]
        return np.ascontiguousarray(np.stack(streams, axis=1)).view(dtype).reshape(count)

    def end(self) -> None:
        """Nothing may be left."""
        if self._at != len(self._data):
            raise ValueError("it goes on after its end")
