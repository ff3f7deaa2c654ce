"""The choice of an engine: those usable here, and what the others need."""

from __future__ import annotations

from html import escape

import ipywidgets as W

from workbench.deployment import BACKENDS, Availability, Backend


class EngineChoice(W.VBox):
    """A menu of the backends usable on this machine; `missing` tells, greyed, of the others and how to enable each."""

    def __init__(self, preferred: str = "OnnxRuntime"):
        found = [(backend, backend.availability()) for kind in BACKENDS.values() for backend in kind.variants()]
        usable = [backend for backend, about in found if about.usable]
        first = next((b for b in usable if type(b).__name__ == preferred), usable[0] if usable else None)
        self.menu = W.Dropdown(
            description="Runs on",
            options=[(backend.label, backend) for backend in usable],
            value=first,
            layout=W.Layout(width="290px"),
        )
        self.missing = W.HTML(_missing([(b, about) for b, about in found if not about.usable or about.why]))
        super().__init__([self.menu])

    @property
    def backend(self) -> Backend:
        """The chosen backend."""
        return self.menu.value


def _missing(found: list[tuple[Backend, Availability]]) -> str:
    """A folded list of backends with what each lacks and the command that brings it."""
    if not found:
        return ""
    items = "".join(
        f'<li><span class="wb-greyed">{escape(backend.label)}</span>: {escape(about.why)}.'
        + (f"<br>To enable it: <code>{escape(about.command)}</code>" if about.command else "")
        + "</li>"
        for backend, about in found
    )
    summary = f"{len(found)} more {'engines need' if len(found) > 1 else 'engine needs'} something first"
    return f'<details class="wb-missing"><summary>{summary}</summary><ul>{items}</ul></details>'
