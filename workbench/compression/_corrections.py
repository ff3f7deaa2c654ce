"""Corrections of what rounding costs, made to the weights before they are rounded, each with the gain it brought."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from workbench.compression import _adaptive_rounding, _bias, _checks, _equalize, _folding, _training, one_layer
from workbench.compression._calibrated import Judge, Samples, Score, samples
from workbench.compression._run import device_of
from workbench.compression._scheme import Scheme, simulate
from workbench.data.task import Task
from workbench.errors import StepError
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model
from workbench.models.record import Record

NAMES = ("equalize", "adaptive_rounding", "correct_bias")  # in the order in which they are tried

_MOST = 512  # samples, of which every fourth is held out to judge by
_HELD_OUT = 4


def corrected(
    model: Model,
    task: Task,
    *,
    bits: int,
    per_channel: bool,
    equalize: bool,
    correct_bias: bool,
    adaptive_rounding: bool,
    layers: Mapping[str, int] | None = None,
    activation_bits: int = 0,
    step: str,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Model:
    """A float32 model whose weights lose less when they are rounded to a symmetric grid.

    Parameters
    ----------
    bits, per_channel
        The grid: ``ŵ = s · clamp(round(w / s), -n, n)``, ``n = 2^(bits - 1) - 1``, ``s = max |w| / n``.
    equalize, correct_bias, adaptive_rounding
        Which of the corrections to try; see `improved`.
    layers
        Bits of single layers; 32 for one that stays as it is.
    activation_bits
        Of the layers' inputs while a correction is judged, with ranges by min-max; 0 for inputs in float.
    step
        Label of the step that rounds, for the record.

    Returns
    -------
    Model
        Of precision fp32, batch norms folded. After adaptive rounding its weights lie on their grids, so that rounding
        them again by ``max |w|`` gives the same ones.

    Raises
    ------
    StepError
        If `layers` names one the network does not call, or there are too few calibration samples.
    DataError
        If the network's outputs or a layer's inputs on calibration samples are NaN or infinite.
    """
    known = one_layer.weighted(model)
    _checks.layers(step, layers or {}, known, "layers it can round")
    scheme = Scheme(known, bits, activation_bits, per_channel=per_channel, layers=layers or {})
    asked = {"equalize": equalize, "adaptive_rounding": adaptive_rounding, "correct_bias": correct_bias}
    names = [name for name in NAMES if asked[name]]
    with torch.inference_mode(False), _training.settled(seed, device_of(model)):
        return improved(model, task, scheme, names, step=step, seed=seed, progress=progress)


def check(model: Model, names: Sequence[str], step: str) -> None:
    """Refuse corrections that would undo what an earlier step made.

    Raises
    ------
    StepError
        If weights that share values would no longer.
    """
    parting = [name for name in names if name != "correct_bias"]
    if parting and "clustered" in model.changes:
        raise StepError(
            f"{step}: {parting[0]} moves weights that share a value apart, and {model.name} was clustered for them to "
            f"share it. Leave {' and '.join(parting)} out, or leave wb.Cluster out."
        )


def improved(
    model: Model,
    task: Task,
    scheme: Scheme,
    names: Sequence[str],
    *,
    step: str,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Model:
    """`model`, its batch norms folded, with those of the corrections that do good under a scheme.

    Cross-layer equalisation, adaptive rounding and bias correction follow each other in that order. Each is worked out
    on three quarters of the calibration samples, at most 384, and judged on the others by how far the rounded network's
    outputs are from the float one's; one that makes the error larger is not applied.

    Parameters
    ----------
    names
        Of `NAMES`.

    Returns
    -------
    Model
        With a record of each correction: correction, applied, sqnr_before_db, sqnr_after_db, accuracy_before,
        accuracy_after (both of the rounded network on the held-out samples), samples, note.
    """
    check(model, names, step)
    given = samples(model, task, most=_MOST)
    # a network with a fixed batch needs one to judge by and one to learn from
    least = max(2 * given.size if given.whole else 0, _HELD_OUT)
    if len(given) < least:
        raise StepError(
            f"{step}: corrections learn from some calibration samples and are judged on others, and {task.name} has "
            f"{len(given)}; at least {least} are needed. Build it with wb.Task.from_arrays(…, calibration=512)."
        )
    used, held = _parted(given)
    judge = Judge(model, held, task.metric)
    run = _Run(_folding.folded(model), scheme, used, judge, seed, progress.part(0.0, 0.1))
    rows = []
    for number, name in enumerate(names):
        part = progress.part(0.1 + 0.9 * number / len(names), 0.1 + 0.9 * (number + 1) / len(names), _WORDS[name])
        rows.append({"correction": _WORDS[name], **run.attempt(name, part), "samples": len(held)})
    progress(1.0)
    title = f"corrections, on {len(held)} calibration samples held out"
    return replace(run.model, records=(*run.model.records, Record.of(step, title, rows)))


class _Run:
    """The network as it stands between two corrections: in float, and rounded, with the rounded one's score."""

    def __init__(self, model: Model, scheme: Scheme, used: Samples, judge: Judge, seed: int, progress: Progress):
        self.model = self.exact = model
        self.scheme, self.used, self.judge, self.seed = scheme, used, judge, seed
        self.rounded, self.score = self._rounded(model, progress)

    def attempt(self, name: str, progress: Progress) -> dict[str, Any]:
        """Try one correction, and keep it if it does good; what came out."""
        before = self.score
        candidate, note = _WAYS[name](self, progress.part(0.0, 0.8))
        if candidate is None:
            return _row(before, before, False, note)
        rounded, after = self._rounded(candidate, progress.part(0.8, 1.0))
        applied = after.sqnr_db >= before.sqnr_db
        if applied:
            self.model, self.rounded, self.score = candidate, rounded, after
            if name == "equalize":  # the same function: what the later ones have to come near to, layer by layer
                self.exact = candidate
        return _row(before, after, applied, note if applied else "the error grew, so it was not applied")

    def _rounded(self, model: Model, progress: Progress) -> tuple[Model, Score]:
        rounded = simulate(model, self.scheme, self.used, progress=progress).model
        return rounded, self.judge.score(rounded)

    def equalized(self, progress: Progress) -> tuple[Model | None, str]:
        between = _equalize.pairs(self.model)
        if not between:
            return None, "no layer is read by one other alone through ReLU or pooling"
        return _equalize.equalized(self.model, between), f"{_counted(len(between), 'pair')} of layers"

    def adapted(self, progress: Progress) -> tuple[Model | None, str]:
        found = _adaptive_rounding.adapted(self.model, self.scheme, self.used, seed=self.seed, progress=progress)
        return found, _counted(len(self.scheme.rounded), "layer")

    def unbiased(self, progress: Progress) -> tuple[Model | None, str]:
        layers = self.scheme.rounded
        found = _bias.corrected(self.model, self.exact, self.rounded, layers, self.used, progress=progress)
        return found, _counted(len(layers), "layer")


_WORDS = {
    "equalize": "cross-layer equalisation",
    "adaptive_rounding": "adaptive rounding",
    "correct_bias": "bias correction",
}
_WAYS: dict[str, Callable[[_Run, Progress], tuple[Model | None, str]]] = {
    "equalize": _Run.equalized,
    "adaptive_rounding": _Run.adapted,
    "correct_bias": _Run.unbiased,
}


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _row(before: Score, after: Score, applied: bool, note: str) -> dict[str, Any]:
    return {
        "applied": applied,
        "sqnr_before_db": before.sqnr_db,
        "sqnr_after_db": after.sqnr_db,
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "note": note,
    }


def _parted(given: Samples) -> tuple[Samples, Samples]:
    """Those to learn from, and every fourth to judge by; whole batches where the network's batch is fixed."""
    place = np.arange(len(given))
    held = (place // given.size if given.whole else place) % _HELD_OUT == 1
    return given.picked(place[~held]), given.picked(place[held])
