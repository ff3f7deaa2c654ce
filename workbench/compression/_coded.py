"""One tensor as streams of bytes: dense or by the gaps between what is not zero, plain or by a codebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from workbench.compression import _bits
from workbench.compression._reader import Reader, varint
from workbench.compression._tensors import Stored

_SHARED, _SPARSE = 1, 2  # flags of a method; plain has neither
_SKIP = 255  # a gap that passes over so many zeros and has no value behind it
_MOST_SHARED = 2**16


@dataclass(frozen=True)
class Head:
    """How a tensor is written: all that says how long its streams are.

    Attributes
    ----------
    method
        Flags: by codebook, sparse.
    held
        Values written one by one: those that are not zero, if it is sparse.
    gaps
        Symbols that say where they are; 0 unless it is sparse.
    pooled
        Values that are written together with those of other tensors: its codebook, or a bias whole.
    """

    method: int
    held: int
    gaps: int
    pooled: int

    def written(self) -> bytes:
        """The head of a weight; others have none."""
        numbers = [self.method]
        if self.method & _SPARSE:
            numbers += [self.held, self.gaps]
        if self.method & _SHARED:
            numbers += [self.pooled]
        return b"".join(map(varint, numbers))


@dataclass(frozen=True, eq=False)
class Coded:
    """A tensor as it is written: `streams` are u8, `pooled` as many patterns as the head says."""

    head: Head
    streams: tuple[np.ndarray, ...]
    pooled: np.ndarray

    @cached_property
    def body(self) -> bytes:
        """The packed streams, each behind its length."""
        packed = [_bits.pack(stream) for stream in self.streams]
        return b"".join(varint(len(each)) + each for each in packed)

    @property
    def bytes(self) -> int:
        """What it adds to the file, if what is pooled were not compressed any further."""
        return len(self.head.written()) + len(self.body) + self.pooled.nbytes

    @property
    def huffman_bytes(self) -> float:
        """The same with streams as Huffman codes of their own would make them, without tables, lengths and head."""
        return sum(map(_bits.huffman_bytes, self.streams)) + self.pooled.nbytes


def ways(tensor: Stored) -> list[Coded]:
    """All the ways in which the tensor can be written; what is no weight has one, which leaves it to the pool."""
    if not tensor.is_weight:
        return [Coded(Head(0, 0, 0, tensor.patterns.size), (), tensor.patterns)]
    values = tensor.without_negative_zeros
    dense = _ways(0, (), values)
    positions = np.flatnonzero(values)
    if len(positions) == len(values):
        return dense
    return [*dense, *_ways(_SPARSE, (_gaps(positions),), values[positions])]


def shortest(found: Sequence[Coded]) -> Coded:
    """The way that adds least to the file."""
    return min(found, key=lambda way: way.bytes)


def decode(reader: Reader, head: Head, pooled: np.ndarray, tensor: Stored) -> np.ndarray:
    """The patterns of the tensor whose body comes next; `tensor` has its size and dtype."""
    if not tensor.is_weight:
        return pooled
    values = np.zeros_like(tensor.patterns)
    places = _positions(reader.stream(head.gaps), head.held, len(values)) if head.method & _SPARSE else slice(None)
    if head.method & _SHARED:
        indices = reader.planes(head.held, _index_dtype(head.pooled))
        if int(indices.max(initial=0)) >= max(head.pooled, 1):
            raise ValueError("an index past the codebook")
        values[places] = pooled[indices]
    else:
        values[places] = reader.planes(head.held, values.dtype)
    return values


def read_head(reader: Reader, tensor: Stored) -> Head:
    """The head of a tensor of this size; nothing in it is larger than the tensor allows."""
    count = tensor.patterns.size
    if not tensor.is_weight:
        return Head(0, 0, 0, count)
    method = reader.number(_SHARED | _SPARSE)
    held, gaps = count, 0
    if method & _SPARSE:
        held = reader.number(count)
        gaps = reader.number(held + count // _SKIP)
    return Head(method, held, gaps, reader.number(min(_MOST_SHARED, held)) if method & _SHARED else 0)


def planes(values: np.ndarray) -> tuple[np.ndarray, ...]:
    """The first bytes of all values, then the second, …: of floats the last holds sign and exponent, which repeat."""
    return tuple(np.ascontiguousarray(values.view(np.uint8).reshape(-1, values.itemsize).T))


def _ways(method: int, before: tuple[np.ndarray, ...], values: np.ndarray) -> list[Coded]:
    gaps = sum(map(len, before))
    found = [Coded(Head(method, len(values), gaps, 0), (*before, *planes(values)), values[:0])]
    codebook = np.unique(values)
    if values.itemsize > 1 and 0 < len(codebook) <= min(_MOST_SHARED, len(values) // 2):
        indices = np.searchsorted(codebook, values).astype(_index_dtype(len(codebook)))
        head = Head(method | _SHARED, len(values), gaps, len(codebook))
        found.append(Coded(head, (*before, *planes(indices)), codebook))
    return found


def _index_dtype(shared: int) -> np.dtype:
    return np.dtype("<u2" if shared > 256 else "<u1")


def _gaps(positions: np.ndarray) -> np.ndarray:
    """Zeros before each position; 255 of them are one symbol more, as the filler zeros of Deep Compression are."""
    zeros = np.diff(positions, prepend=-1) - 1
    symbols = np.full(len(positions) + int((zeros // _SKIP).sum()), _SKIP, np.uint8)
    symbols[np.cumsum(1 + zeros // _SKIP) - 1] = zeros % _SKIP
    return symbols


def _positions(gaps: np.ndarray, held: int, count: int) -> np.ndarray:
    steps = gaps.astype(np.int64) + (gaps != _SKIP)
    positions = (np.cumsum(steps) - 1)[gaps != _SKIP]
    if len(positions) != held or (held and positions[-1] >= count):
        raise ValueError("gaps that lead elsewhere")
    return positions
