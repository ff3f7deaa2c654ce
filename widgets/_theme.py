"""The theme of the page, the one style sheet of all panels, and the files of our own that a page loads."""

from __future__ import annotations

from pathlib import Path

import anywidget
import traitlets


def static(*names: str) -> str:
    """The text of some of the files in ``static``, one after another."""
    folder = Path(__file__).parent / "static"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


class Theme(anywidget.AnyWidget):
    """An invisible widget that reports the theme of the page and carries the style sheet.

    It also tells the page that something was resized when a chart comes into view: one made while its tab was hidden
    would otherwise keep the size it had there.
    """

    _esm = static("theme.js")
    _css = static("page.css", "panels.css")
    dark = traitlets.Bool(False, help="Whether the page is dark; false until the page has said so.").tag(sync=True)
