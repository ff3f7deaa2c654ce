"""The published ResNet-20 keeps its published accuracy on every engine."""

from __future__ import annotations

import numpy as np
import pytest

import workbench as wb


@pytest.fixture(scope="module")
def study(shared_data):
    data = np.load(shared_data / "cifar10" / "cifar10.npz")
    task = wb.Task.from_arrays(
        data["x_train"], data["y_train"], data["x_test"], data["y_test"], calibration=512,
        preprocess=[wb.data.Scale(1 / 255), wb.data.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))],
    )  # fmt: skip
    model = wb.load(shared_data / "cifar10" / "resnet20-12fca82f.th", architecture="resnet20")
    with wb.Study(model, task) as s:
        yield s


@pytest.mark.parametrize(
    "backend", [wb.Eager(threads=2), wb.OnnxRuntime(threads=2), wb.OpenVINO(threads=2)], ids=lambda b: b.title
)
def test_fp32_scores_exactly_the_published_accuracy(study, backend):
    if not backend.availability().usable:
        pytest.skip(backend.availability().why)
    assert study.run([], on=backend).measurement.accuracy == 0.9173


@pytest.mark.parametrize("backend", [wb.OnnxRuntime(threads=2), wb.OpenVINO(threads=2)], ids=lambda b: b.title)
def test_static_int8_keeps_the_accuracy_and_shrinks_the_file(study, backend):
    if not backend.availability().usable:
        pytest.skip(backend.availability().why)
    m = study.run([wb.Quantize("int8")], on=backend).measurement
    assert m.accuracy >= 0.916
    assert m.precision == "int8"
    assert m.size_bytes < 0.35 * study.run([], on=backend).measurement.size_bytes
