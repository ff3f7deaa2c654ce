"""Graphs run by each engine alone, and data for small networks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import workbench as wb
from workbench.data.task import Split


def ops(model: wb.Model) -> Counter:
    return Counter(node.op_type for node in model.graph.graph.node)


def initializers(model: wb.Model) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.graph.initializer}


def on_onnxruntime(graph: onnx.ModelProto, *inputs: np.ndarray, level: str = "ORT_ENABLE_ALL") -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip([i.name for i in session.get_inputs()], inputs, strict=True)))[0]


def as_written(graph: onnx.ModelProto, *inputs: np.ndarray) -> np.ndarray:
    """Each node computed as it stands."""
    return on_onnxruntime(graph, *inputs, level="ORT_DISABLE_ALL")


def on_openvino(graph: onnx.ModelProto, *inputs: np.ndarray) -> np.ndarray:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(graph.SerializeToString(), b""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    return compiled(list(inputs))[0]


def decibels(expected: np.ndarray, found: np.ndarray) -> float:
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    return float(10 * np.log10((expected**2).sum() / ((expected - found) ** 2).sum()))


def noise_task(shape: tuple[int, ...], count: int = 70) -> wb.Task:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, *shape)).astype(np.float32)
    return wb.Task.from_arrays(x, np.arange(count) % 2, x[:10], np.arange(count)[:10] % 2, calibration=count)


def without_calibration(task: wb.Task) -> wb.Task:
    return replace(task, calibration=Split(tuple(x[:0] for x in task.calibration.inputs), task.calibration.labels[:0]))


def record(model: wb.Model, title: str) -> tuple[dict, ...]:
    return next(found.rows for found in model.records if found.title == title)
