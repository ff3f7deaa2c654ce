"""What shall I change?"""

from __future__ import annotations

from html import escape

import ipywidgets as W

from widgets._cards import Cards
from widgets._copy import CopyButton
from widgets._engines import EngineChoice
from widgets._panel import Panel
from workbench.compression import STEPS, Finetune, Prune, Quantize, Step
from workbench.errors import WorkbenchError
from workbench.study import Candidate, Recipe

PRESETS: dict[str, tuple[Step, ...]] = {
    "the model as it is": (),
    "int8": (Quantize("int8"),),
    "prune 30 %, fine-tune": (Prune(0.3), Finetune(epochs=2)),
    "prune 50 %, fine-tune, int8": (Prune(0.5), Finetune(epochs=2), Quantize("int8")),
    "half the weights zero, int8": (Prune(0.5, structured=False), Finetune(epochs=1), Quantize("int8")),
}


class CompressPanel(Panel):
    """A recipe as cards in order; Run measures it as a job and picks the candidate."""

    title = "Compress"
    question = "What shall I change?"
    runs_jobs = True

    def _build(self) -> list[W.Widget]:
        self.preset = W.Dropdown(
            description="Start from",
            options=[("choose a recipe", ""), *((name, name) for name in PRESETS)],
            layout=W.Layout(width="300px"),
        )
        self.kind = W.Dropdown(description="Step", options=list(STEPS), layout=W.Layout(width="200px"))
        self.add = W.Button(description="Add step", tooltip="Put this step at the end of the recipe")
        top = W.HBox([self.preset, self.kind, self.add])
        self.engine = EngineChoice()
        self.batch = W.IntText(value=1, description="Batch size", layout=W.Layout(width="160px"))
        self.seed = W.IntText(value=0, description="Seed", layout=W.Layout(width="140px"))
        self.run = W.Button(
            description="Run", button_style="primary", tooltip="Make and measure the candidate, as a job"
        )
        self.copy = CopyButton()
        where = W.HBox([self.engine, self.batch, self.seed])
        actions = W.HBox([self.run, self.copy, self.engine.missing])
        for row in (top, where, actions):
            row.add_class("wb-controls")
        self.refused = W.HTML()
        self.refused.add_class("wb-refused")
        self.recipe = W.HTML()
        self.cards = Cards(self._describe, self.bindings.handler)
        self.cards.fill(PRESETS["prune 50 %, fine-tune, int8"])
        return [top, self.cards, where, self.recipe, self.refused, actions]

    def _listen(self) -> None:
        self.add.on_click(self.bindings.handler(lambda _: self.cards.add(self.kind.value), "Adding a step"))
        self.run.on_click(self.bindings.handler(lambda _: self._run(), "Starting the run"))
        self.on(self.preset, "value", self._start_from, "Starting from a recipe")
        for control in (self.engine.menu, self.batch, self.seed):
            self.on(control, "value", self._describe, "Reading the controls")

    def _start_from(self) -> None:
        if self.preset.value:
            self.cards.fill(PRESETS[self.preset.value])
            self.preset.value = ""  # the same recipe can be chosen again after changes

    def draft(self) -> Recipe:
        """The recipe the controls describe; raises what the kernel refuses."""
        return Recipe(self.cards.steps(), self.engine.backend, self.batch.value, self.seed.value)

    def _describe(self) -> None:
        """Show the recipe in words and as code, or why it is none."""
        try:
            recipe = self.draft()
        except WorkbenchError as error:
            self._refuse(error)
            self.recipe.value, self.copy.text = "", ""
            return
        self.refused.value = ""
        self.copy.text = recipe.to_python()
        self.recipe.value = f"<p>Recipe: <b>{escape(recipe.label)}</b> on {escape(recipe.backend_label)}</p>"

    def _refuse(self, error: WorkbenchError) -> None:
        self.refused.value = f'<div role="alert">{escape(str(error))}</div>'

    def _run(self) -> None:
        try:
            recipe = self.draft()
            job = self.study.submit(recipe.steps, recipe.backend, recipe.batch, recipe.seed)
        except WorkbenchError as error:  # refused before any work: the words belong beside the controls
            self._refuse(error)
            return
        self.refused.value = ""
        self.follow(job, self._done, "Selecting the candidate")

    def _done(self, candidate: Candidate) -> None:
        self.selection.candidate = candidate.number

    def to_html(self) -> str:
        return f"<h3>{escape(self.question)}</h3>{self.recipe.value}<pre>{escape(self.copy.text)}</pre>"

    def to_text(self) -> str:
        return f"{self.study.name}: {self.copy.text or 'a recipe that is not complete'}"
