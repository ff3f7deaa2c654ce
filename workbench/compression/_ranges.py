"""The range of values that a quantiser keeps, chosen from a histogram of them."""

from __future__ import annotations

import numpy as np

METHODS = ("minmax", "percentile", "entropy", "mse")
BINS = 2048  # as many as in Migacz 2017
PERCENTILE = 99.99

_CANDIDATES = 128  # ranges that entropy and mse try
_NARROWEST = 1 / 64  # of the whole range
_UNSEEN = 1e-4  # what an empty bin counts where its logarithm is taken


def histogram_edges(low: float, high: float, bins: int = BINS) -> np.ndarray:
    """Ends of the bins for values from `low` to `high`, zero included: ``(bins + 1,)`` float64, of equal width."""
    return np.linspace(min(low, 0.0), max(high, 0.0), bins + 1)


def range_from_histogram(
    counts: np.ndarray, edges: np.ndarray, method: str, percentile: float = PERCENTILE, bits: int = 8
) -> tuple[float, float]:
    """The range an asymmetric quantiser of so many bits should keep; what lies outside becomes its nearer end.

    Parameters
    ----------
    counts
        ``(n,)``, how many values fell into each bin.
    edges
        ``(n + 1,)``, ends of the bins as `histogram_edges` gives them.
    method
        ``minmax``: all that was seen. ``percentile``: without an equal share of values at either end. ``entropy``: the
        range whose quantised histogram has the smallest Kullback-Leibler divergence from the whole one (Migacz, "8-bit
        Inference with TensorRT", 2017). ``mse``: the range with the smallest mean squared error (Nagel et al., "A White
        Paper on Neural Network Quantization", 2021, section 3.1). Both clip at plus and minus the same value; ``mse``
        then tries each end alone.
    percentile
        Of ``percentile``: how many of 100 values are kept.
    bits
        Of ``entropy`` and ``mse``: width of the quantised values.

    Returns
    -------
    (float, float)
        ``low <= 0 <= high``: zero is always kept, so that padding stays what it is.
    """
    counts, edges = np.asarray(counts, dtype=np.float64), np.asarray(edges, dtype=np.float64)
    low, high = edges[0], edges[-1]
    if low < high and counts.any():
        if method == "percentile":
            low, high = _by_share(counts, edges, percentile)
        elif method == "entropy":
            low, high = _by_entropy(counts, edges, bits)
        elif method == "mse":
            low, high = _by_error(counts, edges, bits)
    return float(min(low, 0.0)), float(max(high, 0.0))


def squared_error(counts: np.ndarray, edges: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int) -> np.ndarray:
    """Sum of squared quantisation errors for each of several ranges, values spread evenly over their bin.

    The grid is that of `_simulated.activation`. The error at ``x`` is ``(x - clamp(x))²`` outside and
    ``(x - s · round(x / s))²`` inside the range; the integrals of both are known, so that bins wider than a step do no
    harm. Values in the bin that holds zero are taken for zero, which costs nothing: after a ReLU most of them are.

    Parameters
    ----------
    counts, edges
        ``(n,)`` and ``(n + 1,)``.
    low, high
        ``(k,)``, ends of the ranges; ``low <= 0 <= high`` and ``low < high``.
    bits
        Width of the quantised values.

    Returns
    -------
    numpy.ndarray
        ``(k,)`` float64.
    """
    steps = 2**bits - 1
    step = ((high - low) / steps)[:, None]
    zero = np.round(-low[:, None] / step)
    inside = np.clip(edges, -zero * step, (steps - zero) * step)
    units = inside / step
    whole = np.round(units)
    integral = step**3 * (whole / 12 + _cube(units - whole) / 3) + _cube(edges - inside) / 3
    density = np.where(_holds_zero(edges), 0.0, counts) / np.diff(edges)
    return np.diff(integral, axis=1) @ density


def _cube(values: np.ndarray) -> np.ndarray:
    return values * values * values  # far faster than a power


def _holds_zero(edges: np.ndarray) -> np.ndarray:
    return (edges[:-1] <= 0) & (edges[1:] > 0)


def _by_share(counts: np.ndarray, edges: np.ndarray, percentile: float) -> tuple[float, float]:
    share = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
    tail = (1 - percentile / 100) / 2
    low = np.searchsorted(share, tail, side="right") - 1
    high = np.searchsorted(share, 1 - tail, side="left")
    return edges[low], edges[min(high, len(counts))]


def _by_error(counts: np.ndarray, edges: np.ndarray, bits: int) -> tuple[float, float]:
    shares = np.linspace(_NARROWEST, 1, _CANDIDATES)
    most = shares * max(-edges[0], edges[-1])
    lows, highs = _clipped(edges[0], edges[-1], most)
    low, high = _best(counts, edges, lows, highs, bits)
    if low < 0 < high:
        low, high = _best(counts, edges, low * shares, np.full(_CANDIDATES, high), bits)
        low, high = _best(counts, edges, np.full(_CANDIDATES, low), high * shares, bits)
    return low, high


def _best(counts: np.ndarray, edges: np.ndarray, lows: np.ndarray, highs: np.ndarray, bits: int) -> tuple[float, float]:
    place = np.argmin(squared_error(counts, edges, lows, highs, bits))
    return lows[place], highs[place]


def _clipped(low: float, high: float, most: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.maximum(low, -most), np.minimum(high, most)


def _by_entropy(counts: np.ndarray, edges: np.ndarray, bits: int) -> tuple[float, float]:
    counts = _without_zeros(counts, edges)
    best, least = (0, len(counts)), np.inf
    most = np.linspace(1, _NARROWEST, _CANDIDATES) * max(-edges[0], edges[-1])
    for low, high in zip(*_clipped(edges[0], edges[-1], most), strict=True):
        first = np.searchsorted(edges, low, side="right") - 1
        last = np.searchsorted(edges, high, side="left")
        divergence = _divergence(counts, first, last, 2**bits)
        if divergence < least:
            best, least = (first, last), divergence
    return edges[best[0]], edges[best[1]]


def _without_zeros(counts: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The bin that holds zero as full as its fuller neighbour: exact zeros would outweigh all else."""
    counts = counts.copy()
    for place in np.flatnonzero(_holds_zero(edges)):
        counts[place] = max(
            counts[max(place - 1, 0) : place].max(initial=0), counts[place + 1 : place + 2].max(initial=0)
        )
    return counts


def _divergence(counts: np.ndarray, first: int, last: int, levels: int) -> float:
    """Of the whole histogram, what is outside put into the end bins, from what is left of the inside in `levels`."""
    inside = counts[first:last]
    whole = inside.copy()
    whole[0] += counts[:first].sum()
    whole[-1] += counts[last:].sum()
    level = np.arange(len(inside)) * min(levels, len(inside)) // len(inside)
    filled = inside > 0
    mean = np.bincount(level, inside) / np.maximum(np.bincount(level, filled), 1)
    rounded = np.where(filled, mean[level], 0) + _UNSEEN
    total = whole.sum()
    if total == 0:
        return np.inf
    p, q = whole / total, rounded / rounded.sum()
    return float(np.sum(p * np.log(np.where(p > 0, p, 1) / q)))
