"""Grids for weights: rows of values, each rounded to what so many bits can hold.

A row is what shares one grid: an output channel, or the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from workbench.compression._kmeans import kmeans_1d
from workbench.compression._ranges import PERCENTILE

GRIDS = ("uniform", "log", "kmeans")
CLIPS = ("none", "mse", "percentile")

_SHARES = 100  # ranges that "mse" tries, evenly spaced up to the whole one


def uniform(
    rows: Tensor, bits: int, *, symmetric: bool = True, clip: str = "none", percentile: float = PERCENTILE
) -> Tensor:
    """Rows on grids of even steps, rounded to nearest.

    Symmetric: ``s · clamp(round(w / s), -n, n)`` with ``n = 2^(bits - 1) - 1`` and ``s = max |w| / n``. Asymmetric:
    ``s · (clamp(round(w / s) + z, 0, 2^bits - 1) - z)`` with ``s = (max w - min w) / (2^bits - 1)`` and
    ``z = round(-min w / s)``, the range stretched to hold zero.

    Parameters
    ----------
    rows
        ``(grids, values)``, floating.
    clip
        ``mse``: the range is shrunk to that share of itself, of a hundred, whose mean squared error is smallest.
        ``percentile``: it leaves out the largest magnitudes, or an equal share of values at either end.
    percentile
        How many of 100 values are kept.

    Notes
    -----
    After Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018, sections 2.1 and 2.2,
    and Nagel et al., "A White Paper on Neural Network Quantization", 2021, sections 2.2 and 3.1.
    """
    step = _symmetric if symmetric else _asymmetric
    low, high = _ends(rows, symmetric, percentile if clip == "percentile" else 100.0)
    if clip == "mse":
        return _least_error(rows, lambda share: step(rows, low * share, high * share, bits))
    return step(rows, low, high, bits)


def logarithmic(rows: Tensor, bits: int) -> Tensor:
    """Rows of powers of two, their negatives and zero, rounded to nearest in the exponent.

    ``sign(w) · 2^round(log2 |w|)`` where that exponent is among the ``2^(bits - 1) - 1`` largest that the row has room
    for, counted down from ``round(log2 max |w|)``; what is smaller becomes zero. One bit is the sign, one of the other
    codes is zero.

    Notes
    -----
    After Miyashita, Lee & Murmann, "Convolutional Neural Networks using Logarithmic Data Representation", 2016,
    equations 5 to 7, with their full scale taken from the largest weight.
    """
    exponents = rows.abs().log2().round()
    top = exponents.amax(1, keepdim=True)
    return torch.where(exponents > top - (2 ** (bits - 1) - 1), rows.sign() * exponents.exp2(), torch.zeros_like(rows))


def codebook(rows: Tensor, bits: int) -> Tensor:
    """Rows of at most ``2^bits`` values each, by k-means; where a row holds zeros, one of the values is zero.

    Notes
    -----
    After Han, Mao & Dally, "Deep Compression", ICLR 2016, section 3, without its training.
    """
    return torch.stack([_coded(row.cpu().numpy(), 2**bits) for row in rows]).to(rows)


def symmetric_scale(rows: Tensor, bits: int) -> Tensor:
    """Step of the symmetric grid of each row: ``(grids, 1)``; 1 for a row of zeros."""
    return _positive(_ends(rows, True, 100.0)[1] / (2 ** (bits - 1) - 1))


def _symmetric(rows: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    most = 2 ** (bits - 1) - 1
    scale = _positive(high / most)
    return (rows / scale).round().clamp(-most, most) * scale


def _asymmetric(rows: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    steps = 2**bits - 1
    scale = _positive((high - low) / steps)
    zero = (-low / scale).round()
    return ((rows / scale).round() + zero).clamp(0, steps).sub(zero).mul(scale)


def _ends(rows: Tensor, symmetric: bool, percentile: float) -> tuple[Tensor, Tensor]:
    if symmetric:
        most = _percentile(rows.abs(), percentile)
        return -most, most
    tail = (100 - percentile) / 2
    return _percentile(rows, tail).clamp(max=0), _percentile(rows, 100 - tail).clamp(min=0)


def _percentile(rows: Tensor, percentile: float) -> Tensor:
    if percentile in (0, 100):
        return rows.amin(1, keepdim=True) if percentile == 0 else rows.amax(1, keepdim=True)
    # numpy's, because torch's takes no more than 16 million values
    return torch.from_numpy(np.percentile(rows.cpu().numpy(), percentile, axis=1, keepdims=True)).to(rows)


def _least_error(rows: Tensor, rounded: Callable[[float], Tensor]) -> Tensor:
    best = rounded(1.0)
    least = (rows - best).square().sum(1, keepdim=True)
    for share in np.arange(_SHARES - 1, 0, -1) / _SHARES:
        tried = rounded(float(share))
        error = (rows - tried).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _coded(row: np.ndarray, values: int) -> Tensor:
    used = row != 0
    if not used.any():
        return torch.from_numpy(row)
    centroids, indices = kmeans_1d(row[used], values if used.all() else values - 1)
    coded = np.zeros_like(row)
    coded[used] = centroids[indices]
    return torch.from_numpy(coded)
