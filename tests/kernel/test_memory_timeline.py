"""Bytes alive step by step, against sums done by hand; the least any order needs, against trying every order."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import onnx
import pandas as pd
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import workbench as wb
from workbench.errors import BackendError, DataError, LoadError
from workbench.figures import memory_timeline as figure
from workbench.figures.memory_timeline import memory_timeline_figure
from workbench.models.model import Model
from workbench.profiling import _ort_plan, _schedule
from workbench.profiling.memory import memory_counters, memory_timeline


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.relu = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x):
        return x + self.relu(self.fc(x))


class Keeps(nn.Module):
    """Holds on to the first result although only the second layer needs it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(2, 2)

    def forward(self, x):
        first = self.a(x)
        return self.c(self.b(first))


class Branches(nn.Module):
    """Widens twice before it narrows once; the other way round needs half as much."""

    def __init__(self):
        super().__init__()
        self.up1, self.up2 = nn.Linear(4, 100), nn.Linear(4, 100)
        self.down1, self.down2 = nn.Linear(100, 2), nn.Linear(100, 2)

    def forward(self, x):
        a, b = self.up1(x), self.up2(x)
        return self.down1(a) + self.down2(b)


class Several(nn.Module):
    """Gives a tensor, a view of it and another one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        y = self.a(x)
        return y, (y.view(-1, 2, 4), self.b(y))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        return self.layer(x)


def loaded(module: nn.Module, *shape: int) -> Model:
    return wb.load(module.eval(), inputs=torch.ones(2, *shape))


def steps(model: Model, batch: int = 1) -> list[tuple]:
    frame = memory_timeline(model, batch).frame()
    return list(frame[["layer", "live_bytes", "allocated_bytes", "freed_bytes"]].itertuples(index=False, name=None))


def test_a_chain_frees_each_tensor_after_the_layer_that_reads_it():
    model = loaded(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), 4)
    # two samples: 32 bytes go in, 64 lie between, 16 come out; the caller keeps the input
    assert steps(model, 2) == [("(input)", 32, 32, 0), ("0", 96, 64, 0), ("1", 160, 64, 64), ("2", 112, 16, 64)]
    timeline = memory_timeline(model, 2)
    assert (timeline.peak_bytes, timeline.peak_layer, timeline.measured) == (160, "1", True)
    # an order may give the input back after its last use: before and after the activation are 64 bytes each
    assert (timeline.minimum_bytes, timeline.minimum_exact) == (128, True)
    assert timeline.weight_bytes == 4 * (4 * 8 + 8 + 8 * 2 + 2)


def test_an_operation_in_place_allocates_nothing():
    model = loaded(nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)), 4)
    assert steps(model, 2) == [("(input)", 32, 32, 0), ("0", 96, 64, 0), ("1", 96, 0, 0), ("2", 112, 16, 64)]
    assert memory_timeline(model, 2).minimum_bytes == 96


def test_a_view_takes_no_memory_and_keeps_what_it_looks_at():
    model = loaded(nn.Sequential(nn.Linear(4, 8), nn.Flatten(), nn.Linear(16, 2)), 2, 4)
    assert steps(model) == [("(input)", 32, 32, 0), ("0", 96, 64, 0), ("2", 104, 8, 64)]


def test_a_residual_block_keeps_its_input_until_the_sum():
    assert steps(loaded(Residual(), 4)) == [
        ("(input)", 16, 16, 0),
        ("fc", 32, 16, 0),
        ("relu", 48, 16, 16),
        ("add", 48, 16, 16),
    ]
    assert memory_timeline(loaded(Residual(), 4)).minimum_bytes == 48


def test_what_a_forward_pass_still_refers_to_is_alive():
    # 32 bytes of the first layer's result are held by a name until the forward pass returns
    assert steps(loaded(Keeps(), 4))[2:] == [("b", 16 + 32 + 8, 8, 0), ("c", 16 + 32 + 8 + 8, 8, 40)]
    assert memory_timeline(loaded(Keeps(), 4)).minimum_bytes == 16 + 32


def test_a_tensor_given_twice_is_counted_once_and_stays():
    frame = memory_timeline(loaded(Several(), 4)).frame()
    assert list(frame["live_bytes"]) == [16, 48, 56]
    assert frame["freed_bytes"].sum() == 0


def test_a_module_called_twice_has_two_steps():
    same = nn.Linear(4, 4)
    assert [row[0] for row in steps(loaded(nn.Sequential(same, same), 4))] == ["(input)", "0", "0"]


def test_another_order_may_need_less_and_is_found():
    timeline = memory_timeline(loaded(Branches(), 4))
    assert timeline.peak_bytes == 16 + 400 + 400 + 8 + 8 + 8
    # one branch to its end, then the other: its input, its wide tensor and the narrow one of the first
    assert (timeline.minimum_bytes, timeline.minimum_exact) == (16 + 400 + 8, True)


def lenet_graph() -> Model:
    model = wb.load("lenet5")
    return replace(model, module=None, graph=model.onnx())


CONV1, POOL1, CONV2, POOL2 = 4 * 6 * 28 * 28, 4 * 6 * 14 * 14, 4 * 16 * 10 * 10, 4 * 16 * 5 * 5


def test_lenet5_by_hand_as_a_module():
    timeline = memory_timeline(wb.load("lenet5"))
    image = 4 * 28 * 28
    assert (timeline.peak_bytes, timeline.peak_layer) == (image + 2 * CONV1, "relu1")
    assert timeline.minimum_bytes == 2 * CONV1
    assert timeline.weight_bytes == 4 * 61706
    frame = timeline.frame().set_index("layer")
    # torch's pooling writes down where each maximum was, in 8 bytes
    assert frame.loc["pool1", "allocated_bytes"] == POOL1 + 2 * POOL1
    assert list(frame.index) == "(input) conv1 relu1 pool1 conv2 relu2 pool2 fc1 relu3 fc2 relu4 fc3".split()


def test_lenet5_by_hand_as_a_graph():
    timeline = memory_timeline(lenet_graph())
    assert list(timeline.frame()["live_bytes"]) == [
        *(3136, 3136 + CONV1, 2 * CONV1, CONV1 + POOL1, POOL1 + CONV2, 2 * CONV2, CONV2 + POOL2),
        *(POOL2 + 480, 2 * 480, 480 + 336, 2 * 336, 336 + 40),
    ]
    assert (timeline.peak_bytes, timeline.peak_layer, timeline.minimum_bytes) == (2 * CONV1, "relu1", 2 * CONV1)
    assert timeline.weight_bytes >= 4 * 61706
    assert not timeline.measured


def test_a_graph_scales_with_the_batch():
    one, five = (memory_timeline(lenet_graph(), batch).frame()["live_bytes"] for batch in (1, 5))
    assert list(five) == [5 * n for n in one]


def test_a_quantised_graph_lies_in_memory_as_integers(digits):
    model = wb.Quantize("int8").apply(wb.load("lenet5"), digits)
    frame = memory_timeline(model).frame()
    # float32 comes in and goes out; in between a number is a byte, and the activation is part of the rounding
    assert list(frame["live_bytes"])[:4] == [3136, 3136 + 784, 784 + CONV1 // 4, CONV1 // 4 + POOL1 // 4]
    assert frame.iloc[-1][["layer", "allocated_bytes"]].tolist() == ["fc3", 40]


@pytest.mark.parametrize(
    ("module", "shape"), [(Residual(), (4,)), (Several(), (4,)), (Recurrent(), (5, 4)), (Encoder(), (5, 8))]
)
def test_what_is_left_at_the_end_is_what_went_in_and_what_comes_out(module, shape):
    model = loaded(module, *shape)
    timeline = memory_timeline(model, 3)
    x = torch.ones(3, *shape)
    with torch.no_grad():
        leaves = torch.utils._pytree.tree_leaves(model.module(x))
    distinct = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in leaves}
    frame = timeline.frame()
    assert frame["allocated_bytes"].sum() - frame["freed_bytes"].sum() == 4 * x.numel() + sum(distinct.values())
    before = frame["live_bytes"] - frame["allocated_bytes"]
    assert list(before[1:]) == list((frame["live_bytes"] - frame["freed_bytes"])[:-1])
    assert timeline.minimum_bytes <= timeline.peak_bytes


def test_watching_leaves_the_model_as_it_was():
    model = wb.load("resnet20")
    before = model.fingerprint
    memory_timeline(model)
    assert model.fingerprint == before


def random_trace(rng: random.Random, count: int) -> _schedule.Trace:
    sizes, operations = [rng.randint(1, 9)], []
    for index in range(count):
        reads = tuple(rng.sample(range(len(sizes)), rng.randint(1, min(2, len(sizes)))))
        operations.append(_schedule.Operation(f"l{index}", "op", reads, (len(sizes),)))
        sizes.append(rng.randint(1, 9))
    return _schedule.Trace(tuple(operations), tuple(sizes), (0,), (len(sizes) - 1,))


def least_of_all_orders(trace: _schedule.Trace) -> float:
    """By trying every order, with nothing cleverer than a set of live buffers."""
    best = math.inf
    for order in itertools.permutations(range(len(trace.operations))):
        live, peak, done = {0}, trace.sizes[0], set()
        for index in order:
            operation = trace.operations[index]
            if not live.issuperset(operation.reads):
                peak = math.inf
                break
            live |= set(operation.writes)
            peak = max(peak, sum(trace.sizes[b] for b in live))
            done.add(index)
            needed = {b for i, o in enumerate(trace.operations) if i not in done for b in o.reads} | set(trace.outputs)
            live &= needed
        best = min(best, peak)
    return best


@pytest.mark.parametrize("seed", range(40))
def test_the_minimum_is_that_of_trying_every_order(seed: int):
    trace = random_trace(random.Random(seed), 6)
    assert _schedule.minimum_bytes(trace) == (least_of_all_orders(trace), True)


@pytest.mark.parametrize("seed", range(10))
def test_a_search_that_is_given_up_says_so_and_keeps_below(seed: int, monkeypatch):
    trace = random_trace(random.Random(seed), 6)
    monkeypatch.setattr(_schedule, "_STATES", 0)
    bound, exact = _schedule.minimum_bytes(trace)
    assert bound <= least_of_all_orders(trace)
    assert not exact or bound == least_of_all_orders(trace)


def test_nothing_moves_past_a_change_in_place():
    operation = _schedule.Operation
    # the second operation overwrites what the first reads; the other way round the first would read other numbers
    ran = (
        operation("a", "op", (0,), (1,)),
        operation("b", "op", (), (2,), changes=(0,)),
        operation("c", "op", (1, 2), (3,)),
    )
    assert _schedule.Trace(ran, (8, 1, 1, 1), (0,), (3,)).before == [0, 0b1, 0b11]


def test_a_layer_that_fails_is_named():
    model = loaded(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), 4)
    broken = replace(model, module=nn.Sequential(nn.Linear(4, 8), nn.Linear(4, 2)))
    with pytest.raises(LoadError, match=r"fails in layer 1 \(Linear\)"):
        memory_timeline(broken)


def graph_model(nodes: list, output: list) -> Model:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])
    y = helper.make_tensor_value_info("y", TensorProto.INT64, output)
    graph = helper.make_graph(nodes, "g", [x], [y])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return Model("odd", {"x": torch.ones(2, 4)}, graph=made)


def test_a_graph_that_hides_a_shape_is_refused_with_the_tensor():
    with pytest.raises(DataError, match=r"shape of 'y' \(NonZero.*Give the model as a torch module"):
        memory_timeline(graph_model([helper.make_node("NonZero", ["x"], ["y"], name="where/NonZero")], [2, None]))


def test_a_graph_made_for_another_batch_is_refused():
    model = lenet_graph()
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model.graph)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(DataError, match="batch is 3, but lenet5 is made for a batch of 2"):
        memory_timeline(replace(model, graph=fixed), 3)


@pytest.mark.parametrize("function", [memory_timeline, memory_counters])
def test_nonsense_batches_are_refused(function):
    with pytest.raises(DataError, match="batch is 0; a whole number of at least 1"):
        function(wb.load("mlp"), batch=0)


def test_onnxruntime_tells_the_block_it_lays_out():
    # both hidden tensors live while the second product runs; inputs, outputs and weights are not in the block
    model = loaded(nn.Sequential(nn.Linear(16, 256), nn.Linear(256, 128), nn.Linear(128, 8)), 16)
    for batch in (1, 2):
        planned = memory_timeline(model, batch).planned_bytes(wb.OnnxRuntime(threads=1))
        assert planned == batch * 4 * (256 + 128)


def test_engines_that_do_not_tell_their_plan_say_so(monkeypatch):
    timeline = memory_timeline(wb.load("mlp"))
    with pytest.raises(BackendError, match="PyTorch eager.* does not tell what memory it plans"):
        timeline.planned_bytes(wb.Eager())
    monkeypatch.setattr(_ort_plan, "_ARENA", "a line no version writes")
    with pytest.raises(BackendError, match="does not log what its arena is asked for"):
        timeline.planned_bytes(wb.OnnxRuntime(threads=1))


def test_counters_see_what_a_run_takes_and_gives_back():
    model = loaded(nn.Linear(1, 1000), 1)
    row = memory_counters(model, wb.Eager(threads=1), 20_000).frame().set_index("counter").loc["resident"]
    if math.isnan(row["peak_bytes"]):
        pytest.skip("this system keeps no mark of the highest memory")
    # 80 MB of outputs, which nobody keeps
    assert row["peak_bytes"] - row["loaded_bytes"] > 75e6
    assert row["peak_bytes"] - row["after_bytes"] > 40e6


FRAME = pd.DataFrame(
    {
        "step": [0, 1, 2],
        "layer": ["(input)", "fc <1>", "relu"],
        "type": ["input", "Linear", "ReLU"],
        "live_bytes": [1000, 5000, 9000],
        "allocated_bytes": [1000, 4000, 4000],
        "freed_bytes": [0, 0, 4000],
        "tensors": [1, 2, 3],
    }
)


def test_the_figure_has_a_step_per_row_in_the_unit_of_its_peak():
    info = figure._info(FRAME, 8000, minimum_exact=True)
    assert [(s.step, s.layer, s.live) for s in info.steps] == [
        (0, "(input)", 1.0),
        (1, "fc <1>", 5.0),
        (2, "relu", 9.0),
    ]
    assert (info.peak, info.peak_label, info.unit) == (2, "peak 9 KB, relu", "KB")
    assert (info.minimum, info.minimum_label) == (8.0, "any order needs 8 KB")
    assert figure._info(FRAME, 8000, minimum_exact=False).minimum_label == "any order needs at least 8 KB"
    assert info.steps[1].hover == (
        "<b>fc &lt;1&gt;</b><br>Linear<br>5 KB alive in 2 tensors<br>4 KB allocated · 0 B freed after it"
    )


@pytest.mark.parametrize("dark", [False, True])
def test_the_figure_draws_and_sets_the_selected_layer_off(dark: bool):
    drawn = memory_timeline_figure(FRAME, minimum_bytes=8000, selected="relu + other", dark=dark)
    traces = {trace.name: trace for trace in drawn.data}
    assert list(traces[figure.LIVE].customdata) == ["(input)", "fc <1>", "relu"]
    assert list(traces[figure.SELECTED].x) == [2]
    assert list(traces[figure.PEAK].y) == [9.0]
    assert drawn.layout.shapes[0].y0 == 8.0
    assert not memory_timeline_figure(FRAME, dark=dark).layout.shapes


def test_no_timeline_says_what_to_do_first():
    drawn = memory_timeline_figure(FRAME.iloc[:0])
    assert drawn.layout.annotations[0].text.startswith("No memory timeline yet.")
