"""Profiles of compiled models: a row per kernel, each led back to the layers that were fused into it."""

from __future__ import annotations

import gc
import operator
import re
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor import config
from torch._inductor.graph import GraphLowering

import workbench as wb
from workbench.deployment import _inductor
from workbench.deployment._fx_layers import KEY, Operation, shares
from workbench.deployment._inductor_code import launched
from workbench.deployment._kernel_profile import Event, KernelRecorder, matched, within
from workbench.errors import BackendError

pytestmark = pytest.mark.skipif(not wb.Compiled().availability().usable, reason=wb.Compiled().availability().why or "-")

REPEATS = 6


class Block(nn.Module):
    """Two convolutions and a shortcut, with the additions and activations written out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.shortcut = nn.Sequential(nn.Conv2d(3, 8, 1))
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return self.drop(torch.relu(y))


class Network(nn.Module):
    """The block as a part of a network that takes its input by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.block(image).mean((2, 3)))


class Attention(nn.Module):
    """Attention written out, which torch.compile replaces by one operation, after an encoder layer of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        q, k, v = (part(x).view(len(x), 5, 2, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        a = (q @ k.transpose(-2, -1) / 2.0).softmax(-1)
        return self.norm(x + self.o((a @ v).transpose(1, 2).reshape(len(x), 5, 8)))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.lstm(x)[0][:, -1]))


@dataclass
class Recorded:
    """One recording: the rows, the milliseconds of each call, and the code of the engine's own program."""

    model: wb.Model
    rows: list[wb.deployment.OpTiming]
    walls_ms: list[float]
    code: str

    def layers(self, kind: str = "layer") -> list[tuple[str, ...]]:
        return [row.layers for row in self.rows if row.kind == kind]

    def types(self, layer: str) -> list[str]:
        return [row.type for row in self.rows if layer in row.layers and row.kind == "layer"]


def recorded(model: wb.Model) -> Recorded:
    inputs = tuple(value.numpy() for value in model.example.values())
    codes: list[str] = []
    with pytest.MonkeyPatch.context() as patch, wb.Compiled(threads=1).compile(model) as engine:
        patch.setattr(GraphLowering, "save_output_code", staticmethod(codes.append))
        engine(*inputs)
        (plain,) = codes
        with engine.recorder(inputs) as recorder:
            walls = recorder.block(REPEATS) + recorder.block(REPEATS)
            return Recorded(model, recorder.rows(1.0), walls, plain)


@pytest.fixture(scope="module")
def lenet() -> Recorded:
    return recorded(wb.load("lenet5"))


@pytest.fixture(scope="module")
def network() -> Recorded:
    return recorded(wb.Model("network", {"image": torch.randn(2, 3, 16, 16)}, module=Network(), keywords=True))


@pytest.fixture(scope="module")
def attention() -> Recorded:
    return recorded(wb.Model("attention", {"x": torch.randn(2, 5, 8)}, module=Attention()))


@pytest.fixture(scope="module")
def classifier() -> Recorded:
    return recorded(wb.Model("classifier", {"x": torch.randn(2, 5, 4)}, module=Classifier()))


@pytest.fixture(params=["lenet", "network", "attention", "classifier"])
def each(request: pytest.FixtureRequest) -> Recorded:
    return request.getfixturevalue(request.param)


def test_every_weighted_layer_of_lenet_has_the_one_row_that_multiplies(lenet: Recorded):
    for layer in ("conv1", "conv2"):
        (row,) = [row for row in lenet.rows if layer in row.layers and row.kind == "layer"]
        assert (row.type, row.kernel) == ("convolution", lenet.model.module.get_submodule(layer).kernel_size)
    for layer in ("fc1", "fc2", "fc3"):
        assert lenet.types(layer) == ["addmm"]
    assert lenet.types("relu1") == lenet.types("pool1") == ["fused relu max_pool2d"]


def test_a_block_is_fused_around_its_convolutions(network: Recorded):
    assert network.layers() == [
        ("block.conv1",),
        ("block.bn1", "block.relu"),
        ("block.conv2",),
        ("block.shortcut.0",),
        ("block.bn2", "block.add", "block.relu_1", "block.drop", "mean"),
        ("head",),
    ]
    assert network.types("block.conv2") == ["convolution"]
    assert network.types("block.add") == ["fused batch_norm add relu mean"]


def test_a_reorder_serves_layers_and_computes_none(network: Recorded):
    (move,) = [row for row in network.rows if row.kind == "move"]
    assert (move.type, move.precision) == ("reorder", "")
    assert move.layers == ("block.conv1", "block.shortcut.0")


def test_an_operation_that_replaced_several_has_their_layers(attention: Recorded):
    for part in ("self_attn", "linear1", "linear2", "norm2", "add_1"):
        assert attention.types(f"encoder.{part}") == ["transformer_encoder_layer_fwd"]
    for layer in ("q", "k", "v", "o"):
        assert attention.types(layer) == ["addmm"]
    (row,) = [row for row in attention.rows if "matmul" in row.layers]
    assert row.type.startswith("scaled_dot_product")
    assert {"matmul", "div", "softmax", "matmul_1"} <= set(row.layers)
    assert attention.types("norm") == ["fused add layer_norm"]


def test_a_model_that_compiles_only_by_export_has_the_same_layers(classifier: Recorded):
    products = [row for row in classifier.rows if "lstm" in row.layers and not row.type.startswith("fused")]
    assert products and all(re.search("rnn|mm", row.type) for row in products)
    assert len(classifier.types("fc")) == 1
    assert {layer for row in classifier.rows for layer in row.layers} == {"lstm", "select", "relu", "fc"}


def test_the_layers_are_those_of_the_eager_model(each: Recorded):
    with wb.Eager(threads=1).compile(each.model) as engine:
        rows = engine.profile(tuple(value.numpy() for value in each.model.example.values()), 2)
    assert {layer for row in each.rows for layer in row.layers} == {layer for row in rows for layer in row.layers}


def test_the_rows_of_a_call_never_exceed_the_call(each: Recorded):
    assert all(len(row.times_ms) == 2 * REPEATS and min(row.times_ms) >= 0 for row in each.rows)
    sums = np.sum([row.times_ms for row in each.rows], axis=0)
    assert (sums > 0).all() and (sums <= each.walls_ms).all()


def test_the_kernels_are_those_of_the_program_that_is_not_recorded(each: Recorded):
    body = each.code[each.code.index("def call(") :]
    calls = re.findall(r"^ +(?:buf\d+ = )?((?:cpp_fused|extern_kernels|torch\.ops)[\w.]*)\(", body, re.MULTILINE)
    plain = [call.removesuffix(".default").rpartition(".")[2] for call in calls]
    assert [row.name.rpartition("::")[2] for row in each.rows] == plain


def test_the_weights_a_row_reads_are_those_of_its_layer(lenet: Recorded):
    for layer, module in lenet.model.module.named_children():
        stored = [p.numel() * p.element_size() for p in module.parameters()]
        if stored:
            (row,) = [row for row in lenet.rows if layer in row.layers and row.kind == "layer"]
            # the bias of a convolution may be added by the kernel after it
            assert row.weight_bytes in ((stored[0], sum(stored)) if row.kernel else (sum(stored),))


def test_each_row_reads_what_the_row_before_it_wrote(lenet: Recorded):
    for before, after in zip(lenet.rows, lenet.rows[1:], strict=False):
        assert {port.name for port in before.writes} & {port.name for port in after.reads}
    assert lenet.rows[0].reads[0].shape == (2, 1, 28, 28)
    assert lenet.rows[-1].writes[0].shape == (2, 10)
    assert {port.dtype for row in lenet.rows for port in row.writes} == {"float32"}


def test_recording_leaves_the_engine_and_torch_as_they_were(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = np.random.default_rng(0).random((3, 8), dtype=np.float32)
    threads = torch.get_num_threads()
    with wb.Compiled(threads=1).compile(wb.Model("small", {"x": torch.randn(2, 8)}, module=module)) as engine:
        wanted = engine(x)
        first, second = (engine.profile((x,), 2) for _ in range(2))
        assert [row.layers for row in first] == [row.layers for row in second] != []
        np.testing.assert_array_equal(engine(x), wanted)
        monkeypatch.setattr(GraphLowering, "save_output_code", lambda code: pytest.fail("compiled again"))
        engine(x)
    kept = weakref.ref(module)
    del engine, module
    gc.collect()
    assert kept() is None
    assert torch.get_num_threads() == threads
    assert not config.cpp.enable_kernel_profile and config.trace.provenance_tracking_level == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lost", ["_inductor_triton_kernel_to_post_grad_node_info", "V", "GraphLowering"])
def test_a_torch_that_does_not_tell_is_named(lost: str, monkeypatch):
    private = _inductor._private
    monkeypatch.setattr(_inductor, "_private", lambda module, name: None if name == lost else private(module, name))
    model = wb.Model("small", {"x": torch.randn(2, 8)}, module=nn.Linear(8, 4))
    with wb.Compiled(threads=1).compile(model) as engine, pytest.raises(BackendError, match=r"torch 2\..*wb\.Eager"):
        engine.recorder((np.zeros((1, 8), np.float32),))


def test_a_program_without_kernels_is_refused():
    model = wb.Model("views", {"x": torch.randn(2, 8)}, module=nn.Flatten())
    with wb.Compiled(threads=1).compile(model) as engine, pytest.raises(BackendError, match="computes nothing"):
        engine.recorder((np.zeros((1, 8), np.float32),))


# what a profiler sees of two calls on a GPU, where the time of a kernel is that of the device, whoever launched it
CALLS = [
    Event("call", 0, 100),
    Event("aten::empty", 2, 3),
    Event("aten::convolution", 10, 40),
    Event("aten::_convolution", 12, 38),
    Event("aten::cudnn_convolution", 14, 36, device_us=500.0),
    Event("triton_poi_fused_relu_0", 50, 60, device_us=30.0),
    Event("aten::copy_", 70, 80, device_us=7.0),
    Event("call", 200, 300),
    Event("aten::convolution", 210, 230, device_us=480.0),
    Event("triton_poi_fused_relu_0", 250, 260, device_us=20.0),
]
LAUNCHES = [
    wb.deployment.OpTiming(name, "", (), ()) for name in ("aten::convolution", "triton_poi_fused_relu_0")
]  # fmt: skip


def test_what_a_launch_took_includes_what_it_called():
    first, second = within(CALLS, "call")
    conv, relu = matched(first, [launch.name for launch in LAUNCHES])
    assert (conv.thread_ms, conv.within, conv.device_ms) == pytest.approx((0.03, 2, 0.5))
    assert (relu.thread_ms, relu.within, relu.device_ms) == pytest.approx((0.01, 0, 0.03))
    assert [spent.within for spent in matched(second, [launch.name for launch in LAUNCHES])] == [0, 0]


@pytest.mark.parametrize("names", [["b", "a"], ["a", "b", "c"], ["a", "a"]])
def test_launches_in_another_order_are_not_matched(names: list[str]):
    assert matched([Event("a", 0, 1), Event("b", 2, 3)], names) is None


def test_a_kernel_is_known_by_the_number_of_its_graph():
    events = [Event("graph_3_cpp_fused_relu_1", 0, 1), Event("graph_3_cpp_fused_relu_11", 2, 3)]
    assert matched(events, ["cpp_fused_relu_1", "cpp_fused_relu_11"]) is not None
    assert matched(events, ["cpp_fused_relu_11"])[0].thread_ms == pytest.approx(0.001)


def test_device_times_are_taken_as_they_are():
    recorder = KernelRecorder(lambda: None, LAUNCHES, on_device=True)
    recorder._blocks = [within(CALLS, "call")]
    assert [row.times_ms for row in recorder.rows(1.0)] == [pytest.approx((0.5, 0.48)), pytest.approx((0.03, 0.02))]


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([CALLS[2:6], CALLS[8:9]], "in the order it launches them"),
        ([[], []], "on Linux and Windows"),
        ([[Event(launch.name, i, i + 1) for i, launch in enumerate(LAUNCHES)]], "no kernel on the GPU"),
    ],
)
def test_calls_without_the_kernels_have_no_rows(calls: list[list[Event]], message: str):
    recorder = KernelRecorder(lambda: None, LAUNCHES, on_device=True)
    recorder._blocks = [calls]
    with pytest.raises(BackendError, match=message):
        recorder.rows(1.0)


TRITON = """
triton_poi_fused_relu_0 = async_compile.triton('triton_poi_fused_relu_0', '''
@triton.jit
def triton_poi_fused_relu_0(in_out_ptr0, in_ptr0, xnumel, XBLOCK : tl.constexpr):
    pass
''', device_str='cuda')

class Runner:
    def call(self, args):
        arg0_1, arg1_1, arg2_1 = args
        args.clear()
        with torch.cuda._DeviceGuard(0):
            torch.cuda.set_device(0)
            # Topologically Sorted Source Nodes: [conv], Original ATen: [aten.convolution]
            # [Provenance debug handles] extern_kernels.convolution:1
            buf0 = extern_kernels.convolution(arg0_1, arg1_1, stride=(1, 1), groups=1, bias=None)
            assert_size_stride(buf0, (2, 8, 4, 4), (128, 16, 4, 1))
            buf1 = buf0; del buf0  # reuse
            # [Provenance debug handles] triton_poi_fused_relu_0:2
            stream0 = get_raw_stream(0)
            triton_poi_fused_relu_0.run(buf1, arg2_1, 256, stream=stream0)
            # [Provenance debug handles] torch.ops.aten.topk.default:3
            buf2 = torch.ops.aten.topk.default(reinterpret_tensor(buf1, (2, 128), (128, 1), 0), 3)
            buf3 = buf2[0]
            buf4 = buf2[1]
            del buf2
        return (buf3, buf4, )
"""


def test_generated_code_tells_launches_and_buffers():
    conv, relu, topk = launched(TRITON)
    assert [step.event for step in (conv, relu, topk)] == [
        "aten::convolution", "triton_poi_fused_relu_0", "aten::topk",
    ]  # fmt: skip
    assert (conv.arguments, conv.results) == ([("arg0_1", None), ("arg1_1", None)], ["buf0"])
    assert relu.parameters[:2] == ["in_out_ptr0", "in_ptr0"]
    assert relu.arguments[:2] == [("buf0", None), ("arg2_1", None)]
    assert (topk.arguments, topk.results) == ([("buf0", (2, 128))], ["buf3", "buf4"])


def lowered(*steps: tuple[str, object, str]) -> dict[str, fx.Node]:
    """A lowered graph of nodes in a row, from (name, target, operation of the traced program)."""
    graph = fx.Graph()
    node, nodes = graph.placeholder("x"), {}
    for name, target, source in steps:
        node = nodes[name] = graph.create_node("call_function", target, (node,), name=name)
        node.meta["custom"] = {KEY: source} if source else {}
    return nodes


def test_a_template_kernel_computes_all_it_was_made_of_and_another_only_prepares_it():
    aten = torch.ops.aten
    nodes = lowered(("conv", aten.convolution.default, "a"), ("relu", aten.relu.default, "b"))
    found = {"a": Operation("conv2d", ("conv",), ()), "b": Operation("relu", ("act",), ("a",))}
    prepares, computes = shares([([nodes["conv"]], "fused"), (list(nodes.values()), "template")], found)
    assert (prepares.kind, prepares.layers) == ("move", ("conv",))
    assert (computes.kind, computes.layers) == ("layer", ("conv", "act"))


def test_what_replaced_several_is_told_by_what_takes_its_results():
    aten = torch.ops.aten
    nodes = lowered(
        ("q", aten.mm.default, "q"),
        ("fused", aten.topk.default, ""),
        ("first", operator.getitem, "c"),
    )
    chain = {"q": (), "a": ("q",), "b": ("a",), "c": ("b",), "view": ("c",)}
    found = {name: Operation(name, (name,), inputs) for name, inputs in chain.items()}
    kernels = [([nodes["q"]], "library"), ([nodes["fused"]], "library")]
    assert [share.layers for share in shares(kernels, found)] == [("q",), ("a", "b", "c", "view")]
