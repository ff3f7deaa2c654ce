"""One layer at a time, at one level after another: what a sensitivity analysis computes, and keeps as it goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from workbench import environment, measure
from workbench.compression import Quantize, one_layer
from workbench.data.task import Task
from workbench.deployment import Backend, Eager, Engine
from workbench.errors import DataError, StepError, nearest
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model
from workbench.profiling import profile
from workbench.profiling.align import align
from workbench.study._results import Results

_BATCH = 200  # samples per call while accuracy is measured
_INT8 = 8  # the width that engines run
_WHY = "why"  # stands in place of a score
_NO_LATENCY = {"latency_ms": math.nan, "saved_ms": math.nan, "saved_low_ms": math.nan, "saved_high_ms": math.nan}


@dataclass(frozen=True)
class Plan:
    """What is to be computed; checked by whoever makes it.

    Attributes
    ----------
    backend
        What latency is measured on; None to leave it out.
    layers
        None for all that the technique can change.
    samples
        Of the test split, from its start.
    """

    model: Model
    task: Task
    technique: str
    backend: Backend | None
    levels: tuple[float, ...]
    layers: tuple[str, ...] | None
    samples: int
    seed: int


@dataclass(frozen=True)
class Score:
    """Accuracy (0 to 1) with its 95 % interval, and mean cross-entropy in nats."""

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    loss: float


@dataclass(frozen=True)
class Swept:
    """What came out: the untouched model's score, a row per layer and level, and what was left out with the reason."""

    baseline: Score
    rows: tuple[dict[str, Any], ...]
    left_out: tuple[tuple[str, str], ...]


def run(plan: Plan, results: Results, *, progress: Progress = SILENT) -> Swept:
    """Every point of the plan; one that `results` holds is not computed again, and each is kept as soon as it is there.

    Raises
    ------
    StepError
        If the plan names a layer that cannot be changed.
    Cancelled
        If `progress` says so.
    """
    sweep = _Sweep(plan, results)
    try:
        return sweep.run(progress)
    finally:
        sweep.close()


def score(model: Model, task: Task, samples: int, *, progress: Progress = SILENT) -> Score:
    """The task's metric and the cross-entropy of a torch module, on the first samples of the test split.

    The first output is taken for logits.

    Raises
    ------
    DataError
        If it is NaN or infinite, or does not fit the labels.
    """
    values, losses, seen = [], 0.0, 0
    with Eager().compile(model) as engine:
        for inputs, labels in task.batches("test", _BATCH, samples):
            progress(seen / samples, f"accuracy, {seen} of {samples}")
            outputs = engine(*inputs)
            logits = torch.from_numpy(outputs[0] if isinstance(outputs, tuple) else outputs)
            values.append(task.metric.per_sample(outputs, labels))
            seen += len(labels)
            losses += float(functional.cross_entropy(logits.double(), torch.from_numpy(labels), reduction="sum"))
            if not math.isfinite(losses):
                raise DataError(
                    f"{model.name} gives NaN or infinite outputs for test samples up to {seen - 1}. Look for what is "
                    "wrong with the data or the weights."
                )
    mean, low, high = task.metric.interval(np.concatenate(values))
    return Score(float(mean), float(low), float(high), losses / seen)


class _Sweep:
    """The plan while it runs: what several points need is made once, and only if one needs it."""

    def __init__(self, plan: Plan, results: Results):
        self.plan, self._results = plan, results
        self._engine: Engine | None = None
        self._progress: Progress = SILENT

    def run(self, progress: Progress) -> Swept:
        plan = self.plan
        progress(0.0, "layers")
        layers = self._layers()
        points = [(layer, level) for layer in layers for level in plan.levels]
        steps = 1 + len(points)
        self._progress = progress.part(0.0, 1 / steps, "as it is")
        baseline = Score(**self._kept(lambda: self._score(plan.model), "baseline"))
        rows, left_out = [], []
        for done, (layer, level) in enumerate(points, start=1):
            share = f"{100 * level:g} %" if plan.technique == "prune" else f"{level} bits"
            self._progress = progress.part(done / steps, (done + 1) / steps, f"{layer}, {share}")
            self._progress(0.0)
            row = self._row(layer, level, baseline)
            if _WHY in row:
                left_out.append((layer, f"{share}: {row[_WHY]}"))
            else:
                rows.append(row)
        unchanged = [layer for layer in one_layer.weighted(plan.model) if plan.layers is None and layer not in layers]
        left_out += [(layer, "loses no channels, or those of another layer of its group") for layer in unchanged]
        return Swept(baseline, tuple(rows), tuple(left_out))

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def _layers(self) -> Sequence[str]:
        plan = self.plan
        if plan.technique == "quantize":
            return plan.layers or one_layer.weighted(plan.model)
        groups = self._kept(lambda: one_layer.prunable(plan.model), "prunable")
        accepted = [layer for group in groups.values() for layer in group]
        for layer in plan.layers or ():
            if layer not in accepted:
                raise StepError(f"Layer {layer} of {plan.model.name} can lose no channel. {nearest(layer, accepted)}")
        if not groups:
            raise StepError(f"No layer of {plan.model.name} can lose a channel, so that there is nothing to try.")
        return plan.layers or list(groups)

    def _row(self, layer: str, level: float, baseline: Score) -> dict[str, Any]:
        """One row of the frame, or the reason why this layer cannot be changed so."""
        plan = self.plan
        changed = cache(lambda: self._changed(layer, level))
        found = self._kept(lambda: self._tried(changed), "score", layer, level)
        if _WHY in found:
            return found
        drop = baseline.accuracy - found["accuracy"]
        times = {**_NO_LATENCY, "contended": False} | self._times(layer, level, changed)
        rate = times["saved_ms"] / (100 * drop) if drop > 0 else math.nan
        point = {"layer": layer, "technique": plan.technique, "level": level, "accuracy_drop": drop}
        return point | found | times | {"saved_ms_per_point": rate}

    def _tried(self, changed: Callable[[], Model]) -> dict[str, Any]:
        try:
            return self._score(changed())
        except StepError as why:  # such as a layer too narrow to lose a channel at this ratio
            return {_WHY: str(why)}

    def _score(self, model: Model) -> dict[str, Any]:
        part = self._progress.part(0.1, 0.7)
        return asdict(score(model, self.plan.task, self.plan.samples, progress=part))

    def _changed(self, layer: str, level: float) -> Model:
        if self.plan.technique == "prune":
            return one_layer.pruned(self.plan.model, layer, level)
        return one_layer.quantised(self.plan.model, layer, int(level), self._ranges[layer])

    def _times(self, layer: str, level: float, changed: Callable[[], Model]) -> dict[str, Any]:
        backend = self.plan.backend
        if backend is None:
            return {}
        where = [environment.current().processor, backend.to_dict(), backend.thread_count]
        if self.plan.technique == "prune":
            return self._kept(lambda: self._against_unchanged(backend, changed()), "latency", layer, level, where)
        if level != _INT8:
            return {}
        saved = self._kept(lambda: self._saved_by_int8(backend), "int8", where)
        return {"saved_ms": saved["layers"].get(layer, math.nan), "contended": saved["contended"]}

    def _against_unchanged(self, backend: Backend, changed: Model) -> dict[str, Any]:
        """Latency of the changed model, and how much shorter it is than the unchanged one's, block by block."""
        if self._engine is None:
            self._engine = backend.compile(self.plan.model)
        inputs, progress = self.plan.task.inputs("test", 1), self._progress.part(0.7, 1.0, backend.label)
        with backend.compile(changed) as engine:
            calls = [lambda: self._engine(*inputs), lambda: engine(*inputs)]
            before, after = measure.latency(calls, progress=progress)
        saved = np.asarray(before.blocks_ms) - np.asarray(after.blocks_ms)
        low, high = measure.bootstrap_median(saved)
        return {
            "latency_ms": after.median_ms,
            "saved_ms": float(np.median(saved)),
            "saved_low_ms": low,
            "saved_high_ms": high,
            "contended": before.contended or after.contended,
        }

    def _saved_by_int8(self, backend: Backend) -> dict[str, Any]:
        """By layer, the time of its rows in a profile less that in a profile of the whole model in int8."""
        plan, part = self.plan, self._progress.part
        int8 = Quantize("int8").apply(plan.model, plan.task, seed=plan.seed, progress=part(0.7, 0.8))
        before = profile(plan.model, on=backend, progress=part(0.8, 0.9))
        after = profile(int8, on=backend, progress=part(0.9, 1.0))
        saved: dict[str, float] = {}
        for group in align(before, after).frame().itertuples():
            for layer in group.layers_a if group.how != "unmatched" else ():
                saved[layer] = saved.get(layer, 0.0) + group.latency_a_ms - group.latency_b_ms
        return {"layers": saved, "contended": before.contended or after.contended}

    @cached_property
    def _ranges(self) -> dict[str, tuple[float, float]]:
        return one_layer.input_ranges(self.plan.model, self.plan.task, progress=self._progress.part(0.0, 0.1))

    def _kept(self, compute: Callable[[], Any], *what: Any) -> Any:
        """The result kept under this and all else it depends on, or else computed and kept."""
        plan = self.plan
        key = [plan.model.fingerprint, plan.task.fingerprint, plan.technique, plan.samples, plan.seed]
        key += [environment.library_versions(), *what]
        value = self._results.get(*key)
        if value is None:
            value = compute()
            self._results.put(value, *key)
        return value
