"""Errors and notices, in words, dismissible; nothing fails in silence."""

from __future__ import annotations

import re
import traceback
from html import escape

import ipywidgets as W

from workbench.errors import WorkbenchError

_KEPT = 4


class Notices(W.VBox):
    """The strip where errors and notices stand until they are dismissed, the newest first."""

    def __init__(self) -> None:
        super().__init__()
        self.add_class("wb-notices")

    def error(self, doing: str, error: BaseException) -> None:
        """Show an error that happened while `doing` what the words say; escapes all it shows.

        The text of a `WorkbenchError` is meant to be read as it is; any other error is ours, so its traceback is kept
        for a report.
        """
        text = f"<b>{escape(doing)} failed.</b> {_in_words(error)}"
        if not isinstance(error, WorkbenchError):
            lines = "".join(traceback.format_exception(error))
            text += f"<details><summary>Details for a report</summary><pre>{escape(lines)}</pre></details>"
        self._add(text, "alert", "wb-error")

    def tell(self, text: str) -> None:
        """Show a notice; escapes it."""
        self._add(_escaped(text), "status", "wb-notice")

    def clear(self) -> None:
        """Dismiss everything."""
        self.children = ()

    @property
    def text(self) -> str:
        """What is shown, as HTML, the newest first."""
        return "".join(item.children[0].value for item in self.children)

    def _add(self, html: str, role: str, css_class: str) -> None:
        words = W.HTML(f'<div role="{role}">{html}</div>')
        if any(item.children[0].value == words.value for item in self.children):
            return  # said already, and still standing
        dismiss = W.Button(description="Dismiss", tooltip="Remove this message")
        item = W.HBox([words, dismiss])
        item.add_class("wb-item")
        item.add_class(css_class)
        dismiss.on_click(lambda _: self._remove(item))
        self.children = (item, *self.children)[:_KEPT]

    def _remove(self, item: W.HBox) -> None:
        self.children = tuple(child for child in self.children if child is not item)


def _in_words(error: BaseException) -> str:
    text = str(error) or "No reason was given."
    return _escaped(text if isinstance(error, WorkbenchError) else f"{type(error).__name__}: {text}")


def _escaped(text: str) -> str:
    """`text` as HTML; what stands between backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
