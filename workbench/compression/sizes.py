"""How many bytes the weights of a model take: dense, sparse, by codebook, coded, and as the artefact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from workbench import formatting
from workbench.compression import _coded, _tensors, coding
from workbench.compression._tensors import Stored
from workbench.measure import artifact_size
from workbench.models.model import Model

COLUMNS = [
    *("layer", "tensor", "weights", "nonzero", "bits", "dense_bytes", "sparse_bytes", "clusters", "codebook_bytes"),
    *("index_bytes", "huffman_bytes", "coded_bytes"),
]
THE_REST = "everything else"
_INDEX_BYTES = 4  # of CSR's column numbers and row starts: int32, as scipy and torch have them


@dataclass(frozen=True, eq=False)
class Sizes:
    """Bytes of a model's weights in every form, next to each other. None but the last is what an engine loads.

    Attributes
    ----------
    rows
        See `frame`.
    coded_bytes
        Length of the file that `coding.encode` makes.
    """

    rows: pd.DataFrame
    coded_bytes: int
    _model: Model = field(repr=False)

    def frame(self) -> pd.DataFrame:
        """A row per weight, which is a tensor of two axes or more, and one for all other tensors together.

        Columns: layer; tensor (its name in the state dict or graph); weights, nonzero (how many); bits (of one, dense);
        dense_bytes; sparse_bytes (compressed sparse rows: the non-zero values, an int32 column for each, an int32 start
        for each row and one more, a row being one place of the first axis); clusters (different values besides zero);
        codebook_bytes (those values); index_bytes (``ceil(log2(clusters))`` bits for each that is not zero; where the
        zeros are comes on top); huffman_bytes (bound of Huffman codes of their own for gaps, indices or bytes, in the
        best of the ways that `coding.encode` knows, codebook included and tables not; where rows repeat, the file can
        be shorter); coded_bytes (in the file).

        The last row holds biases, statistics and scales, which are kept dense and in no codebook, so that bits and
        clusters are 0; its coded_bytes is what is left of the file, header included.
        """
        return self.rows.copy()

    @property
    def dense_bytes(self) -> int:
        """All tensors, one element after another, in their own dtypes."""
        return int(self.rows["dense_bytes"].sum())

    @property
    def sparse_bytes(self) -> int:
        """All tensors, the weights as compressed sparse rows."""
        return int(self.rows["sparse_bytes"].sum())

    @property
    def shared_bytes(self) -> int:
        """Codebooks and indices of all weights, without where they are; the other tensors dense."""
        rest = self.rows["layer"] == THE_REST
        return int(
            (self.rows["codebook_bytes"] + self.rows["index_bytes"]).sum() + self.rows["dense_bytes"][rest].sum()
        )

    @property
    def huffman_bytes(self) -> int:
        """The Huffman bound of all weights, and the other tensors dense."""
        return int(self.rows["huffman_bytes"].sum())

    @cached_property
    def deflate_bytes(self) -> int:
        """The deployable artefact, an ONNX graph with its structure, after DEFLATE: as `Measurement.size_bytes`."""
        return artifact_size({"model.onnx": self._model.onnx().SerializeToString()})[0]

    def totals(self) -> dict[str, int]:
        """Every total by its name; exports a model that is no graph yet."""
        names = ("dense_bytes", "sparse_bytes", "shared_bytes", "huffman_bytes", "coded_bytes", "deflate_bytes")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        dense, sparse, coded = map(formatting.size, (self.dense_bytes, self.sparse_bytes, self.coded_bytes))
        smaller = formatting.factor(self.dense_bytes / self.coded_bytes)
        return f"<Sizes of {self._model.name}: {dense} dense, {sparse} sparse, {coded} coded ({smaller} smaller)>"

    def _repr_html_(self) -> str:
        return f"<p>{repr(self)[1:-1]}</p>" + self.rows.to_html(index=False, border=0, escape=True, na_rep="–")


def sizes(model: Model) -> Sizes:
    """Bytes of a model's weights: dense, sparse, by codebook, Huffman coded, in the actual file, and as the artefact.

    Sharing and single zeros save bytes of a file, not time: every engine here unpacks them and computes with all.

    Parameters
    ----------
    model
        A module of any dtype, or a graph: int8 initialisers count 8 bits.
    """
    tensors = _tensors.stored(model)
    found = [_coded.ways(tensor) for tensor in tensors]
    total = len(coding.assemble(tensors, [_coded.shortest(ways) for ways in found]))
    rows = [_row(tensor, ways) for tensor, ways in zip(tensors, found, strict=True) if tensor.is_weight]
    rest = [tensor for tensor in tensors if not tensor.is_weight]
    if rest:
        dense = sum(tensor.dense_bytes for tensor in rest)
        elements = sum(tensor.patterns.size for tensor in rest)
        held = sum(int(np.count_nonzero(tensor.without_negative_zeros)) for tensor in rest)
        left = total - sum(row["coded_bytes"] for row in rows)
        rows.append(
            dict.fromkeys(COLUMNS, 0)
            | {"layer": THE_REST, "tensor": "", "weights": elements, "nonzero": held, "coded_bytes": left}
            | dict.fromkeys(("dense_bytes", "sparse_bytes", "huffman_bytes"), dense)
        )
    return Sizes(pd.DataFrame(rows, columns=COLUMNS), total, model)


def _row(tensor: Stored, ways: Sequence[_coded.Coded]) -> dict[str, Any]:
    values = tensor.without_negative_zeros
    held = values[values != 0]
    clusters = len(np.unique(held))
    index_bits = math.ceil(math.log2(clusters)) if clusters else 0
    return {
        "layer": tensor.name.rpartition(".")[0] or tensor.name,
        "tensor": tensor.name,
        "weights": values.size,
        "nonzero": held.size,
        "bits": tensor.bits,
        "dense_bytes": tensor.dense_bytes,
        "sparse_bytes": math.ceil(held.size * tensor.bits / 8) + _INDEX_BYTES * (held.size + tensor.shape[0] + 1),
        "clusters": clusters,
        "codebook_bytes": math.ceil(clusters * tensor.bits / 8),
        "index_bytes": math.ceil(held.size * index_bits / 8),
        "huffman_bytes": math.ceil(min(way.huffman_bytes for way in ways)),
        "coded_bytes": _coded.shortest(ways).bytes,
    }
