"""How far two versions of a model are apart, layer by layer, on real data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench import formatting
from workbench.data.task import Task
from workbench.deployment import Engine, OnnxRuntime
from workbench.errors import DataError
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model
from workbench.profiling import _points
from workbench.profiling._points import Point

COLUMNS = ["layer", "type", "shape", "sqnr_db", "cosine", "max_error"]
_CHUNK = 8  # samples; what every layer puts out for one chunk is held at a time


@dataclass(frozen=True, eq=False)
class Distances:
    """How far one version of a model is from another at each layer they have in common.

    Attributes
    ----------
    rows
        See `frame`.
    unmatched
        What was left out, a row each: layer, side (``a``, ``b`` or ``both``) and why.
    name_a, name_b
        What was compared: the reference, and its approximation.
    samples
        Calibration samples it was computed on.
    """

    rows: pd.DataFrame
    unmatched: pd.DataFrame
    name_a: str
    name_b: str
    samples: int

    def frame(self) -> pd.DataFrame:
        """A row per point that both versions compute, in execution order.

        Columns: layer (several joined by `` + `` where one of the versions has them fused, so that only the last of
        them can be compared), type (of the first of them), shape (of what was compared, of one
        sample), sqnr_db (``inf`` where both are equal, NaN where the reference is all zero), cosine (of both as vectors
        over all samples; NaN where either is all zero) and max_error (largest absolute difference).
        """
        return self.rows.copy()

    def __repr__(self) -> str:
        lowest = self.rows["sqnr_db"].min()
        worst = "equal everywhere" if lowest == math.inf else f"lowest SQNR {formatting.significant(lowest)} dB"
        return (
            f"<Distances of {self.name_b} from {self.name_a}: {len(self.rows)} points, {worst}, "
            f"{self.samples} samples, {len(self.unmatched)} layers left out>"
        )

    def _repr_html_(self) -> str:
        tables = [frame.to_html(index=False, border=0, escape=True) for frame in (self.rows, self.unmatched)]
        left_out = f"<p>Left out</p>{tables[1]}" if len(self.unmatched) else ""
        return f"<p>{escape(repr(self)[1:-1])}</p>{tables[0]}{left_out}"


def sqnr_db(reference: Tensor | np.ndarray, approximation: Tensor | np.ndarray) -> float:
    """Signal-to-quantisation-noise ratio of one tensor against another.

    ``10 log10(Σ r² / Σ (r - a)²)`` over all elements.

    Parameters
    ----------
    reference, approximation
        Same shape, any floating dtype; compared in float64.

    Returns
    -------
    float
        Decibels; ``inf`` where they are equal.

    Raises
    ------
    ValueError
        If the shapes differ or `reference` is all zero.
    """
    r, a = (torch.as_tensor(x).detach().to("cpu", torch.float64) for x in (reference, approximation))
    if r.shape != a.shape:
        raise ValueError(f"the shapes differ: {tuple(r.shape)} and {tuple(a.shape)}; compare tensors of one shape.")
    sums = _Sums()
    sums.add(r.numpy(), a.numpy())
    if sums.signal == 0:
        raise ValueError("the reference is all zero, so that there is no signal to compare noise with.")
    return sums.sqnr_db


def sqnr(model_a: Model, model_b: Model, task: Task, *, samples: int = 64, progress: Progress = SILENT) -> Distances:
    """How far `model_b` is from `model_a` at each layer, on calibration data.

    Both run as ONNX graphs on ONNX Runtime with its optimisations off, so that int8 is computed as its Q/DQ nodes say
    and no value is lost to fusion by the engine. They are compared where they hold the same value: after the last of
    the layers that one of them has fused, dequantised where it is quantised. After pruning, the channels that were kept
    are compared with the same channels of the reference.

    Parameters
    ----------
    model_a, model_b
        The reference, such as the float32 or dense model, and its approximation.
    task
        Its calibration split is what both run on.
    samples
        As many of that split as there are, at most this many. A network with a fixed batch size uses whole batches.

    Returns
    -------
    Distances
        Energies of signal and noise are summed over all samples, in float64; decibels are not averaged.

    Raises
    ------
    DataError
        If the data do not fit the models, if there are too few, if a layer puts out NaN or infinity, or if the models
        have no layer in common.
    LoadError, BackendError
        If a model cannot be exported to ONNX, or ONNX Runtime cannot run it.

    Notes
    -----
    Signal-to-quantisation-noise ratio after Gersho and Gray, "Vector Quantization and Signal Compression", 1992.
    """
    for model in (model_a, model_b):
        task.check(model)
    progress(0.0, "exporting")
    common = _points.common(model_a.onnx(), model_b.onnx())
    if not common.points:
        raise DataError(
            f"{model_a.name} and {model_b.name} have no layer in common, so that nothing can be compared. Give two "
            "versions of one model, such as one before and after wb.Quantize."
        )
    pairs = [_Pair(point, _kept(model_a), _kept(model_b)) for point in common.points]
    wanted_a, wanted_b = [p.a.tensor for p in common.points], [p.b.tensor for p in common.points]
    done = 0
    with _tapped(model_a, wanted_a) as engine_a, _tapped(model_b, wanted_b) as engine_b:
        for inputs in _chunks(task, (engine_a, engine_b), samples):
            progress(done / samples, f"comparing, {done} of {samples} samples")
            outputs = _read(engine_a, wanted_a, inputs), _read(engine_b, wanted_b, inputs)
            for pair, a, b in zip(pairs, *outputs, strict=True):
                _check_finite(pair.point, (model_a, a), (model_b, b))
                pair.add(a, b, len(inputs[0]))
            done += len(inputs[0])
    types = dict(zip(model_a.layers["layer"], model_a.layers["type"], strict=True))
    rows = [pair.row(types) for pair in pairs if not pair.why]
    left_out = [
        *((layer, "a", "the other has no such layer") for layer in common.only_a),
        *((layer, "b", "the other has no such layer") for layer in common.only_b),
        *((layer, "both", "no value behind it is in both") for layer in common.nowhere),
        *((" + ".join(pair.point.layers), "both", pair.why) for pair in pairs if pair.why),
    ]
    return Distances(
        rows=pd.DataFrame(rows, columns=COLUMNS),
        unmatched=pd.DataFrame(left_out, columns=["layer", "side", "why"]),
        name_a=_named(model_a),
        name_b=_named(model_b),
        samples=done,
    )


@dataclass
class _Sums:
    """Energies of a reference, of its approximation and of their difference, chunk by chunk."""

    signal: float = 0.0
    noise: float = 0.0
    other: float = 0.0
    product: float = 0.0
    max_error: float = 0.0

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        a, b = (np.asarray(x, dtype=np.float64).ravel() for x in (a, b))
        error = a - b
        self.signal += float(a @ a)
        self.noise += float(error @ error)
        self.other += float(b @ b)
        self.product += float(a @ b)
        self.max_error = max(self.max_error, float(np.abs(error).max(initial=0.0)))

    @property
    def sqnr_db(self) -> float:
        if self.signal == 0:
            return math.nan
        return math.inf if self.noise == 0 else 10 * math.log10(self.signal / self.noise)

    @property
    def cosine(self) -> float:
        scale = math.sqrt(self.signal) * math.sqrt(self.other)
        return self.product / scale if scale else math.nan


class _Pair:
    """One point, what was summed there, and why it cannot be compared; empty where it can."""

    def __init__(self, point: Point, kept_a: Mapping[str, Sequence[int]], kept_b: Mapping[str, Sequence[int]]):
        self.point, self.sums, self.shape, self.why = point, _Sums(), (), ""
        same = point.a.channels == point.b.channels
        layer, self._axis = (point.a.channels if same else None) or ("", 0)
        self._kept = kept_a.get(layer), kept_b.get(layer)

    def add(self, a: np.ndarray, b: np.ndarray, batch: int) -> None:
        if self._kept != (None, None) and a.ndim == b.ndim > 1:
            a, b = self._shared(a, b)
        if a.shape != b.shape or a.size == 0:
            self.why = f"the shapes differ: {a.shape[1:]} and {b.shape[1:]}"
            return
        self.shape = self.shape or (a.shape[1:] if a.shape[:1] == (batch,) else a.shape)
        self.sums.add(a, b)

    def _shared(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Those channels of each that pruning kept in both; all of them where what was kept is not what is there."""
        widths = a.shape[self._axis], b.shape[self._axis]
        numbers = [range(width) if kept is None else kept for kept, width in zip(self._kept, widths, strict=True)]
        if tuple(map(len, numbers)) != widths:
            return a, b
        _, of_a, of_b = np.intersect1d(*numbers, assume_unique=True, return_indices=True)
        return a.take(of_a, self._axis), b.take(of_b, self._axis)

    def row(self, types: Mapping[str, str]) -> tuple[Any, ...]:
        layers, sums = self.point.layers, self.sums
        kind = types.get(layers[0], self.point.a.operator)
        return " + ".join(layers), kind, self.shape, sums.sqnr_db, sums.cosine, sums.max_error


def _tapped(model: Model, tensors: Sequence[str]) -> Engine:
    """An engine that also puts out these tensors."""
    graph = _points.with_outputs(model.onnx(), tensors)
    return OnnxRuntime(graph_level="disabled").compile(model.changed("", graph=graph))


def _read(engine: Engine, tensors: Sequence[str], inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    outputs = engine(*inputs)
    values = outputs if isinstance(outputs, tuple) else (outputs,)
    named = dict(zip((spec.name for spec in engine.outputs), values, strict=True))
    return [named[tensor] for tensor in tensors]


def _chunks(task: Task, engines: Sequence[Engine], samples: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Calibration inputs, a few samples at a time, or as many as a network with a fixed batch size takes."""
    fixed = {engine.name: size for engine in engines if (size := engine.inputs[0].shape[0]) is not None}
    if len(set(fixed.values())) > 1:
        sizes = " and ".join(f"{name} {size}" for name, size in fixed.items())
        raise DataError(
            f"The models take batches of different sizes ({sizes}). Load both with the same example inputs."
        )
    size = next(iter(fixed.values()), _CHUNK)
    count = 0
    for inputs, labels in task.batches("calibration", size, samples):
        if not fixed or len(labels) == size:
            count += len(labels)
            yield inputs
    if not count:
        raise DataError(
            f"{task.name} has {task.count('calibration')} calibration samples and {samples} were asked for; at least "
            f"{size if fixed else 1} is needed. Build the task with wb.Task.from_arrays(…, calibration=512)."
        )


def _kept(model: Model) -> dict[str, Sequence[int]]:
    """The channels of the untouched module that each pruned layer still has."""
    return {
        path: settings["kept_channels"]
        for edit in model.edits
        for path, settings in edit.items()
        if isinstance(settings, Mapping) and "kept_channels" in settings
    }


def _check_finite(point: Point, *sides: tuple[Model, np.ndarray]) -> None:
    for model, value in sides:
        if not np.isfinite(value).all():
            raise DataError(
                f"Layer {' + '.join(point.layers)} of {_named(model)} puts out NaN or infinity on calibration samples. "
                "Look for what is wrong with the data or the weights before that layer, or use a wider precision."
            )


def _named(model: Model) -> str:
    return " ".join((model.name, *(f"({change})" for change in model.changes)))
