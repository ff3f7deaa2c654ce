"""Distances are what the formula gives, taken where both versions hold the same value."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import workbench as wb
from workbench.errors import DataError
from workbench.figures.sqnr import _info, sqnr_figure
from workbench.profiling import _points
from workbench.profiling.sqnr import sqnr, sqnr_db


def tabular(features: int, count: int = 40) -> wb.Task:
    x = np.random.default_rng(0).normal(size=(count, features)).astype(np.float32)
    y = np.arange(count) % 2
    return wb.Task.from_arrays(x, y, x, y, calibration=count)


def two_layers(first: torch.Tensor, second: torch.Tensor) -> wb.Model:
    module = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(first)
        module[2].weight.copy_(second)
    return wb.load(module, inputs=torch.zeros(2, 3))


def decibels(r: np.ndarray, a: np.ndarray) -> float:
    return 10 * math.log10((r.astype(float) ** 2).sum() / ((r.astype(float) - a) ** 2).sum())


@pytest.fixture(scope="module")
def lenet() -> wb.Model:
    return wb.load("lenet5")


@pytest.fixture(scope="module")
def lenet_int8(lenet, digits) -> wb.Model:
    return wb.Quantize("int8").apply(lenet, digits)


# --- one tensor


def test_a_tenth_of_the_amplitude_as_noise_is_twenty_decibels():
    assert sqnr_db(torch.ones(5), torch.full((5,), 0.9, dtype=torch.float64)) == pytest.approx(20)
    assert sqnr_db(np.array([3.0, 4.0]), np.array([3.0, 3.0])) == pytest.approx(10 * math.log10(25))


def test_equal_tensors_are_infinitely_close_and_half_precision_is_compared_in_double():
    half = torch.tensor([1.0, 300.0], dtype=torch.bfloat16)
    assert sqnr_db(half, half.float()) == math.inf
    big = torch.full((4,), 3e38)
    assert sqnr_db(big, big / 2) == pytest.approx(10 * math.log10(4))


def test_an_undefined_ratio_is_refused():
    with pytest.raises(ValueError, match="all zero"):
        sqnr_db(torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\)"):
        sqnr_db(torch.zeros(3), torch.ones(4))


# --- two models


def test_two_layers_are_as_far_apart_as_numpy_says():
    torch.manual_seed(1)
    first, second = torch.randn(4, 3), torch.randn(2, 4)
    task = tabular(3)
    d = sqnr(two_layers(first, second), two_layers(first + 0.01, second), task, samples=40)
    x = task.inputs("calibration", 40)[0].astype(np.float64)
    hidden = [x @ (first.numpy().astype(float) + shift).T for shift in (0, np.float64(0.01))]
    outputs = [np.tanh(h) @ second.numpy().astype(float).T for h in hidden]
    frame = d.frame().set_index("layer")
    assert list(frame.index) == ["0", "1", "2"] and d.samples == 40
    assert frame.loc["0", "sqnr_db"] == pytest.approx(decibels(*hidden), rel=1e-3)
    assert frame.loc["2", "sqnr_db"] == pytest.approx(decibels(*outputs), rel=1e-3)
    assert frame.loc["2", "max_error"] == pytest.approx(np.abs(outputs[0] - outputs[1]).max(), rel=1e-3)
    a, b = (o.ravel() for o in outputs)
    assert frame.loc["2", "cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert frame.loc["0", "shape"] == (4,) and frame.loc["0", "type"] == "Linear"


def test_energies_are_summed_over_all_samples_not_decibels_averaged():
    """The first samples are loud and exact, the last are quiet and all noise: their mean in dB would be far lower."""
    x = np.concatenate([np.full((8, 3), 100.0), np.full((8, 3), -1.0)]).astype(np.float32)
    task = wb.Task.from_arrays(x, np.arange(16) % 2, x, np.arange(16) % 2, calibration=16)
    calibrated = task.inputs("calibration", 16)[0]

    class Clipped(nn.Module):
        def __init__(self, floor):
            super().__init__()
            self.act = nn.Hardtanh(floor, 200.0)
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.act(x))

    torch.manual_seed(0)
    a, b = (wb.load(Clipped(floor), inputs=torch.zeros(2, 3)) for floor in (-5.0, 0.0))
    frame = sqnr(a, b, task, samples=16).frame().set_index("layer")
    assert frame.loc["act", "sqnr_db"] == pytest.approx(decibels(calibrated, np.maximum(calibrated, 0)))
    assert frame.loc["act", "sqnr_db"] == pytest.approx(10 * math.log10((8 * 3 * 1e4 + 24) / 24))


def test_a_model_equals_itself_at_every_layer(lenet, digits):
    d = sqnr(lenet, lenet, digits, samples=8)
    assert list(d.frame()["layer"]) == list(lenet.layers["layer"])
    assert (d.frame()["sqnr_db"] == math.inf).all() and (d.frame()["max_error"] == 0).all() and d.unmatched.empty
    assert "equal everywhere" in repr(d)


def test_int8_is_compared_after_the_activation_it_absorbed(lenet, lenet_int8, digits):
    d = sqnr(lenet, lenet_int8, digits, samples=16)
    frame = d.frame().set_index("layer")
    assert list(frame.index) == [
        *("conv1 + relu1", "pool1", "conv2 + relu2", "pool2", "flatten", "fc1 + relu3", "fc2 + relu4", "fc3"),
    ]
    assert frame["sqnr_db"].between(25, 60).all() and d.unmatched.empty
    # by hand: the float side at the output of the activation, from torch; the int8 side within its own step of it
    x = torch.from_numpy(digits.inputs("calibration", 16)[0])
    with torch.no_grad():
        reference = lenet.module[:2](x)
    scales = {t.name: numpy_helper.to_array(t) for t in lenet_int8.graph.graph.initializer}
    step = float(scales["relu1/Relu_out_scale"])
    assert 0.3 * step < frame.loc["conv1 + relu1", "max_error"] < 4 * step
    energy = float((reference.double() ** 2).mean())
    # rounding alone would leave uniform noise of step² / 12 (Widrow); weights and input are rounded as well
    rounding = 10 * math.log10(energy / (step**2 / 12))
    assert rounding - 12 < frame.loc["conv1 + relu1", "sqnr_db"] < rounding + 3


def test_the_last_point_is_the_output_that_the_engine_gives(lenet, lenet_int8, digits):
    x = digits.inputs("calibration", 16)[0]
    outputs = []
    for model in (lenet, lenet_int8):
        with wb.OnnxRuntime(graph_level="disabled").compile(model) as engine:
            outputs.append(engine(x))
    row = sqnr(lenet, lenet_int8, digits, samples=16).frame().iloc[-1]
    assert row["layer"] == "fc3" and row["sqnr_db"] == pytest.approx(decibels(*outputs), abs=1e-6)


def test_pruned_channels_are_compared_with_the_same_channels_of_the_dense_model(lenet, digits):
    pruned = wb.Prune(0.5, round_to=1).apply(lenet, digits)
    d = sqnr(lenet, pruned, digits, samples=8)
    frame = d.frame().set_index("layer")
    # nothing before the first layer was pruned, so that what it kept is what it was
    assert frame.loc["conv1", "shape"] == (3, 28, 28) and frame.loc["conv1", "max_error"] < 1e-6
    assert frame.loc["pool1", "max_error"] < 1e-6
    kept = list(pruned.edits[-1]["conv2"]["kept_channels"])
    assert torch.equal(pruned.module.conv2.bias, lenet.module.conv2.bias[kept])
    x = torch.from_numpy(digits.inputs("calibration", 8)[0])
    with torch.no_grad():
        a, b = lenet.module[:4](x)[:, kept], pruned.module[:4](x)
    assert frame.loc["conv2", "sqnr_db"] == pytest.approx(decibels(a.numpy(), b.numpy()), abs=1e-3)
    assert list(d.unmatched["layer"]) == ["flatten"] and "(400,) and (200,)" in d.unmatched["why"][0]


def test_the_channels_a_model_kept_are_known_after_quantisation_and_a_second_pruning(lenet, digits):
    twice = wb.Prune(0.3, round_to=1).apply(wb.Prune(0.3, round_to=1).apply(lenet, digits), digits)
    kept = list(twice.edits[-1]["fc1"]["kept_channels"])
    assert torch.equal(twice.module.fc1.bias, lenet.module.fc1.bias[kept])
    frame = sqnr(lenet, wb.Quantize("int8").apply(twice, digits), digits, samples=8).frame().set_index("layer")
    assert frame.loc["conv1 + relu1", "sqnr_db"] > 25


def test_more_bits_are_closer(lenet, digits):
    """Weights rounded by hand to a grid of n steps: 8 bits, then 2."""
    lowest = []
    for bits in (8, 4, 2):
        module = wb.load("lenet5").module
        with torch.no_grad():
            for parameter in module.parameters():
                step = parameter.abs().max() / (2 ** (bits - 1) - 1)
                parameter.copy_((parameter / step).round() * step)
        rounded = wb.load(module, inputs=torch.zeros(2, 1, 28, 28), name="lenet5")
        lowest.append(sqnr(lenet, rounded, digits, samples=8).frame()["sqnr_db"].min())
    assert lowest[0] > lowest[1] > lowest[2]


# --- points


def graph(nodes: list[tuple[str, str, list[str], str]]) -> onnx.ModelProto:
    """A graph of nodes given as operator, layer, inputs and output; ``w`` is a weight."""
    made = []
    for operator, layer, inputs, output in nodes:
        node = helper.make_node(operator, inputs, [output], name=f"{layer}/{operator}/{output}")
        node.metadata_props.add(key="workbench.layers", value=str(layer.split("+")).replace("'", '"'))
        made.append(node)
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in ("x", nodes[-1][3])]
    weight = numpy_helper.from_array(np.ones((1, 3), np.float32), "w")
    return helper.make_model(helper.make_graph(made, "g", value[:1], value[1:], [weight]))


def layers_of(a: onnx.ModelProto, b: onnx.ModelProto) -> list[tuple[tuple[str, ...], str, str]]:
    return [(point.layers, point.a.tensor, point.b.tensor) for point in _points.common(a, b).points]


def test_a_folded_normalisation_is_compared_behind_it():
    apart = graph([("Mul", "conv", ["x", "w"], "c"), ("Add", "bn", ["c", "w"], "n"), ("Relu", "act", ["n"], "y")])
    folded = graph([("Mul", "conv+bn", ["x", "w"], "c"), ("Relu", "act", ["c"], "y")])
    assert layers_of(apart, folded) == [(("conv", "bn"), "n", "c"), (("act",), "y", "y")]


def test_a_layer_of_several_nodes_is_compared_at_its_end():
    a = graph([("Mul", "gelu", ["x", "w"], "a"), ("Add", "gelu", ["a", "x"], "b"), ("Relu", "act", ["b"], "y")])
    b = graph([("Relu", "gelu", ["x"], "a"), ("Relu", "act", ["a"], "y")])
    assert layers_of(a, b) == [(("gelu",), "b", "a"), (("act",), "y", "y")]


def test_a_layer_that_one_side_lacks_is_named_and_the_points_behind_it_stay():
    a = graph([("Mul", "fc", ["x", "w"], "a"), ("Relu", "drop", ["a"], "b"), ("Relu", "act", ["b"], "y")])
    b = graph([("Mul", "fc", ["x", "w"], "a"), ("Relu", "act", ["a"], "b"), ("Relu", "extra", ["b"], "y")])
    found = _points.common(a, b)
    assert (found.only_a, found.only_b, found.nowhere) == (("drop",), ("extra",), ())
    assert [point.layers for point in found.points] == [("fc",), ("act",)]


def test_branches_do_not_stand_for_each_other():
    nodes = [("Mul", "left", ["x", "w"], "l"), ("Add", "right", ["x", "w"], "r"), ("Add", "sum", ["l", "r"], "y")]
    swapped = [nodes[1], nodes[0], nodes[2]]
    expected = [(("left",), "l", "l"), (("right",), "r", "r"), (("sum",), "y", "y")]
    assert layers_of(graph(nodes), graph(swapped)) == expected


# --- refusals


def test_two_models_without_a_common_layer_are_refused(digits, lenet):
    other = wb.load(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), inputs=torch.zeros(2, 1, 28, 28), name="other")
    with pytest.raises(DataError, match="lenet5 and other have no layer in common"):
        sqnr(lenet, other, digits)


def test_a_layer_that_puts_out_nan_is_named(digits, lenet):
    broken = wb.load("lenet5")
    with torch.no_grad():
        broken.module.fc1.weight[0, 0] = math.nan
    with pytest.raises(DataError, match="Layer fc1 of lenet5 puts out NaN"):
        sqnr(lenet, broken, digits, samples=8)


def test_a_dead_reference_has_no_ratio_and_the_rest_is_unharmed():
    dead = two_layers(torch.zeros(4, 3), torch.ones(2, 4))
    frame = sqnr(dead, two_layers(torch.ones(4, 3), torch.ones(2, 4)), tabular(3), samples=8).frame()
    assert frame["sqnr_db"].isna().all() and (frame["max_error"] > 0).all()


# --- the figure


def test_bars_end_at_their_decibels_and_equal_layers_at_the_right(lenet, lenet_int8, digits):
    frame = sqnr(lenet, lenet_int8, digits, samples=8).frame()
    frame.loc[1, "sqnr_db"], frame.loc[2, "sqnr_db"] = math.inf, math.nan
    info = _info(frame)
    assert info.bars[0].end_db == frame["sqnr_db"][0] and info.bars[0].text == f"{frame['sqnr_db'][0]:.1f} dB"
    assert (info.bars[1].text, info.bars[1].end_db) == ("equal", info.high_db)
    assert (info.bars[2].text, info.bars[2].end_db) == ("no signal", 0.0)
    figure = sqnr_figure(frame, selected="relu1", dark=True)
    assert list(figure.data[0].customdata) == list(frame["layer"])
    assert figure.data[0].marker.opacity[0] == 1.0 and figure.data[0].marker.opacity[1] < 1.0


def test_an_empty_frame_says_what_to_do(lenet, digits):
    frame = sqnr(lenet, lenet, digits, samples=8).frame().iloc[:0]
    assert "Choose two versions" in sqnr_figure(frame).layout.annotations[0].text
