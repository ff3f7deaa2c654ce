"""The weights of a model as a file as small as their entropy allows: gaps, codebooks and indices, Huffman coded.

After Han, Mao & Dally, "Deep Compression", ICLR 2016, sections 2 to 4. The file holds what the tensors are, not what is
computed with them: reading it takes the model it was made of, or any other of the same structure.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from workbench.compression import _coded, _tensors
from workbench.compression._coded import Coded, Head
from workbench.compression._reader import Reader
from workbench.compression._tensors import Stored
from workbench.errors import LoadError
from workbench.models.model import Model

_MAGIC = b"\x89WBW"
_VERSION = 1
_HEADER = struct.Struct("<4sB8sIQ")  # magic, version, structure, CRC-32 and length of the body
_WIDTHS = (1, 2, 4, 8)


def encode(model: Model) -> bytes:
    """Every parameter and buffer of the model's module, or every initialiser of its graph, in a small file.

    Each weight, which is a tensor of two axes or more, is written in the shortest of four ways: all values, or the gaps
    between those that are not zero and the values there; the values as they are, byte by byte, or as a codebook and
    indices. All other tensors, and the codebooks, follow each other as they are. Each of these streams is packed into
    few bits, or Huffman coded, or deflated, whichever is shortest.

    Returns
    -------
    bytes
        `decode` gives back the same bits, but for negative zeros of weights, which become the zeros they are equal to.
    """
    tensors = _tensors.stored(model)
    return assemble(tensors, [_coded.shortest(_coded.ways(tensor)) for tensor in tensors])


def decode(data: bytes, model: Model) -> Model:
    """A copy of `model` with the weights that `encode` wrote to `data`.

    Parameters
    ----------
    model
        Of the structure of the encoded one: the same tensors in name, dtype and shape. Its own weights do not matter.

    Raises
    ------
    LoadError
        If `data` is no such file, or truncated, damaged, of another version, or of a model of another structure.
    """
    tensors = _tensors.stored(model)
    reader = Reader(_checked(data, tensors, model.name))
    try:
        heads = [_coded.read_head(reader, tensor) for tensor in tensors]
        pools = _read_pools(reader, heads, tensors)
        patterns = {
            tensor.name: _coded.decode(reader, head, pooled, tensor)
            for tensor, head, pooled in zip(tensors, heads, pools, strict=True)
        }
        reader.end()
    except ValueError as error:
        raise LoadError(f"The file of compressed weights is damaged: {error}. Take another copy of it.") from None
    return _tensors.with_patterns(model, patterns)


def assemble(tensors: Sequence[Stored], coded: Sequence[Coded]) -> bytes:
    """The file of these tensors, each in the way that was chosen for it."""
    heads = b"".join(each.head.written() for each, tensor in zip(coded, tensors, strict=True) if tensor.is_weight)
    body = b"".join((heads, _pools(coded), *(each.body for each in coded)))
    return _HEADER.pack(_MAGIC, _VERSION, _structure(tensors), zlib.crc32(body), len(body)) + body


def _checked(data: bytes, tensors: Sequence[Stored], name: str) -> bytes:
    """The body of the file, which is whole and of a model with these tensors; else `LoadError`."""
    if data[: len(_MAGIC)] != _MAGIC[: len(data)] or not data:
        raise LoadError(
            f"This is no file of compressed weights: it begins with {data[:4]!r}, not {_MAGIC!r}. Give what "
            "workbench.compression.coding.encode returned."
        )
    if len(data) < _HEADER.size:
        raise LoadError(f"The file of compressed weights is truncated: {len(data)} bytes are less than its header.")
    _, version, structure, crc, length = _HEADER.unpack_from(data)
    if version != _VERSION:
        raise LoadError(
            f"The file of compressed weights has version {version}, and this release reads version {_VERSION}. Encode "
            "the model again with this one."
        )
    body = data[_HEADER.size :]
    if len(body) != length:
        what = "truncated" if len(body) < length else "followed by something else"
        raise LoadError(
            f"The file of compressed weights is {what}: {len(body)} bytes after its header, where {length} are "
            "announced. Take another copy of it."
        )
    if zlib.crc32(body) != crc:
        raise LoadError("The file of compressed weights is damaged: its checksum is wrong. Take another copy of it.")
    if structure != _structure(tensors):
        raise LoadError(
            f"The file holds the weights of another model than {name}: names, dtypes or shapes of the tensors differ. "
            "Give the model that was encoded, or one of the same structure, with every step that changed its layers."
        )
    return body


def _structure(tensors: Iterable[Stored]) -> bytes:
    described = [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    return hashlib.sha256(repr(described).encode()).digest()[:8]


def _pools(coded: Sequence[Coded]) -> bytes:
    """What is pooled of all tensors, first what is one byte wide, then two, …; as planes, each behind its length."""
    parts = []
    for width in _WIDTHS:
        pooled = [each.pooled for each in coded if each.pooled.itemsize == width and each.pooled.size]
        if pooled:
            head = Head(0, sum(map(len, pooled)), 0, 0)
            parts.append(Coded(head, _coded.planes(np.concatenate(pooled)), pooled[0][:0]).body)
    return b"".join(parts)


def _read_pools(reader: Reader, heads: Sequence[Head], tensors: Sequence[Stored]) -> list[np.ndarray]:
    """Its part of the pools for each tensor."""
    parts = [tensor.patterns[:0] for tensor in tensors]
    for width in _WIDTHS:
        mine = [i for i, head in enumerate(heads) if head.pooled and tensors[i].patterns.itemsize == width]
        if mine:
            counts = [heads[i].pooled for i in mine]
            values = reader.planes(sum(counts), np.dtype(f"<u{width}"))
            for i, part in zip(mine, np.split(values, np.cumsum(counts)[:-1]), strict=True):
                parts[i] = part
    return parts
