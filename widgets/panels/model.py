"""What is this network?"""

from __future__ import annotations

from html import escape
from typing import Any

import ipywidgets as W
import pandas as pd

from widgets._panel import Panel
from widgets._table import Column, Row, Table
from workbench import formatting as fmt

_COLUMNS = (
    Column("layer", number=False),
    Column("type", number=False),
    Column("input", number=False),
    Column("output", number=False),
    Column("parameters"),
    Column("MACs"),
    Column("share of MACs, %"),
)


class ModelPanel(Panel):
    """The study's network: what it is, and a row per layer in execution order."""

    title = "Model"
    question = "What is this network?"

    def _build(self) -> list[W.Widget]:
        self.facts = W.HTML(_facts(self.study.model))
        self.table = Table(
            _COLUMNS,
            caption="Layers in execution order; shapes and MACs are of one sample",
            empty="This network has no layers that can be named.",
            height="560px",
        )
        self.table.fill(_rows(self.study.model.layers))
        self._highlight()
        return [self.facts, self.table]

    def _listen(self) -> None:
        self.table.on_pick(self.bindings.handler(self._picked, "Picking a layer"))
        self.bindings.connect(self.selection.events.layer, lambda *_: self._highlight(), "Highlighting the layer")

    def _picked(self, key: str) -> None:
        self.selection.layer = self.table.rows[int(key)]["cells"][0]

    def _highlight(self) -> None:
        layers = self.selection.layers
        self.table.selected = [r["key"] for r in self.table.rows if r["cells"][0] in layers]

    def to_html(self) -> str:
        return f"<h3>{escape(self.question)}</h3>{self.facts.value}{self.table.to_html()}"

    def to_text(self) -> str:
        model = self.study.model
        return f"{model.name}: {model.parameters:,} parameters, {model.macs:,} MACs, {len(model.layers)} layers"


def _facts(model: Any) -> str:
    """Name, form, size and inputs of the network in one line."""
    form = "torch module" if model.module is not None else "ONNX graph"
    facts = [
        ("network", model.name),
        ("form", form),
        ("weights", model.weights),
        ("precision", model.precision),
        ("parameters", fmt.count(model.parameters)),
        ("MACs of one sample", fmt.count(model.macs)),
        ("input", "; ".join(str(spec) for spec in model.inputs)),
    ]
    items = "".join(f'<div><span class="wb-muted">{escape(k)}</span><br>{escape(str(v))}</div>' for k, v in facts)
    notes = "".join(f"<p>{escape(note)}</p>" for note in model.notes)
    return f'<div class="wb-facts">{items}</div>{notes}'


def _rows(layers: pd.DataFrame) -> list[Row]:
    total = float(layers["macs"].sum())
    rows = []
    for position, (_, layer) in enumerate(layers.iterrows()):
        macs, parameters = float(layer["macs"]), float(layer["parameters"])
        share = macs / total if total else 0.0
        shapes = (_shape(layer["input_shape"]), _shape(layer["output_shape"]))
        rows.append(
            Row(
                key=str(position),
                cells=(
                    str(layer["layer"]),
                    str(layer["type"]),
                    *shapes,
                    fmt.count(parameters),
                    fmt.count(macs),
                    f"{100 * share:.1f}",
                ),
                sort=(str(layer["layer"]), str(layer["type"]), *shapes, parameters, macs, share),
            )
        )
    return rows


def _shape(shape: Any) -> str:
    """A shape as ``1 × 28 × 28``; a dash where it is not known."""
    if isinstance(shape, str):
        return shape
    try:
        return " × ".join(str(n) for n in shape) or "scalar"
    except TypeError:
        return "–"
