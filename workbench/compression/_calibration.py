"""What a float graph computes on calibration samples: the range of each tensor, and outputs to compare with.

The graph is given further outputs and run chunk by chunk. Of each chunk the ends of every tensor are kept, and then
their histograms; never the tensors themselves.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

from workbench.compression._onnx_graph import fixed_batch, input_names
from workbench.compression._ranges import BINS, histogram_edges, range_from_histogram
from workbench.data.task import Task
from workbench.errors import StepError
from workbench.jobs import SILENT, Progress
from workbench.profiling import sqnr_db

CHUNK = 32  # samples; every tensor of the graph is held for one chunk

_COMPARED = 64  # samples
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_HISTOGRAM_BYTES = 2**26  # of all tensors of a chunk of which histograms are taken
_EXACT = 2**24  # as far as float32 counts
_ENDS = ("ReduceMin", "ReduceMax")

Feed = dict[str, np.ndarray]


class Samples:
    """A task's calibration split as feeds of a graph, of the batch size that a graph may be fixed to.

    Attributes
    ----------
    count
        How many there are; without a rest that a fixed batch has no room for.
    least
        The fewest the graph takes.
    """

    def __init__(self, task: Task, graph: onnx.ModelProto):
        self._task, self._names, self._fixed = task, input_names(graph), fixed_batch(graph)
        held, self.least = task.count("calibration"), self._fixed or 1
        self.count = held - held % self.least

    def feeds(self, size: int = CHUNK, limit: int | None = None) -> Iterator[Feed]:
        """Chunks of so many samples, in order; the first `limit` samples, or as many whole batches as hold them."""
        count = self.count if limit is None else min(self.count, math.ceil(limit / self.least) * self.least)
        if count:
            for inputs, _ in self._task.batches("calibration", self._fixed or size, count):
                yield dict(zip(self._names, inputs, strict=True))


@dataclass(frozen=True, eq=False)
class Reference:
    """Feeds, and what the float graph puts out for each."""

    feeds: list[Feed] = field(default_factory=list)
    outputs: list[Sequence[np.ndarray]] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """How many they hold."""
        return sum(_length(feed) for feed in self.feeds)

    def add(self, feed: Feed, outputs: Sequence[np.ndarray]) -> None:
        """Keep these, unless there are enough."""
        if self.samples < _COMPARED:
            self.feeds.append(feed)
            self.outputs.append(outputs)

    def sqnr_db(self, graph: onnx.ModelProto) -> float:
        """Signal-to-quantisation-noise ratio of a graph's outputs, computed as its nodes say, without fusion.

        Returns
        -------
        float
            Decibels, over all floating outputs together; NaN where the reference is all zero.
        """
        session = open_session(graph)
        found = [session.run(None, feed) for feed in self.feeds]
        expected, given = _flat(self.outputs), _flat(found)
        return sqnr_db(expected, given) if expected.any() else math.nan


def reference(graph: onnx.ModelProto, samples: Samples) -> Reference:
    """What a float graph puts out for the first calibration samples; empty where there are none."""
    session, found = open_session(graph), Reference()
    for feed in samples.feeds(limit=_COMPARED):
        outputs = run(session, feed)
        _check_outputs(session, outputs)
        found.add(feed, outputs)
    return found


def observe(
    graph: onnx.ModelProto, kinds: Collection[str], samples: Samples, method: str, *, progress: Progress = SILENT
) -> tuple[dict[str, tuple[float, float]], Reference]:
    """Range of each floating tensor that a node of these kinds reads or writes, and the graph's own outputs.

    Parameters
    ----------
    graph
        Float, its shapes inferred.
    kinds
        Operators.
    samples
        Run through once; for every method but ``minmax`` a second time.
    method
        See `_ranges.range_from_histogram`.

    Raises
    ------
    StepError
        If the graph does not run, or an output or a range is not finite.
    """
    tensors = _measurable(graph, kinds)
    whole = method == "minmax"
    extents, outputs = _extents(graph, tensors, samples, progress.part(0.0, 1.0 if whole else 0.4))
    if whole:
        return extents, outputs
    wide = {name: ends for name, ends in extents.items() if ends[0] < ends[1]}
    ranges = {}
    for name, counts in _histograms(graph, wide, samples, progress.part(0.4, 0.9)).items():
        progress(0.9 + 0.1 * len(ranges) / len(wide), "ranges")
        ranges[name] = range_from_histogram(counts, histogram_edges(*wide[name]), method)
    return extents | ranges, outputs


def open_session(graph: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """A session that computes each node as it stands; raises `StepError` where ONNX Runtime does not take the graph."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # what goes wrong comes as an exception
    try:
        return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no base class but this one
        raise StepError(f"The graph does not run on the calibration samples: {error}") from error


def run(session: onnxruntime.InferenceSession, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """All outputs; raises `StepError` where ONNX Runtime cannot compute them."""
    try:
        return session.run(None, feed)
    except Exception as error:  # as above
        raise StepError(f"The graph does not run on the calibration samples: {error}") from error


def _measurable(graph: onnx.ModelProto, kinds: Collection[str]) -> list[str]:
    weights = {tensor.name for tensor in graph.graph.initializer}
    known = {
        value.name
        for value in (*graph.graph.value_info, *graph.graph.output, *graph.graph.input)
        if value.type.tensor_type.elem_type in _FLOATS and value.name not in weights
    }
    read = (name for node in graph.graph.node if node.op_type in kinds for name in (*node.input, *node.output))
    return [name for name in dict.fromkeys(read) if name in known]


def _extents(
    graph: onnx.ModelProto, tensors: Sequence[str], samples: Samples, progress: Progress
) -> tuple[dict[str, tuple[float, float]], Reference]:
    session, own = open_session(_with_ends(graph, tensors)), len(graph.graph.output)
    lows, highs = np.full(len(tensors), np.inf, np.float32), np.full(len(tensors), -np.inf, np.float32)
    found, done = Reference(), 0
    progress(0.0, f"calibrating, 0 of {samples.count} samples")
    for feed in samples.feeds():
        outputs = run(session, feed)
        _check_outputs(session, outputs[:own])
        found.add(feed, outputs[:own])
        ends = np.array(outputs[own:], dtype=np.float32).reshape(-1, 2)
        # unlike fmin and fmax these keep a NaN
        lows, highs = np.minimum(lows, ends[:, 0]), np.maximum(highs, ends[:, 1])
        done += _length(feed)
        progress(done / samples.count, f"calibrating, {done} of {samples.count} samples")
    for name, low, high in zip(tensors, lows, highs, strict=True):
        if not (np.isfinite(low) and np.isfinite(high)):
            raise StepError(
                f"The range of {name!r} over the calibration samples is not finite. "
                "Look for NaN or overflow in the data or the weights."
            )
    return {name: (float(a), float(b)) for name, a, b in zip(tensors, lows, highs, strict=True)}, found


def _with_ends(graph: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """A copy that also puts out the smallest and the largest value of each tensor."""
    copied = onnx.ModelProto()
    copied.CopyFrom(graph)
    for name in tensors:
        for operator in _ENDS:
            end = f"{name}/{operator}"
            copied.graph.node.append(helper.make_node(operator, [name], [end], name=end, keepdims=0))
            copied.graph.output.append(helper.make_empty_tensor_value_info(end))
    return copied


def _histograms(
    graph: onnx.ModelProto, extents: Mapping[str, tuple[float, float]], samples: Samples, progress: Progress
) -> dict[str, np.ndarray]:
    """How many values of each tensor fall into each of the bins of `histogram_edges`."""
    copied, names = onnx.ModelProto(), list(extents)
    copied.CopyFrom(graph)
    taken = {value.name for value in (*graph.graph.output, *graph.graph.input)}
    copied.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in taken)
    session = open_session(copied)
    given = [value.name for value in session.get_outputs()]
    edges = {name: histogram_edges(*ends) for name, ends in extents.items()}
    counts = {name: np.zeros(BINS) for name in names}
    first = run(session, next(samples.feeds(1)))
    size = max(1, min(CHUNK, _HISTOGRAM_BYTES * samples.least // sum(value.nbytes for value in first)))
    done = 0
    for feed in samples.feeds(size):
        progress(done / samples.count, f"histograms, {done} of {samples.count} samples")
        values = feed | dict(zip(given, run(session, feed), strict=True))
        for name in names:
            counts[name] += _histogram(values[name], edges[name])
        done += _length(feed)
    return counts


def _histogram(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    parts = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).flatten().split(_EXACT)
    return sum(torch.histc(part, len(edges) - 1, edges[0], edges[-1]).double() for part in parts).numpy()


def _check_outputs(session: onnxruntime.InferenceSession, outputs: Sequence[np.ndarray]) -> None:
    for spec, value in zip(session.get_outputs(), outputs, strict=False):
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
            raise StepError(
                f"Output {spec.name!r} is NaN or infinite on the calibration samples, so no range can be taken. "
                "Check that preprocessing and weights belong together."
            )


def _flat(outputs: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    arrays = [np.ravel(a) for chunk in outputs for a in chunk if np.issubdtype(a.dtype, np.floating)]
    return np.concatenate(arrays) if arrays else np.zeros(0)


def _length(feed: Feed) -> int:
    return len(next(iter(feed.values())))
