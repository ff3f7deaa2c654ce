"""What shall I change?"""

from __future__ import annotations

from html import escape

import ipywidgets as W

from widgets._cards import Card, Cards
from widgets._copy import CopyButton
from widgets._engines import EngineChoice
from widgets._layer_values import LayerValues
from widgets._panel import Panel
from widgets.panels.did import WhatItDid
from workbench import jobs
from workbench.compression import (
    QAT,
    STEPS,
    Clip,
    Cluster,
    Distill,
    FakeQuantize,
    Finetune,
    LowRank,
    Prune,
    Quantize,
    Step,
)
from workbench.errors import WorkbenchError
from workbench.jobs import Progress
from workbench.models import Model
from workbench.study import Candidate, Recipe

PRESETS: dict[str, tuple[Step, ...]] = {
    "the model as it is": (),
    "int8": (Quantize("int8"),),
    "train for int8": (QAT(epochs=2),),
    "weights alone in int8": (Quantize("int8 weights"),),
    "prune 30 %, fine-tune": (Prune(0.3), Finetune(epochs=2)),
    "prune 50 %, fine-tune, int8": (Prune(0.5), Finetune(epochs=2), Quantize("int8")),
    "prune 50 %, distil": (Prune(0.5), Distill(epochs=5)),
    "half the weights zero, int8": (Prune(0.5, granularity="weight"), Finetune(epochs=1), Quantize("int8")),
    "2 of 4 weights zero, fine-tune": (Prune(granularity="2:4"), Finetune(epochs=1)),
    "90 % of the weights zero, 16 shared values": (
        Prune(0.9, granularity="weight", rounds=2, epochs=3),
        Cluster(16, epochs=1),
    ),
    "low rank, fine-tune": (LowRank(energy=0.9), Finetune(epochs=2)),
    "clip, int8": (Clip(value=99.9), Quantize("int8")),
    "4-bit weights, simulated": (FakeQuantize(bits=4, clip="mse"),),
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
        self.layers = LayerValues(self.study.model, self._check_layer)
        self.cards = Cards(self._changed, self.bindings.handler)
        self.cards.fill(PRESETS["prune 50 %, fine-tune, int8"])
        self._mark()
        self.did = WhatItDid(self.study, within=self)
        self.fold = W.Accordion([self.did], titles=(f"{self.did.title}: records, training, weights, sizes",))
        return [top, self.cards, self.layers, where, self.recipe, self.refused, actions, self.fold]

    def _listen(self) -> None:
        self.add.on_click(self.bindings.handler(lambda _: self.cards.add(self.kind.value), "Adding a step"))
        self.run.on_click(self.bindings.handler(lambda _: self._run(), "Starting the run"))
        self.on(self.preset, "value", self._start_from, "Starting from a recipe")
        for control in (self.engine.menu, self.batch, self.seed):
            self.on(control, "value", self._describe, "Reading the controls")
        self.layers.table.on_pick(self.bindings.handler(self._picked, "Picking a layer"))
        self.layers.table.on_edit(self.bindings.handler(self.layers.write, "Writing the value of a layer"))
        self.bindings.connect(self.selection.events.layer, lambda *_: self._mark(), "Highlighting the layer")
        self.on(self.fold, "selected_index", self.come_into_view, "Showing what it did")

    def come_into_view(self) -> None:
        if self.fold.selected_index == 0:
            self.did.come_into_view()

    def _start_from(self) -> None:
        if self.preset.value:
            self.cards.fill(PRESETS[self.preset.value])
            self.preset.value = ""  # the same recipe can be chosen again after changes

    def _changed(self) -> None:
        """Bring what stands below the cards up to date."""
        self._show_layers()
        self._describe()

    # values by layer

    def _show_layers(self) -> None:
        self.layers.show(self.cards.focused, self._before(self.cards.focused))

    def _before(self, card: Card | None) -> tuple[Step, ...] | None:
        """The steps before a card; None where there is no card, or one of them is refused."""
        if card is None:
            return None
        try:
            return tuple(c.step() for c in self.cards.cards[: self.cards.cards.index(card)])
        except WorkbenchError:
            return None

    def _picked(self, key: str) -> None:
        self.selection.layer = self.layers.names[int(key)]

    def _mark(self) -> None:
        picked = self.selection.layers
        self.layers.table.selected = [str(key) for key, name in enumerate(self.layers.names) if name in picked]

    def _check_layer(self, name: str) -> None:
        """Ask the step, as a job, whether the network takes what was written for this layer."""
        alone, before = self.layers.alone(name), self._before(self.cards.focused)
        if alone is None or before is None or (*before, alone) in self.layers.refusals:
            return
        steps = (*before, alone)
        job = jobs.submit(f"Checking {alone.label}", _refusal, self.study.model, steps)
        self.follow(job, lambda why: self._checked(steps, why), "Checking the value of a layer")

    def _checked(self, steps: tuple[Step, ...], why: str) -> None:
        self.layers.refusals[steps] = why
        self._show_layers()

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
        recipe = f"{self.recipe.value}<pre>{escape(self.copy.text)}</pre>"
        return f"<h3>{escape(self.question)}</h3>{recipe}{self.layers.table.to_html()}{self.did.to_html()}"

    def to_text(self) -> str:
        return f"{self.study.name}: {self.copy.text or 'a recipe that is not complete'}"


def _refusal(model: Model, steps: tuple[Step, ...], *, progress: Progress) -> str:
    """Why the last of the steps refuses what those before make of the model; empty where it does not."""
    for done, step in enumerate(steps, 1):
        progress(done / len(steps), step.label)
        try:
            step.check(model)
        except WorkbenchError as error:
            return str(error) if done == len(steps) else ""  # an earlier one's reason is not this value's: Run tells it
        model = step.preview(model)
    return ""
