"""Functional operations: found in execution order, and called the same in a table of layers and in an ONNX graph."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import workbench as wb
from workbench.models import export
from workbench.models.export import ExportWarning, provenance
from workbench.models.operations import Watch, operation_name

SLOT = "_compiled_call_impl"


class Block(nn.Module):
    """Operations of one name next to a module of that name, one of which nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(x))
        y = functional.relu(y + x)
        y.relu()
        y = functional.relu(y - 1)
        return functional.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        scale = torch.softmax(1 - y.mean((2, 3)), -1).sqrt()
        return self.head(torch.cat([scale[:, :2] * 2, scale[:, 2:]], 1)) if y.shape[0] else scale


IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NAMES = [
    *("block.conv", "block.relu", "block.add", "block.relu_1", "block.relu_2", "block.sub", "block.relu_3"),
    *("block.slice", "block.pad", "mean", "sub", "softmax", "sqrt", "slice", "mul", "slice_1", "cat", "head"),
]


def watched(module: nn.Module, *inputs: Tensor) -> list[str]:
    with Watch(module.eval()) as watch, torch.no_grad():
        module(*inputs)
    names = watch.layers()
    return [names[event] for event in watch.events if watch.is_row(event)]


def test_leaves_and_operations_come_in_execution_order_and_repeats_are_numbered():
    # a name that a module has is not given to an operation; reading a shape is none
    assert watched(Net(), IMAGES) == NAMES


def test_table_of_layers_has_a_row_for_each_of_them():
    table = wb.load(Net(), inputs=IMAGES).layers
    assert list(table["layer"]) == NAMES
    assert list(table["type"])[:4] == ["Conv2d", "ReLU", "add", "relu"]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: x + 1, "add"),
        (lambda x: 1 + x, "add"),
        (lambda x: x.clone().add_(1), "clone add"),
        (lambda x: 1 - x, "sub"),
        (lambda x: 1 / x, "div"),
        (lambda x: x // 2, "floor_divide"),
        (lambda x: x % 2, "remainder"),
        (lambda x: 2**x, "pow"),
        (lambda x: x @ x.mT, "transpose matmul"),
        (lambda x: -x, "neg"),
        (lambda x: ~(x > 0), "gt bitwise_not"),
        (lambda x: (x > 0) & (x < 1), "gt lt bitwise_and"),
        (lambda x: x[:, None, 1:], "slice"),
        (lambda x: x[:, 0], "select"),
        (lambda x: x[torch.tensor([0])], "tensor index"),
        (lambda x: x.relu_(), "relu"),
        (lambda x: functional.max_pool2d(x[None], 1), "slice max_pool2d"),
        (lambda x: functional.gelu(x), "gelu"),
        (lambda x: torch.ops.aten.add.Tensor(x, x), "add"),
        (lambda x: torch.split(x, 1)[0], "split"),
        (lambda x: x.reshape(x.size(0), x.dim() + x.shape[1] - x.ndim), "reshape"),
    ],
)
def test_operations_have_torchs_name_however_they_are_written(call: Callable[[Tensor], Tensor], name: str):
    class Written(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call(x)

    assert " ".join(watched(Written(), torch.rand(2, 3))) == name


def test_attributes_are_operations_only_where_they_compute():
    assert operation_name(Tensor.T.__get__) == "transpose"
    assert operation_name(Tensor.shape.__get__) == operation_name(Tensor.dtype.__get__) == ""


def test_what_a_leaf_calls_is_part_of_it_even_where_it_owns_parts():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.empty = nn.MultiheadAttention(4, 2, batch_first=True), nn.Sequential()

        def forward(self, x: Tensor) -> Tensor:
            return self.empty(self.attention(x, x, x, need_weights=False)[0]) + x

    assert watched(Mixed(), torch.rand(2, 3, 4)) == ["attention", "empty", "add"]


def test_a_shared_block_goes_on_counting_and_a_shared_leaf_keeps_its_name():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(3, 3))
            self.same = self.block

        def forward(self, x: Tensor) -> Tensor:
            return self.same(self.block(x) + 1) + 1

    assert watched(Shared(), torch.rand(2, 3)) == ["block.0", "add", "block.0", "add_1"]


def test_scripts_are_leaves():
    with pytest.warns(DeprecationWarning):
        script = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    assert watched(nn.Sequential(nn.Linear(3, 3), script), torch.rand(2, 3)) == ["0", "1"]


def test_a_second_forward_pass_is_counted_afresh():
    net = Net().eval()
    with Watch(net) as watch, torch.no_grad():
        net(IMAGES)
        net(IMAGES)
    names = watch.layers()
    assert [names[event] for event in watch.events if watch.is_row(event)] == NAMES


def test_other_threads_run_the_same_module_unobserved():
    net, seen = Net().eval(), []

    def other() -> None:
        with torch.no_grad():
            seen.append(net(IMAGES).shape)

    with Watch(net) as watch:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert watch.events == []
    assert seen == [(2, 2)]


def test_two_threads_may_watch_one_module_and_leave_it_as_it_was():
    net, inside, done = Net().eval(), threading.Event(), threading.Event()
    found = []

    def other() -> None:
        with Watch(net) as watch, torch.no_grad():
            inside.set()
            done.wait(10)
            net(IMAGES)
        found.extend(watch.layers().values())

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    first = watched(net, IMAGES)
    assert all(SLOT in vars(module) for module in net.modules())
    done.set()
    thread.join()
    assert first == NAMES
    assert {layer for layer in found if layer} == set(NAMES)
    assert not any(SLOT in vars(module) for module in net.modules())


def test_a_module_copied_while_it_is_watched_is_not_watched():
    net = Net().eval()
    with Watch(net) as watch, torch.no_grad():
        copy.deepcopy(net)(IMAGES)
    assert watch.events == []


@pytest.mark.parametrize(
    ("failing", "where"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2)), "layer 1 (Linear)"),
        (nn.Sequential(nn.ReLU(), Block()), "layer 1.conv (Conv2d)"),
    ],
)
def test_a_failure_names_the_innermost_layer(failing: nn.Module, where: str):
    with Watch(failing) as watch, pytest.raises(RuntimeError):
        failing(torch.rand(2, 3))
    assert watch.failure() == where


def test_a_failure_of_an_operation_names_it():
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x) + 1 + torch.ones(7)

    for module, where in ((Wrong(), "its own forward, at add_1"), (nn.Sequential(Wrong()), "layer 0.add_1")):
        with Watch(module) as watch, pytest.raises(RuntimeError):
            module(torch.rand(2, 3))
        assert watch.failure() == where


# agreement with the ONNX graph


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(10, 8), nn.Parameter(torch.rand(1, 16, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.encoder(self.table(ids) + self.place[:, : ids.shape[1]])
        return self.head(functional.gelu(x.mean(1)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.rnn, self.head = nn.Embedding(10, 8), nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        steps, (last, _) = self.rnn(self.table(ids))
        return self.head(functional.relu(steps[:, -1]) + last[-1])


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.scaled_dot_product_attention(x, x, self.conv(x))
        y = functional.layer_norm(y @ x.mT, (8,))
        y += x.permute(0, 1, 3, 2)
        return functional.adaptive_avg_pool2d(y.transpose(1, 2), 1).flatten(1)


IDS = torch.arange(10).reshape(2, 5)
NETWORKS = {
    "net": (Net, IMAGES),
    "transformer": (Text, IDS),
    "lstm": (Recurrent, IDS),
    "attention": (Attending, IMAGES),
}
# operator of ONNX by operation of torch, where each is the other's only counterpart
COUNTERPARTS = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "relu": "Relu",
    "gelu": "Gelu",
    "softmax": "Softmax",
    "pad": "Pad",
    "mean": "ReduceMean",
    "sqrt": "Sqrt",
    "cat": "Concat",
    "slice": "Slice",
    "select": "Gather",
    "layer_norm": "LayerNormalization",
    "matmul": "MatMul",
    "adaptive_avg_pool2d": "ReduceMean",
    "Conv2d": "Conv",
    "ReLU": "Relu",
    "Embedding": "Gather",
    "LayerNorm": "LayerNormalization",
    "LSTM": "LSTM",
}


def model_of(name: str, shared_data) -> wb.Model:
    if name == "resnet20":
        return wb.load(shared_data / "cifar10" / "resnet20-12fca82f.th", architecture="resnet20")
    if name in NETWORKS:
        kind, example = NETWORKS[name]
        torch.manual_seed(0)
        return wb.load(kind(), inputs=example, name=name)
    return wb.load(name)


@pytest.mark.parametrize("name", ["resnet20", "lenet5", *NETWORKS])
def test_graph_and_table_of_layers_use_the_same_names_for_the_same_things(name: str, shared_data):
    model = model_of(name, shared_data)
    graph = model.onnx()
    table = model.layers.drop_duplicates("layer").set_index("layer")
    layers = provenance(graph)
    unknown = {layer for found in layers.values() for layer in found} - set(table.index)
    assert unknown <= {node.name for node in graph.graph.node if node.op_type == "Shape"}
    operators: dict[str, set[str]] = {}
    for node in graph.graph.node:
        operators.setdefault(layers[node.name][0], set()).add(node.op_type)
    first = {layer: index for index, layer in reversed(list(enumerate(n for f in layers.values() for n in f)))}
    for layer, row in table.iterrows():
        # what only makes a view, is folded into a constant, or is used by nobody leaves no node
        if layer not in first or row["type"] not in COUNTERPARTS or layer not in operators:
            assert row["output_bytes"] == 0 or layer in first or layer == "block.relu_2", layer
            continue
        assert COUNTERPARTS[row["type"]] in operators[layer], layer


def test_numbers_do_not_shift_where_an_operation_is_dropped():
    layers = provenance(wb.load(Net(), inputs=IMAGES).onnx())
    assert layers["block.relu_1/Relu"] == ("block.relu_1",)
    assert layers["block.relu_3/Relu"] == ("block.relu_3",)
    assert not any("block.relu_2" in found for found in layers.values())


def test_all_nodes_of_one_operation_share_its_name():
    graph = wb.load(Attending(), inputs=IMAGES).onnx()
    layers = provenance(graph)
    kinds = [n.op_type for n in graph.graph.node if layers[n.name] == ("scaled_dot_product_attention",)]
    assert kinds.count("MatMul") == 2
    assert "Softmax" in kinds


def test_an_operation_that_cannot_be_told_has_no_name_of_the_table(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export._Labels, "of", lambda *_: {})
    model = wb.load(Net(), inputs=IMAGES)
    layers = {layer for found in provenance(model.onnx()).values() for layer in found}
    assert layers & set(model.layers["layer"]) == {"block.conv", "block.relu", "head"}


def test_tracing_by_dynamo_goes_past_the_watch():
    module = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval()
    with Watch(module) as watch:
        program = torch.export.export(module, (torch.rand(2, 3),), strict=True)
    assert watch.events == []
    assert program.module()(torch.ones(2, 3)).shape == (2, 3)


def test_older_exporter_gives_no_operation_the_name_of_another(newer_exporter_fails: None):
    model = wb.load(Net(), inputs=IMAGES)
    with pytest.warns(ExportWarning):
        graph = model.onnx()
    relus = [(node.name, provenance(graph)[node.name]) for node in graph.graph.node if node.op_type == "Relu"]
    # which of the two operations is which cannot be told, so neither has a name of the table
    assert relus[0] == ("block.relu/Relu", ("block.relu",))
    assert len(relus) == 3
    names = set(model.layers["layer"])
    assert not names & {layer for _, layers in relus[1:] for layer in layers}
    assert provenance(graph)["softmax/Softmax"] == ("softmax",)
