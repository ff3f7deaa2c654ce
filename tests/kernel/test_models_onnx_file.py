"""ONNX files: what is read from them, and what is refused before anything is allocated or followed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import workbench as wb
from workbench.errors import LoadError

F = TensorProto.FLOAT


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return wb.load("lenet5").onnx()


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Saves a graph of the given nodes over an input ``x``."""

    def written(nodes, shape=("N", 3), weights=(), kind=F, raw: bool = False) -> Path:
        x = helper.make_tensor_value_info("x", kind, shape)
        y = helper.make_tensor_value_info(nodes[-1].output[0], F, None)
        body = helper.make_graph(nodes, "g", [x], [y], list(weights))
        model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        return tmp_path / "m.onnx"

    return written


def relu(source: str = "x", target: str = "y", name: str = "r") -> onnx.NodeProto:
    return helper.make_node("Relu", [source], [target], name=name)


def weight(name: str = "w", size: int = 3, dtype=np.float32) -> TensorProto:
    return numpy_helper.from_array(np.ones(size, dtype), name)


def refused(path: Path, says: str, **options) -> None:
    with pytest.raises(LoadError, match=says):
        wb.load(path, **options)


def test_file_is_read_as_a_graph_with_the_open_batch_axis_kept(tmp_path: Path, graph):
    onnx.save(graph, tmp_path / "net.onnx")
    model = wb.load(tmp_path / "net.onnx")
    assert (model.name, model.source, model.module) == ("net", "net.onnx", None)
    assert [str(spec) for spec in model.inputs] == ["x: float32 (N, 1, 28, 28)"]
    assert model.example["x"].shape == (2, 1, 28, 28)
    assert (model.parameters, model.macs) == (61_706, 416_520)


def test_fixed_batch_size_is_declared_and_the_example_has_it(save):
    model = wb.load(save([relu()], shape=(4, 3)))
    assert model.inputs[0].shape == (4, 3)
    assert model.example["x"].shape == (4, 3)


def test_nodes_without_a_name_get_one_and_the_names_that_are_there_stay(save):
    model = wb.load(save([relu("x", "a", ""), relu("a", "b", "mine"), relu("b", "y", "mine")]))
    names = [node.name for node in model.graph.graph.node]
    assert names[:2] == ["Relu_0", "mine"] and len(set(names)) == 3


def test_ids_are_made_up_as_zeros_which_every_table_has(save):
    table = numpy_helper.from_array(np.ones((5, 2), np.float32), "w")
    model = wb.load(save([helper.make_node("Gather", ["w", "x"], ["y"])], weights=[table], kind=TensorProto.INT64))
    assert model.example["x"].dtype == torch.int64 and not model.example["x"].any()


def test_open_axes_ask_for_inputs_and_stay_open(save):
    path = save([relu()], shape=("N", "T", 3))
    refused(path, "input x has axes of open length.*inputs=")
    model = wb.load(path, inputs=np.ones((2, 7, 3), np.float32))
    assert model.inputs[0].shape == (None, None, 3)
    assert model.layers["output_shape"][0] == (7, 3)


def test_input_without_any_shape_takes_the_rank_of_what_is_given(save):
    path = save([relu()], shape=None)
    refused(path, "any number of axes")
    assert wb.load(path, inputs={"x": torch.ones(2, 3)}).inputs[0].shape == (None, None)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (np.ones((2, 4), np.float32), r"x is float32 \(N, 3\), but float32 \(2, 4\)"),
        (np.ones((2, 3), np.int64), r"but int64 \(2, 3\)"),
        (np.ones((2, 3, 1), np.float32), r"\(2, 3, 1\)"),
        ({"y": np.ones((2, 3))}, "no input 'y'"),
        (({}, {}), "takes 1 inputs"),
    ],
)
def test_inputs_are_held_against_the_declared_ones(save, inputs, says: str):
    refused(save([relu()]), says, inputs=inputs)


@pytest.mark.parametrize("keep", [0.01, 0.5, 0.999])
def test_truncated_file_is_called_damaged(tmp_path: Path, graph, keep: float):
    data = graph.SerializeToString()
    (tmp_path / "m.onnx").write_bytes(data[: int(len(data) * keep)])
    refused(tmp_path / "m.onnx", "damaged or incomplete")


def test_invalid_graph_names_the_node(save):
    refused(save([relu("b", "a", "first"), relu("a", "b", "second")]), "first")
    refused(save([helper.make_node("Add", ["x", "w"], ["y"], name="adder")], weights=[weight(dtype=np.int64)]), "adder")
    refused(save([helper.make_node("Add", ["x", "w"], ["y"], name="adder")], weights=[weight(size=4)]), "adder")
    refused(save([helper.make_node("Nonsense", ["x"], ["y"], name="odd")]), "Nonsense")


def test_input_that_is_no_tensor_is_refused(tmp_path: Path, save):
    model = onnx.load(save([relu()]))
    model.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x", F, None))
    onnx.save(model, tmp_path / "s.onnx")
    refused(tmp_path / "s.onnx", "input x is a sequence")


@pytest.mark.parametrize("dims", [[10**12], [-1], [2]])
@pytest.mark.parametrize("raw", [True, False])
def test_tensor_whose_shape_does_not_match_its_data_is_refused_before_it_is_read(save, dims: list[int], raw: bool):
    if raw:
        tensor = weight()
    else:
        tensor = helper.make_tensor("w", F, [3], [1.0, 1.0, 1.0])
    del tensor.dims[:]
    tensor.dims.extend(dims)
    refused(save([helper.make_node("Add", ["x", "w"], ["y"])], weights=[tensor]), "tensor w has")


# weights beside the graph


@pytest.fixture
def beside(tmp_path: Path, graph) -> Path:
    folder = tmp_path / "net"
    folder.mkdir()
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    onnx.save(copy, folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    return folder / "m.onnx"


def redirected(path: Path, location: str) -> Path:
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())
    return path


def test_weights_beside_the_graph_are_read(beside: Path, graph):
    found = {t.name: numpy_helper.to_array(t) for t in wb.load(beside).graph.graph.initializer}
    for tensor in graph.graph.initializer:
        assert np.array_equal(found[tensor.name], numpy_helper.to_array(tensor))


@pytest.mark.parametrize("location", ["../m.data", "/etc/passwd", "link", "sub/../../m.data", ""])
def test_weights_outside_the_folder_are_refused(beside: Path, location: str):
    (beside.parent.parent / "m.data").write_bytes((beside.parent / "m.data").read_bytes())
    (beside.parent / "link").symlink_to("../m.data")
    refused(redirected(beside, location), "outside the model's folder")


def test_missing_and_truncated_weights_are_named(beside: Path):
    data = beside.parent / "m.data"
    data.write_bytes(data.read_bytes()[:1000])
    refused(beside, r"'m\.data' has \d+ for it")
    data.unlink()
    refused(beside, "'m.data', which is missing")
