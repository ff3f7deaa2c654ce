"""Values by layer as cells of a table: a row per layer of a network, one step's value of each to write in."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any, NamedTuple

import ipywidgets as W

from widgets import _per_layer
from widgets._cards import Card
from widgets._table import Column, Row, Table
from workbench import formatting as fmt
from workbench.compression import Step
from workbench.compression.weights import comparable_layers
from workbench.errors import WorkbenchError
from workbench.models import Model

_COLUMNS = (
    Column("layer", number=False),
    Column("type", number=False),
    Column("parameters"),
    Column("share of MACs, %"),
)
_NO_STEP = "No step above takes values by layer. Add one that does, for example Prune or FakeQuantize"


class _Layer(NamedTuple):
    """The fixed part of a row."""

    name: str
    cells: tuple[str, ...]
    sort: tuple[Any, ...]


class LayerValues(W.VBox):
    """The layers of `model` that have weights; beside each what the card it was told to show says of it.

    Parameters
    ----------
    written
        Called with the name of the layer after a cell was written in.

    Attributes
    ----------
    refusals
        Why the network does not take a value, by the steps up to the one that has this value alone; empty where it
        does. Whoever finds that out writes it here.
    """

    def __init__(self, model: Model, written: Callable[[str], None]):
        self._layers = _layers(model)
        self._written = written
        self._card: Card | None = None
        self._before: tuple[Step, ...] | None = None
        self.refusals: dict[tuple[Step, ...], str] = {}
        self.table = Table(_COLUMNS, empty="This network has no layers with weights that steps know.", height="176px")
        self.refused = W.HTML()
        self.refused.add_class("wb-refused")
        super().__init__([self.table, self.refused])
        self.add_class("wb-found")

    @property
    def names(self) -> list[str]:
        """The layers, in the order of the rows."""
        return [layer.name for layer in self._layers]

    def show(self, card: Card | None, before: tuple[Step, ...] | None) -> None:
        """Show the values of a card; no values for None.

        Parameters
        ----------
        before
            The steps before it; None where they are not known.
        """
        self._card, self._before = card, before
        each = "" if card is None else card.by_layer.each
        values, faults = self._values(), self._faults()
        with self.table.hold_sync():
            self.table.columns = [c._asdict() for c in (*_COLUMNS, *([Column(each)] if each else []))]
            self.table.editable = len(_COLUMNS) if each else -1
            self.table.hint = "" if card is None else _general(card)
            self.table.caption = f"{each.capitalize()} by layer of {card.kind.__name__}" if each else _NO_STEP
            self.table.faults = {str(self.names.index(name)): why for name, why in faults.items()}
            self.table.fill(
                Row(str(key), (*layer.cells, *_cell(values, layer, each)), (*layer.sort, *_sort(values, layer, each)))
                for key, layer in enumerate(self._layers)
            )
        told = "".join(f"<div>{escape(name)}: {escape(why)}</div>" for name, why in faults.items())
        self.refused.value = f'<div role="alert">{told}</div>' if told else ""

    def write(self, key: str, text: str) -> None:
        """Take what was written in the cell of a row into the card; an empty cell leaves the layer to the others."""
        if self._card is None:
            return
        name, setting = self._layers[int(key)].name, self._card.by_layer
        values = {k: v for k, v in setting.value.items() if k != name}
        if text.strip():
            values[name] = _per_layer.value(text.strip())
        setting.set(values)
        self._written(name)

    def alone(self, name: str) -> Step | None:
        """The step that the card would be with a value for this layer alone; None where that is none."""
        values = self._values()
        if self._card is None or name not in values:
            return None
        try:
            return self._card.step(**{self._card.by_layer.name: {name: values[name]}})
        except WorkbenchError:
            return None

    def _values(self) -> dict[str, Any]:
        """What the card says by layer; nothing while its own text cannot be read, which the card says."""
        try:
            return {} if self._card is None else self._card.by_layer.value
        except WorkbenchError:
            return {}

    def _faults(self) -> dict[str, str]:
        """Why single values are refused: by the step's settings, or by what it said of the network when asked."""
        values = self._values()
        named = [name for name in self.names if name in values]
        if not named:
            return {}
        try:
            self._card.step()
        except WorkbenchError:
            general = self._refusal({})  # of the other settings: no cell's fault
            alone = {name: self._refusal({name: values[name]}) for name in named}
            return {name: why for name, why in alone.items() if why and why != general}
        alone = {name: (*(self._before or ()), self.alone(name)) for name in named}
        return {name: why for name, steps in alone.items() if (why := self.refusals.get(steps, ""))}

    def _refusal(self, values: dict[str, Any]) -> str:
        """Why the step refuses these values by layer, the card's other settings given; empty where it does not."""
        try:
            self._card.step(**{self._card.by_layer.name: values})
        except WorkbenchError as error:
            return str(error)
        return ""


def _layers(model: Model) -> list[_Layer]:
    """The convolutions and linear layers of a module, the nodes with parameters of a graph."""
    frame = model.layers
    frame = frame[frame["layer"].isin(comparable_layers(model, model))] if model.module is not None else frame
    frame = frame[frame["parameters"] > 0]
    total = float(model.layers["macs"].sum()) or 1.0
    found = []
    for row in frame.itertuples():
        share = float(row.macs) / total
        name, kind = str(row.layer), str(row.type)
        cells = (name, kind, fmt.count(float(row.parameters)), f"{100 * share:.1f}")
        found.append(_Layer(name, cells, (name, kind, float(row.parameters), share)))
    return found


def _general(card: Card) -> str:
    """What the card says of layers that are not named, where it has a setting of that name."""
    setting = next((s for s in card.settings if s.name == card.by_layer.each), None)
    return "" if setting is None else str(setting.value)


def _cell(values: dict[str, Any], layer: _Layer, each: str) -> tuple[str, ...]:
    return (str(values.get(layer.name, "")),) if each else ()


def _sort(values: dict[str, Any], layer: _Layer, each: str) -> tuple[Any, ...]:
    return (values.get(layer.name),) if each else ()
