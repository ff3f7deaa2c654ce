"""Layer tables: shapes, parameters and multiply-accumulates, of modules and of graphs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
import torchinfo
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import workbench as wb
from workbench.errors import LoadError
from workbench.models import layers, zoo


def rows(model: wb.Model) -> dict[str, tuple]:
    return {row.layer: (row.type, row.parameters, row.macs) for row in model.layers.itertuples()}


def test_table_lists_leaf_modules_in_execution_order_with_their_shapes():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Sequential(nn.ReLU(), nn.Flatten()), nn.Linear(36, 2))
    table = wb.load(network, inputs=torch.rand(5, 3, 8, 8)).layers
    assert list(table.columns) == layers.COLUMNS
    assert list(table["layer"]) == ["0", "1.0", "1.1", "2"]
    assert list(table["input_shape"]) == [(3, 8, 8), (4, 3, 3), (4, 3, 3), (36,)]
    assert list(table["output_shape"]) == [(4, 3, 3), (4, 3, 3), (36,), (2,)]
    assert list(table["macs"]) == [9 * 4 * 27, 0, 0, 72]
    assert list(table["parameters"]) == [4 * 27 + 4, 0, 0, 74]


@pytest.mark.parametrize("batch", [1, 3])
def test_macs_are_those_of_one_sample_whatever_the_example(batch: int):
    assert wb.load(nn.Conv1d(2, 6, 5, groups=2), inputs=torch.rand(batch, 2, 9)).macs == 5 * 6 * 5


def test_grouped_and_transposed_convolutions_count_the_products_they_make():
    x = torch.rand(1, 4, 5, 5)
    assert wb.load(nn.Conv2d(4, 8, 3, groups=4), inputs=x).macs == 9 * 8 * 9
    assert wb.load(nn.ConvTranspose2d(4, 8, 2, stride=2), inputs=x).macs == 25 * 4 * 8 * 4


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fc(x))


def test_layer_called_twice_has_two_rows_and_its_parameters_once():
    model = wb.load(Twice(), inputs=torch.rand(2, 3))
    assert list(model.layers["layer"]) == ["fc", "fc"]
    assert list(model.layers["parameters"]) == [12, 0]
    assert model.macs == 18


class Written(nn.Module):
    """A matrix product and a weight that belong to no layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(self.act(x * self.scale)[:, :, None], x[:, None]).sum(2)


def test_operations_outside_any_layer_are_rows_with_the_weights_they_use():
    model = wb.load(nn.Sequential(Written(), nn.Linear(3, 1)), inputs=torch.rand(2, 3), name="net")
    assert rows(model) == {
        "0.mul": ("mul", 3, 0),
        "0.act": ("ReLU", 0, 0),
        "0.slice": ("slice", 0, 0),
        "0.slice_1": ("slice", 0, 0),
        "0.bmm": ("bmm", 0, 9),
        "0.sum": ("sum", 0, 0),
        "1": ("Linear", 4, 3),
    }


def test_weights_that_no_layer_uses_are_a_row_of_the_module_around_them():
    class Spare(Twice):
        def __init__(self):
            super().__init__()
            self.spare = nn.Parameter(torch.ones(7))

    model = wb.load(nn.Sequential(Spare()), inputs=torch.rand(2, 3))
    assert rows(model)["0"] == ("Spare", 7, 0)
    assert list(model.layers.set_index("layer").loc["0", ["input_bytes", "weight_bytes", "output_bytes"]]) == [0, 0, 0]


def test_attention_is_counted_in_full():
    width, length = 8, 5
    model = wb.load(nn.TransformerEncoderLayer(width, 2, 16, batch_first=True), inputs=torch.rand(2, length, width))
    projections, scores = 4 * length * width * width, 2 * length * length * width
    assert rows(model)["self_attn"] == ("MultiheadAttention", 4 * width * width + 4 * width, projections + scores)
    assert model.layers["parameters"].sum() == model.parameters


def test_fused_attention_of_the_cpu_is_counted():
    class Attend(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(x, x, x)

    assert wb.load(Attend(), inputs=torch.rand(2, 1, 6, 8)).macs == 2 * 6 * 6 * 8


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("learning", [False, True])
def test_recurrent_layers_are_counted_over_all_steps(kind: type[nn.Module], gates: int, learning: bool):
    # kernels differ: the fused one of the CPU is used where no gradient is wanted
    module = kind(8, 12, num_layers=2, bidirectional=True, batch_first=True).requires_grad_(learning)
    model = wb.load(module, inputs=torch.rand(3, 5, 8))
    assert model.macs == 5 * 2 * gates * 12 * ((8 + 12) + (24 + 12))


def test_tables_of_every_kind_of_module_add_up_to_its_parameters():
    class Ids(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.rnn, self.head = nn.Embedding(9, 4), nn.GRU(4, 6, batch_first=True), nn.Linear(6, 9)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.rnn(self.table(ids))[0][:, -1])

    model = wb.load(Ids(), inputs=torch.zeros(2, 7, dtype=torch.int64))
    assert model.layers["parameters"].sum() == model.parameters
    assert rows(model)["rnn"][2] == 7 * 3 * 6 * (4 + 6)


def test_looking_at_layers_leaves_nothing_behind():
    model = wb.load("lenet5")
    before = [dict(vars(module)) for module in model.module.modules()]
    assert len(model.layers) == 12
    assert [dict(vars(module)) for module in model.module.modules()] == before


# against other counts


@pytest.mark.parametrize("name", [*(n for n, entry in zoo.ZOO.items() if not entry.vocabulary), "published resnet20"])
def test_parameters_and_macs_are_those_of_torchinfo_and_of_the_flop_counter(name: str, shared_data):
    checkpoint = shared_data / "cifar10" / "resnet20-12fca82f.th"
    model = wb.load(checkpoint, architecture="resnet20") if name == "published resnet20" else wb.load(name)
    one = next(iter(model.example.values()))[:1]
    summary = torchinfo.summary(model.module, input_data=one, verbose=0)
    # torchinfo takes the addition of a bias, and the scale and shift of a normalisation, for multiply-adds
    additions = 0
    for found in summary.summary_list:
        if isinstance(found.module, nn.BatchNorm2d):
            additions += sum(p.numel() for p in found.module.parameters())
        elif getattr(found.module, "bias", None) is not None:
            additions += found.module.bias.numel() * int(np.prod(found.output_size[2:], dtype=int))
    with FlopCounterMode(display=False) as counter:
        model.module(one)
    assert model.layers["parameters"].sum() == summary.total_params == model.parameters
    assert model.macs == summary.total_mult_adds - additions == counter.get_total_flops() // 2


def test_the_transformers_macs_are_those_of_the_flop_counter_and_its_parameters_torchinfos():
    # torchinfo counts a linear layer once, however many places of a sentence it is applied to
    model = wb.load("transformer")
    # the counter does not know the CPU's fused attention, so the plain products stand in for it
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.module(model.example["x"][:1])
    assert model.macs == counter.get_total_flops() // 2
    assert model.parameters == torchinfo.summary(model.module, input_data=model.example["x"], verbose=0).total_params


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv2d(4, 8, 3, groups=4, bias=False), (2, 4, 6, 6)),
        (nn.ConvTranspose2d(4, 8, 2, stride=2, bias=False), (2, 4, 5, 5)),
        (nn.Sequential(nn.Conv1d(3, 5, 3, bias=False), nn.ReLU(), nn.Conv1d(5, 5, 3, groups=5, bias=False)), (2, 3, 9)),
    ],
)
def test_convolutions_count_as_other_counters_count_them(module: nn.Module, shape: tuple[int, ...]):
    model = wb.load(module, inputs=torch.rand(shape))
    with FlopCounterMode(display=False) as counter:
        module(model.example["input"][:1])
    found = model.macs, model.layers["parameters"].sum()
    assert found == (counter.get_total_flops() // 2, sum(p.numel() for p in module.parameters()))
    if not isinstance(module, nn.ConvTranspose2d):  # torchinfo counts its outputs, of which it computes several at once
        summary = torchinfo.summary(module, input_size=(1, *shape[1:]), verbose=0)
        assert found == (summary.total_mult_adds, summary.total_params)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_recurrent_layers_agree_with_torchinfo_but_for_the_biases(kind: type[nn.Module], gates: int):
    network = nn.Sequential(kind(5, 7, batch_first=True))
    model = wb.load(network, inputs=torch.rand(2, 4, 5))
    summary = torchinfo.summary(network, input_size=(1, 4, 5), verbose=0)
    biases = 4 * 2 * gates * 7  # at each of four steps
    assert model.macs == summary.total_mult_adds - biases
    assert model.layers["parameters"].sum() == summary.total_params


def test_shared_modules_count_their_work_each_time_and_their_parameters_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.mix = nn.Linear(4, 4, bias=False), nn.MultiheadAttention(4, 2, batch_first=True)
            self.same = self.one

        def forward(self, x: Tensor) -> Tensor:
            y = self.same(self.one(x))
            return functional.linear(self.mix(y, y, y)[0], self.one.weight)

    model = wb.load(Tied(), inputs=torch.rand(2, 3, 4))
    summary = torchinfo.summary(model.module, input_size=(1, 3, 4), verbose=0)
    assert model.layers["parameters"].sum() == summary.total_params == 16 + 4 * (16 + 4)
    # torchinfo leaves out attention and functional products: by hand, three of 4 x 4 for each of three tokens,
    # attention's four projections, and its scores and their use
    assert model.macs == 3 * 3 * 16 + 4 * 3 * 16 + 2 * 3 * 3 * 4
    assert list(model.layers["layer"]) == ["one", "one", "mix", "linear"]
    assert list(model.layers["weight_bytes"]) == [64, 64, 4 * 4 * (16 + 4), 64]


# bytes


def moved(model: wb.Model) -> dict[str, tuple[int, int, int]]:
    columns = ["input_bytes", "weight_bytes", "output_bytes"]
    return {row.layer: tuple(getattr(row, name) for name in columns) for row in model.layers.itertuples()}


class Copies(nn.Module):
    """What makes views, what changes in place, and what copies."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.drop, self.same = nn.Dropout(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))  # (N, 4, 4, 4): 256 bytes a sample
        y = self.same(self.drop(y))
        y = y + y.flatten(1).view(y.shape).transpose(2, 3)[:, :, :]
        y += 1
        return y[:, :, ::2].contiguous().double()  # 128 bytes, and 256 as double


def test_bytes_are_those_of_one_sample_and_views_move_none():
    found = moved(wb.load(Copies(), inputs=torch.rand(3, 2, 6, 6)))
    still = (0, 0, 0)
    assert found == {
        "conv": (288, 4 * (72 + 4), 256),
        "norm": (256, 4 * 4 * 4, 256),  # scale, shift, mean, variance; not the counter of batches
        "act": (256, 0, 256),
        **dict.fromkeys(["drop", "same", "flatten", "view", "transpose", "slice", "slice_1"], still),
        "add": (256 + 256, 0, 256),
        "add_1": (256, 0, 256),
        "contiguous": (128, 0, 128),
        "double": (128, 0, 256),
    }


def test_bytes_follow_the_dtype_and_of_embeddings_the_rows_looked_up():
    network = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 2, bias=False)).to(torch.bfloat16)
    found = moved(wb.load(network, inputs=torch.zeros(2, 5, dtype=torch.int64)))
    assert found == {"0": (5 * 8, 5 * 8 * 2, 5 * 8 * 2), "1": (80, 32, 20)}


def test_a_number_repeated_by_its_stride_is_read_once():
    class Spread(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.expand(-1, 10) + 1

    assert moved(wb.load(Spread(), inputs=torch.rand(2, 1)))["add"] == (4, 0, 40)


def test_assignment_and_weights_of_an_operation_are_read_and_written():
    class Assigns(nn.Module):
        def __init__(self):
            super().__init__()
            self.offset = nn.Parameter(torch.zeros(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y[:, 0] = 0
            return y + self.offset[1:2]

    model = wb.load(Assigns(), inputs=torch.rand(2, 4))
    assert moved(model) == {"mul": (16, 0, 16), "setitem": (16, 0, 16), "slice": (0, 0, 0), "add": (16, 16, 16)}
    assert rows(model)["add"][1] == 12


def test_failure_half_way_names_the_layer():
    model = wb.load(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), inputs=torch.rand(2, 3), name="net")
    model.module[1] = nn.Linear(5, 2)
    with pytest.raises(LoadError, match=r"net fails in layer 1 \(Linear\)"):
        model.layers  # noqa: B018


# graphs


@pytest.mark.parametrize("name", ["lenet5", "resnet20"])
def test_graph_table_agrees_with_the_modules(name: str):
    model = wb.load(name)
    graph = layers.graph_table(model.onnx()).set_index("layer")
    module = model.layers.set_index("layer")
    working = module[module["macs"] > 0]
    assert (graph.loc[working.index, "macs"] == working["macs"]).all()
    assert list(graph.loc[working.index, "output_shape"]) == list(working["output_shape"])
    assert graph["macs"].sum() == model.macs
    columns = ["input_bytes", "weight_bytes", "output_bytes"]
    # untrained normalisations shift by nothing, so that folding them adds no bias
    assert (graph.loc[working.index, columns] == working[columns]).all(axis=None)


def graph_of(
    nodes: list[onnx.NodeProto], shape: list, weights: dict[str, np.ndarray], opset: int = 20
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


SCALE, ZERO, WEIGHT = np.float32(0.1), np.uint8(0), np.zeros((4, 3, 3, 3), np.int8)


def test_quantised_graph_counts_its_products_and_its_int8_weights():
    weights = {"s": SCALE, "z": ZERO, "zw": np.int8(0), "w": WEIGHT, "b": np.zeros(4, np.float32)}
    graph = graph_of(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="d"),
            helper.make_node("DequantizeLinear", ["w", "s", "zw"], ["dw"], name="dw"),
            helper.make_node("Conv", ["d", "dw", "b"], ["y"], name="conv1/Conv"),
        ],
        [None, 3, 8, 8],
        weights,
    )
    table = layers.graph_table(graph)
    assert list(table["layer"]) == ["conv1"]
    # what lies in memory is the quantised input, and the output nobody quantises
    assert table.iloc[0, 6:].tolist() == [3 * 64, 4 * 27 + 4 * 4, 4 * 36 * 4]
    assert list(table["macs"]) == [36 * 4 * 27]
    assert table["parameters"].sum() == layers.graph_parameters(graph) == 4 * 27 + 4


def test_integer_operators_count_their_products():
    weights = {"s": SCALE, "z": ZERO, "w": np.zeros((6, 4), np.int8)}
    graph = graph_of(
        [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "qs", "qz"], name="q"),
            helper.make_node("MatMulInteger", ["q", "w", "qz"], ["i"], name="fc/MatMul_quant"),
            helper.make_node("Cast", ["i"], ["y"], name="cast", to=TensorProto.FLOAT),
        ],
        ["N", 6],
        weights,
    )
    table = layers.graph_table(graph).set_index("type")
    assert table.loc["MatMulInteger", "macs"] == 24
    assert table.loc["MatMulInteger", "layer"] == "fc"
    assert table["parameters"].sum() == 24


def test_axis_of_unknown_length_counts_nothing_until_it_is_known():
    graph = graph_of([helper.make_node("MatMul", ["x", "w"], ["y"])], ["N", "T", 6], {"w": np.ones((6, 4), np.float32)})
    assert layers.graph_table(graph)["macs"].sum() == 0
    assert list(layers.graph_table(graph)["output_shape"]) == [(None, 4)]
    assert layers.graph_table(graph)[["input_bytes", "output_bytes"]].isna().all(axis=None)
    assert layers.graph_table(graph, {"x": (2, 5, 6)})["macs"].sum() == 5 * 24
