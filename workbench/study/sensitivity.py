"""Which layers bear compression: accuracy against how much one layer is pruned, or in how few bits it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from workbench import formatting, jobs
from workbench.compression import Quantize, one_layer
from workbench.data.task import Task
from workbench.deployment import Backend, OnnxRuntime
from workbench.errors import DataError, RecipeError, StepError, nearest
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model
from workbench.study import _sweep
from workbench.study._results import Results
from workbench.study.study import Study

COLUMNS = [
    *("layer", "technique", "level", "accuracy", "accuracy_low", "accuracy_high", "accuracy_drop", "loss"),
    *("latency_ms", "saved_ms", "saved_low_ms", "saved_high_ms", "saved_ms_per_point", "contended"),
]
LEVELS: dict[str, tuple[float, ...]] = {"prune": (0.25, 0.5, 0.75), "quantize": (8, 6, 4, 3, 2)}
_CHECKS: dict[str, Callable[[Any], None]] = {"prune": one_layer.check_ratio, "quantize": one_layer.check_bits}
_MOST_SAMPLES = 2000  # of the test split by default: an interval of about ± 1.3 points at 90 %, for every point


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """How accuracy falls as one layer at a time is compressed further.

    Attributes
    ----------
    rows
        See `frame`.
    baseline
        Accuracy, its interval and the loss of the untouched model, on the same samples.
    left_out
        Layer and reason of what was not tried.
    samples
        Test samples that accuracy and loss were measured on.
    backend_label
        What latency was measured on; empty where it was left out.
    """

    rows: pd.DataFrame
    baseline: _sweep.Score
    left_out: tuple[tuple[str, str], ...]
    model_name: str
    technique: str
    backend_label: str
    samples: int

    def frame(self) -> pd.DataFrame:
        """A row per layer and level: layers in execution order, levels as they were given.

        Columns: layer, technique, level (``prune``: the share of output channels removed, 0 to 1; ``quantize``: bits of
        weight and input), accuracy with its 95 % interval accuracy_low and accuracy_high, accuracy_drop (from the
        untouched model's, of 1), loss (mean cross-entropy in nats), latency_ms (median of one call of the whole model,
        batch 1), saved_ms (against the untouched model in the same interleaved run), saved_low_ms and saved_high_ms
        (its 95 % bootstrap interval), saved_ms_per_point (milliseconds saved for each percentage point of accuracy
        lost; NaN where accuracy did not fall) and contended (whether the machine was busy with something else).

        For ``quantize`` no engine runs one layer at so many bits, so that latency_ms and the interval are NaN. At 8
        bits saved_ms is the time of the layer's rows in a float32 profile less that in a profile of the whole model in
        int8, quantisers included; rows that an engine fuses count whole for each layer in them. At other widths it is
        NaN.
        """
        return self.rows.copy()

    def curve(self, layer: str) -> pd.DataFrame:
        """The rows of one layer, the mildest level first.

        Raises
        ------
        DataError
            If the layer has none; those that have are named.
        """
        rows = self.rows[self.rows["layer"] == layer]
        if rows.empty:
            raise DataError(f"Layer {layer!r} was not tried. {nearest(layer, set(self.rows['layer']))}")
        return rows.sort_values("level", ascending=self.technique == "prune").reset_index(drop=True)

    def __repr__(self) -> str:
        drops = self.rows.groupby("layer", sort=False)["accuracy_drop"].max()
        worst = f", {drops.idxmax()} falls furthest (by {100 * drops.max():.1f} points)" if len(drops) else ""
        return (
            f"<Sensitivity of {self.model_name} to {self.technique!r}: {len(drops)} layers, {self.samples} samples, "
            f"{formatting.accuracy(self.baseline.accuracy)} as it is{worst}>"
        )

    def _repr_html_(self) -> str:
        left_out = "".join(f"<li>{escape(layer)}: {escape(why)}</li>" for layer, why in self.left_out)
        return (
            f"<p>{escape(repr(self)[1:-1])}</p>"
            + self.rows.to_html(index=False, border=0, escape=True)
            + (f"<p>Left out</p><ul>{left_out}</ul>" if left_out else "")
        )


def sensitivity(
    model: Model,
    task: Task,
    technique: str = "prune",
    *,
    on: Backend | None = None,
    levels: Sequence[float] | None = None,
    layers: Sequence[str] | None = None,
    limit: int | None = None,
    cache: str | Path | Study | None = None,
    seed: int = 0,
    latency: bool = True,
) -> jobs.Job:
    """Accuracy, loss and latency as one layer at a time is pruned or quantised and all others stay as they are.

    Parameters
    ----------
    model
        A float32 torch module; nothing is trained after a change.
    technique
        ``prune`` removes output channels of smallest L2 norm, as `Prune` does, in exact widths; layers joined by an
        addition lose the same channels, as one, under the name of the first. ``quantize`` rounds weight and input of
        the layer to so many bits and back, with ranges from the calibration split.
    on
        What latency is measured on; `OnnxRuntime()` by default.
    levels
        Shares of channels above 0 and below 1, by default 0.25, 0.5 and 0.75; or bits from 2 to 16, by default 8, 6, 4,
        3 and 2.
    layers
        Names of convolutions and linear layers; by default all that the technique can change.
    limit
        Test samples, from the start of the split. By default all of a split of up to 2,000, else the first 2,000.
    cache
        A folder, or a study kept in one, where each point is kept as soon as it is there, so that a job that was
        cancelled goes on where it stopped. None keeps them for as long as this process lives.
    seed
        Seed of every random choice.
    latency
        False measures no latency; its columns are then NaN.

    Returns
    -------
    Job
        On the worker thread; its result is a `Sensitivity`.

    Raises
    ------
    StepError
        If the technique, a level or a layer is none of the accepted, or the model has no float32 torch module.
    DataError
        If the data do not fit the model, or `limit` is below 1.
    BackendError
        If the backend cannot run the model.

    Notes
    -----
    One layer at a time after Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, section 3.2.
    """
    if technique not in LEVELS:
        raise StepError(f"There is no technique {technique!r}. {nearest(str(technique), LEVELS)}")
    task.check(model)
    one_layer.check(model)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise RecipeError(f"seed is {seed!r}; a whole number of at least 0 is needed.")
    plan = _sweep.Plan(
        model=model,
        task=task,
        technique=technique,
        backend=_backend(model, technique, on) if latency else None,
        levels=_levels(technique, levels),
        layers=None if layers is None else _layers(model, layers),
        samples=_samples(task, limit),
        seed=seed,
    )
    return jobs.submit(f"Sensitivity of {model.name}, {technique}", _run, plan, Results(_folder(cache)))


def _run(plan: _sweep.Plan, results: Results, *, progress: Progress = SILENT) -> Sensitivity:
    swept = _sweep.run(plan, results, progress=progress)
    return Sensitivity(
        rows=pd.DataFrame(swept.rows, columns=COLUMNS),
        baseline=swept.baseline,
        left_out=swept.left_out,
        model_name=plan.model.name,
        technique=plan.technique,
        backend_label="" if plan.backend is None else plan.backend.label,
        samples=plan.samples,
    )


def _backend(model: Model, technique: str, on: Backend | None) -> Backend:
    backend = OnnxRuntime() if on is None else on
    if not isinstance(backend, Backend):
        raise RecipeError(f"{backend!r} is not a backend. Give an instance such as on=wb.OnnxRuntime().")
    backend.require()
    backend.check(model)
    if technique == "quantize":
        backend.check(Quantize("int8").preview(model))
    return backend


def _levels(technique: str, levels: Sequence[float] | None) -> tuple[float, ...]:
    if levels is None:
        return LEVELS[technique]
    if not isinstance(levels, (list, tuple)) or not levels:
        raise StepError(f"levels is {levels!r}; give a list such as {list(LEVELS[technique])}.")
    for level in levels:
        _CHECKS[technique](level)
    return tuple(dict.fromkeys(levels))


def _layers(model: Model, layers: Sequence[str]) -> tuple[str, ...]:
    accepted = one_layer.weighted(model)
    if not isinstance(layers, (list, tuple)) or not layers:
        raise StepError(f"layers is {layers!r}; give a list such as {list(accepted[:2])}.")
    for layer in layers:
        if layer not in accepted:
            raise StepError(
                f"{model.name} has no convolution or linear layer {layer!r}. {nearest(str(layer), accepted)}"
            )
    return tuple(dict.fromkeys(layers))


def _samples(task: Task, limit: int | None) -> int:
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise DataError(f"limit is {limit!r}; a whole number of at least 1 is needed, or None.")
    return min(task.count("test"), _MOST_SAMPLES if limit is None else limit)


def _folder(cache: str | Path | Study | None) -> Path | None:
    if isinstance(cache, Study):
        return None if cache.folder is None else cache.folder / "sensitivity"
    return None if cache is None else Path(cache)
