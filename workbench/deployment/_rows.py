"""From an engine's kernels back to the model's layers.

An engine fuses, renames and drops the nodes of the graph it is given. Two things are left to go by: most kernels keep
the name of a node, or of a tensor a node writes, with something appended; and the graph says what lies around a node
whose name is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from workbench.models import export

# operations an engine inserts itself, under names that begin like those of the graph: only the full name counts
_MOVES = {
    *("ReorderInput", "ReorderOutput", "Reorder", "Transpose"),
    *("QuantizeLinear", "DequantizeLinear", "Cast", "Convert"),
}
# operations that dominate a kernel, with the words of the kernel types that compute them
_PRODUCTS = ("MatMul", "Gemm", "FullyConnected")
_HEAVY = {
    "Conv": ("Conv",),
    "ConvTranspose": ("Conv", "Deconv"),
    "Gemm": _PRODUCTS,
    "MatMul": _PRODUCTS,
    "LSTM": ("LSTM",),
    "GRU": ("GRU",),
}

# operations that an engine knows under another name, and numbers instead of keeping the node's
_RENAMED = {
    "MVN": ("LayerNormalization", "InstanceNormalization", "GroupNormalization"),
    "LSTMSequence": ("LSTM",),
    "GRUSequence": ("GRU",),
    "RNNSequence": ("RNN",),
}


@dataclass(frozen=True)
class Node:
    """One node of the graph an engine was given: its name and type, its tensors, and the layers it stands for."""

    name: str
    type: str
    layers: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Kernel:
    """One operation an engine executes.

    Attributes
    ----------
    sources
        Names of nodes or tensors of the graph it is known to stand for, as the engine spells them.
    reads, writes
        Its tensors in the graph the engine made of the one it was given; empty where it does not tell.
    """

    type: str
    sources: tuple[str, ...]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


class Lineage:
    """What is needed of a graph to lead kernels back to layers; nodes in topological order."""

    def __init__(self, nodes: Sequence[Node]):
        self.nodes = tuple(nodes)
        self._by_name: dict[str, int] = {}
        self._consumers: dict[str, list[int]] = {}
        self._producer: dict[str, int] = {}
        for index, node in enumerate(self.nodes):
            for tensor in node.outputs:
                self._producer[tensor] = index
            for tensor in node.inputs:
                self._consumers.setdefault(tensor, []).append(index)
        for index, node in enumerate(self.nodes):
            if node.name:
                self._by_name.setdefault(node.name, index)

    @classmethod
    def of(cls, graph: onnx.ModelProto) -> Lineage:
        """The lineage of an ONNX graph."""
        layers = export.provenance(graph)
        nodes = []
        for node in graph.graph.node:
            name = node.name or (node.output[0] if node.output else "")
            nodes.append(Node(name, node.op_type, layers.get(name, ()), tuple(node.input), tuple(node.output)))
        return cls(nodes)

    def to_list(self) -> list[list[Any]]:
        """JSON values."""
        return [[n.name, n.type, list(n.layers), list(n.inputs), list(n.outputs)] for n in self.nodes]

    @classmethod
    def from_list(cls, values: list[list[Any]]) -> Lineage:
        """What `to_list` wrote."""
        return cls([Node(name, kind, tuple(a), tuple(b), tuple(c)) for name, kind, a, b, c in values])

    def layers(self, kernels: Sequence[Kernel]) -> list[tuple[str, ...]]:
        """For each of an engine's kernels, in execution order, the layers it computes, in the graph's order.

        A kernel has the layers of the nodes it names, and of those between what it reads and what it writes. Any other
        node was fused away: a convolution or product goes to the kernel of its kind that follows it (which is then
        named after the activation), anything else to the last kernel that computes one of its inputs.
        """
        owned: list[set[int]] = [set() for _ in kernels]
        owner: dict[int, int] = {}
        for index, kernel in enumerate(kernels):
            for node in self._named(kernel):
                owned[index].add(node)
                owner.setdefault(node, index)
        for index, node in self._paired(kernels, owned, owner):
            owned[index].add(node)
            owner[node] = index
        made = {tensor for kernel in kernels for tensor in kernel.writes}
        for index, kernel in enumerate(kernels):
            # a tensor the engine made up says nothing of where the kernel begins
            if kernel.writes and made.intersection(kernel.reads) <= self._producer.keys():
                for node in self._behind(owned[index], set(kernel.reads), owner):
                    owner[node] = index
                    # a quantiser stands for the layer whose numbers it writes, which may be the one before
                    if self.nodes[node].type not in _MOVES:
                        owned[index].add(node)
        self._fused(kernels, owned, owner)
        return [tuple(dict.fromkeys(x for n in sorted(mine) for x in self.nodes[n].layers)) for mine in owned]

    def _named(self, kernel: Kernel) -> list[int]:
        """The nodes a kernel names, and those whose tensors it writes."""
        moves = kernel.type in _MOVES
        found = [self._find(source, exact=moves) for source in kernel.sources]
        if not moves:
            found += [self._producer.get(tensor) for tensor in kernel.writes]
        return [node for node in found if node is not None]

    def _paired(self, kernels: Sequence[Kernel], owned: list[set[int]], owner: dict[int, int]) -> list[tuple[int, int]]:
        """Kernels with names of the engine's own, and nodes without a kernel, that match one to one by type."""
        pairs = []
        for kind, types in _RENAMED.items():
            nameless = [i for i, kernel in enumerate(kernels) if kernel.type == kind and not owned[i]]
            nodes = [i for i, node in enumerate(self.nodes) if node.type in types and i not in owner]
            if len(nameless) == len(nodes):
                pairs += zip(nameless, nodes, strict=True)
        return pairs

    def _behind(self, nodes: set[int], reads: set[str], owner: dict[int, int]) -> set[int]:
        """The nodes without a kernel on the ways from some nodes back to the tensors their kernel reads."""
        found: set[int] = set()
        waiting = list(nodes)
        while waiting:
            for tensor in self.nodes[waiting.pop()].inputs:
                before = self._producer.get(tensor)
                if tensor not in reads and before is not None and before not in owner and before not in found:
                    found.add(before)
                    waiting.append(before)
        return found

    def _fused(self, kernels: Sequence[Kernel], owned: list[set[int]], owner: dict[int, int]) -> None:
        """Give every node that is left to the kernel it was most likely fused into."""
        covered = {layer for node in owner for layer in self.nodes[node].layers}
        for index, node in enumerate(self.nodes):
            if index in owner:
                continue
            kernel = self._downstream(index, owner, kernels, owned) if node.type in _HEAVY else None
            if kernel is None:
                upstream = [owner[p] for t in node.inputs if (p := self._producer.get(t)) in owner]
                kernel = max(upstream, default=None)
            if kernel is None:
                continue
            owner[index] = kernel
            # a layer some kernel is named after has its row; the rest of it was folded, not moved to a neighbour
            if not covered.issuperset(node.layers) and node.type not in _MOVES:
                owned[kernel].add(index)

    def _find(self, source: str, exact: bool) -> int | None:
        """The node `source` names: by its name or a tensor it writes, whole or followed by what the engine appended."""
        source = source.removeprefix("fused ")
        ends = [len(source)]
        if not exact:
            ends += [i for i in range(len(source) - 1, 0, -1) if source[i] in "_/"]
        for end in ends:
            for known in (self._by_name, self._producer):
                if source[:end] in known:
                    return known[source[:end]]
        return None

    def _downstream(
        self, index: int, owner: dict[int, int], kernels: Sequence[Kernel], owned: list[set[int]]
    ) -> int | None:
        """The kernel of this heavy node's kind that is first reached through nodes without a kernel of their own."""
        words = _HEAVY[self.nodes[index].type]
        waiting, seen = [index], {index}
        while waiting:
            for tensor in self.nodes[waiting.pop(0)].outputs:
                for after in self._consumers.get(tensor, ()):
                    if after in seen:
                        continue
                    seen.add(after)
                    if after not in owner:
                        waiting.append(after)
                    elif any(self.nodes[n].type in _HEAVY for n in owned[owner[after]]):
                        continue  # it computes a heavy node of its own
                    elif (kind := kernels[owner[after]].type) not in _MOVES and any(word in kind for word in words):
                        return owner[after]
        return None
