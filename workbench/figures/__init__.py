"""Figures: each a pure function from a DataFrame to a Plotly figure; plotly loads when one is drawn."""

from workbench.figures.bits import bits_figure
from workbench.figures.dataflow import dataflow_figure
from workbench.figures.memory_timeline import memory_timeline_figure
from workbench.figures.pareto import pareto_figure
from workbench.figures.profile_bars import profile_bars_figure
from workbench.figures.profile_treemap import profile_treemap_figure
from workbench.figures.profile_types import profile_types_figure
from workbench.figures.roofline import roofline_figure
from workbench.figures.sensitivity import sensitivity_figure
from workbench.figures.side_by_side import side_by_side_figure
from workbench.figures.sizes import sizes_figure
from workbench.figures.sqnr import sqnr_figure
from workbench.figures.training import training_figure
from workbench.figures.weights import weights_figure

__all__ = [
    "bits_figure",
    "dataflow_figure",
    "memory_timeline_figure",
    "pareto_figure",
    "profile_bars_figure",
    "profile_treemap_figure",
    "profile_types_figure",
    "roofline_figure",
    "sensitivity_figure",
    "side_by_side_figure",
    "sizes_figure",
    "sqnr_figure",
    "training_figure",
    "weights_figure",
]
