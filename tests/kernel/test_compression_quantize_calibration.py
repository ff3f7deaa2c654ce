"""Ranges come from all calibration samples, a chunk at a time, by the rule that was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from _quantised import decibels, initializers, on_onnxruntime
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

import workbench as wb
from workbench.compression import _calibration, _simulated
from workbench.compression._ranges import METHODS, histogram_edges, range_from_histogram, squared_error
from workbench.errors import Cancelled
from workbench.jobs import on_progress


def histogram(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    edges = histogram_edges(values.min(), values.max())
    return np.histogram(values, edges)[0], edges


def error(values: np.ndarray, low: float, high: float, bits: int) -> float:
    """Sum of squared errors of the real values, rounded by the simulation."""
    x = torch.from_numpy(values)
    return float((x - _simulated.activation(x, bits, low, high)).square().sum())


VALUES = {
    "both signs": np.random.default_rng(0).laplace(size=9_973),
    "after a ReLU": np.maximum(np.random.default_rng(1).normal(size=9_973), 0),
    "one far out": np.append(np.random.default_rng(2).normal(size=9_973), 50.0),
}


# --- the rules


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", VALUES)
def test_a_range_holds_zero_and_lies_within_what_was_seen(method, name):
    values = VALUES[name]
    low, high = range_from_histogram(*histogram(values), method)
    assert min(values.min(), 0) <= low <= 0 <= high <= values.max()


def test_minmax_is_all_that_was_seen():
    values = VALUES["both signs"]
    assert range_from_histogram(*histogram(values), "minmax") == (values.min(), values.max())


@pytest.mark.parametrize("percentile", [99.0, 99.9])
def test_percentile_leaves_equal_shares_outside(percentile):
    values = VALUES["both signs"]
    counts, edges = histogram(values)
    low, high = range_from_histogram(counts, edges, "percentile", percentile)
    tail, width = (1 - percentile / 100) / 2, edges[1] - edges[0]
    assert (values < low).mean() <= tail < (values < low + width).mean()
    assert (values > high).mean() <= tail < (values > high - width).mean()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", VALUES)
def test_mse_comes_within_five_percent_of_the_best_range_of_a_fine_grid(name, bits):
    values = VALUES[name]
    found = error(values, *range_from_histogram(*histogram(values), "mse", bits=bits), bits)
    shares = np.linspace(0.02, 1, 30)
    grid = [(max(values.min(), -s * np.abs(values).max()), s * values.max()) for s in shares]
    assert found <= 1.05 * min(error(values, low, high, bits) for low, high in grid)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_error_of_a_histogram_is_that_of_its_values(bits):
    values = VALUES["both signs"]
    counts, edges = histogram(values)
    for low, high in ((values.min(), values.max()), (-2.0, 3.0), (-0.5, 0.1)):
        estimate = squared_error(counts, edges, np.array([low]), np.array([high]), bits)[0]
        assert estimate == pytest.approx(error(values, low, high, bits), rel=0.02)


def test_entropy_gives_up_a_value_far_out_and_keeps_an_even_spread():
    low, high = range_from_histogram(*histogram(VALUES["one far out"]), "entropy")
    assert high < 10
    even = np.linspace(0, 1, 50_000)
    assert range_from_histogram(*histogram(even), "entropy") == (0, 1)


def test_values_that_are_all_zero_have_an_empty_range():
    edges = histogram_edges(0.0, 0.0)
    for method in METHODS:
        assert range_from_histogram(np.zeros(len(edges) - 1), edges, method) == (0, 0)


# --- the calibrator


class Reader(CalibrationDataReader):
    def __init__(self, task: wb.Task):
        self._chunks = task.batches("calibration", 32)

    def get_next(self):
        chunk = next(self._chunks, None)
        return None if chunk is None else {"x": chunk[0][0]}


@pytest.fixture(scope="module")
def lenet() -> wb.Model:
    model = wb.load("lenet5")
    model.onnx()
    return model


def test_minmax_gives_what_onnx_runtimes_own_tool_gives_bit_for_bit(lenet, digits, tmp_path: Path):
    onnx.save(lenet.onnx(), tmp_path / "source.onnx")
    quant_pre_process(tmp_path / "source.onnx", tmp_path / "ready.onnx", skip_symbolic_shape=True)
    quantize_static(
        tmp_path / "ready.onnx",
        tmp_path / "bare.onnx",
        Reader(digits),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    bare = onnx.load(tmp_path / "bare.onnx")
    ours = wb.Quantize("int8").apply(lenet, digits)
    expected, found = {t.name: numpy_helper.to_array(t) for t in bare.graph.initializer}, initializers(ours)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value.dtype == found[name].dtype and np.array_equal(value, found[name]), name
    assert [node.name for node in bare.graph.node] == [node.name for node in ours.graph.graph.node]


def doubling() -> onnx.ModelProto:
    """y = 2x, of eight values."""
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 8]) for name in "xy"]
    two = numpy_helper.from_array(np.float32(2), "two")
    graph = helper.make_graph([helper.make_node("Mul", ["x", "two"], ["y"], name="m")], "g", values[:1], values[1:])
    graph.initializer.append(two)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def uneven() -> wb.Task:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(100, 8)) ** 3).astype(np.float32)
    return wb.Task.from_arrays(x, np.arange(100) % 2, x[:4], np.arange(4) % 2, calibration=100)


@pytest.mark.parametrize("method", METHODS)
def test_ranges_of_a_graph_are_those_of_the_histogram_of_all_its_values(method, uneven):
    samples = _calibration.Samples(uneven, doubling())
    ranges, _ = _calibration.observe(doubling(), {"Mul"}, samples, method)
    x = np.concatenate([inputs[0] for inputs, _ in uneven.batches("calibration", 7)]).astype(np.float64)
    for name, values in (("x", x), ("y", 2 * x)):
        expected = range_from_histogram(*histogram(values), method)
        # a value at the end of a bin may fall into the next one in float32
        np.testing.assert_allclose(ranges[name], expected, atol=2 * np.ptp(values) / 2048)


def test_histograms_are_taken_of_as_few_samples_at_a_time_as_fit(uneven, monkeypatch):
    asked = []
    original = wb.Task.batches

    def batches(self, split, size, limit=None):
        asked.append(size)
        return original(self, split, size, limit)

    monkeypatch.setattr(wb.Task, "batches", batches)
    monkeypatch.setattr(_calibration, "_HISTOGRAM_BYTES", 5 * 8 * 4)  # of y, for five samples
    _calibration.observe(doubling(), {"Mul"}, _calibration.Samples(uneven, doubling()), "mse")
    assert asked == [32, 1, 5], "all once for the ends, one sample to see its size, and all again"


def test_a_range_by_percentile_withstands_a_sample_that_is_far_out():
    torch.manual_seed(0)
    layer = nn.Linear(16, 4)
    with torch.no_grad():
        layer.weight[:, 0] = 0  # so that the value far out spoils one range alone
    model = wb.load(nn.Sequential(layer), inputs=torch.zeros(2, 16))
    x = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)
    x[70, 0] = 300
    labels = np.arange(2000) % 4
    task = wb.Task.from_arrays(x, labels, x[:8], labels[:8], calibration=2000)
    fresh = np.random.default_rng(1).normal(size=(200, 16)).astype(np.float32)
    found = {}
    for method in ("minmax", "percentile"):
        graph = wb.Quantize("int8", calibration=method).apply(model, task).graph
        found[method] = decibels(on_onnxruntime(model.onnx(), fresh), on_onnxruntime(graph, fresh))
    assert found["percentile"] > found["minmax"] + 10


def test_the_second_pass_reports_progress_and_can_be_cancelled(lenet, digits):
    seen = []
    step = wb.Quantize("int8", calibration="percentile")
    step.apply(lenet, digits, progress=on_progress(lambda fraction, message: seen.append((fraction, message))))
    assert [fraction for fraction, _ in seen] == sorted(fraction for fraction, _ in seen)
    assert "histograms, 64 of 256 samples" in [message for _, message in seen]

    def stop(_, message):
        if message.startswith("histograms"):
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        step.apply(lenet, digits, progress=on_progress(stop))
