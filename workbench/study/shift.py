"""How engines bear inputs that are brighter, darker or stronger than those their ranges were taken from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pandas as pd

from workbench.data.scaling import Shift
from workbench.data.task import Task
from workbench.deployment import Engine
from workbench.errors import DataError
from workbench.jobs import SILENT, Progress
from workbench.measure import accuracy
from workbench.study.candidate import Candidate

COLUMNS = ["engine", "shift", "gain", "offset", "accuracy", "accuracy_low", "accuracy_high"]


SHIFTS = (Shift(0.25), Shift(0.5), Shift(), Shift(2.0), Shift(4.0), Shift(offset=-1.0), Shift(offset=1.0))


def under_shift(
    engines: Mapping[str, Engine] | Sequence[Candidate],
    task: Task,
    shifts: Sequence[Shift] = SHIFTS,
    *,
    limit: int | None = None,
    progress: Progress = SILENT,
) -> pd.DataFrame:
    """Accuracy of each engine on test inputs whose values are shifted after preprocessing.

    A quantiser with static ranges clips what its calibration samples did not hold; one with dynamic ranges takes them
    from each batch.

    Parameters
    ----------
    engines
        Open engines by name, or candidates of a study, which are compiled and closed here.
    task
        Its test split is shifted: its images, or, where there are none, every input that is not ids.
    shifts
        By default gains from 0.25 to 4, and one standard deviation of normalised inputs up and down.
    limit
        Only the first so many samples; None for the whole split.

    Returns
    -------
    pandas.DataFrame
        A row per engine and shift, in the order given: engine, shift, gain, offset, accuracy (0 to 1) with its 95 %
        interval accuracy_low and accuracy_high.

    Raises
    ------
    DataError
        If there are no engines or no shifts, one of them is none, or the task has no values that can be shifted.
    """
    _check(engines, task, shifts)
    with ExitStack() as opened:
        if isinstance(engines, Mapping):
            named = dict(engines)
        else:
            named = {_name(candidate): opened.enter_context(candidate.engine()) for candidate in engines}
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in named}
        for done, shift in enumerate(shifts):
            # all engines one after another, so that the samples are prepared once for each shift
            shifted = replace(task, preprocess=(*task.preprocess, shift))
            for place, (name, engine) in enumerate(named.items()):
                at = (done + place / len(named)) / len(shifts)
                part = progress.part(at, at + 1 / (len(shifts) * len(named)), f"{name}, {shift.label}")
                score, (low, high) = accuracy(engine, shifted, limit=limit, progress=part)
                rows[name].append(dict(zip(COLUMNS, _row(name, shift, score, low, high), strict=True)))
    progress(1.0)
    return pd.DataFrame([row for of_engine in rows.values() for row in of_engine], columns=COLUMNS)


def _row(name: str, shift: Shift, score: float, low: float, high: float) -> tuple[Any, ...]:
    return name, shift.label, float(shift.gain), float(shift.offset), score, low, high


def _name(candidate: Candidate) -> str:
    return f"{candidate.number}: {candidate.label} on {candidate.recipe.backend_label}"


def _check(engines: Any, task: Task, shifts: Any) -> None:
    kind = Engine if isinstance(engines, Mapping) else Candidate
    values = list(engines.values()) if isinstance(engines, Mapping) else engines
    if not isinstance(values, Sequence) or not values or not all(isinstance(value, kind) for value in values):
        raise DataError(f"engines is {engines!r}; give open engines by name, or a list of a study's candidates.")
    if not isinstance(shifts, Sequence) or not shifts or not all(isinstance(shift, Shift) for shift in shifts):
        raise DataError(f"shifts is {shifts!r}; give a list such as [wb.Shift(0.5), wb.Shift(offset=1.0)].")
    if not any(given["preprocessed"] for given in task.describe()["inputs"]):
        raise DataError(
            f"{task.name} gives the network nothing but ids, which have no gain and no brightness. Give a task with "
            "images or other numbers."
        )
