"""Quantised graphs are what they claim, keep their accuracy and their layers, and run on both engines."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from _quantised import initializers, noise_task, on_onnxruntime, on_openvino, ops, without_calibration
from onnx import TensorProto, helper
from torch import nn

import workbench as wb
from workbench.errors import Cancelled, StepError
from workbench.jobs import on_progress
from workbench.models.export import provenance

INT8, DYNAMIC = wb.Quantize("int8"), wb.Quantize("int8", mode="dynamic")


@pytest.fixture(scope="module")
def lenet() -> wb.Model:
    """LeNet-5, exported once."""
    model = wb.load("lenet5")
    model.onnx()
    return model


@pytest.fixture(scope="module")
def static(lenet, digits) -> wb.Model:
    """Its static int8 form."""
    return INT8.apply(lenet, digits)


# --- what the graph holds


def test_static_int8_has_u8_activations_and_s8_weights_per_output_channel(static):
    tensors = initializers(static)
    weights = {"conv1": 6, "conv2": 16, "fc1": 120, "fc2": 84, "fc3": 10}
    scales = [node.input for node in static.graph.graph.node if node.op_type == "DequantizeLinear"]
    per_channel = [tensors[s] for q, s, _ in scales if q in tensors and tensors[q].dtype == np.int8]
    assert sorted(scale.size for scale in per_channel) == sorted(weights.values())
    activations = [node.input for node in static.graph.graph.node if node.op_type == "QuantizeLinear"]
    assert activations and all(tensors[zero].dtype == np.uint8 and tensors[s].size == 1 for _, s, zero in activations)
    assert static.precision == "int8" and static.changes == ("quantised",) and static.module is None
    onnx.checker.check_model(static.graph, full_check=True)


def test_inputs_and_outputs_stay_float32_with_an_open_batch(static, lenet):
    for before, after in (
        (lenet.onnx().graph.input, static.graph.graph.input),
        (lenet.onnx().graph.output, static.graph.graph.output),
    ):
        assert [(v.name, v.type.tensor_type.elem_type) for v in after] == [(v.name, TensorProto.FLOAT) for v in before]
        assert after[0].type.tensor_type.shape.dim[0].dim_param == before[0].type.tensor_type.shape.dim[0].dim_param


def test_every_node_keeps_the_layer_it_stands_for(lenet, static, digits):
    known = {layer for layers in provenance(lenet.onnx()).values() for layer in layers}
    for model in (static, DYNAMIC.apply(lenet, digits)):
        found = provenance(model.graph)
        assert {layer for layers in found.values() for layer in layers} == known
        for node in model.graph.graph.node:
            assert set(found[node.name]) <= known, node.name
    of = provenance(static.graph)
    reads_weight = [node for node in static.graph.graph.node if node.input[0].startswith("fc2.weight")]
    assert [of[node.name][0] for node in reads_weight] == ["fc2"]
    conv = next(node for node in static.graph.graph.node if node.op_type == "Conv")
    relus = [layers for name, layers in provenance(lenet.onnx()).items() if name.endswith("/Relu")]
    assert set(relus[0]) <= set(of[conv.name]), "the activation folded into a layer's range is part of that layer"


def test_only_products_are_quantised_in_a_transformer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = wb.load(nn.Sequential(layer, nn.Flatten(), nn.Linear(80, 2)), inputs=torch.zeros(2, 5, 16))
    result = INT8.apply(model, noise_task((5, 16)))
    fed = {name for node in result.graph.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    reading = {node.op_type for node in result.graph.graph.node if fed & set(node.input)}
    assert reading == {"MatMul", "Gemm", "Add"}, "products, and the additions that share their input"
    x = noise_task((5, 16)).inputs("test", 10)[0]
    expected, found = on_onnxruntime(model.onnx(), x), on_onnxruntime(result.graph, x)
    assert 10 * np.log10((expected**2).sum() / ((expected - found) ** 2).sum()) > 25


def test_dynamic_int8_quantises_products_and_leaves_convolutions(lenet, digits):
    result = DYNAMIC.apply(lenet, without_calibration(digits))
    assert ops(result)["MatMulInteger"] == 3 and ops(result)["Conv"] == 2 and not ops(result)["Gemm"]
    held = initializers(result)
    assert [held[n].dtype for n in held if n.startswith("fc1.weight") and n.endswith("_quantized")] == [np.int8]


def test_dynamic_int8_of_layers_with_equal_weights_stays_close():
    torch.manual_seed(0)
    first = nn.Linear(16, 16)
    model = wb.load(nn.Sequential(first, nn.ReLU(), copy.deepcopy(first)), inputs=torch.randn(2, 16))
    x = noise_task((16,)).inputs("test", 10)[0]
    expected, found = on_onnxruntime(model.onnx(), x), on_onnxruntime(DYNAMIC.apply(model, noise_task((16,))).graph, x)
    assert 10 * np.log10((expected**2).sum() / ((expected - found) ** 2).sum()) > 25


def test_seven_bit_weights_stay_within_seven_bits(lenet, digits):
    for mode in ("static", "dynamic"):
        result = wb.Quantize("int8", mode=mode, reduce_range=True).apply(lenet, digits)
        weights = [t for name, t in initializers(result).items() if t.dtype == np.int8 and t.ndim > 1]
        assert weights and max(int(np.abs(t.astype(int)).max()) for t in weights) <= 64


def test_half_precision_of_a_module_stays_a_module_and_exports_its_casts(lenet, digits):
    x = digits.inputs("test", 8)[0]
    expected = on_onnxruntime(lenet.onnx(), x)
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        result = wb.Quantize(name).apply(lenet, digits)
        assert result.precision == name and result.changes == ("quantised",)
        assert {p.dtype for p in result.module.parameters()} == {dtype}
        with torch.no_grad():
            found = result.run_module(torch.from_numpy(x))
        assert found.dtype == torch.float32
        assert np.abs(found.numpy() - expected).max() < 0.05 * np.abs(expected).max()
    half = wb.Quantize("fp16").apply(lenet, digits)
    assert np.abs(on_onnxruntime(half.onnx(), x) - expected).max() < 0.01 * np.abs(expected).max()


# --- what it costs


@pytest.mark.parametrize("engine", [on_onnxruntime, on_openvino])
@pytest.mark.parametrize("step", [INT8, DYNAMIC], ids=["static", "dynamic"])
def test_int8_lenet_keeps_its_accuracy_on_both_engines(lenet, digits, engine, step):
    x, labels = digits.inputs("test", 500)[0], digits.labels("test")
    found = engine(step.apply(lenet, digits).graph, x).argmax(1)
    expected = on_onnxruntime(lenet.onnx(), x).argmax(1)
    assert (found == labels).mean() >= (expected == labels).mean() - 0.01


@pytest.fixture(scope="module")
def resnet(shared_data) -> tuple[wb.Model, wb.Task]:
    """The trained ResNet-20, 512 calibration and 1000 test images."""
    model = wb.load(str(shared_data / "cifar10" / "resnet20-12fca82f.th"), architecture="resnet20")
    arrays = np.load(shared_data / "cifar10" / "cifar10.npz")
    steps = [wb.data.Scale(1 / 255), wb.data.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    task = wb.Task.from_arrays(
        arrays["x_train"], arrays["y_train"], arrays["x_test"][:1000], arrays["y_test"][:1000], preprocess=steps
    )
    return model, task


def test_int8_resnet20_stays_within_half_a_point_on_both_engines(resnet):
    model, task = resnet
    graph = INT8.apply(model, task).graph
    x, labels = task.inputs("test", 1000)[0], task.labels("test")
    expected = on_onnxruntime(model.onnx(), x)
    for engine in (on_onnxruntime, on_openvino):
        found = engine(graph, x)
        assert abs((found.argmax(1) == labels).mean() - (expected.argmax(1) == labels).mean()) <= 0.005
        assert (found.argmax(1) == expected.argmax(1)).mean() > 0.97


# --- calibration


def test_calibration_comes_in_chunks_of_32_of_the_calibration_split(lenet, digits, monkeypatch):
    asked = []
    original = wb.Task.batches

    def batches(self, split, size, limit=None):
        asked.append((split, size, limit))
        return original(self, split, size, limit)

    monkeypatch.setattr(wb.Task, "batches", batches)
    INT8.apply(lenet, digits)
    assert asked == [("calibration", 32, 256)], "once, and all of them"


def test_a_graph_for_a_fixed_batch_is_calibrated_in_that_batch(lenet, digits):
    graph = onnx.ModelProto()
    graph.CopyFrom(lenet.onnx())
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.shape.dim[0].Clear()
        value.type.tensor_type.shape.dim[0].dim_value = 3  # 256 samples leave a rest of one
    del graph.graph.value_info[:]
    result = INT8.apply(wb.Model("fixed", {"x": torch.zeros(3, 1, 28, 28)}, graph=graph), digits)
    assert ops(result)["QuantizeLinear"] > 0
    assert on_onnxruntime(result.graph, digits.inputs("test", 3)[0]).shape == (3, 10)


def test_a_task_without_calibration_samples_is_refused(lenet, digits):
    with pytest.raises(StepError, match=r"needs calibration samples.*calibration=512"):
        INT8.apply(lenet, without_calibration(digits))


def test_outputs_that_are_not_finite_are_refused():
    class Broken(nn.Module):
        def forward(self, x):
            return (x @ torch.ones(6, 2)).log()

    with pytest.raises(StepError, match="NaN or infinite"):
        INT8.apply(wb.load(Broken(), inputs=torch.ones(2, 6)), noise_task((6,)))


def test_a_range_that_is_not_finite_names_its_tensor():
    class Overflowing(nn.Module):
        def forward(self, x):
            return (x @ torch.ones(6, 4)).tanh() @ torch.ones(4, 2)

    x = np.ones((64, 6), np.float32)
    x[40] = np.finfo(np.float32).max
    task = wb.Task.from_arrays(x, np.arange(64) % 2, x[:2], np.arange(2), calibration=64)
    with pytest.raises(StepError, match=r"range of '.+' over the calibration samples is not finite"):
        INT8.apply(wb.load(Overflowing(), inputs=torch.ones(2, 6)), task)


def test_calibrating_reports_progress_and_can_be_cancelled(lenet, digits):
    seen = []
    INT8.apply(lenet, digits, progress=on_progress(lambda fraction, message: seen.append((fraction, message))))
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == 1
    assert "calibrating, 256 of 256 samples" in [message for _, message in seen]

    def stop(fraction, message):
        if "64 of" in message:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        INT8.apply(lenet, digits, progress=on_progress(stop))


# --- the step as a whole


def test_the_result_is_the_same_every_time_and_the_graph_untouched(lenet, digits, static):
    given = wb.Model("graph", dict(lenet.example), graph=lenet.onnx())
    before = given.graph.SerializeToString(deterministic=True)
    assert INT8.apply(given, digits).graph == static.graph
    DYNAMIC.apply(given, digits)
    wb.Quantize("fp16").apply(given, digits)
    assert given.graph.SerializeToString(deterministic=True) == before


def test_a_graph_alone_becomes_int8_and_fp16_but_not_bf16(lenet, digits):
    given = wb.Model("graph", dict(lenet.example), graph=lenet.onnx())
    x = digits.inputs("test", 8)[0]
    half = wb.Quantize("fp16").apply(given, digits)
    weights = {t.data_type for t in half.graph.graph.initializer if t.name.endswith(".weight")}
    assert weights == {TensorProto.FLOAT16} and half.precision == "fp16" and half.module is None
    expected = on_onnxruntime(given.graph, x)
    assert np.abs(on_onnxruntime(half.graph, x) - expected).max() < 0.01 * np.abs(expected).max()
    assert set(provenance(half.graph).values()) <= set(provenance(given.graph).values())
    with pytest.raises(StepError, match=r"ONNX graph only, and bf16.*fp16"):
        wb.Quantize("bf16").check(given)


def test_a_graph_that_holds_quantised_nodes_is_refused_whatever_it_is_called(static):
    foreign = wb.Model("foreign", dict(static.example), graph=static.graph)
    for step in (INT8, DYNAMIC, wb.Quantize("fp16")):
        with pytest.raises(StepError, match="foreign is already int8.*rounding twice"):
            step.check(foreign)


def test_dynamic_int8_of_a_network_without_products_is_refused():
    model = wb.load(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), inputs=torch.zeros(2, 1, 8, 8)
    )
    with pytest.raises(StepError, match=r"MatMul, Gemm.*also covers convolutions"):
        DYNAMIC.apply(model, noise_task((1, 8, 8)))


def test_a_graph_onnx_runtime_cannot_run_is_an_error_and_not_a_crash(digits):
    node = helper.make_node("Nonsense", ["x"], ["y"], domain="nowhere")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1, 28, 28]) for name in "xy"]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("nowhere", 1)]
    graph = helper.make_model(helper.make_graph([node], "odd", values[:1], values[1:]), opset_imports=opsets)
    with pytest.raises(StepError, match="does not run on the calibration samples"):
        INT8.apply(wb.Model("odd", {"x": torch.zeros(2, 1, 28, 28)}, graph=graph), digits)
