"""Weights alone in 8 and 4 bits: what the file holds, what the graph computes, and that engines run it."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from _quantised import (
    as_written,
    decibels,
    initializers,
    noise_task,
    on_onnxruntime,
    on_openvino,
    ops,
    record,
    without_calibration,
)
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import workbench as wb
from workbench.compression import _weight_only
from workbench.errors import BackendError, StepError

INT8, INT4 = wb.Quantize("int8 weights"), wb.Quantize("int4 weights")
ENGINES = [on_onnxruntime, on_openvino]


def mlp(*widths: int) -> wb.Model:
    torch.manual_seed(0)
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return wb.load(nn.Sequential(*layers[:-1]), inputs=torch.zeros(2, widths[0]))


def dequantised(model: wb.Model) -> list[np.ndarray]:
    """Each weight of the graph in floats, by numpy, from what lies in the file."""
    held, found = initializers(model), []
    for node in model.graph.graph.node:
        if node.op_type == "DequantizeLinear":
            settings = {a.name: a.i for a in node.attribute}
            values, scale = (held[name].astype(np.float32) for name in node.input)
            if settings.get("block_size"):
                scale = np.repeat(scale, settings["block_size"], axis=settings["axis"])
            else:
                scale = scale.reshape([-1 if i == settings["axis"] else 1 for i in range(values.ndim)])
            found.append(values * scale)
    return found


# --- what the file holds


@pytest.mark.parametrize(
    ("step", "kind", "share"), [(INT8, TensorProto.INT8, 1 / 3.9), (INT4, TensorProto.INT4, 1 / 6.3)]
)
def test_the_file_of_a_million_weights_shrinks(step, kind, share):
    model = mlp(1024, 960, 64)
    result = step.apply(model, noise_task((1024,), count=4))
    assert result.graph.ByteSize() < share * model.onnx().ByteSize()
    assert result.precision == step.precision and result.changes == ("quantised",) and result.module is None
    weights = [t for t in result.graph.graph.initializer if len(t.dims) == 2 and t.dims[0] in (960, 1024)]
    assert sorted(t.data_type for t in weights if t.dims[1] in (64, 960) and t.data_type != 1) == [kind, kind]
    onnx.checker.check_model(result.graph, full_check=True)


def test_eight_bit_weights_are_the_nearest_of_127_steps_either_way_per_output():
    model = mlp(20, 12)
    (found,) = dequantised(INT8.apply(model, noise_task((20,))))
    weight = model.module[0].weight.detach().numpy().T
    step = np.abs(weight).max(0) / 127
    assert (np.abs(found - weight) <= step / 2 * 1.0001).all()
    np.testing.assert_allclose(found, np.round(weight / step) * step, atol=1e-6)


def test_four_bit_weights_lie_on_fifteen_steps_of_each_block_no_further_off_than_plain_rounding():
    model = mlp(64, 12)
    result = INT4.apply(model, noise_task((64,)))
    (found,) = dequantised(result)
    blocks = model.module[0].weight.detach().numpy().T.reshape(2, 32, 12)
    error = np.square(found.reshape(blocks.shape) - blocks).sum(1)
    step = np.abs(blocks).max(1, keepdims=True) / 7
    plain = np.square(np.round(blocks / step) * step - blocks).sum(1)
    assert (error <= plain * 1.0001).all() and error.sum() < 0.95 * plain.sum()
    codes = next(v for v in initializers(result).values() if v.dtype.name == "int4").astype(int)
    assert codes.min() >= -8 and codes.max() <= 7 and len(np.unique(codes)) > 8


def test_rows_of_zeros_stay_zero():
    for quantised, weight in (
        (_weight_only.int8_by_channel(np.zeros((3, 4), np.float32), 0), np.zeros((3, 4))),
        (_weight_only.int4_by_block(np.zeros((32, 4), np.float32)), np.zeros((32, 4))),
    ):
        values, scale = quantised
        assert np.array_equal(values, weight) and np.isfinite(scale).all() and (scale > 0).all()


def test_a_weight_that_two_layers_share_is_kept_once():
    torch.manual_seed(0)
    first = nn.Linear(32, 32)
    model = wb.load(nn.Sequential(first, nn.ReLU(), copy.deepcopy(first)), inputs=torch.zeros(2, 32))
    for step in (INT8, INT4):
        result = step.apply(model, noise_task((32,)))
        assert ops(result)["DequantizeLinear"] == 1 and ops(result)["MatMul"] == 2


# --- what it computes


@pytest.mark.parametrize("step", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("widths", [(64, 32, 5), (45, 33, 7)], ids=["whole blocks", "a rest"])
def test_a_network_computes_with_the_dequantised_weights(step, widths):
    model = mlp(*widths)
    result = step.apply(model, noise_task(widths[:1]))
    x = noise_task(widths[:1]).inputs("test", 10)[0]
    first, second = (weight[:rows] for weight, rows in zip(dequantised(result), widths, strict=False))
    biases = [part.bias.detach().numpy() for part in model.module if isinstance(part, nn.Linear)]
    expected = np.maximum(x @ first + biases[0], 0) @ second + biases[1]
    np.testing.assert_allclose(as_written(result.graph, x), expected, rtol=1e-4, atol=1e-5)
    for engine in ENGINES:  # they round the inputs of products to 8 bits, by block
        assert decibels(expected, engine(result.graph, x)) > 30


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("step", [INT8, INT4], ids=["int8", "int4"])
def test_lenet_keeps_its_accuracy_on_both_engines(digits, step, engine):
    model = wb.load("lenet5")
    x, labels = digits.inputs("test", 500)[0], digits.labels("test")
    found = engine(step.apply(model, digits).graph, x).argmax(1)
    assert (found == labels).mean() >= (on_onnxruntime(model.onnx(), x).argmax(1) == labels).mean() - 0.01


def test_onnx_runtime_multiplies_by_the_weights_as_they_are_kept(tmp_path):
    for step in (INT8, INT4):
        result = step.apply(mlp(45, 33, 7), noise_task((45,)))
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        onnxruntime.InferenceSession(result.graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
        assert kinds.count("MatMulNBits") == 2 and "DequantizeLinear" not in kinds


class Convolutions(nn.Module):
    """One of each kind: plain, depthwise, transposed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain, self.depthwise = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.norm, self.transposed = nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.transposed(self.norm(self.depthwise(self.plain(x).relu())))


@pytest.mark.parametrize("step", [INT8, INT4], ids=["int8", "int4"])
def test_convolutions_take_8_bits_per_channel(step):
    model = wb.load(Convolutions(), inputs=torch.zeros(2, 3, 8, 8))
    result = step.apply(model, noise_task((3, 8, 8)))
    held = initializers(result)
    scales = [held[n.input[1]].size for n in result.graph.graph.node if n.op_type == "DequantizeLinear"]
    assert sorted(scales) == [4, 8, 8]
    x = noise_task((3, 8, 8)).inputs("test", 10)[0]
    for engine in ENGINES:
        assert decibels(on_onnxruntime(model.onnx(), x), engine(result.graph, x)) > 35


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(300, 32), nn.Linear(32, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids).mean(1))


def test_an_embedding_table_takes_8_bits_per_row_and_only_rows_in_use_are_dequantised():
    model = wb.load(Words(), inputs=torch.zeros(2, 5, dtype=torch.int64))
    ids = np.random.default_rng(0).integers(0, 300, (40, 5))
    task = wb.Task.from_arrays(ids, np.arange(40) % 2, ids, np.arange(40) % 2)
    result = INT4.apply(model, task)
    assert result.graph.ByteSize() < model.onnx().ByteSize() / 2.5
    table = model.module.table.weight.detach().numpy()
    step = np.abs(table).max(1, keepdims=True) / 127
    module = copy.deepcopy(model.module)
    module.table.weight.data = torch.from_numpy(np.round(table / step) * step)
    (weight,) = dequantised(result)
    module.head.weight.data = torch.from_numpy(np.ascontiguousarray(weight.T))
    with torch.no_grad():
        expected = module(torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(as_written(result.graph, ids), expected, atol=1e-5)
    assert not any(
        list(t.dims) == [300, 32] and t.data_type == TensorProto.FLOAT for t in result.graph.graph.initializer
    )
    assert decibels(expected, on_openvino(result.graph, ids)) > 30


def gemm(**settings: float) -> onnx.ModelProto:
    """y = Gemm(x, w, b) of 32 inputs and 6 outputs, as another exporter may write it."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(6, 32) if settings.get("transB") else (32, 6)).astype(np.float32)
    held = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(rng.normal(size=6).astype(np.float32), "b")]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", size]) for n, size in (("x", 32), ("y", 6))]
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], **settings)], "g", values[:1], values[1:]
    )
    graph.initializer.extend(held)
    graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, list(weight.shape)))  # as old files do
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7)


@pytest.mark.parametrize("settings", [{}, {"transB": 1}, {"alpha": 0.5, "transB": 1}, {"beta": 2.0}], ids=str)
@pytest.mark.parametrize("step", [INT8, wb.Quantize("int8", mode="dynamic")], ids=["weights", "dynamic"])
def test_a_gemm_of_any_settings_stays_close_in_an_old_graph_without_names(settings, step):
    model = wb.Model("old", {"x": torch.zeros(2, 32)}, graph=gemm(**settings))
    x = noise_task((32,)).inputs("test", 10)[0]
    expected = on_onnxruntime(gemm(**settings), x)
    if "beta" in settings and step is not INT8:
        with pytest.raises(StepError, match="this graph has none"):
            step.apply(model, noise_task((32,)))
        return
    if "beta" in settings:
        with pytest.raises(StepError, match="no operation that can be quantised"):
            step.apply(model, noise_task((32,)))
        return
    result = step.apply(model, noise_task((32,)))
    assert [value.name for value in result.graph.graph.input] == ["x"]
    assert decibels(expected, as_written(result.graph, x)) > 35


# --- the step as a whole


def test_layers_take_the_precision_they_are_given(digits):
    model = wb.load("lenet5")
    result = wb.Quantize("int4 weights", layers={"fc2": "int8", "fc3": "fp32"}).apply(model, digits)
    held = initializers(result)
    kinds = {name.split(".")[0]: v.dtype.name for name, v in held.items() if ".weight" in name and "scale" not in name}
    assert kinds == {"conv1": "int8", "conv2": "int8", "fc1": "int4", "fc2": "int8", "fc3": "float32"}
    known = {layer for layers in wb.models.export.provenance(model.onnx()).values() for layer in layers}
    found = wb.models.export.provenance(result.graph)
    assert {layer for layers in found.values() for layer in layers} == known


def test_the_layers_chosen_to_stay_float_are_those_that_cost_most():
    torch.manual_seed(0)
    first, last = nn.Linear(64, 64), nn.Linear(64, 4)
    with torch.no_grad():
        last.weight.copy_((torch.arange(256).reshape(4, 64) % 15 - 7) / 7)  # on the grid: it costs nothing
    model = wb.load(nn.Sequential(first, nn.ReLU(), last), inputs=torch.zeros(2, 64))
    result = wb.Quantize("int4 weights", keep_float=1).apply(model, noise_task((64,)))
    rows = {row["layer"]: row for row in record(result, "output SQNR with one layer quantised")}
    assert (rows["0"]["precision"], rows["2"]["precision"]) == ("fp32", "quantised")
    assert 10 < rows["0"]["sqnr_db"] < 30 and (rows["2"]["sqnr_db"] is None or rows["2"]["sqnr_db"] > 100)
    assert len(dequantised(result)) == 1


def test_no_calibration_samples_are_needed_and_with_some_the_output_sqnr_is_recorded():
    model, task = mlp(64, 32, 5), noise_task((64,))
    bare = INT4.apply(model, without_calibration(task))
    result = INT4.apply(model, task)
    assert bare.graph == result.graph
    assert [found.title for found in bare.records] == ["nodes by operator"]
    x = task.inputs("calibration", 64)[0]
    expected = decibels(as_written(model.onnx(), x), as_written(result.graph, x))
    assert record(result, "outputs against float32")[0] == {"samples": 64, "sqnr_db": pytest.approx(expected, abs=0.01)}
    count = {row["operator"]: (row["quantised"], row["float"]) for row in record(result, "nodes by operator")}
    assert count["MatMul"] == (2, 0) and count["Relu"] == (0, 1)


def test_a_study_runs_it_on_both_engines_and_its_artefact_is_smaller(digits, tmp_path):
    with wb.Study(wb.load("mlp"), digits, store=tmp_path) as study:
        plain = study.run([])
        candidates = [study.run([INT4], on=backend) for backend in (wb.OnnxRuntime(), wb.OpenVINO())]
        before = candidates[0].model()
        with pytest.raises(BackendError, match="ONNX graph"):
            study.run([INT4], on=wb.Eager())
        with pytest.raises(StepError, match="already int4 weights"):
            study.run([INT4, INT8])
    for candidate in candidates:
        assert candidate.measurement.file_bytes < plain.measurement.file_bytes / 3
        assert candidate.measurement.accuracy > plain.measurement.accuracy - 0.03
        assert candidate.measurement.precision == "int4 weights"
    with wb.Study(wb.load("mlp"), digits, store=tmp_path) as study:
        after = study.candidates[1].model()
    assert after.graph == before.graph and after.records == before.records


def test_a_network_without_weights_is_refused():
    model = wb.load(nn.Sequential(nn.Flatten(), nn.ReLU()), inputs=torch.zeros(2, 4))
    with pytest.raises(StepError, match="no operation that can be quantised"):
        INT8.apply(model, noise_task((4,)))
