"""Rows of a profile as the matching sees them, and the match of two sequences of rows by what they compute."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from workbench.profiling.profile import Profile

_NUMBER = re.compile(r"_\d+$")
# a part of an operation's name and its family, the first that fits; what fits none is a family of its own
_FAMILIES = (
    ("move", r"^(dynamic|de|fake)?quantize(linear)?$|^convert|^cast|reorder|reformat|memcpy"),
    ("resize", r"resize|upsampl|interpolate"),
    ("attention", r"attention|mha|sdpa"),
    ("recurrent", r"lstm|gru|rnn"),
    ("pool", r"convactpool|pool|reduce|^mean"),
    ("conv", r"conv"),
    ("product", r"gemm|matmul|matrix|linear|fullyconnected|einsum|addmm|^b?mm$"),
    ("softmax", r"softmax"),
    ("batch norm", r"batch_?norm|^scale$|^bn"),
    ("norm", r"norm|mvn"),
    ("activation", r"relu|sigmoid|tanh|gelu|silu|swish|hardtanh|elu|clip|clamp|mish|erf|activation"),
    ("view", r"reshape|flatten|view|squeeze|identity|dropout|expand|shuffle|transpose|permute|noop"),
    ("elementwise", r"^(add|sub|mul|div|sum|pow|sqrt|exp|where)|eltwise|elementwise|pointwise"),
    ("gather", r"gather|embedding"),
    ("join", r"concat|^cat$|stack"),
    ("cut", r"slice|split|chunk|pad"),
)  # fmt: skip
_COMPILED = [(family, re.compile(pattern)) for family, pattern in _FAMILIES]
KNOWN = frozenset(family for family, _ in _FAMILIES)
HEAVY = frozenset({"conv", "product", "attention", "recurrent"})

Step = Literal["heavy", "light", "none"]

_HEAVY_WEIGHT = 4.0  # against 1 for anything else: what takes the time decides
_LEAST = 0.35  # similarity below which two rows do not match
_NEAR = 0.02  # what lying at the same place between known groups adds, so that the nearer of equal rows is taken


def family(name: str) -> str:
    """The kind of operation a type or a node's name stands for: ``conv`` for ``CaskConvolution`` and ``Conv_3``."""
    name = _NUMBER.sub("", name).lower()
    # ONNX Runtime's quantised operators
    name = re.sub(r"^qlinear", "", name)
    return next((found for found, pattern in _COMPILED if pattern.search(name)), name)


@dataclass(frozen=True)
class Row:
    """One row of a profile.

    Attributes
    ----------
    index
        Its number in the profile's frame.
    family
        See `family`.
    holds
        Families of the other operations that were fused into it, as far as the names of its layers tell.
    parameters, macs
        Of one sample; NaN where unknown.
    shape
        Of one sample's output without axes of length 1, in ascending order, because engines lay axes out differently;
        None where unknown.
    place
        Where it stands in dataflow, the same for two branches that may run in either order.
    """

    index: int
    type: str
    kind: str
    layers: tuple[str, ...]
    family: str
    holds: frozenset[str]
    kernel: tuple[int, ...]
    parameters: float
    macs: float
    shape: tuple[int, ...] | None
    before: tuple[int, ...]
    place: tuple[float, ...]


def rows(profile: Profile) -> list[Row]:
    """The rows of a profile but the call itself and what is unattributed, in execution order."""
    frame = profile.rows
    before: dict[int, list[int]] = {}
    for writer, reader in profile.edges:
        before.setdefault(reader, []).append(writer)
    columns = zip(
        profile.operations, frame["macs"].to_numpy(float), frame["parameters"].to_numpy(float),
        frame["output_shape"], strict=False,
    )  # fmt: skip
    found: list[Row] = []
    flow = _Flow()
    for index, (operation, macs, parameters, shape) in enumerate(columns):
        if operation.kind == "call":
            continue
        shape = _lengths(shape)
        own, holds = _families(operation.type, operation.layers)
        if own == "conv" and math.prod(operation.kernel) == 1 and shape is not None and len(shape) < 2:
            own = "product"  # how an engine may compute a linear layer
        sources = tuple(before.get(index, ()))
        step: Step = "none" if operation.kind == "move" else "heavy" if own in HEAVY else "light"
        own_input = step == "heavy" and parameters > 0
        place = flow.place(index, sources, [port.name for port in operation.reads], step, own_input)
        # of parallel branches the one with the larger kernel, or more to compute, goes first
        size = (-math.prod(operation.kernel), -np.nan_to_num(macs))
        found.append(
            Row(
                index, operation.type, operation.kind, operation.layers, own, holds, operation.kernel, parameters,
                macs / profile.batch, shape, sources, (*place, *size),
            )
        )  # fmt: skip
    return found


def _families(kind: str, layers: Iterable[str]) -> tuple[str, frozenset[str]]:
    """The family of an operation, and those of what else it holds, by its type and the names of its layers."""
    named = [family(layer.rpartition(".")[2]) for layer in layers]
    own = family(kind)
    if own not in KNOWN and any(f in KNOWN for f in named):
        own = next((f for f in named if f in HEAVY), next(f for f in named if f in KNOWN))
    if kind.lower() == "convactpool":
        own, named = "conv", [*named, "pool"]
    return own, frozenset(f for f in named if f in KNOWN and f != own)


class _Flow:
    """How deep rows lie in dataflow: heavy operations on the longest way there, and others since the last of them.

    Folding the others, or fusing them into what comes before, changes nothing of the first. Without dataflow a row lies
    behind the one executed before it.
    """

    def __init__(self) -> None:
        self._written: dict[int, tuple[int, int]] = {}
        self._entered: dict[str, tuple[int, int]] = {}
        self._last = (0, 0)

    def place(self, index: int, sources: Sequence[int], reads: Sequence[str], step: Step, own_input: bool) -> tuple:
        """The place of one row; rows come in execution order.

        Parameters
        ----------
        sources
            The rows it reads from.
        reads
            The tensors it reads.
        step
            What it adds to the depth.
        own_input
            Whether the first tensor it reads is its input, and the others only what was fused into it: then it lies
            where that puts it, even where a sum reads what comes later.
        """
        known = [self._written[source] for source in sources if source in self._written]
        if not known:  # an input of the network lies where it was first read
            known = [self._entered.setdefault(reads[0], self._last) if reads else self._last]
        heavy, light = known[0] if own_input else max(known)
        here = {"heavy": (heavy + 1, 0), "light": (heavy, light + 1), "none": (heavy, light)}[step]
        self._written[index] = self._last = max([here, *known])
        return here


def _lengths(shape: object) -> tuple[int, ...] | None:
    """A frame's shape in the form of `Row.shape`."""
    if not isinstance(shape, tuple) or not all(isinstance(n, int) for n in shape):
        return None
    return tuple(sorted(n for n in shape if n != 1))


def sequence(
    a: Sequence[Row], b: Sequence[Row], groups: Sequence[tuple[Collection[int], Collection[int]]]
) -> list[tuple[int, int]]:
    """Pairs of rows of two profiles that compute the same, the most there are without crossing.

    A weighted longest common subsequence (Needleman and Wunsch 1970, gaps free), once in execution order and once in
    order of dataflow, of which the better counts.

    Parameters
    ----------
    a, b
        In execution order.
    groups
        Row numbers of either side that are known to belong together; these rows match no other, and no match crosses
        the longest chain of groups that do not cross each other.

    Returns
    -------
    list of tuple
        Numbers of a row of either side.
    """
    taken = [{row for group in groups for row in group[side]} for side in (0, 1)]
    free = [[row for row in rows if row.index not in taken[side]] for side, rows in enumerate((a, b))]
    if not all(free):
        return []
    score = _scores(*free)
    pairs, gain = _ordered((a, b), free, groups, score, lambda row: row.index)
    flowing, more = _ordered((a, b), free, groups, score, lambda row: row.place)
    return flowing if more > gain * (1 + 1e-9) else pairs


def _ordered(
    sides: Sequence[Sequence[Row]],
    free: Sequence[Sequence[Row]],
    groups: Sequence[tuple[Collection[int], Collection[int]]],
    score: np.ndarray,
    key: Callable[[Row], Any],
) -> tuple[list[tuple[int, int]], float]:
    """The pairs of `sequence` where the rows of either side stand in order of `key`, and what they gain."""
    spots = [{row.index: i for i, row in enumerate(sorted(rows, key=key))} for rows in sides]
    chain = _chain([tuple(_span(rows, spot) for rows, spot in zip(group, spots, strict=True)) for group in groups])
    lines, segments, along = [], [], []
    for side, rows in enumerate(free):
        places = np.array([spots[side][row.index] for row in rows])
        lines.append(np.argsort(places))
        segment, share = _segments(np.sort(places), [span[side] for span in chain])
        segments.append(segment)
        along.append(share)
    near = 1 - _NEAR * np.abs(along[0][:, None] - along[1][None, :])
    within = segments[0][:, None] == segments[1][None, :]
    pairs, gain = _best(np.where(within, score[np.ix_(*lines)] * near, 0.0))
    return [(free[0][lines[0][i]].index, free[1][lines[1][j]].index) for i, j in pairs], gain


def alike(a: Row, b: Row) -> bool:
    """Whether nothing that is known of two rows contradicts their computing the same."""
    return bool(_scores([a], [b])[0, 0] > 0)


def _span(rows: Collection[int], spots: Mapping[int, int]) -> tuple[int, int]:
    """The first and the last place of some rows."""
    places = [spots[row] for row in rows]
    return min(places), max(places)


def _chain(spans: Sequence[tuple[tuple[int, int], ...]]) -> list[tuple[tuple[int, int], ...]]:
    """The most groups, given by their spans on either side, of which each lies behind the one before on both."""
    spans = sorted(spans)
    if not spans:
        return []
    starts, ends = (np.array([[span[side][end] for side in (0, 1)] for span in spans]) for end in (0, 1))
    length, previous = np.ones(len(spans), int), np.full(len(spans), -1)
    for i in range(1, len(spans)):
        reachable = np.where((ends[:i] < starts[i]).all(axis=1), length[:i], 0)
        if reachable.max() > 0:
            previous[i] = int(reachable.argmax())
            length[i] = reachable[previous[i]] + 1
    found, i = [], int(length.argmax())
    while i >= 0:
        found.append(spans[i])
        i = int(previous[i])
    return found[::-1]


def _segments(spots: np.ndarray, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """For each place which stretch between or within groups of a chain it lies in, and how far along, 0 to 1."""
    starts, ends = (np.array([span[end] for span in spans], int) for end in (0, 1))
    segments = np.searchsorted(starts, spots) + np.searchsorted(ends, spots)
    along = np.zeros(len(spots))
    for segment in np.unique(segments):
        inside = np.flatnonzero(segments == segment)
        along[inside] = np.arange(len(inside)) / max(len(inside) - 1, 1)
    return segments, along


def _scores(a: Sequence[Row], b: Sequence[Row]) -> np.ndarray:
    """How much is gained by matching each row with each of the other side; 0 where they cannot."""
    families = _coded([r.family for r in a], [r.family for r in b])
    fits = families[0][:, None] == families[1][None, :]
    # an unknown kernel fits any
    kernels = _coded([r.kernel for r in a], [r.kernel for r in b])
    known = [np.array([bool(r.kernel) for r in side]) for side in (a, b)]
    fits &= (kernels[0][:, None] == kernels[1][None, :]) | ~(known[0][:, None] & known[1][None, :])
    shape = _shape_likeness(a, b)
    heavy = np.array([r.family in HEAVY for r in a])[:, None]
    weights = _likeness([r.parameters for r in a], [r.parameters for r in b])
    macs = _likeness([r.macs for r in a], [r.macs for r in b])
    similar = np.where(heavy, 0.4 * weights + 0.35 * shape + 0.25 * macs, 0.3 + 0.7 * shape)
    fits &= (similar >= _LEAST) & ((shape > 0) | ~heavy)
    return np.where(fits, similar * np.where(heavy, _HEAVY_WEIGHT, 1.0), 0.0)


def _coded(a: Sequence[object], b: Sequence[object]) -> tuple[np.ndarray, np.ndarray]:
    """Equal values as equal numbers."""
    codes = {value: i for i, value in enumerate(dict.fromkeys((*a, *b)))}
    return np.array([codes[v] for v in a]), np.array([codes[v] for v in b])


def _likeness(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    """1 for equal counts, the root of their ratio for others; 0.5 where one is not known."""
    left, right = np.array(a, float)[:, None], np.array(b, float)[None, :]
    low, high = np.minimum(left, right), np.maximum(left, right)
    ratio = np.divide(low, high, out=np.ones(np.broadcast(left, right).shape), where=high > 0)
    return np.where(np.isnan(left) | np.isnan(right), 0.5, np.sqrt(ratio))


def _shape_likeness(a: Sequence[Row], b: Sequence[Row]) -> np.ndarray:
    """The share of lengths that two shapes have in common: pruned channels leave the others as they are."""
    left, right = (list(dict.fromkeys(r.shape for r in side)) for side in (a, b))
    table = np.array([[_common(x, y) for y in right] for x in left])
    return table[np.ix_([left.index(r.shape) for r in a], [right.index(r.shape) for r in b])]


def _common(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> float:
    if a is None or b is None:
        return 0.5
    if a == b:
        return 1.0
    if len(a) == len(b) == 1:
        return math.sqrt(min(a[0], b[0]) / max(a[0], b[0], 1))
    rest, same = list(b), 0
    for length in a:
        if length in rest:
            rest.remove(length)
            same += 1
    return same / max(len(a), len(b))


def _best(score: np.ndarray) -> tuple[list[tuple[int, int]], float]:
    """The pairs of a path without crossing that gains most, and what it gains."""
    count_a, count_b = score.shape
    total = np.zeros((count_a + 1, count_b + 1))
    for i in range(count_a):
        # gaps cost nothing, so that the best so far is a running maximum
        total[i + 1, 1:] = np.maximum.accumulate(np.maximum(total[i, 1:], total[i, :-1] + score[i]))
    pairs = []
    i, j = count_a, count_b
    while i and j:
        if total[i, j] == total[i - 1, j]:
            i -= 1
        elif total[i, j] == total[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return pairs[::-1], float(total[-1, -1])
