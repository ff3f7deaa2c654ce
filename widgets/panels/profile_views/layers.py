"""Views that a profile alone is enough for: bars by layer, bars by type, treemap, data-flow graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import ipywidgets as W

from widgets.panels.profile_views._base import Held, View
from workbench import formatting as fmt
from workbench.figures import dataflow_figure, profile_bars_figure, profile_treemap_figure, profile_types_figure

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


class LayerBars(View):
    """Bars by layer in execution order, what no layer accounts for in grey."""

    title = "Layers"
    imports = ("from workbench.figures import profile_bars_figure",)

    def words(self, held: Held, result: Any) -> str:
        frame = held.shown.profile.frame().iloc[:-1]
        if frame.empty:
            return ""
        slowest = frame.loc[frame["latency_ms"].idxmax()]
        label = slowest["layer"] or slowest["name"]
        return f"The slowest of {len(frame)} rows is {label}: {fmt.share(slowest['share'])} of the call."

    def figure(self, held: Held, result: Any) -> Figure:
        return profile_bars_figure(held.shown.profile.frame(), **held.look)

    def lines(self, held: Held) -> tuple[str, ...]:
        return f"profile = {held.profile_code}", "profile_bars_figure(profile.frame())"


class TypeBars(View):
    """Bars by type of operation."""

    title = "Types"
    imports = ("from workbench.figures import profile_types_figure",)

    def words(self, held: Held, result: Any) -> str:
        shares = held.shown.profile.frame().iloc[:-1].groupby("type")["share"].sum()
        if shares.empty:
            return ""
        return f"Of {len(shares)} types {shares.idxmax()} takes most: {fmt.share(shares.max())} of the call."

    def figure(self, held: Held, result: Any) -> Figure:
        return profile_types_figure(held.shown.profile.frame(), **held.look)

    def lines(self, held: Held) -> tuple[str, ...]:
        return f"profile = {held.profile_code}", "profile_types_figure(profile.frame())"


class Treemap(View):
    """Layers inside their blocks, each as large as its time or another number."""

    title = "Treemap"
    fits = True
    imports = ("from workbench.figures import profile_treemap_figure",)
    areas: ClassVar[tuple[tuple[str, str], ...]] = (
        ("latency", "latency_ms"),
        ("MACs", "macs"),
        ("parameters", "parameters"),
        ("bytes of activations", "activation_bytes"),
    )
    colours: ClassVar[tuple[tuple[str, str], ...]] = (
        ("type", "type"),
        ("precision", "precision"),
        ("operations per byte", "intensity"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.value = W.Dropdown(description="Area", options=self.areas, layout=W.Layout(width="170px"))
        self.column = W.Dropdown(description="Colour by", options=self.colours, layout=W.Layout(width="200px"))
        self.controls = (self.value, self.column)

    def words(self, held: Held, result: Any) -> str:
        return f"Layers lie inside their blocks, each as large as its {self.value.label}. Click a block to enter it."

    def figure(self, held: Held, result: Any) -> Figure:
        value, column = self.value.value, self.column.value
        return profile_treemap_figure(held.shown.profile.frame(), value=value, column=column, **held.look)

    def lines(self, held: Held) -> tuple[str, ...]:
        chosen = f'value="{self.value.value}", column="{self.column.value}"'
        return f"profile = {held.profile_code}", f"profile_treemap_figure(profile.frame(), {chosen})"


class DataFlow(View):
    """What feeds what, coloured by a column of the profile."""

    title = "Data flow"
    imports = ("from workbench.figures import dataflow_figure",)
    colours: ClassVar[tuple[tuple[str, str], ...]] = (
        ("latency", "latency_ms"),
        ("MACs", "macs"),
        ("parameters", "parameters"),
        ("bytes read", "read_bytes"),
        ("bytes written", "written_bytes"),
        ("bytes of activations", "activation_bytes"),
        ("operations per byte", "intensity"),
        ("type", "type"),
        ("precision", "precision"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.column = W.Dropdown(description="Colour by", options=self.colours, layout=W.Layout(width="250px"))
        self.controls = (self.column,)

    def words(self, held: Held, result: Any) -> str:
        edges = held.shown.profile.edges
        if not edges:
            return f"{held.shown.profile.backend_label} does not tell which row feeds which."
        return f"{len(edges)} tensors go from one row to another."

    def figure(self, held: Held, result: Any) -> Figure:
        p = held.shown.profile
        return dataflow_figure(p.frame(), p.edges, column=self.column.value, **held.look)

    def lines(self, held: Held) -> tuple[str, ...]:
        return (
            f"profile = {held.profile_code}",
            f'dataflow_figure(profile.frame(), profile.edges, column="{self.column.value}")',
        )
