"""What is known of the selected candidate: its numbers, its steps and what each changed, its environment."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as W

from widgets._copy import CopyButton
from widgets._panel import Panel
from workbench import formatting as fmt
from workbench import jobs
from workbench.jobs import Progress
from workbench.study import Candidate, Study

_NONE = "Nothing is selected. Click a point or a row in Compare, or run a recipe in Compress."


class Inspector(Panel):
    """The selected candidate in full, with what can be done with it."""

    title = "Selected"
    question = "Selected"
    runs_jobs = True

    def _build(self) -> list[W.Widget]:
        self._shown: int | None = None
        self.about = W.HTML()
        self.about.add_class("wb-about")
        self.copy = CopyButton()
        self.folder = W.Text(description="Folder", placeholder="where the package is written")
        self.save = W.Button(description="Save", tooltip="Write a package that runs elsewhere, as a job")
        actions = W.HBox([self.copy, W.HBox([self.folder, self.save])])
        actions.add_class("wb-actions")
        self._draw()
        return [self.about, actions]

    def _listen(self) -> None:
        self.bindings.connect(self.selection.events.candidate, lambda *_: self._draw(), "Showing the selection")
        self.bindings.connect(self.study.added, lambda _candidate: self._draw(), "Showing the selection")
        self.save.on_click(self.bindings.handler(lambda _button: self._save(), "Saving"))

    @property
    def candidate(self) -> Candidate | None:
        """The selected candidate; None where none is, or the study has no such number."""
        return next((c for c in self.study.candidates if c.number == self.selection.candidate), None)

    def _draw(self) -> None:
        candidate = self.candidate
        self.save.disabled = self.folder.disabled = candidate is None
        self.copy.text = "" if candidate is None else candidate.to_python()
        if candidate is None:
            self.about.value = f'<p class="wb-muted">{escape(_NONE)}</p>'
            return
        if self._shown != candidate.number:
            self.folder.value = f"{self.study.model.name}-{candidate.number}"
            self._shown = candidate.number
        self.about.value = _about(candidate, self.study)

    def _save(self) -> None:
        candidate, folder = self.candidate, self.folder.value.strip()
        if candidate is None:
            return
        if not folder:
            self.notices.tell("Give a folder to save the package in, for example resnet20-int8.")
            return
        job = jobs.submit(f"Save candidate {candidate.number}", _save, candidate, folder)
        self.follow(job, self._saved, "Saving")

    def _saved(self, folder: Path) -> None:
        self.notices.tell(f"Saved to {folder}. To run it: python {folder / 'run.py'}")

    def to_html(self) -> str:
        return f"<h3>{escape(self.question)}</h3>{self.about.value}"

    def to_text(self) -> str:
        return _NONE if self.candidate is None else repr(self.candidate)[1:-1]


def _save(candidate: Candidate, folder: str, *, progress: Progress) -> Path:
    progress(0.1, f"compiling for {candidate.recipe.backend_label}")
    with candidate.engine() as engine:
        progress(0.8, "writing the package")
        return engine.save(folder)


def _about(candidate: Candidate, study: Study) -> str:
    m, recipe = candidate.measurement, candidate.recipe
    base = study.baseline
    rows = [
        ("accuracy", fmt.accuracy(m.accuracy), fmt.plus_minus(m.accuracy, m.accuracy_interval, 100)),
        ("latency", fmt.milliseconds(m.latency_ms), fmt.latency_interval(m.latency_ms, m.latency_interval_ms)),
        ("latency, p95", fmt.milliseconds(m.latency_p95_ms), ""),
        ("speed-up", fmt.factor(m.speedup), ""),
        ("throughput", f"{fmt.significant(m.throughput_per_s)} /s", ""),
        ("size", fmt.size(m.size_bytes), ""),
        ("memory", f"{fmt.significant(m.memory_mb)} MB", ""),
    ]
    numbers = "".join(
        f"<tr><th scope=row>{escape(k)}</th><td>{escape(v)}</td><td>{escape(interval)}</td></tr>"
        for k, v, interval in rows
    )
    against = ""
    if base is not None and base.number != candidate.number:
        drop = m.accuracy - base.measurement.accuracy
        against = f"<p>Accuracy against the baseline, candidate {base.number}: {_points(drop)}</p>"
    busy = "<p>The machine was busy with something else while this was measured.</p>" if m.contended else ""
    environment = "".join(
        f"<tr><th scope=row>{escape(str(k))}</th><td>{escape(_plain(v))}</td></tr>" for k, v in m.environment.items()
    )
    where = f"{recipe.backend_label} · batch {recipe.batch} · {m.precision}"
    return (
        f'<p class="wb-name"><b>Candidate {candidate.number}: {escape(candidate.label)}</b><br>'
        f'<span class="wb-muted">{escape(where)}</span></p>'
        f'<table class="wb-numbers">{numbers}</table>{against}{busy}'
        f"<h3>Steps, and what each changed</h3>{_steps(candidate, study)}"
        f'<details><summary>Environment</summary><table class="wb-env">{environment}</table></details>'
    )


def _points(difference: float) -> str:
    """A difference of two accuracies in percentage points, signed."""
    return fmt.signed(difference, f"{fmt.accuracy(abs(difference), unit=False)} points")


def _plain(value: Any) -> str:
    """A value of the environment in words."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value in (None, "") else str(value)


def _steps(candidate: Candidate, study: Study) -> str:
    """The steps in order; beside each what it changed, where the recipe without it and after was measured alike."""
    recipe = candidate.recipe
    if not recipe.steps:
        return "<p>None: this is the model as it is.</p>"
    alike = {
        c.recipe.steps: c
        for c in study.candidates
        if (c.recipe.backend, c.recipe.batch) == (recipe.backend, recipe.batch)
        and (c.recipe.seed == recipe.seed or not c.recipe.steps)
    }
    items = []
    for count, step in enumerate(recipe.steps, 1):
        before, after = alike.get(recipe.steps[: count - 1]), alike.get(recipe.steps[:count])
        change = _change(before, after) if before and after else "not measured on its own"
        items.append(f'<li>{escape(step.label)}<br><span class="wb-muted">{escape(change)}</span></li>')
    return f"<ol>{''.join(items)}</ol>"


def _change(before: Candidate, after: Candidate) -> str:
    """What one step changed: accuracy, latency as a ratio, size."""
    a, b = before.measurement, after.measurement
    accuracy, size = b.accuracy - a.accuracy, b.size_bytes - a.size_bytes
    (a_low, a_high), (b_low, b_high) = a.latency_interval_ms, b.latency_interval_ms
    if a_low <= b_high and b_low <= a_high:
        speed = "latency indistinguishable"
    else:
        ratio = a.latency_ms / b.latency_ms
        speed = f"{fmt.factor(ratio)} faster" if ratio > 1 else f"{fmt.factor(1 / ratio)} slower"
    return " · ".join((f"accuracy {_points(accuracy)}", speed, fmt.signed(size, fmt.size(abs(size)))))
