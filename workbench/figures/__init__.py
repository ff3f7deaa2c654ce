"""Figures: each a pure function from a DataFrame to a Plotly figure; plotly loads when one is drawn."""

from workbench.figures.pareto import pareto_figure
from workbench.figures.profile_bars import profile_bars_figure

__all__ = ["pareto_figure", "profile_bars_figure"]
