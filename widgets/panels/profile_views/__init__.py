"""The views of the Profile panel; a new one is a class in one of these files and its name in `VIEWS`."""

from __future__ import annotations

from widgets.panels.profile_views._base import FIRST, Held, Network, Source, View, Work, has_result
from widgets.panels.profile_views.engine import Advice, RooflineView, SideBySide
from widgets.panels.profile_views.layers import DataFlow, LayerBars, Treemap, TypeBars
from widgets.panels.profile_views.network import Distance, Memory, SensitivityView

VIEWS: tuple[type[View], ...] = (
    LayerBars,
    TypeBars,
    Treemap,
    DataFlow,
    RooflineView,
    Memory,
    SideBySide,
    Distance,
    SensitivityView,
    Advice,
)

__all__ = ["FIRST", "VIEWS", "Held", "Network", "Source", "View", "Work", "has_result"]
