"""The ONNX export: the same numbers, any batch size, and names that lead back to the layers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

import workbench as wb
from workbench.errors import LoadError
from workbench.models import zoo
from workbench.models.cast import cast
from workbench.models.export import ExportWarning, provenance, to_onnx
from workbench.models.inputs import outputs


def run(graph: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(inputs))


def batch(model: wb.Model, size: int) -> dict[str, Tensor]:
    """Fresh inputs of `size` samples like the model's example."""
    noise = torch.Generator().manual_seed(size)
    return {
        name: torch.rand(size, *value.shape[1:], generator=noise).to(value.dtype)
        if value.is_floating_point()
        else torch.randint(0, 10, (size, *value.shape[1:]), generator=noise).to(value.dtype)
        for name, value in model.example.items()
    }


def worst_difference(model: wb.Model, size: int) -> float:
    inputs = batch(model, size)
    with torch.no_grad():
        expected = outputs(model.run_module(*inputs.values()))
    found = run(model.onnx(), {name: value.numpy() for name, value in inputs.items()})
    assert [f.shape for f in found] == [tuple(e.shape) for e in expected]
    return max(float(np.abs(f - e.numpy()).max()) for f, e in zip(found, expected, strict=True))


@pytest.fixture(scope="module", params=zoo.ZOO)
def network(request: pytest.FixtureRequest) -> wb.Model:
    """Every network of the zoo, its batch statistics shaken so that folding them must be right."""
    model = wb.load(request.param)
    noise = torch.Generator().manual_seed(1)
    for module in model.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=noise)
            module.running_var.uniform_(0.8, 1.2, generator=noise)
            module.bias.data.normal_(0, 0.1, generator=noise)
    return model


def test_export_of_every_zoo_network_computes_the_same_at_any_batch_size(network: wb.Model):
    with torch.no_grad():
        scale = float(network.module(network.example["x"]).abs().max())
    assert all(worst_difference(network, size) < 1e-5 * max(1.0, scale) for size in (1, 2, 7))


def test_every_node_leads_back_to_a_layer_and_every_layer_is_found(network: wb.Model):
    graph = network.onnx()
    named = {layer for layers in provenance(graph).values() for layer in layers}
    working = {name for name, m in network.module.named_modules() if list(m.parameters(recurse=False))}
    assert working <= named
    known = {name for name, _ in network.module.named_modules()}
    blocks = {name.rpartition(".")[0] for name in known}
    assert all(layer in known or layer.rpartition(".")[0] in blocks for layer in named)


def test_graph_is_named_after_its_layers():
    graph = wb.load("resnet20").onnx()
    conv = next(n for n in graph.graph.node if n.name == "layer2.0.conv1/Conv")
    assert list(conv.output) == ["layer2.0.conv1/Conv_out"]
    assert conv.input[1] == "layer2.0.conv1.weight"
    # the exporter folds the normalisation into the convolution
    assert provenance(graph)[conv.name] == ("layer2.0.conv1", "layer2.0.bn1")
    assert provenance(graph)["layer2.0.add/Add"] == ("layer2.0.add",)
    names = [n.name for n in graph.graph.node]
    assert len(set(names)) == len(names)
    assert [o.name for o in graph.graph.output] == ["output"]
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_graph_tells_nothing_of_the_machine_that_exported_it():
    text = str(wb.load("lenet5").onnx())
    for private in ("stack_trace", "fx_node", ".py", "site-packages"):
        assert private not in text


def test_export_prints_and_warns_nothing(capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wb.load("mlp").onnx()
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


class Functional(nn.Module):
    """A block whose activations are written out in forward."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.ModuleDict({"fc": nn.Linear(3, 2)})

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(functional.relu(self.conv(x)) + x)
        return self.head["fc"](functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Functional()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).relu()


def test_functional_operations_belong_to_the_module_around_them():
    layers = provenance(wb.load(Nested(), inputs=torch.rand(2, 3, 8, 8)).onnx())
    assert layers["block.relu/Relu"] == ("block.relu",)
    assert layers["block.relu_1/Relu"] == ("block.relu_1",)
    assert layers["block.add/Add"] == ("block.add",)
    assert layers["block.head.fc/Gemm"] == ("block.head.fc",)
    assert layers["relu/Relu"] == ("relu",)


class Text(nn.Module):
    """Ids and a mask in, a dict out; a transformer between."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.encoder(self.table(ids))
        pooled = (x * mask[..., None]).sum(1) / (1 + mask.sum(1, keepdim=True))
        return {"logits": self.head(pooled), "pooled": pooled}


class Anything(Text):
    """The same behind a signature that names nothing."""

    def forward(self, **given: Tensor) -> dict[str, Tensor]:
        return super().forward(given["ids"], given["mask"])


class Sequence(Text):
    def forward(self, *given: Tensor) -> dict[str, Tensor]:
        return super().forward(*given)


IDS, MASK = torch.arange(10).reshape(2, 5) % 10, torch.ones(2, 5)


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (Text(), (IDS, MASK)),
        (Text(), {"mask": MASK, "ids": IDS}),
        (Text(), (IDS[:1], MASK[:1])),
        (Anything(), {"ids": IDS, "mask": MASK}),
        (Sequence(), (IDS, MASK)),
    ],
    ids=["by position", "by keyword", "one sample", "any keyword", "any position"],
)
def test_several_inputs_and_outputs_export_in_every_calling_form(module: nn.Module, inputs):
    model = wb.load(module, inputs=inputs)
    assert all(worst_difference(model, size) < 1e-5 for size in (1, 2, 7))
    graph = model.onnx().graph
    assert [value.name for value in graph.input] == list(model.example)
    assert [value.name for value in graph.output] == ["output_0", "output_1"]
    assert all(value.type.tensor_type.shape.dim[0].dim_param == "batch" for value in graph.input)


def test_one_output_of_a_graph_may_be_an_input_of_the_next_operation():
    class Tap(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x.relu()
            return y, y + 1

    assert worst_difference(wb.load(Tap(), inputs=torch.rand(2, 3)), 3) == 0


class Specialised(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.zeros(2, 1)], 1)


def test_batch_size_fixed_within_a_network_is_said_aloud_and_kept():
    model = wb.load(Specialised(), inputs=torch.rand(2, 3))
    with pytest.warns(ExportWarning, match="batches of 2 only"):
        graph = model.onnx()
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    assert "batches of 2" in graph.graph.doc_string
    assert worst_difference(model, 2) == 0


def test_older_exporter_steps_in_aloud_where_the_newer_one_fails(newer_exporter_fails: None):
    model = wb.load(Nested(), inputs=torch.rand(2, 3, 8, 8))
    with pytest.warns(ExportWarning, match="older exporter.*the newer one is broken"):
        graph = model.onnx()
    assert "older exporter" in graph.graph.doc_string
    assert provenance(graph)["block.conv/Conv"] == ("block.conv",)
    assert all(worst_difference(model, size) < 1e-5 for size in (1, 7))


def test_older_exporter_does_not_call_a_batch_size_open_that_it_wrote_into_the_graph(newer_exporter_fails: None):
    class Baked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.zeros(int(x.shape[0]), 1)

    with pytest.warns(ExportWarning, match="batches of 3 only"):
        graph = wb.load(Baked(), inputs=torch.rand(3, 2)).onnx()
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3


def test_what_cannot_be_exported_names_the_operation_and_the_layer():
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(x @ x.mT).abs()

    model = wb.load(nn.Sequential(nn.ReLU(), Odd()), inputs=torch.rand(2, 3, 3))
    with pytest.raises(LoadError, match=r"cannot be exported to ONNX: aten\.linalg_eig.* in layer 1"):
        model.onnx()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cast_network_has_casts_at_its_borders_only(dtype: torch.dtype):
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    model = wb.load(block, inputs=torch.rand(2, 3, 8, 8))
    half = cast(model.module, dtype)
    graph = to_onnx(half, model.example, False, "half").graph
    kinds = [node.op_type for node in graph.node]
    assert (kinds[0], kinds[-1], kinds.count("Cast")) == ("Cast", "Cast", 2)
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {TensorProto.FLOAT}
    with torch.no_grad():
        assert half(model.example["input"]).dtype == torch.float32
    assert [n for n, _ in half.named_modules()] == [n for n, _ in model.module.named_modules()]


def test_cast_leaves_ids_alone_and_keeps_close():
    text = Text().eval()
    half = cast(text, torch.bfloat16)
    with torch.no_grad():
        expected, found = text(IDS, MASK), half(IDS, MASK)
    assert found["logits"].dtype == torch.float32
    assert 0.0 < float((found["logits"] - expected["logits"]).abs().max()) < 0.05
    with pytest.raises(ValueError, match="already"):
        cast(half, torch.float16)


# graphs of other origin


def foreign(nodes: list[onnx.NodeProto], *weights: str) -> onnx.ModelProto:
    shape = [None, 2]
    values = [numpy_helper.from_array(np.ones((2, 2), np.float32), name) for name in weights]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, shape)],
        values,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_provenance_of_a_foreign_graph_comes_from_scopes_then_names_then_weights():
    scoped = helper.make_node("Relu", ["c"], ["d"], name="node_relu_3")
    scoped.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'features', 'features.act', 'relu']")
    classes = ["Net", "torch.nn.modules.container.Sequential", "torch.nn.modules.activation.ReLU", "aten.relu.default"]
    scoped.metadata_props.add(key="pkg.torch.onnx.class_hierarchy", value=str(classes))
    graph = foreign(
        [
            helper.make_node("MatMul", ["x", "enc.0.fc.weight"], ["a"], name="MatMul_0"),
            helper.make_node("Relu", ["a"], ["b"], name="/layer1/layer1.0/act/Relu"),
            helper.make_node("MatMul", ["b", "w7"], ["c"], name="my_product"),
            scoped,
        ],
        "enc.0.fc.weight",
        "w7",
    )
    assert provenance(graph) == {
        "MatMul_0": ("enc.0.fc",),
        "/layer1/layer1.0/act/Relu": ("layer1.0.act",),
        "my_product": ("my_product",),
        "node_relu_3": ("features.act",),
    }


def test_quantisers_belong_to_what_they_quantise():
    scale = ["s", "z"]
    graph = foreign(
        [
            helper.make_node("QuantizeLinear", ["x", *scale], ["q"], name="q0"),
            helper.make_node("DequantizeLinear", ["q", *scale], ["dq"], name="dq0"),
            helper.make_node("MatMul", ["dq", "w"], ["a"], name="fc1/MatMul"),
            helper.make_node("QuantizeLinear", ["a", *scale], ["qa"], name="q1"),
            helper.make_node("DequantizeLinear", ["qa", *scale], ["dqa"], name="dq1"),
        ],
        "w",
    )
    assert set(provenance(graph).values()) == {("fc1",)}
