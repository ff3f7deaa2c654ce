"""A button that puts text on the clipboard of whoever clicks it."""

from __future__ import annotations

import anywidget
import traitlets

from widgets._theme import static


class CopyButton(anywidget.AnyWidget):
    """Copies `text` in the browser, where the clipboard is; disabled while there is none."""

    _esm = static("clipboard.js", "copy.js")
    label = traitlets.Unicode("Copy as code", help="What the button says.").tag(sync=True)
    text = traitlets.Unicode("", help="What it copies.").tag(sync=True)
