"""Streams of bytes, each written in the shortest of a few ways, and what a Huffman code would make of them."""

from __future__ import annotations

import heapq
import math
import zlib

import numpy as np

_DEFLATE_HUFFMAN, _DEFLATE = 9, 10  # a smaller number is how many bits each byte is packed into
_CODES = {_DEFLATE_HUFFMAN: zlib.Z_HUFFMAN_ONLY, _DEFLATE: zlib.Z_DEFAULT_STRATEGY}
_MEMORY = 9  # the most: 32,768 symbols to a table of codes
_RAW = -zlib.MAX_WBITS  # DEFLATE without zlib's own header and checksum


def pack(symbols: np.ndarray) -> bytes:
    """The shortest of: as few bits for each byte as the largest needs; DEFLATE's Huffman codes alone; DEFLATE.

    Parameters
    ----------
    symbols
        ``(n,)`` u8.

    Notes
    -----
    zlib's dynamic Huffman codes (RFC 1951, section 3.2.7) came within 0.5 % of `huffman_bytes` for 11,000 gaps and
    indices of pruned weights and more, and within 25 bytes for fewer; finding repeats besides made them 7 to 20 %
    longer, and LZMA 2 to 20 %. Repeats do pay for what is mostly one value.
    """
    plain = symbols.tobytes()
    ways = []
    for way, strategy in _CODES.items():
        deflate = zlib.compressobj(zlib.Z_BEST_COMPRESSION, zlib.DEFLATED, _RAW, _MEMORY, strategy)
        ways.append(bytes([way]) + deflate.compress(plain) + deflate.flush())
    shortest = min(ways, key=len)
    width = int(symbols.max(initial=0)).bit_length()
    if 1 + math.ceil(len(symbols) * width / 8) > len(shortest):
        return shortest
    bits = np.unpackbits(symbols.reshape(-1, 1), axis=1)[:, 8 - width :]
    return bytes([width]) + np.packbits(bits).tobytes()


def unpack(data: bytes, count: int) -> np.ndarray:
    """The `count` bytes that `pack` was given; raises `ValueError` where `data` is not what it wrote of so many."""
    if not data:
        raise ValueError("an empty stream")
    way, rest = data[0], data[1:]
    if way <= 8:
        if len(rest) != math.ceil(count * way / 8):
            raise ValueError("a packed stream of another length")
        bits = np.unpackbits(np.frombuffer(rest, np.uint8), count=count * way).reshape(count, way)
        return np.packbits(np.pad(bits, ((0, 0), (8 - way, 0))), axis=1).reshape(count)
    if way not in _CODES:
        raise ValueError("an unknown way of packing")
    inflate = zlib.decompressobj(_RAW)
    try:
        plain = inflate.decompress(rest, count + 1)  # a bound, because a few bytes can ask for gigabytes
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(plain) != count or not inflate.eof or inflate.unused_data:
        raise ValueError("a deflated stream of another length")
    return np.frombuffer(plain, np.uint8)


def huffman_bytes(symbols: np.ndarray) -> float:
    """Bytes of a Huffman code made for these symbols, its table left out: at least their entropy.

    A single symbol over and over takes none. Code after Huffman, Proceedings of the IRE 40 (9), 1952.
    """
    heap = np.unique(symbols, return_counts=True)[1].tolist()
    heapq.heapify(heap)
    bits = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        bits += merged
        heapq.heappush(heap, merged)
    return bits / 8
