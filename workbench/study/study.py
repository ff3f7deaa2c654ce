"""`Study`: one model, one task, all candidates; the cache; the Pareto front."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from psygnal import Signal

from workbench import environment, jobs
from workbench.compression import Step
from workbench.data.task import Task
from workbench.deployment import Backend, Eager, Engine, OnnxRuntime
from workbench.errors import DataError, StoreError
from workbench.jobs import SILENT, Progress
from workbench.measure import Measurement, MemoryMeter, accuracy, measure
from workbench.models.model import Model
from workbench.study import pareto, states
from workbench.study.candidate import Candidate
from workbench.study.recipe import Recipe
from workbench.study.store import Store, digest

_COLUMNS = (
    "candidate recipe backend batch family precision accuracy accuracy_low accuracy_high latency_ms latency_low_ms "
    "latency_high_ms latency_p95_ms speedup throughput_per_s size_bytes file_bytes memory_mb pareto contended created"
).split()
_KEPT_MODELS = 32  # step outputs held ready in this process; the store has them all


class Study:
    """One model and one task, everything tried on them, and what came out best.

    Recipes are paths in a tree: what two of them share at the front is computed once, in this process and the next.

    Parameters
    ----------
    model, task
        What is made cheaper, and what it is judged on.
    store
        A folder to keep the study in, so that it goes on in a new process; None keeps it in memory.
    name
        What a person calls it; by default the model's and the task's names.

    Attributes
    ----------
    added
        Signal, emitted with each new `Candidate`, on the thread that measured it.

    Raises
    ------
    DataError
        If the task's samples do not fit the model's inputs.
    StoreError
        If the store holds a study of another model or task, or cannot be read.
    """

    added = Signal(object)

    def __init__(self, model: Model, task: Task, store: str | Path | None = None, name: str | None = None):
        task.check(model)
        self.model, self.task = model, task
        self.name = name or f"{model.name} · {task.name}"
        self._working = threading.RLock()  # one measurement at a time: two would disturb each other
        self._models: dict[str, Model] = {}
        self._by_key: dict[str, Candidate] = {}
        self._reference: Engine | None = None
        self._store = Store(store)
        try:
            self._claim()
            self._refresh()
        except BaseException:
            self._store.close()
            raise

    def _claim(self) -> None:
        for key, mine, name in (
            ("model", self.model.fingerprint, self.model.name),
            ("task", self.task.fingerprint, self.task.name),
        ):
            theirs = self._store.meta(key)
            if theirs is not None and theirs != mine:
                raise StoreError(
                    f"{self._store.folder} is a study of another {key}: it was made with "
                    f"{self._store.meta(key + '_name')!r} ({theirs[:12]}), this is {name!r} ({mine[:12]}). Give the "
                    f"same {key}, weights included, or another folder."
                )
            if theirs is None:
                self._store.set_meta(key, mine)
                self._store.set_meta(key + "_name", name)

    def _refresh(self) -> None:
        """Take in candidates that another process added."""
        last = max((c.number for c in self._by_key.values()), default=0)
        for number, key, state, recipe, measurement, created in self._store.candidates(after=last):
            self._keep(number, key, state, Recipe.from_dict(recipe), Measurement.from_dict(measurement), created)

    def _keep(
        self, number: int, key: str, state: str, recipe: Recipe, measured: Measurement, created: str
    ) -> Candidate:
        candidate = Candidate(number, recipe, measured, created, partial(self._model, state, recipe), self._about)
        self._by_key[key] = candidate
        return candidate

    @property
    def folder(self) -> Path | None:
        """Where it is kept; None for a study in memory."""
        return self._store.folder

    # what was tried

    @property
    def candidates(self) -> list[Candidate]:
        """All candidates, by number."""
        return sorted(self._by_key.values(), key=lambda c: c.number)

    @property
    def baseline(self) -> Candidate | None:
        """The first candidate without steps: the model as it is; None until one was run."""
        return next((c for c in self.candidates if not c.recipe.steps), None)

    @property
    def log(self) -> list[str]:
        """Every run so far, and whatever else was noted, as a line of Python."""
        return self._store.log()

    def note(self, code: str) -> None:
        """Append to `log` a line of Python that did something besides `run`: took a profile, say."""
        self._store.add_log(code)

    def frame(self) -> pd.DataFrame:
        """A row per candidate, by number.

        Columns: candidate, recipe, backend, batch, family, precision, accuracy with accuracy_low and accuracy_high,
        latency_ms with latency_low_ms, latency_high_ms and latency_p95_ms, speedup (over the reference engine, in the
        same interleaved run), throughput_per_s, size_bytes, file_bytes, memory_mb, pareto (on the front of accuracy
        against latency among the candidates of its batch size), contended, created.
        """
        rows = []
        for c in self.candidates:
            m = c.measurement
            low_high = (*m.accuracy_interval, m.latency_ms, *m.latency_interval_ms)
            rows.append(
                (c.number, c.label, c.recipe.backend_label, m.batch, c.family, m.precision, m.accuracy, *low_high)
                + (m.latency_p95_ms, m.speedup, m.throughput_per_s, m.size_bytes, m.file_bytes, m.memory_mb)
                + (False, m.contended, c.created)
            )
        frame = pd.DataFrame(rows, columns=_COLUMNS)
        frame["pareto"] = frame["pareto"].astype(bool)
        for _, rows_of_batch in frame.groupby("batch"):
            frame.loc[rows_of_batch.index, "pareto"] = pareto.front(rows_of_batch)
        return frame

    def pareto(self) -> pd.DataFrame:
        """The rows of `frame` on the front, fastest first."""
        frame = self.frame()
        return frame[frame["pareto"]].sort_values(["batch", "latency_ms"]).reset_index(drop=True)

    def best(self, max_drop: float = 0.01, batch: int | None = None) -> Candidate:
        """The fastest candidate whose accuracy is at most `max_drop` (of 1) below the untouched model's.

        Parameters
        ----------
        batch
            Among the candidates of this batch size; None for the batch of the first candidate.

        Raises
        ------
        StoreError
            If nothing was run yet, or no candidate is accurate enough; the closest is named.
        """
        if not self._by_key:
            raise StoreError("the study is empty; run something first, e.g. study.run([], on=wb.OnnxRuntime()).")
        batch = self.candidates[0].recipe.batch if batch is None else batch
        among = [c for c in self.candidates if c.recipe.batch == batch]
        if not among:
            raise StoreError(f"no candidate was measured at batch {batch}; run one with study.run(…, batch={batch}).")
        wanted = self.reference_accuracy - max_drop
        good = [c for c in among if c.measurement.accuracy >= wanted - 1e-12]
        if not good:
            closest = max(among, key=lambda c: c.measurement.accuracy)
            raise StoreError(
                f"no candidate keeps {wanted:.2%} accuracy; the closest is {closest!r}. Allow a larger max_drop, or "
                "add wb.Finetune(…) after the step that costs most."
            )
        return min(good, key=lambda c: c.measurement.latency_ms)

    @property
    def reference_accuracy(self) -> float:
        """Accuracy (0 to 1) of the untouched model on the reference engine; measured once and kept."""
        kept = self._store.meta("reference_accuracy")
        if kept is None:
            with self._working:
                kept = repr(accuracy(self._reference_engine(), self.task)[0])
                self._store.set_meta("reference_accuracy", kept)
        return float(kept)

    # trying something

    def run(
        self,
        steps: Sequence[Step] = (),
        on: Backend | None = None,
        batch: int = 1,
        seed: int = 0,
        *,
        progress: Progress = SILENT,
    ) -> Candidate:
        """Apply the steps, compile, measure, and keep the candidate; one already measured is returned at once.

        Parameters
        ----------
        steps
            Applied in order; empty measures the model as it is.
        on
            The backend; `OnnxRuntime()` by default.
        batch
            Samples per timed call.
        seed
            Seed of every random choice in the steps.

        Raises
        ------
        RecipeError, StepError, BackendError, DataError
            Before any work, where the recipe cannot work on this model, task or machine.
        TrainingDiverged
            If the loss of a step that trains stops being a number; finished steps are kept.
        Cancelled
            If `progress` says so; finished steps are kept, and of a step that trains its finished epochs: the same
            recipe goes on after them.
        """
        recipe = Recipe(tuple(steps), on if on is not None else OnnxRuntime(), batch, seed)
        key, state = self._keys(recipe)
        if key in self._by_key:
            return self._by_key[key]
        self._check(recipe)
        with self._working:
            self._refresh()
            if key in self._by_key:
                return self._by_key[key]
            model = self._model(state, recipe, progress.part(0.0, 0.5))
            measured = self._measure(model, recipe, progress.part(0.5, 1.0))
            number, created = self._store.add_candidate(key, state, recipe.to_dict(), measured.to_dict())
            self._store.add_log(recipe.to_python())
            candidate = self._keep(number, key, state, recipe, measured, created)
        self.added.emit(candidate)
        return candidate

    def submit(self, steps: Sequence[Step] = (), on: Backend | None = None, batch: int = 1, seed: int = 0) -> jobs.Job:
        """`run` as a job on the worker thread; what can be refused is refused here, before it is queued."""
        recipe = Recipe(tuple(steps), on if on is not None else OnnxRuntime(), batch, seed)
        if self._keys(recipe)[0] not in self._by_key:
            self._check(recipe)
        name = f"{recipe.label} on {recipe.backend_label}"
        return jobs.submit(name, self.run, recipe.steps, recipe.backend, batch, seed)

    def _check(self, recipe: Recipe) -> None:
        recipe.backend.require()
        if recipe.batch > self.task.count("test"):
            raise DataError(f"batch is {recipe.batch}, but the test split has {self.task.count('test')} samples.")
        model = self.model
        for step in recipe.steps:
            step.check(model)
            model = step.preview(model)
        recipe.backend.check(model)

    def _keys(self, recipe: Recipe) -> tuple[str, str]:
        """The candidate's key, and that of the state its steps lead to."""
        state = self._state_key(recipe, len(recipe.steps))
        return digest(state, recipe.backend.to_dict(), recipe.batch), state

    def _state_key(self, recipe: Recipe, count: int) -> str:
        steps = [step.to_dict() for step in recipe.steps[:count]]
        seed = recipe.seed if steps else 0  # the untouched model has no random choice
        return digest(self.model.fingerprint, self.task.fingerprint, steps, seed, environment.library_versions())

    def _model(self, state: str, recipe: Recipe, progress: Progress = SILENT) -> Model:
        """The model the recipe's steps lead to, from the longest prefix that is already there."""
        with self._working:
            keys = [self._state_key(recipe, n) for n in range(len(recipe.steps) + 1)]
            model, done = self.model, 0
            for count in range(len(recipe.steps), 0, -1):
                found = self._lookup(keys[count])
                if found is not None:
                    model, done = found, count
                    break
            todo = recipe.steps[done:]
            for index, step in enumerate(todo):
                part = progress.part(index / len(todo), (index + 1) / len(todo), step.label)
                part(0.0)
                step.check(model)
                key = keys[done + index + 1]
                checkpoint = self._store.checkpoint(key)
                model = step.apply(model, self.task, seed=recipe.seed, progress=part, checkpoint=checkpoint)
                self._remember(key, model)
                self._store.put_state(key, *states.pack(model))
                checkpoint.clear()
            return model

    def _lookup(self, key: str) -> Model | None:
        if key in self._models:
            return self._models[key]
        kept = self._store.state(key)
        if kept is None:
            return None
        return self._remember(key, states.unpack(*kept, self.model))

    def _remember(self, key: str, model: Model) -> Model:
        self._models[key] = model
        while len(self._models) > _KEPT_MODELS:
            self._models.pop(next(iter(self._models)))
        return model

    def _measure(self, model: Model, recipe: Recipe, progress: Progress) -> Measurement:
        reference = self._reference_engine()
        progress(0.0, f"compiling for {recipe.backend_label}")
        recipe.backend.prepare(model)
        meter = MemoryMeter()
        with recipe.backend.compile(model, progress.part(0.0, 0.2)) as engine:
            return measure(
                engine,
                self.task,
                batch=recipe.batch,
                reference=reference,
                memory=meter,
                progress=progress.part(0.2, 1.0, recipe.backend_label),
            )

    def _reference_engine(self) -> Engine:
        """What every speedup is against: the untouched model, eager where it has a module."""
        if self._reference is None:
            backend = Eager() if self.model.module is not None else OnnxRuntime()
            self._reference = backend.compile(self.model)
        return self._reference

    def _about(self) -> dict[str, Any]:
        task = self.task.describe()
        return {
            "model": self.model.name,
            "weights": self.model.weights,
            "classes": task["classes"],
            "preprocessing": task["preprocessing"],
            "task": task,
        }

    def close(self) -> None:
        """Release the reference engine and the store; the candidates stay readable in this process."""
        if self._reference is not None:
            self._reference.close()
            self._reference = None
        self._store.close()

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = "in memory" if self._store.folder is None else str(self._store.folder)
        return f"<Study {self.name}: {len(self._by_key)} candidates, {where}>"

    def _repr_html_(self) -> str:
        return self.frame().drop(columns=["file_bytes", "created"]).to_html(index=False, border=0, escape=True)
