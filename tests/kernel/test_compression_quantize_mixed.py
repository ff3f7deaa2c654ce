"""Which layers stay float, given or chosen, what was measured, and corrections before rounding."""

from __future__ import annotations

import copy
import json

import numpy as np
import onnx
import pytest
import torch
from _quantised import as_written, decibels, initializers, noise_task, on_openvino, ops, record, without_calibration
from torch import nn

import workbench as wb
from workbench.compression import quantize, step_from_dict
from workbench.errors import StepError

OUTPUTS, NODES = "outputs against float32", "nodes by operator"
ALONE = "output SQNR with one layer quantised"


class Net(nn.Module):
    """A convolution and two linear layers, of which `narrow` has weights that 8 bits hold badly: one is far larger."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.narrow, self.last = nn.Conv2d(1, 4, 3, stride=2), nn.Linear(36, 16), nn.Linear(16, 4)
        with torch.no_grad():
            self.narrow.weight[:, 0] = 4.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.narrow(self.conv(x).relu().flatten(1)).relu())


@pytest.fixture(scope="module")
def model() -> wb.Model:
    model = wb.load(Net(), inputs=torch.zeros(2, 1, 8, 8))
    model.onnx()
    return model


@pytest.fixture(scope="module")
def task() -> wb.Task:
    return noise_task((1, 8, 8))


def calibration(task: wb.Task, count: int = 64) -> np.ndarray:
    return task.inputs("calibration", count)[0]


def float_weights(model: wb.Model) -> set[str]:
    """Weights that products read as floats."""
    held = initializers(model)
    read = {name for n in model.graph.graph.node if n.op_type in ("Conv", "Gemm", "MatMul") for name in n.input}
    return {name.split(".weight")[0] for name in read if name in held and held[name].ndim > 1}


# --- given


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("layer", ["narrow", "last"])
def test_a_layer_set_to_fp32_keeps_its_float_weights_and_the_others_do_not(model, task, mode, layer):
    result = wb.Quantize("int8", mode=mode, layers={layer: "fp32"}).apply(model, task)
    unquantised = {"conv"} if mode == "dynamic" else set()
    assert float_weights(result) == {layer} | unquantised
    x = task.inputs("test", 10)[0]
    assert decibels(as_written(model.onnx(), x), on_openvino(result.graph, x)) > 25


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x)


def test_an_operation_between_layers_can_stay_float():
    model = wb.load(Sum(), inputs=torch.zeros(2, 8))
    (name,) = set(model.layers["layer"]) - {"first", "second"}
    for settings, expected in (({}, (1, 0)), ({name: "fp32"}, (0, 1))):
        result = wb.Quantize("int8", layers=settings).apply(model, noise_task((8,)))
        (row,) = (row for row in record(result, NODES) if row["operator"] == "Add")
        assert (row["quantised"], row["float"]) == expected


def test_an_unknown_layer_is_refused_before_any_work_with_the_nearest(model, task):
    step = wb.Quantize("int8", layers={"narow": "fp32"})
    for given in (model, wb.Model("graph", dict(model.example), graph=model.onnx())):
        with pytest.raises(StepError, match=r"no layer 'narow'.*Did you mean 'narrow'\?"):
            step.check(given)
    with wb.Study(model, task) as study, pytest.raises(StepError, match="narow"):
        study.run([step])


def test_layers_of_a_graph_alone_can_be_named(model, task):
    given = wb.Model("graph", dict(model.example), graph=model.onnx())
    result = wb.Quantize("int8", layers={"narrow": "fp32"}).apply(given, task)
    assert float_weights(result) == {"narrow"}


def test_nothing_left_to_quantise_is_refused(model, task):
    everything = dict.fromkeys(model.layers["layer"], "fp32")
    with pytest.raises(StepError, match="nothing is left to quantise once"):
        wb.Quantize("int8", layers=everything).apply(model, task)


# --- chosen


@pytest.fixture(scope="module")
def chosen(model, task) -> wb.Model:
    return wb.Quantize("int8", keep_float=1).apply(model, task)


def test_the_layers_chosen_are_those_that_cost_most_when_quantised_alone(model, task, chosen):
    x = calibration(task)
    expected = as_written(model.onnx(), x)
    cost = {}
    for layer in ("conv", "narrow", "last"):
        others = {other: "fp32" for other in ("conv", "narrow", "last") if other != layer}
        alone = wb.Quantize("int8", layers=others).apply(model, task)
        cost[layer] = decibels(expected, as_written(alone.graph, x))
    rows = {row["layer"]: row for row in record(chosen, ALONE)}
    assert rows.keys() == cost.keys()
    worst = min(cost, key=cost.__getitem__)
    assert worst == "narrow"
    assert float_weights(chosen) == {worst} == {n for n, row in rows.items() if row["precision"] == "fp32"}
    for layer, value in cost.items():
        # the float rectifiers after the other layers are not folded there, and here rounded or not
        assert rows[layer]["sqnr_db"] == pytest.approx(value, abs=1.0)


def test_keeping_the_worst_layer_float_raises_output_sqnr(model, task, chosen):
    plain = wb.Quantize("int8").apply(model, task)
    assert record(chosen, OUTPUTS)[0]["sqnr_db"] > record(plain, OUTPUTS)[0]["sqnr_db"] + 1


def test_a_layer_that_is_set_is_not_chosen(model, task):
    result = wb.Quantize("int8", keep_float=1, layers={"narrow": "int8"}).apply(model, task)
    assert "narrow" not in {row["layer"] for row in record(result, ALONE)}
    assert float_weights(result) != {"narrow"} and len(float_weights(result)) == 1


@pytest.mark.parametrize("count", [3, 10])
def test_more_layers_to_keep_than_there_are_is_refused(model, task, count):
    with pytest.raises(StepError, match=f"keep_float is {count}, and there are 3 layers"):
        wb.Quantize("int8", keep_float=count).apply(model, task)


@pytest.mark.parametrize(
    "step", [wb.Quantize("int8", mode="dynamic", keep_float=1), wb.Quantize("int8 weights", keep_float=1)]
)
def test_choosing_without_calibration_samples_is_refused(model, task, step):
    with pytest.raises(StepError, match=r"keep_float chooses layers by calibration samples.*calibration=512"):
        step.apply(model, without_calibration(task))


# --- recorded


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_the_output_sqnr_recorded_is_that_of_the_graph_on_64_calibration_samples(model, task, mode):
    result = wb.Quantize("int8", mode=mode).apply(model, task)
    (row,) = record(result, OUTPUTS)
    assert row["samples"] == 64
    halves = np.split(calibration(task), 2)  # a dynamic range is that of a chunk
    expected, found = (np.concatenate([as_written(graph, x) for x in halves]) for graph in (model.onnx(), result.graph))
    assert row["sqnr_db"] == pytest.approx(decibels(expected, found), abs=0.01)


def test_dynamic_int8_without_calibration_samples_records_its_nodes_alone(model, task):
    result = wb.Quantize("int8", mode="dynamic").apply(model, without_calibration(task))
    assert [found.title for found in result.records] == [NODES]


def test_the_nodes_recorded_are_all_of_the_graph_by_operator(model, task, chosen):
    count = {row["operator"]: (row["quantised"], row["float"]) for row in record(chosen, NODES)}
    assert count["Conv"] == (1, 0) and count["Gemm"] == (1, 1)
    dynamic = wb.Quantize("int8", mode="dynamic").apply(model, task)
    count = {row["operator"]: (row["quantised"], row["float"]) for row in record(dynamic, NODES)}
    assert count["Conv"] == (0, 1) and count["MatMul"] == (ops(dynamic)["MatMulInteger"], 0) == (2, 0)


def test_a_study_opened_again_has_the_same_graph_and_records(model, task, tmp_path):
    steps = [wb.Quantize("int8", calibration="mse", keep_float=1, layers={"last": "int8"})]
    with wb.Study(model, task, store=tmp_path) as study:
        before = study.run(steps).model()
    with wb.Study(model, task, store=tmp_path) as study:
        after = study.candidates[0].model()
    assert after.graph == before.graph and after.records == before.records
    assert after.fingerprint == before.fingerprint and after.precision == "int8"


def test_the_same_seed_gives_the_same_graph(model, task):
    step = wb.Quantize("int8", calibration="entropy", keep_float=1)
    assert step.apply(model, task, seed=3).fingerprint == step.apply(model, task, seed=3).fingerprint


# --- corrections


def int8_weight(model: wb.Model, layer: str) -> np.ndarray:
    held = initializers(model)
    name = next(name for name in held if name.startswith(layer) and name.endswith("weight_quantized"))
    scale = held[name.replace("_quantized", "_scale")]
    return held[name].astype(np.float32) * scale.reshape(-1, *[1] * (held[name].ndim - 1))


def rounded_down(model: wb.Model, layers: dict[str, int]) -> wb.Model:
    """What a correction may give: weights on their grids, but not the nearest points of them."""
    module = copy.deepcopy(model.module)
    for name, part in module.named_children():
        if layers.get(name) != 32:
            weight = part.weight.detach()
            scale = weight.abs().flatten(1).amax(1).reshape(-1, *[1] * (weight.ndim - 1)) / 127
            part.weight.data = (weight / scale - 1e-4).floor().clamp(-127, 127) * scale
            part.weight.data.flatten(1)[:, 0] = (scale * 127).flatten()  # the largest magnitude is kept
    return model.changed("", module=module)


@pytest.mark.parametrize(("precision", "activation_bits"), [("int8", 8), ("int8 weights", 0)])
def test_corrected_weights_reach_the_graph_as_they_are(model, task, monkeypatch, precision, activation_bits):
    asked = []

    def corrected(given, _, **settings):
        asked.append(settings)
        return rounded_down(given, settings["layers"])

    monkeypatch.setattr(quantize, "corrected", corrected)
    result = wb.Quantize(precision, adaptive_rounding=True, layers={"narrow": "fp32"}).apply(model, task, seed=5)
    (settings,) = asked
    wanted = {"bits": 8, "per_channel": True, "adaptive_rounding": True, "equalize": False, "correct_bias": False}
    wanted |= {"layers": {"narrow": 32}, "seed": 5, "activation_bits": activation_bits}
    assert {key: settings[key] for key in wanted} == wanted
    expected = rounded_down(model, {"narrow": 32}).module
    held = initializers(result)
    (row,) = record(result, OUTPUTS)
    plain = decibels(as_written(model.onnx(), calibration(task)), as_written(result.graph, calibration(task)))
    assert row["sqnr_db"] == pytest.approx(plain, abs=0.01), "against the weights as they were"
    float_weight = next(value for name, value in held.items() if name.startswith("narrow.weight"))
    assert np.array_equal(np.sort(float_weight, None), np.sort(model.module.narrow.weight.detach().numpy(), None))
    x = task.inputs("test", 10)[0]
    if precision == "int8":
        weight = expected.conv.weight.detach().numpy()
        np.testing.assert_allclose(int8_weight(result, "conv"), weight, atol=1e-6 * np.abs(weight).max())
    else:
        with torch.no_grad():
            outputs = expected(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(as_written(result.graph, x), outputs, rtol=1e-4, atol=1e-4)


def test_layers_that_dynamic_int8_leaves_float_are_left_uncorrected(model, task, monkeypatch):
    asked = []
    monkeypatch.setattr(quantize, "corrected", lambda given, _, **settings: asked.append(settings) or given)
    wb.Quantize("int8", mode="dynamic", equalize=True).apply(model, task)
    assert asked[0]["layers"] == {"conv": 32}


def test_layers_that_take_four_bits_are_left_uncorrected(model, task, monkeypatch):
    asked = []
    monkeypatch.setattr(quantize, "corrected", lambda given, _, **settings: asked.append(settings) or given)
    wb.Quantize("int8 weights", correct_bias=True, layers={"narrow": "int4"}).apply(model, task)
    assert asked[0]["layers"] == {"narrow": 32}


def test_each_correction_is_recorded_before_what_the_rounding_cost(model, task):
    result = wb.Quantize("int8", equalize=True, correct_bias=True).apply(model, task)
    titles = [found.title for found in result.records]
    assert len(titles) == 3 and titles[0].startswith("corrections") and titles[1:] == [OUTPUTS, NODES]
    assert [row["correction"] for row in result.records[0].rows] == ["cross-layer equalisation", "bias correction"]


def test_corrections_need_a_module(model):
    given = wb.Model("graph", dict(model.example), graph=model.onnx())
    for name in ("equalize", "correct_bias", "adaptive_rounding"):
        with pytest.raises(StepError, match=f"ONNX graph only, and {name} work on a torch module"):
            wb.Quantize("int8", **{name: True}).check(given)


# --- the step as a value


@pytest.mark.parametrize(
    ("step", "label"),
    [
        (wb.Quantize("int8", calibration="mse"), "Quantise int8, mse"),
        (wb.Quantize("int8", keep_float=2), "Quantise int8, 2 layers fp32"),
        (wb.Quantize("int8", layers={"a": "fp32", "b": "int8"}), "Quantise int8, 1 layer fp32, 1 layer int8"),
        (wb.Quantize("int8", equalize=True, correct_bias=True), "Quantise int8, equalised, bias corrected"),
        (wb.Quantize("int8 weights", adaptive_rounding=True), "Quantise int8 weights, adaptive rounding"),
        (wb.Quantize("int4 weights", layers={"a": "int8"}), "Quantise int4 weights, 1 layer int8"),
    ],
)
def test_a_step_is_the_same_after_json_and_after_python(step, label):
    assert step.label == label
    assert step_from_dict(json.loads(json.dumps(step.to_dict()))) == step
    assert eval(step.to_python(), {"wb": wb}) == step
    assert hash(step_from_dict(step.to_dict())) == hash(step)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"precision": "int8", "calibration": "max"}, "no calibration 'max'.*entropy, minmax, mse, percentile"),
        ({"precision": "int8", "mode": "dynamic", "calibration": "mse"}, "mode='dynamic' takes no ranges"),
        ({"precision": "int8 weights", "calibration": "mse"}, "takes no ranges"),
        ({"precision": "fp16", "layers": {"a": "fp32"}}, "casts the whole model"),
        ({"precision": "bf16", "keep_float": 1}, "casts the whole model"),
        ({"precision": "int8", "keep_float": -1}, "keep_float is -1"),
        ({"precision": "int8", "keep_float": True}, "keep_float is True"),
        ({"precision": "int8", "layers": {"a": "int4"}}, "no precision of layer a 'int4'"),
        ({"precision": "int8", "layers": ["a"]}, "a mapping such as"),
        ({"precision": "int4 weights", "correct_bias": True}, "correct_bias correct what rounding to 8 bits"),
        ({"precision": "fp16", "equalize": True}, "equalize correct what rounding to 8 bits"),
        ({"precision": "int8", "equalize": 1}, "equalize is 1"),
        ({"precision": "int8", "reduce_range": True, "adaptive_rounding": True}, "round it again to 7"),
        ({"precision": "int8 weights", "mode": "dynamic"}, 'settings of "int8"'),
    ],
)
def test_a_setting_that_is_wrong_or_means_nothing_is_refused(settings, words):
    with pytest.raises(StepError, match=words):
        wb.Quantize(**settings)


def test_fewer_calibration_samples_than_a_fixed_batch_is_refused(model):
    graph = onnx.ModelProto()
    graph.CopyFrom(model.onnx())
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.shape.dim[0].Clear()
        value.type.tensor_type.shape.dim[0].dim_value = 16
    given = wb.Model("fixed", {"x": torch.zeros(16, 1, 8, 8)}, graph=graph)
    with pytest.raises(StepError, match="the task has 9, fewer than the graph's batch of 16"):
        wb.Quantize("int8").apply(given, noise_task((1, 8, 8), count=9))
