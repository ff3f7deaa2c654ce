"""A layer's weight as a product of two: the matrix that is factorised, its singular values, and the two factors.

Linear layers: truncated singular value decomposition, the nearest matrix of its rank (Eckart & Young, "The
approximation of one matrix by another of lower rank", Psychometrika 1936). Convolutions, ``channel``: Zhang et al.,
"Accelerating Very Deep Convolutional Networks for Classification and Detection", TPAMI 2015, section 3.1, but on the
weights themselves; ``spatial``: Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank Expansions",
BMVC 2014, scheme 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.models import parts

TIMES = ("layer_ms", "pair_ms", "speedup", "speedup_low", "speedup_high")

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Singular value decomposition of a layer's weight, in float64.

    Attributes
    ----------
    split
        ``linear``, ``channel`` or ``spatial``.
    left, values, right
        ``left @ diag(values) @ right`` is the matrix; values fall.
    """

    split: str
    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def full_rank(self) -> int:
        """The smaller side of the matrix."""
        return len(self.values)

    def rank_of(self, energy: float) -> int:
        """The smallest rank that keeps this share of the sum of squared singular values."""
        kept = self.values.square().cumsum(0)
        return min(int((kept < energy * kept[-1]).sum()) + 1, self.full_rank)

    def energy(self, rank: int) -> float:
        """Share of the sum of squared singular values that `rank` keeps; 1 for a weight of zeros."""
        return 1.0 - self.relative_error(rank) ** 2

    def relative_error(self, rank: int) -> float:
        """Frobenius norm of what `rank` loses over that of the weight; 0 for a weight of zeros."""
        whole = self.values.norm()
        return float(self.values[rank:].norm() / whole) if whole else 0.0

    def halves(self, rank: int) -> tuple[Tensor, Tensor]:
        """``(rows, rank)`` and ``(rank, columns)``; the values are shared out evenly, so that both are of one scale."""
        root = self.values[:rank].sqrt()
        return self.left[:, :rank] * root, root[:, None] * self.right[:rank]


@dataclass(frozen=True, eq=False)
class Choice:
    """What is to become of one layer.

    Attributes
    ----------
    layer
        Its name.
    reason
        Why it is left as it is, in words; empty where it is replaced.
    macs
        Multiply-accumulates of one sample, as it is.
    found, rank
        Its decomposition and the rank chosen; None and 0 for a layer that cannot be factorised.
    macs_of_one
        What one channel of the waist costs.
    input_shape
        Of one sample.
    times
        By column of `TIMES`, where it was timed.
    """

    layer: str
    reason: str
    macs: int
    found: Decomposition | None = None
    rank: int = 0
    macs_of_one: float = 0.0
    input_shape: tuple[int, ...] = ()
    times: Mapping[str, float] = field(default_factory=dict)

    @property
    def largest_rank(self) -> int:
        """The largest that costs fewer multiply-accumulates than the layer; 0 where none does."""
        return min(math.ceil(self.macs / self.macs_of_one) - 1, self.found.full_rank)

    def row(self, timed: bool) -> dict[str, Any]:
        """What the record says of it, with the columns of `TIMES` where layers were timed."""
        known = self.found is not None
        return {
            "layer": self.layer,
            "replaced": not self.reason,
            "split": self.found.split if known else None,
            "rank": self.rank if known else None,
            "full_rank": self.found.full_rank if known else None,
            "largest_rank_that_saves": self.largest_rank if known else None,
            "energy": self.found.energy(self.rank) if known else None,
            "relative_error": self.found.relative_error(self.rank) if known else None,
            "macs": self.macs,
            "macs_of_pair": round(self.rank * self.macs_of_one) if known else None,
            **({column: self.times.get(column) for column in TIMES} if timed else {}),
            "reason": self.reason,
        }


def unfit(layer: nn.Module) -> str:
    """Why a convolution or linear layer cannot be factorised, in words; empty where it can."""
    if getattr(layer, "transposed", False):
        return "a transposed convolution"
    if type(layer) not in _PLAIN:
        return f"of class {type(layer).__name__}, which may compute something else than the plain layer"
    if getattr(layer, "groups", 1) > 1:
        return f"a convolution in {layer.groups} groups"
    return ""


def split_of(layer: nn.Module, wanted: str) -> str:
    """``linear``, ``channel`` or ``spatial``: only a kernel with two sides can be split into a column and a row.

    For a 1 × 1 kernel both splits are the same product.
    """
    if isinstance(layer, nn.Linear):
        return "linear"
    return wanted if isinstance(layer, nn.Conv2d) and min(layer.kernel_size) > 1 else "channel"


def matrix(layer: nn.Module, split: str) -> Tensor:
    """The weight as the matrix that a split factorises; ``spatial``: (outputs · k_w, inputs · k_h)."""
    weight = layer.weight.detach()
    return weight.permute(0, 3, 1, 2).flatten(2).flatten(0, 1) if split == "spatial" else weight.flatten(1)


def decompose(layer: nn.Module, split: str) -> Decomposition:
    """The singular value decomposition of `matrix`, in float64."""
    return Decomposition(split, *torch.linalg.svd(matrix(layer, split).double(), full_matrices=False))


def macs_of_rank_one(layer: nn.Module, split: str, macs: int, wider: float) -> float:
    """Multiply-accumulates that one of the waist's channels costs.

    Parameters
    ----------
    split
        What `split_of` gives for it.
    macs
        Of the layer as it is.
    wider
        Width of the layer's input over that of its output: the first half of a spatial split still has the input's.
    """
    weight = layer.weight
    positions = macs / weight.numel()
    if split != "spatial":
        return positions * (len(weight) + weight[0].numel())
    outputs, inputs, rows, columns = weight.shape
    return positions * (outputs * columns + inputs * rows * wider)


def part(layer: nn.Module, rank: int, split: str) -> tuple[str, dict[str, Any]]:
    """Kind and arguments of the part in `models.parts` that takes the layer's place."""
    if split == "linear":
        return "low_rank_linear", {"rank": rank}
    return "low_rank_conv", {"rank": rank, "split": split}


def fill(pair: nn.Sequential, layer: nn.Module, rank: int, found: Decomposition) -> None:
    """Give the part that takes `layer`'s place the weights of its factors, and its bias."""
    rows, columns = found.halves(rank)
    first, second = pair
    with torch.no_grad():
        if found.split == "spatial":
            outputs, inputs, high, wide = layer.weight.shape
            first.weight.copy_(columns.view(rank, inputs, high, 1))
            second.weight.copy_(rows.view(outputs, wide, 1, rank).permute(0, 3, 2, 1))
        else:
            first.weight.copy_(columns.view_as(first.weight))
            second.weight.copy_(rows.view_as(second.weight))
        if layer.bias is not None:
            second.bias.copy_(layer.bias)


def factorised(layer: nn.Module, rank: int, found: Decomposition) -> nn.Sequential:
    """The two layers that take `layer`'s place, apart from any network."""
    pair = parts.build(layer, *part(layer, rank, found.split))
    fill(pair, layer, rank, found)
    return pair
