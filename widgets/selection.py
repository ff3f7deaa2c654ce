"""What is picked, shared by all panels of an app."""

from __future__ import annotations

from dataclasses import dataclass

from psygnal import SignalGroupDescriptor

SEPARATOR = " + "


@dataclass
class Selection:
    """The picked layer and candidate; panels redraw from its `events`.

    Attributes
    ----------
    layer
        A layer's name, or several that an engine fused, joined by `` + ``; None for none.
    candidate
        A candidate's number in its study; None for none.
    """

    layer: str | None = None
    candidate: int | None = None

    events = SignalGroupDescriptor()

    @property
    def layers(self) -> frozenset[str]:
        """The picked layers one by one; empty for none."""
        return frozenset(self.layer.split(SEPARATOR)) if self.layer else frozenset()
