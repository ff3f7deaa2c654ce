"""Profiles: every kernel is led back to the layers it computes, and rows never claim more than a call took."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import workbench as wb
from workbench.deployment._ort_profile import _outermost
from workbench.deployment._rows import Kernel, Lineage, Node
from workbench.errors import BackendError, DataError

REPEATS = 6
PRODUCT = re.compile("Conv(?!ert)|Gemm|MatMul|FullyConnected")


class Twice(nn.Module):
    """One activation called twice, and a module that computes with its child's weights itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.act = nn.ReLU()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv(x)).flatten(2).transpose(1, 2)
        y, _ = self.attention(y, y, y, need_weights=False)
        return self.head(self.act(y).mean(1))


@pytest.fixture(scope="module")
def lenet() -> wb.Model:
    return wb.load("lenet5")


@pytest.fixture(scope="module")
def int8(lenet: wb.Model, digits: wb.Task) -> wb.Model:
    return wb.Quantize("int8").apply(lenet, digits)


def images(count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).random((count, 1, 28, 28), dtype=np.float32)


def profiled(model: wb.Model, backend: wb.Backend, *inputs: np.ndarray) -> list[wb.deployment.OpTiming]:
    with backend.compile(model) as engine:
        return engine.profile(inputs or (images(),), repeats=REPEATS)


def owners(rows: list[wb.deployment.OpTiming], layer: str) -> list[str]:
    return [row.type for row in rows if layer in row.layers]


def test_eager_times_each_layer_in_execution_order(lenet: wb.Model):
    rows = profiled(lenet, wb.Eager())
    assert [row.name for row in rows] == list(lenet.layers["layer"])
    assert [row.type for row in rows] == list(lenet.layers["type"])
    assert all(row.layers == (row.name,) for row in rows)
    assert all(len(row.times_ms) == REPEATS and min(row.times_ms) > 0 for row in rows)


def test_eager_gives_each_call_of_a_layer_a_row_and_sees_modules_that_call_no_child():
    model = wb.load(Twice(), inputs=torch.randn(2, 1, 4, 4))
    rows = profiled(model, wb.Eager(), np.zeros((2, 1, 4, 4), np.float32))
    names = ["conv", "act", "flatten", "transpose", "attention", "act (call 2)", "mean", "head"]
    assert [row.name for row in rows] == names
    assert [row.layers for row in rows] == [(name.removesuffix(" (call 2)"),) for name in names]


def test_eager_rows_of_a_call_never_exceed_the_call(lenet: wb.Model):
    with wb.Eager().compile(lenet) as engine, engine.recorder((images(),)) as recorder:
        walls = recorder.block(REPEATS)
        rows = recorder.rows(float("nan"))
    sums = np.sum([row.times_ms for row in rows], axis=0)
    assert (sums <= walls).all()


def test_eager_refuses_a_model_whose_layers_change_from_call_to_call():
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.calls = nn.Linear(3, 3), nn.Linear(3, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.a(x) if self.calls % 2 else self.b(x)

    model = wb.Model("moody", {"x": torch.randn(2, 3)}, module=Moody())
    with wb.Eager().compile(model) as engine, pytest.raises(BackendError, match="other layers from call to call"):
        engine.profile((np.zeros((2, 3), np.float32),), REPEATS)


@pytest.mark.parametrize("backend", [wb.OnnxRuntime(threads=1), wb.OpenVINO(threads=1)], ids=lambda b: b.title)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_every_layer_that_computes_has_a_row_and_engine_kernels_have_none(request, lenet, backend, precision):
    model = lenet if precision == "fp32" else request.getfixturevalue("int8")
    rows = profiled(model, backend)
    heavy = lenet.layers[lenet.layers["macs"] > 0]["layer"]
    for layer in heavy:
        products = [kind for kind in owners(rows, layer) if PRODUCT.search(kind)]
        assert len(products) == 1, (layer, rows)
    assert {layer for row in rows for layer in row.layers} <= set(lenet.layers["layer"])
    assert all(row.layers == () for row in rows if row.type in ("ReorderInput", "ReorderOutput", "Reorder"))
    assert len({len(row.times_ms) for row in rows}) == 1
    assert all(time_ms >= 0 for row in rows for time_ms in row.times_ms)


def test_a_fused_activation_is_told_with_its_convolution(lenet: wb.Model):
    for backend in (wb.OnnxRuntime(), wb.OpenVINO()):
        rows = profiled(lenet, backend)
        conv = next(row for row in rows if "Conv" in row.type and row.type != "Convert")
        assert conv.layers[0] == lenet.layers["layer"].iloc[0]
        assert lenet.layers["layer"].iloc[1] in conv.layers


@pytest.mark.parametrize("backend", [wb.OnnxRuntime(threads=1), wb.OpenVINO(threads=1)], ids=lambda b: b.title)
def test_kernels_fused_from_many_operations_are_led_back_to_their_layers(backend: wb.Backend):
    # wide enough that every kernel takes the microsecond below which OpenVINO reports nothing
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu")
    network = nn.Sequential(nn.Linear(8, 64), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    model = wb.load(network, inputs=torch.randn(2, 32, 8))
    rows = profiled(model, backend, np.ones((16, 32, 8), np.float32))
    for index in range(2):
        assert any("Norm" in kind or kind == "MVN" for kind in owners(rows, f"1.layers.{index}.norm1")), rows
        assert any(PRODUCT.search(kind) for kind in owners(rows, f"1.layers.{index}.linear1"))
        assert any(PRODUCT.search(kind) for kind in owners(rows, f"1.layers.{index}.self_attn"))


def test_onnx_runtime_leaves_no_file_behind(lenet: wb.Model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert profiled(lenet, wb.OnnxRuntime())
    assert list(tmp_path.iterdir()) == []


def test_a_profile_refuses_inputs_that_do_not_fit(lenet: wb.Model):
    for backend in (wb.Eager(), wb.OnnxRuntime(), wb.OpenVINO()):
        with backend.compile(lenet) as engine, pytest.raises(DataError, match="float64"):
            engine.profile((images().astype(np.float64),), 1)


def test_kernels_inside_a_loop_are_not_counted_beside_it():
    events = [
        {"name": "inner", "ts": 12, "dur": 3},
        {"name": "loop", "ts": 10, "dur": 9},
        {"name": "after", "ts": 19, "dur": 2},
        {"name": "before", "ts": 5, "dur": 5},
    ]
    assert [event["name"] for event in _outermost(events)] == ["before", "loop", "after"]


def chain(*nodes: tuple[str, str, str]) -> Lineage:
    """Nodes in a row from (name, type, layer)."""
    made, tensor = [], "input"
    for name, kind, layer in nodes:
        made.append(Node(name, kind, (layer,) if layer else (), (tensor,), (f"{name}_out",)))
        tensor = f"{name}_out"
    return Lineage(made)


GRAPH = (
    ("c1/Conv", "Conv", "c1"),
    ("r1/Relu", "Relu", "r1"),
    ("c2/Conv", "Conv", "c2"),
    ("r2/Relu", "Relu", "r2"),
    ("fc/Gemm", "Gemm", "fc"),
)


def named(*kernels: tuple[str, str]) -> list[Kernel]:
    return [Kernel(kind, (name,)) for name, kind in kernels]


def test_a_kernel_named_after_the_activation_holds_its_convolution():
    first, second = ("r1/Relu_out_nchwc", "Conv"), ("r2/Relu_out_nchwc", "Conv")
    kernels = named(first, ("ReorderOutput_token_4", "ReorderOutput"), second, ("fc/Gemm", "Gemm"))
    assert chain(*GRAPH).layers(kernels) == [("c1", "r1"), (), ("c2", "r2"), ("fc",)]


def test_a_kernel_named_after_the_convolution_holds_its_activation():
    first, second = ("c1/Conv_token_12", "QLinearConv"), ("c2/Conv/WithoutBiases", "Convolution")
    kernels = named(first, second, ("fused fc/Gemm", "Gemm"))
    assert chain(*GRAPH).layers(kernels) == [("c1", "r1"), ("c2", "r2"), ("fc",)]


def test_a_name_that_only_begins_like_another_is_told_apart():
    lineage = chain(("a/Add", "Add", "a"), ("a/Add_1", "Add", "b"), ("a/Add_12", "Add", "c"))
    kernels = named(("a/Add_12_token_3", "Add"), ("a/Add_1", "Add"), ("a/Add_token_1", "Add"))
    assert lineage.layers(kernels) == [("c",), ("b",), ("a",)]


def test_a_move_that_an_engine_inserts_belongs_to_no_layer():
    kernels = named(("c1/Conv", "Conv"), ("c1/Conv_out_token_7", "Transpose"), ("c1/Conv_out_q", "QuantizeLinear"))
    assert chain(GRAPH[0]).layers(kernels) == [("c1",), (), ()]


def test_a_layer_with_a_kernel_of_its_own_is_not_given_to_a_neighbour_as_well():
    lineage = chain(("c1/Conv", "Conv", "c1"), ("norm/Sub", "Sub", "norm"), ("norm/Div", "Div", "norm"))
    kernels = named(("c1/Conv", "Conv"), ("norm/Div", "LayerNormalization"))
    assert lineage.layers(kernels) == [("c1",), ("norm",)]


def test_a_kernel_with_a_name_of_its_own_has_what_lies_between_its_tensors():
    norm = ("norm/LayerNormalization", "LayerNormalization", "norm")
    lineage = chain(("fc/Gemm", "Gemm", "fc"), ("drop/Add", "Add", "drop"), norm)
    kernels = [
        Kernel("Gemm", ("fc/Gemm",), ("input", "fc.weight"), ("fc/Gemm_out",)),
        Kernel("SkipLayerNormalization", ("Skip_7",), ("fc/Gemm_out", "scale"), ("norm/LayerNormalization_out",)),
    ]
    assert lineage.layers(kernels) == [("fc",), ("drop", "norm")]


def test_a_quantiser_between_two_layers_gives_neither_to_the_other():
    between = ("fc1_Q", "QuantizeLinear", "fc1"), ("fc1_DQ", "DequantizeLinear", "fc1")
    lineage = chain(("fc1/Gemm", "Gemm", "fc1"), *between, ("fc2/Gemm", "Gemm", "fc2"))
    kernels = [
        Kernel("QGemm", ("fc1/Gemm",), ("input",), ("fc1_Q_out",)),
        Kernel("QGemm", ("fc2/Gemm",), ("fc1_Q_out",), ("fc2/Gemm_out",)),
    ]
    assert lineage.layers(kernels) == [("fc1",), ("fc2",)]


@pytest.mark.parametrize(("kernels", "found"), [(1, [("norm",)]), (2, [(), ()])])
def test_kernels_without_a_name_are_paired_with_nodes_only_one_to_one(kernels: int, found: list):
    lineage = chain(("norm/LayerNormalization", "LayerNormalization", "norm"))
    assert lineage.layers([Kernel("MVN", ()) for _ in range(kernels)]) == found


def test_a_lineage_survives_its_list():
    lineage = chain(*GRAPH)
    assert Lineage.from_list(lineage.to_list()).nodes == lineage.nodes


def test_onnx_runtime_tells_what_each_kernel_reads_and_writes():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            return torch.relu(self.second(x) + x)

    model = wb.load(Residual(), inputs=torch.randn(2, 16, 8, 8))
    rows = profiled(model, wb.OnnxRuntime(), np.zeros((1, 16, 8, 8), np.float32))
    second = next(row for row in rows if "second" in row.layers)
    size = 16 * 8 * 8 * 4
    assert [port.nbytes for port in second.reads] == [size, size], "the sum is fused into the convolution"
    assert [port.nbytes for port in second.writes] == [size]
    assert second.weight_bytes == 4 * (16 * 16 * 9 + 16)
    assert second.precision == "fp32" and second.kernel == (3, 3)


@pytest.mark.parametrize("backend", [wb.OnnxRuntime(threads=1), wb.OpenVINO(threads=1)], ids=lambda b: b.title)
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_a_recurrent_layer_is_led_back_to_its_kernel(backend: wb.Backend, cell: type[nn.Module]):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = cell(8, 32, batch_first=True), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(x)[0][:, -1])

    rows = profiled(wb.load(Recurrent(), inputs=torch.randn(2, 16, 8)), backend, np.ones((1, 16, 8), np.float32))
    slowest = max(rows, key=lambda row: np.median(row.times_ms))
    assert cell.__name__ in slowest.type and "cell" in slowest.layers
