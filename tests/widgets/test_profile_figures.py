"""The data behind the figures of a profile exactly, and that each one draws."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from workbench.figures import _rows as rows
from workbench.figures import dataflow, profile_treemap, profile_types, side_by_side
from workbench.figures._lanes import lay_out
from workbench.figures.dataflow import dataflow_figure
from workbench.figures.profile_treemap import profile_treemap_figure
from workbench.figures.profile_types import profile_types_figure
from workbench.figures.side_by_side import side_by_side_figure

NAN = math.nan
COLUMNS = [
    *("name", "layer", "type", "kind", "latency_ms", "latency_p95_ms", "share", "macs", "parameters"),
    *("input_shape", "output_shape", "read_bytes", "written_bytes", "activation_bytes", "intensity", "precision"),
]
BIG, SMALL = (16, 8, 8), (10,)
FRAME = pd.DataFrame(
    [
        ("(call)", "", "call", "call", 0.1, 0.2, 0.1, NAN, NAN, None, None, NAN, NAN, NAN, NAN, ""),
        ("k1", "stage.0.conv + stage.0.relu", "Conv", "layer", 0.4, 0.5, 0.4, 2e6, 2e3, BIG, BIG, 9e3, 4e3, 8e3, 300.0, "fp32"),  # noqa: E501
        ("reorder <1>", "", "Reorder", "move", 0.1, 0.1, 0.1, NAN, NAN, BIG, BIG, 4e3, 4e3, 8e3, NAN, ""),
        ("k2", "stage.1.conv", "Conv", "layer", 0.2, 0.2, 0.2, 1e6, 1e3, BIG, BIG, 8e3, 4e3, 8e3, 160.0, "int8"),
        ("k3", "stage.add", "Add", "layer", 0.1, 0.1, 0.1, 0, 0, BIG, BIG, 8e3, 4e3, 8e3, 0.0, "fp32"),
        ("k4", "fc", "Gemm", "layer", 0.2, 0.3, 0.2, 1e4, 1e4, BIG, SMALL, 5e4, 40, 4e3, 0.4, "fp32"),
        ("(unattributed)", "(unattributed)", "unattributed", "unattributed", -0.1, NAN, -0.1, NAN, NAN, None, None, NAN, NAN, NAN, NAN, ""),  # noqa: E501
    ],
    columns=COLUMNS,
)  # fmt: skip
EDGES = ((1, 2), (2, 3), (1, 4), (3, 4), (4, 5))
MANY = pd.concat([FRAME.iloc[[1]]] * 500, ignore_index=True).assign(
    layer=[f"stage{i // 50}.{i // 5 % 10}.conv{i % 5}" for i in range(500)], latency_ms=np.linspace(0.001, 0.1, 500)
)


def hidden_tags(figure) -> bool:
    """Whether no text of a figure holds a tag that comes from a name."""
    return "<1>" not in figure.to_json() and "\\u003c1\\u003e" not in figure.to_json()


# by type


def test_a_bar_for_each_type_by_falling_time_with_the_rest_last():
    bars = profile_types._info(FRAME)
    assert [(bar.type, bar.kind, bar.count) for bar in bars] == [
        ("Conv", "layer", 2),
        ("Gemm", "layer", 1),
        ("call", "call", 1),
        ("Reorder", "move", 1),
        ("Add", "layer", 1),
        ("unattributed", "unattributed", 1),
    ]
    assert [bar.latency_ms for bar in bars] == pytest.approx([0.6, 0.2, 0.1, 0.1, 0.1, -0.1])
    assert [bar.share for bar in bars] == pytest.approx([60, 20, 10, 10, 10, -10])
    assert bars[0].layers == "stage.0.conv + stage.0.relu + stage.1.conv"
    assert [bar.text for bar in bars[:3]] == ["0.600 ms · 2 rows", "0.200 ms · 1 row", "0.100 ms"]
    assert bars[0].hover == (
        "<b>Conv</b><br>0.600 ms · 60.0 % of the call<br>2 operations<br>"
        "slowest: stage.0.conv + stage.0.relu, 0.400 ms<br>3.00 M MACs"
    )


def test_one_type_that_computes_here_and_moves_there_has_two_bars():
    frame = FRAME.assign(type=["call", "Transpose", "Transpose", "Conv", "Add", "Gemm", "unattributed"])
    bars = [(bar.type, bar.kind) for bar in profile_types._info(frame) if bar.type == "Transpose"]
    assert bars == [("Transpose", "layer"), ("Transpose", "move")]


@pytest.mark.parametrize("dark", [False, True])
def test_types_draw_with_what_computes_nothing_muted_and_the_selected_set_off(dark):
    figure = profile_types_figure(FRAME, selected="fc", dark=dark)
    bars = figure.data[0]
    assert list(bars.marker.color) == [
        rows.KIND_COLOURS[k] for k in ("layer", "layer", "call", "move", "layer", "unattributed")
    ]
    assert list(bars.marker.opacity) == [0.45, 1.0, 0.45, 0.45, 0.45, 0.45]
    assert bars.customdata[1] == "fc"
    assert {t.name for t in figure.data if t.showlegend} == {
        "layers", "moves and conversions", "entering and leaving", "unattributed",
    }  # fmt: skip


# the treemap


def boxes(value: str = "latency_ms", column: str = "type"):
    return {box.id: box for box in profile_treemap._info(FRAME, value, column).boxes}


def test_a_row_lies_in_the_module_that_holds_all_its_layers():
    found = boxes()
    assert [(b.id, b.parent, b.label) for b in found.values()] == [
        ("module stage", "", "stage"),
        ("module stage.0", "module stage", "0"),
        ("module (moves and conversions)", "", "(moves and conversions)"),
        ("module stage.1", "module stage", "1"),
        ("row 0", "", "(call)"),
        ("row 1", "module stage.0", "conv + relu"),
        ("row 2", "module (moves and conversions)", "reorder <1>"),
        ("row 3", "module stage.1", "conv"),
        ("row 4", "module stage", "add"),
        ("row 5", "", "fc"),
    ]


def test_a_module_has_the_sum_and_the_layers_of_its_rows():
    stage = boxes()["module stage"]
    assert stage.value == pytest.approx(0.7)
    assert stage.layer == "stage.0.conv + stage.0.relu + stage.1.conv + stage.add"
    assert stage.hover == "<b>stage</b><br>0.700 ms · 63.6 % of what is drawn"
    assert boxes("macs")["module stage"].value == pytest.approx(3e6)


def test_rows_fused_across_modules_lie_in_the_module_around_both():
    frame = FRAME.assign(layer=FRAME["layer"].replace("stage.1.conv", "stage.1.conv + stage.2.norm"))
    found = {b.id: b for b in profile_treemap._info(frame, "latency_ms", "type").boxes}
    assert (found["row 3"].parent, found["row 3"].label) == ("module stage", "1.conv + 2.norm")


def test_nodes_without_a_module_go_with_the_layers_they_are_fused_with():
    """TensorRT names a convolution by its weights and what is fused into it by its ONNX node."""
    frame = FRAME.assign(layer=FRAME["layer"].replace("stage.1.conv", "stage.1.conv + Add_36 + Relu_37"))
    found = {b.id: b for b in profile_treemap._info(frame, "latency_ms", "type").boxes}
    assert (found["row 3"].parent, found["row 3"].label) == ("module stage.1", "conv + Add_36 + Relu_37")


def test_a_box_of_many_layers_names_the_first_and_counts_the_rest():
    layers = [f"stage.1.convolution{i}" for i in range(4)]
    frame = FRAME.assign(layer=FRAME["layer"].replace("stage.1.conv", " + ".join(layers)))
    found = {b.id: b for b in profile_treemap._info(frame, "latency_ms", "type").boxes}
    assert found["row 3"].label == "convolution0 + 3 more"


def test_modules_whose_names_begin_alike_are_not_mixed_up():
    layers = ["block1.conv", "block10.conv"]
    frame = FRAME.iloc[[1, 3]].assign(layer=layers, latency_ms=[0.25, 0.5])
    found = {b.id: b for b in profile_treemap._info(frame, "latency_ms", "type").boxes}
    assert found["module block1"].layer == "block1.conv"
    assert (found["module block1"].value, found["module block10"].value) == (0.25, 0.5)


def test_time_below_zero_is_not_drawn_and_said_so():
    info = profile_treemap._info(FRAME, "latency_ms", "type")
    assert info.below_zero == pytest.approx(-0.1)
    assert "row 6" not in {box.id for box in info.boxes}
    notes = profile_treemap_figure(FRAME).layout.annotations
    assert [note.text for note in notes] == [
        "Not drawn: −0.100 ms unattributed; the rows took longer than the whole call."
    ]
    assert not profile_treemap_figure(FRAME.iloc[:-1]).layout.annotations


def test_unattributed_time_above_zero_is_a_box_of_its_own():
    frame = FRAME.assign(latency_ms=FRAME["latency_ms"].abs())
    box = profile_treemap._info(frame, "latency_ms", "type").boxes[-1]
    assert (box.parent, box.label, box.colour) == ("", "(unattributed)", rows.KIND_COLOURS["unattributed"])


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("column", ["type", "intensity"])
def test_the_treemap_draws_every_box_once_and_outlines_the_selected(dark, column):
    figure = profile_treemap_figure(FRAME, column=column, selected="stage.0.relu", dark=dark)
    tree = figure.data[0]
    assert tree.name == profile_treemap.BOXES
    assert len(set(tree.ids)) == len(tree.ids) == 10
    assert [i for i, w in zip(tree.ids, tree.marker.line.width, strict=True) if w > 1] == ["row 1"]
    # what a module holds comes from its rows alone
    assert sum(tree.values) == pytest.approx(1.1)
    assert tree.labels[list(tree.ids).index("row 2")] == "reorder &lt;1&gt;"
    assert hidden_tags(figure)


def test_a_value_no_row_has_says_so_and_a_column_that_is_not_there_is_refused():
    empty = FRAME.assign(read_bytes=NAN)
    assert (
        profile_treemap_figure(empty, value="read_bytes").layout.annotations[0].text
        == "No row of this profile has read bytes."
    )
    with pytest.raises(ValueError, match=r"no column 'time' for the areas\. Accepted: name, layer"):
        profile_treemap_figure(FRAME, value="time")


# the data-flow graph


def test_nodes_of_a_chain_share_a_lane_and_an_edge_that_passes_them_by_has_its_own():
    layout = lay_out(4, [(0, 1), (1, 2), (2, 3), (0, 3)])
    assert layout.lanes == (0, 0, 0, 0)
    assert layout.paths == (
        ((0, 0), (0, 1)),
        ((0, 0), (1, 0.5), (1, 2.5), (0, 3)),
        ((0, 1), (0, 2)),
        ((0, 2), (0, 3)),
    )


def test_branches_lie_beside_the_longest_way():
    """A downsampling shortcut of one node beside two, and query, key and value beside each other."""
    assert lay_out(5, [(0, 1), (1, 2), (0, 3), (2, 4), (3, 4)]).lanes == (0, 0, 0, 1, 0)
    assert lay_out(6, [(0, 1), (0, 2), (0, 3), (1, 4), (2, 4), (4, 5), (3, 5)]).lanes == (0, 0, -1, 1, 0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_no_line_runs_through_a_node_it_does_not_belong_to(seed):
    random = np.random.default_rng(seed)
    edges = {(int(a), int(b)) for a, b in (sorted(random.choice(40, 2, replace=False)) for _ in range(60))}
    layout = lay_out(40, sorted(edges))
    at = {(lane, height): height for height, lane in enumerate(layout.lanes)}
    for (start, end), path in zip(sorted(edges), layout.paths, strict=True):
        assert (path[0], path[-1]) == ((layout.lanes[start], start), (layout.lanes[end], end))
        for (x0, y0), (x1, y1) in pairwise(path):
            assert y1 > y0
            for height in range(math.floor(y0) + 1, math.ceil(y1)):
                x = x0 + (x1 - x0) * (height - y0) / (y1 - y0)
                assert x0 == x1, "only lines along a lane are longer than from one row to the next"
                assert at.get((x, height), end) in (start, end)


def test_every_operation_is_a_node_in_order_and_times_that_are_none_are_left_out():
    info = dataflow._info(FRAME, EDGES, "latency_ms")
    assert [(n.row, n.lane, n.height, n.label) for n in info.nodes] == [
        (1, 0, 0, "stage.0.conv + stage.0.relu"),
        (2, 0, 1, "reorder <1>"),
        (3, 0, 2, "stage.1.conv"),
        (4, 0, 3, "stage.add"),
        (5, 0, 4, "fc"),
    ]
    assert info.nodes[0].detail == "Conv · 0.400 ms"
    assert [(path[0], path[-1]) for path in info.paths] == [
        ((0, 0), (0, 1)),
        ((0, 0), (0, 3)),
        ((0, 1), (0, 2)),
        ((0, 2), (0, 3)),
        ((0, 3), (0, 4)),
    ]
    assert info.nodes[0].hover == (
        "<b>stage.0.conv + stage.0.relu</b><br>Conv · k1<br>0.400 ms · 40.0 % of the call<br>p95 0.500 ms<br>"
        "2.00 M MACs · 2.00 k parameters<br>(16, 8, 8) → (16, 8, 8)<br>9 KB read · 4 KB written<br>"
        "300 operations per byte<br>fp32"
    )


def test_times_are_coloured_on_a_linear_scale_from_nothing_to_the_slowest():
    shading = dataflow._info(FRAME, EDGES, "latency_ms").shades
    assert (shading.low, shading.high, shading.log) == (0.0, 0.4, False)
    assert shading.colours[0] == "#fee838"  # the bright end of cividis


def test_numbers_over_decades_are_coloured_on_a_logarithmic_scale_and_unknown_ones_grey():
    shading = dataflow._info(FRAME, EDGES, "macs").shades
    assert (shading.low, shading.high, shading.log) == (1e4, 2e6, True)
    assert [shading.colours[i] for i in (0, 3, 4)] == ["#fee838", "#00224e", "#00224e"]
    assert shading.colours[1] == "#BBBBBB"


def test_words_have_a_colour_each_the_one_with_most_time_first():
    shading = dataflow._info(FRAME, EDGES, "precision").shades
    assert [word for word, _ in shading.entries] == ["fp32", "int8"]
    colour = dict(shading.entries)
    assert shading.colours == (colour["fp32"], "#BBBBBB", colour["int8"], colour["fp32"], colour["fp32"])


def test_more_words_than_colours_leave_the_least_grey_and_say_so():
    frame = MANY.iloc[:12].assign(type=[f"Op{i}" for i in range(12)])
    entries = rows.shades(frame, "type").entries
    assert [word for word, _ in entries] == [f"Op{i}" for i in range(11, 2, -1)] + ["other"]
    assert len({colour for _, colour in entries}) == 10


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("column", ["latency_ms", "macs", "precision"])
def test_the_graph_draws_nodes_and_edges_in_one_trace_each(dark, column):
    figure = dataflow_figure(FRAME, EDGES, column=column, selected="fc", dark=dark)
    nodes = next(t for t in figure.data if t.name == dataflow.NODES)
    edges = next(t for t in figure.data if t.name == dataflow.EDGES)
    assert list(nodes.customdata) == ["stage.0.conv + stage.0.relu", "", "stage.1.conv", "stage.add", "fc"]
    assert list(nodes.y) == [0, 1, 2, 3, 4]
    assert figure.layout.xaxis.range[0] < min(x for x in (*edges.x, *nodes.x) if x is not None)
    labels = next(t for t in figure.data if t.mode == "text")
    assert min(labels.x) > max(x for x in (*edges.x, *nodes.x) if x is not None)
    assert [w for w in nodes.marker.line.width if w > 1] == [3]
    assert sum(x is None for x in edges.x) == len(EDGES)
    assert hidden_tags(figure)
    explained = any(t.showlegend for t in figure.data) or any(t.marker.showscale for t in figure.data)
    assert explained


def test_an_engine_without_edges_says_so_and_edges_of_another_profile_are_refused():
    assert dataflow_figure(FRAME, ()).layout.annotations[0].text.startswith("This engine does not tell")
    with pytest.raises(ValueError, match=r"Edge \(1, 9\) does not lead from an earlier to a later of the 7 rows"):
        dataflow_figure(FRAME, [(1, 9)])
    with pytest.raises(ValueError, match=r"Edge \(3, 2\)"):
        dataflow_figure(FRAME, [(3, 2)])


@pytest.mark.parametrize(("column", "why"), [("flops", "no column 'flops'"), ("input_shape", "holds shapes")])
def test_a_column_that_cannot_colour_is_refused(column, why):
    with pytest.raises(ValueError, match=why):
        dataflow_figure(FRAME, EDGES, column=column)


# two profiles side by side

GROUPS = pd.DataFrame(
    [
        (("conv",), ("conv", "relu <1>"), ("conv",), ("Conv_1",), (1,), (0,), 0.4, 0.1, 4.0, "names"),
        (("relu <1>",), (), ("relu",), ("k7",), (2,), (1,), 0.1, 0.2, 0.5, "structure"),
        (("(unmatched in a)",), (), ("(unmatched in a)",), (), (3,), (), 0.05, 0.0, NAN, "unmatched"),
        ((), ("(unmatched in b)",), (), ("(unmatched in b)",), (), (2,), 0.0, 0.02, NAN, "unmatched"),
    ],
    columns=[
        *("layers_a", "layers_b", "names_a", "names_b", "rows_a", "rows_b"),
        *("latency_a_ms", "latency_b_ms", "ratio", "how"),
    ],
)


def test_a_pair_of_bars_for_each_group_and_the_unmatched_time_of_each_side():
    pairs = side_by_side._info(GROUPS, "eager", "ONNX")
    assert [p.label for p in pairs] == ["conv + relu <1>", "relu <1>", "unmatched in eager", "unmatched in ONNX"]
    assert [p.layers for p in pairs] == ["conv + relu <1>", "relu <1>", "", ""]
    assert [p.text for p in pairs] == ["4.0 ×", "0.50 ×", "0.0500 ms", "0.0200 ms"]
    assert [p.matched for p in pairs] == [True, True, False, False]
    assert pairs[0].hover == (
        "<b>conv + relu &lt;1&gt;</b><br>eager: 0.400 ms<br>  conv<br>ONNX: 0.100 ms<br>  Conv_1<br>"
        "4.0 × · matched by names"
    )
    assert pairs[3].hover == "<b>unmatched in ONNX</b><br>ONNX: 0.0200 ms"


@pytest.mark.parametrize("dark", [False, True])
def test_both_profiles_draw_in_their_own_colour_and_the_unmatched_in_grey(dark):
    figure = side_by_side_figure(GROUPS, "a <1>", "b", selected="conv", dark=dark)
    first, second = figure.data[:2]
    grey = side_by_side.style.UNATTRIBUTED_COLOUR
    assert list(first.marker.color) == [side_by_side.COLOUR_A] * 2 + [grey] * 2
    assert list(second.marker.color) == [side_by_side.COLOUR_B] * 2 + [grey] * 2
    assert list(first.x)[:3] == [0.4, 0.1, 0.05]
    assert list(second.x)[:2] == [0.1, 0.2]
    assert list(first.marker.opacity) == [1.0, 0.45, 0.45, 0.45]
    assert list(first.customdata) == ["conv + relu <1>", "relu <1>", "", ""]
    assert [t.name for t in figure.data if t.showlegend] == ["a &lt;1&gt;", "b", "without a partner"]


# all of them


def test_five_hundred_rows_stay_readable():
    edges = [(i, i + 1) for i in range(499)] + [(i, i + 3) for i in range(0, 496, 5)]
    flow = dataflow_figure(MANY, edges, column="latency_ms")
    assert flow.layout.height >= 500 * rows.ROW_HEIGHT_PX
    assert len(next(t for t in flow.data if t.name == dataflow.NODES).x) == 500
    tree = profile_treemap_figure(MANY)
    assert len(tree.data[0].ids) == 500 + 10 + 100  # rows, stages and the blocks inside them
    assert profile_types_figure(MANY).data[0].x[0] == pytest.approx(100 * MANY["share"].sum())
    groups = pd.concat([GROUPS.iloc[[0]]] * 500, ignore_index=True)
    assert side_by_side_figure(groups, "a", "b").layout.height >= 500 * rows.ROW_HEIGHT_PX


@pytest.mark.parametrize(
    "draw",
    [
        lambda: profile_types_figure(FRAME.iloc[:0]),
        lambda: profile_treemap_figure(FRAME.iloc[:0]),
        lambda: dataflow_figure(FRAME.iloc[:0], ()),
    ],
)
def test_no_profile_says_what_to_do_first(draw):
    assert draw().layout.annotations[0].text == rows.NO_PROFILE


def test_no_alignment_says_what_to_do_first():
    assert side_by_side_figure(GROUPS.iloc[:0], "a", "b").layout.annotations[0].text.startswith("Nothing is aligned")
