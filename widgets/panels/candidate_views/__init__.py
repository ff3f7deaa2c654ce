"""The views of what a candidate's steps did; a new one is a class in one of these files and its name in `VIEWS`."""

from __future__ import annotations

from widgets.panels.candidate_views._base import CandidateView, Drawn, Listing, Seen
from widgets.panels.candidate_views.measured import Measured, Training
from widgets.panels.candidate_views.sizes import SizesView
from widgets.panels.candidate_views.weights import WeightsView

VIEWS: tuple[type[CandidateView], ...] = (Measured, Training, WeightsView, SizesView)

__all__ = ["VIEWS", "CandidateView", "Drawn", "Listing", "Seen"]
