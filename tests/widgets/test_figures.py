"""The data behind each figure exactly, and that each one draws."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from widgets._fields import settings
from workbench.compression import STEPS
from workbench.deployment import OnnxRuntime
from workbench.figures import _style, pareto, profile_bars
from workbench.figures.pareto import POINTS, SELECTED, pareto_figure
from workbench.figures.profile_bars import profile_bars_figure
from workbench.study import Recipe

ROOT = Path(__file__).resolve().parents[2]


def candidates(**columns: list) -> pd.DataFrame:
    """Four candidates: the baseline, a better one, one just behind that, and one far behind."""
    given = {
        "candidate": [1, 2, 3, 4],
        "recipe": ["as is", "Quantise int8", "Prune <b>", "Prune 90 %"],
        "backend": [
            "PyTorch eager, 2 threads",
            "ONNX Runtime, 2 threads",
            "OpenVINO, 2 threads",
            "OpenVINO, 2 threads",
        ],
        "batch": [1] * 4,
        "family": ["dense", "quantised", "pruned", "pruned"],
        "precision": ["fp32", "int8", "fp32", "fp32"],
        "accuracy": [0.92, 0.91, 0.909, 0.5],
        "latency_ms": [1.0, 0.20, 0.21, 0.5],
        "speedup": [1.0, 5.0, 4.8, 2.0],
        "size_bytes": [1.07e6, 98e3, 5e5, 2e5],
        "pareto": [True, True, False, False],
        "contended": [False, False, True, False],
    }
    frame = pd.DataFrame(given | columns)
    half = pd.Series([0.005, 0.005, 0.005, 0.02])
    return frame.assign(
        accuracy_low=frame["accuracy"] - half,
        accuracy_high=frame["accuracy"] + half,
        latency_low_ms=0.9 * frame["latency_ms"],
        latency_high_ms=1.1 * frame["latency_ms"],
    )


def trace(figure, name):
    return next(t for t in figure.data if t.name == name)


def test_a_point_that_cannot_be_told_from_the_front_keeps_its_colour_and_a_beaten_one_fades():
    info = pareto._info(candidates())
    assert [p.faded for p in info.points] == [False, False, False, True]
    assert [p.on_front for p in info.points] == [True, True, False, False]


def test_points_carry_the_numbers_in_the_units_of_the_axes():
    point = pareto._info(candidates()).points[1]
    assert (point.number, point.accuracy, point.latency_ms) == (2, 91.0, 0.20)
    assert (point.accuracy_low, point.accuracy_high) == pytest.approx((90.5, 91.5))
    assert (point.latency_low_ms, point.latency_high_ms) == pytest.approx((0.18, 0.22))


def test_the_front_is_a_step_in_order_of_latency():
    assert pareto._info(candidates()).steps == (((0.20, 91.0), (1.0, 92.0)),)


def test_batch_sizes_do_not_compete():
    info = pareto._info(candidates(batch=[1, 32, 1, 32], pareto=[True] * 4))
    assert [p.faded for p in info.points] == [False, False, False, True]
    assert info.steps == (((0.21, 90.9), (1.0, 92.0)), ((0.20, 91.0), (0.5, 50.0)))


def test_the_baseline_is_the_first_candidate_without_steps_and_never_fades():
    frame = candidates(
        recipe=["Prune", "as is", "as is", "Prune"], accuracy=[0.99, 0.5, 0.5, 0.5], latency_ms=[0.1] * 4
    )
    info = pareto._info(frame)
    assert info.baseline.number == 2
    assert [p.faded for p in info.points] == [False, False, True, True]


def _families() -> list[str]:
    """Every family that a recipe of one or two steps can be of, the registered ones."""
    fresh = [kind.from_dict({s.name: s.value for s in settings(kind, {})}) for kind in STEPS.values()]
    recipes = [(), *((step,) for step in fresh), *itertools.product(fresh, repeat=2)]
    return sorted({Recipe(steps, OnnxRuntime()).family for steps in recipes})


def test_every_family_that_a_recipe_can_be_of_has_a_colour_and_a_name_in_the_legend():
    families = _families()
    assert {"dense", "mixed", "pruned+quantised", *(kind.family for kind in STEPS.values() if kind.family)} == set(
        families
    )
    frame = pd.concat([candidates().head(1).assign(candidate=n, family=f) for n, f in enumerate(families, 1)])
    figure = pareto_figure(frame.reset_index(drop=True))
    assert list(trace(figure, POINTS).marker.color) == [_style.FAMILY_COLOURS[f] for f in families]
    techniques = {t.name for t in figure.data if t.legendgroup == "Technique"}
    assert techniques == {_style.FAMILY_NAMES.get(f, f) for f in families}
    assert {"low rank", "weights shared", "pruned and quantised"} <= techniques


def test_families_of_one_colour_differ_in_their_outline():
    looks = [(colour, _style.FAMILY_OUTLINES.get(family, 0)) for family, colour in _style.FAMILY_COLOURS.items()]
    assert len(set(looks)) == len(looks)
    assert set(_style.FAMILY_COLOURS) >= set(_style.FAMILY_OUTLINES) | set(_style.FAMILY_NAMES)


def test_one_long_interval_does_not_squeeze_the_others_together():
    frame = candidates()
    frame.loc[0, "latency_high_ms"] = 1000.0
    low, high = pareto._info(frame).latency_range
    assert low < 0.20 and 1.0 < high < 2.0


def test_candidates_that_were_not_measured_are_left_out():
    info = pareto._info(candidates(accuracy=[0.9, math.nan, 0.9, 0.9]))
    assert [p.number for p in info.points] == [1, 3, 4]


def test_hover_says_recipe_and_numbers_as_everywhere_and_escapes_names():
    points = pareto._info(candidates()).points
    assert points[1].hover.split("<br>") == [
        "<b>2: Quantise int8</b>",
        "ONNX Runtime, 2 threads · batch 1 · int8",
        "accuracy 91.00 % ± 0.50",
        "latency 0.200 ms ± 0.020",
        "5.0 × · 98 KB",
    ]
    assert points[2].hover.startswith("<b>3: Prune &lt;b&gt;</b>")
    assert points[2].hover.endswith("measured while the machine was busy")


@pytest.mark.parametrize("dark", [False, True])
def test_the_chart_draws_points_by_family_and_backend_and_rings_the_selected(dark: bool):
    figure = pareto_figure(candidates(), selected=3, dark=dark)
    points = trace(figure, POINTS)
    assert list(points.customdata) == [1, 2, 3, 4]
    assert list(points.marker.color) == ["#999999", "#56B4E9", "#E69F00", "#E69F00"]
    assert list(points.marker.symbol) == ["circle", "square", "diamond", "diamond"]
    assert list(points.text) == ["1", "2", "", ""]
    assert list(points.marker.opacity) == [1.0, 1.0, 1.0, 0.3]
    assert list(trace(figure, SELECTED).x) == [0.21]
    assert figure.layout.xaxis.type == "log"
    assert figure.layout.paper_bgcolor == "rgba(0,0,0,0)"
    names = {t.name for t in figure.data if t.showlegend is not False}
    assert names == {
        "dense", "pruned", "quantised", "PyTorch eager, 2 threads", "ONNX Runtime, 2 threads", "OpenVINO, 2 threads",
    }  # fmt: skip
    assert [(s.y0, s.x0) for s in figure.layout.shapes] == [(92.0, 0), (0, 1.0)]


def test_an_empty_study_says_what_to_do_first():
    figure = pareto_figure(candidates().iloc[:0])
    assert figure.layout.annotations[0].text == "No candidates yet. Run a recipe, and it appears here."


def test_a_family_without_a_colour_is_refused_with_those_that_have_one():
    with pytest.raises(ValueError, match=r"'frozen' has no colour\. Accepted: dense, pruned"):
        pareto_figure(candidates(family=["dense", "frozen", "pruned", "pruned"]))


@pytest.mark.parametrize(
    ("low", "high", "inside"),
    [(0.05, 0.5, [0.05, 0.1, 0.2, 0.5]), (0.1, 900.0, [0.1, 1, 10, 100]), (1.9, 2.6, [2, 2.5])],
)
def test_ticks_of_a_log_axis_are_round_numbers_in_view(low, high, inside):
    values, labels = _style.log_ticks(low, high)
    seen = [(v, w) for v, w in zip(values, labels, strict=True) if low <= v * (1 + 1e-9) and v <= high * (1 + 1e-9)]
    assert [v for v, _ in seen] == pytest.approx(inside)
    assert [float(w) for _, w in seen] == pytest.approx(inside)


def test_two_settings_of_one_backend_have_two_symbols():
    chosen = _style.symbols(["ONNX Runtime, 1 thread", "OpenVINO, 2 threads", "ONNX Runtime, 2 threads"])
    assert len(set(chosen.values())) == 3
    assert (chosen["ONNX Runtime, 1 thread"], chosen["OpenVINO, 2 threads"]) == ("square", "diamond")


PROFILE = pd.DataFrame(
    {
        "name": ["conv1/Conv", "reorder", "fc <1>", "(unattributed)"],
        "layer": ["conv1 + relu1", "", "block.with.a.very.long.path.to.the.layer.fc", "(unattributed)"],
        "type": ["Conv", "Reorder", "Gemm", "unattributed"],
        "latency_ms": [0.06, 0.01, 0.04, -0.01],
        "latency_p95_ms": [0.07, 0.02, 0.05, np.nan],
        "share": [0.6, 0.1, 0.4, -0.1],
        "macs": [1.2e6, np.nan, 0, np.nan],
        "parameters": [1500, np.nan, 0, np.nan],
        "output_shape": [None] * 4,
    }
)


def test_a_bar_for_each_row_in_execution_order():
    info = profile_bars._info(PROFILE)
    assert [b.label for b in info.bars] == [
        "conv1 + relu1",
        "reorder",
        "block.with.a.ve…to.the.layer.fc",
        "(unattributed)",
    ]
    assert [b.share for b in info.bars] == pytest.approx([60, 10, 40, -10])
    assert [b.text for b in info.bars] == ["0.0600 ms", "0.0100 ms", "0.0400 ms", "−0.0100 ms"]
    assert [b.unattributed for b in info.bars] == [False, False, False, True]
    assert info.bars[0].hover == (
        "<b>conv1 + relu1</b><br>Conv · conv1/Conv<br>0.0600 ms · 60.0 % of the call<br>p95 0.0700 ms<br>"
        "1.20 M MACs · 1.50 k parameters"
    )


@pytest.mark.parametrize("dark", [False, True])
def test_the_bars_draw_with_the_rest_in_grey_and_every_row_of_the_selected_layer_set_off(dark: bool):
    figure = profile_bars_figure(PROFILE, selected="relu1 + other", dark=dark)
    bars = figure.data[0]
    assert list(bars.marker.color) == ["#0072B2"] * 3 + ["#999999"]
    assert list(bars.marker.opacity) == [1.0, 0.45, 0.45, 0.45]
    assert list(bars.customdata) == list(PROFILE["layer"])
    assert figure.layout.yaxis.range == (3.5, -0.5)


def test_bars_stay_readable_however_many_there_are():
    many = pd.concat([PROFILE] * 20)
    assert profile_bars_figure(many).layout.height >= 80 * profile_bars.ROW_HEIGHT_PX


def test_no_profile_says_what_to_do_first():
    assert profile_bars_figure(PROFILE.iloc[:0]).layout.annotations[0].text.startswith("No profile yet.")


def test_plotly_loads_when_a_figure_is_drawn_and_not_before():
    code = "import sys, workbench.figures; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
