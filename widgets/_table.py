"""A table: numbers to the right, the header stays, any column sorts, rows can be picked, one column be written in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

import anywidget
import traitlets

from widgets._theme import static


class Column(NamedTuple):
    """One column: its header, where the unit stands, and whether it holds numbers."""

    label: str
    number: bool = True


class Row(NamedTuple):
    """One row.

    Attributes
    ----------
    key
        What picking the row reports.
    cells
        What is read in each column.
    sort
        What each column sorts by: a number, a text, or None for unknown, which stays last.
    strong
        Whether the row stands out.
    """

    key: str
    cells: Sequence[str]
    sort: Sequence[Any]
    strong: bool = False


class Table(anywidget.AnyWidget):
    """Rows of text under headers; see the module."""

    _esm = static("clipboard.js", "table.js")
    columns = traitlets.List(help="A dict per column: label, number.").tag(sync=True)
    rows = traitlets.List(help="A dict per row: key, cells, sort, strong.").tag(sync=True)
    selected = traitlets.List(traitlets.Unicode(), help="Keys of the rows that are highlighted.").tag(sync=True)
    caption = traitlets.Unicode("", help="What the table holds, in words; also its accessible name.").tag(sync=True)
    empty = traitlets.Unicode("Nothing here yet.", help="What to do first, while there are no rows.").tag(sync=True)
    height = traitlets.Unicode("240px", help="Height of the part that scrolls, as CSS.").tag(sync=True)
    pickable = traitlets.Bool(False, help="Whether rows can be picked.").tag(sync=True)
    editable = traitlets.Int(-1, help="The column whose cells can be written in; -1 for none.").tag(sync=True)
    hint = traitlets.Unicode("", help="What stands, greyed, in an empty cell that can be written in.").tag(sync=True)
    faults = traitlets.Dict(help="Why what is written in a row is refused, by the row's key.").tag(sync=True)

    def __init__(self, columns: Iterable[Column], **traits: Any):
        super().__init__(columns=[c._asdict() for c in columns], **traits)
        self._picked: list[Callable[[str], None]] = []
        self._edited: list[Callable[[str, str], None]] = []
        self.on_msg(self._received)

    def fill(self, rows: Iterable[Row]) -> None:
        """Show these rows instead of those there were."""
        self.rows = [
            {"key": r.key, "cells": list(r.cells), "sort": [_sortable(v) for v in r.sort], "strong": r.strong}
            for r in rows
        ]

    def on_pick(self, function: Callable[[str], None]) -> None:
        """Call `function` with the key of each row that is clicked, or entered from the keyboard."""
        self._picked.append(function)
        self.pickable = True

    def on_edit(self, function: Callable[[str, str], None]) -> None:
        """Call `function` with the key of the row and the text of each cell that was written in."""
        self._edited.append(function)

    def _received(self, _widget: Any, content: dict[str, Any], _buffers: Any) -> None:
        key = content.get("key")
        if not any(r["key"] == key for r in self.rows):
            return
        if content.get("kind") == "pick":
            for function in self._picked:
                function(key)
        elif content.get("kind") == "edit" and self.editable >= 0:
            for function in self._edited:
                function(key, str(content.get("text", "")))

    def to_html(self) -> str:
        """The table as plain HTML, for where there are no widgets."""
        return html_table(self.columns, [r["cells"] for r in self.rows], self.caption, self.empty)


def html_table(columns: Sequence[dict[str, Any]], rows: Sequence[Sequence[str]], caption: str, empty: str) -> str:
    """A table as plain HTML with its own alignment; escapes everything it shows."""
    if not rows:
        return f"<p>{escape(empty)}</p>"
    side = [f' style="text-align:{"right" if c["number"] else "left"}"' for c in columns]
    head = "".join(f"<th{s}>{escape(c['label'])}</th>" for c, s in zip(columns, side, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{s}>{escape(text)}</td>" for text, s in zip(row, side, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _sortable(value: Any) -> Any:
    """A JSON value the page can order by; what is not finite is unknown."""
    if value is None or isinstance(value, str):
        return value
    return float(value) if math.isfinite(value) else None
