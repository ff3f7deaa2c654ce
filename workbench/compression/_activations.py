"""Ranges of what layers are given, over calibration samples that come in chunks; no activation is kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from workbench.compression import _ranges
from workbench.compression._calibrated import Samples
from workbench.deployment import Eager, Engine
from workbench.errors import DataError
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model

Note = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Range:
    """What an activation quantiser keeps, and the share of values (0 to 1) that lie outside."""

    low: float
    high: float
    clipped_share: float = 0.0


def extents(
    model: Model, layers: Sequence[str], samples: Samples, *, progress: Progress = SILENT
) -> dict[str, tuple[float, float]]:
    """Smallest and largest input of each of these layers.

    Raises
    ------
    DataError
        If an input is NaN or infinite.
    """
    found: dict[str, tuple[float, float]] = {}

    def note(layer: str, values: Tensor) -> None:
        low, high = (float(end) for end in values.aminmax())
        if not math.isfinite(high - low):
            raise DataError(
                f"The input of {layer} is NaN or infinite on calibration samples, so that no range can be taken. Check "
                "that preprocessing and weights belong together."
            )
        before = found.get(layer, (low, high))
        found[layer] = min(low, before[0]), max(high, before[1])

    _watch(model, layers, samples, note, progress)
    return found


def ranges(
    model: Model,
    layers: Sequence[str],
    samples: Samples,
    *,
    method: str,
    bits: int,
    percentile: float = _ranges.PERCENTILE,
    progress: Progress = SILENT,
) -> dict[str, Range]:
    """The range to keep of the input of each of these layers.

    Parameters
    ----------
    samples
        Run through once for the ends, and, unless the method is ``minmax``, once more for histograms between them.
    method, percentile, bits
        See `_ranges.range_from_histogram`.

    Raises
    ------
    DataError
        If an input is NaN or infinite.
    """
    ends = extents(model, layers, samples, progress=progress.part(0.0, 1.0 if method == "minmax" else 0.5))
    if method == "minmax":
        return {layer: Range(min(low, 0.0), max(high, 0.0)) for layer, (low, high) in ends.items()}
    edges = {layer: _ranges.histogram_edges(*found) for layer, found in ends.items()}
    counts = {layer: np.zeros(_ranges.BINS) for layer in ends}

    def note(layer: str, values: Tensor) -> None:
        low, high = edges[layer][[0, -1]]
        if low < high:
            counts[layer] += values.float().histc(_ranges.BINS, low, high).numpy()

    _watch(model, layers, samples, note, progress.part(0.5, 1.0))
    return {layer: _kept(counts[layer], edges[layer], method, percentile, bits) for layer in ends}


class _Reached(Exception):
    """Ends a forward pass that has done what it was for."""


def up_to(
    engine: Engine,
    layer: nn.Module,
    samples: Samples,
    note: Callable[[Tensor, Tensor], None],
    *,
    progress: Progress = SILENT,
) -> None:
    """Run the samples through the network as far as the first call of a layer.

    Parameters
    ----------
    engine
        Of the network that `layer` is a part of.
    note
        Is given the layer's input and output for each chunk; these are inference tensors.
    """

    def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        note(_given(args, kwargs), output)
        raise _Reached

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        for inputs, _ in samples.chunks("samples", progress):
            with suppress(_Reached):
                engine(*inputs)
    finally:
        handle.remove()


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs["input"]


def _watch(model: Model, layers: Sequence[str], samples: Samples, note: Note, progress: Progress) -> None:
    module = copy.deepcopy(model.module)
    with Eager().compile(model.changed("", module=module)) as engine:
        # after compiling: its run on the example inputs is none of the samples
        for layer in layers:
            module.get_submodule(layer).register_forward_pre_hook(_noting(layer, note), with_kwargs=True)
        for inputs, _ in samples.chunks("ranges", progress):
            engine(*inputs)


def _noting(layer: str, note: Note) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(layer, _given(args, kwargs))

    return hook


def _kept(counts: np.ndarray, edges: np.ndarray, method: str, percentile: float, bits: int) -> Range:
    if not counts.any():  # nothing but zero
        return Range(0.0, 0.0)
    low, high = _ranges.range_from_histogram(counts, edges, method, percentile, bits)
    below, above = np.interp([low, high], edges, np.concatenate([[0.0], np.cumsum(counts)])) / counts.sum()
    return Range(low, high, float(max(below + 1 - above, 0.0)))
