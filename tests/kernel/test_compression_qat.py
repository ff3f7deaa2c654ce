"""Quantisation-aware training rounds as the graph it leaves, which engines run in int8 and which keeps its layers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from _tiny import Memory, blobs, mlp, stop_at
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

import workbench as wb
from workbench.compression import _calibrated, _folding, _qat, _qat_places, step_from_dict
from workbench.data.task import Split
from workbench.errors import Cancelled, DataError, RecipeError, StepError
from workbench.models import structure
from workbench.models.parts.quantisation_aware import Aware
from workbench.models.provenance import provenance
from workbench.models.zoo.transformer import transformer

QUICK = wb.QAT(epochs=1, validation=0.0)


class Residual(nn.Module):
    """Folded norms, one activation module that runs twice, an addition and an activation written as functions."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.relu, self.fc = nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(self.relu(self.conv3(y)).mean((2, 3)))


class Sequence(nn.Module):
    """A convolution over time, and linear layers applied to each place and to one row."""

    def __init__(self):
        super().__init__()
        self.conv, self.each, self.act, self.last = nn.Conv1d(4, 6, 3), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.each(self.conv(x).transpose(1, 2))).mean(1))


def network(kind: type[nn.Module], shape: tuple[int, ...]) -> wb.Model:
    torch.manual_seed(0)
    model = wb.load(kind(), inputs=torch.rand(2, *shape))
    for module in model.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model


def noise_task(model: wb.Model, classes: int, count: int = 48) -> wb.Task:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, *model.inputs[0].shape[1:])).astype(np.float32)
    return wb.Task.from_arrays(x, np.arange(count) % classes, x, np.arange(count) % classes, calibration=32)


def applied(step: wb.QAT, model: wb.Model, task: wb.Task) -> tuple[wb.Model, wb.Model]:
    """The step's result, and the rounding module it was made from."""
    seen = []
    plain = _qat.to_graph
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_qat, "to_graph", lambda model, *rest: (seen.append(model), plain(model, *rest))[1])
        return step.apply(model, task), seen[0]


def outputs(model: wb.Model, x: np.ndarray, backend: wb.Backend | None = None) -> np.ndarray:
    if model.module is not None:
        with torch.no_grad():
            return model.run_module(torch.from_numpy(x)).numpy()
    with (backend or wb.OnnxRuntime()).compile(model) as engine:
        return engine(x)


def kernels(model: wb.Model, x: np.ndarray) -> Counter:
    with wb.OnnxRuntime().compile(model) as engine:
        return Counter(row.type for row in engine.profile([x], repeats=1))


@pytest.fixture(scope="module")
def few(digits) -> wb.Task:
    """A part of the digits, for trainings that take a moment."""
    (x, y), (x_test, y_test) = digits.raw("train"), digits.raw("test")
    settings = {"preprocess": digits.preprocess, "classes": digits.classes, "calibration": 64}
    return wb.Task.from_arrays(x[:320], y[:320], x_test, y_test, **settings)


@pytest.fixture(scope="module")
def lenet(few) -> tuple[wb.Model, wb.Model]:
    """LeNet-5 trained for one epoch: the graph, and the rounding module."""
    return applied(QUICK, wb.load("lenet5"), few)


@pytest.fixture(scope="module")
def residual() -> tuple[wb.Model, wb.Model, wb.Model, np.ndarray]:
    """The residual network: untouched, the graph, the rounding module, and inputs."""
    model = network(Residual, (3, 10, 10))
    task = noise_task(model, 4)
    return model, *applied(QUICK, model, task), task.inputs("test", 48)[0]


# --- the graph computes what was trained


@pytest.mark.parametrize("backend", [wb.OnnxRuntime(), wb.OpenVINO()], ids=lambda backend: type(backend).__name__)
def test_the_graph_predicts_what_the_trained_module_predicts(lenet, few, backend):
    graph, module = lenet
    x, labels = few.inputs("test", 500)[0], few.labels("test")
    found, expected = outputs(graph, x, backend), outputs(module, x)
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.99
    assert (found.argmax(1) == labels).mean() >= 0.96
    assert np.abs(found - expected).mean() < 0.02 * np.abs(expected).max()


@pytest.fixture(scope="module")
def sequence() -> tuple[wb.Model, wb.Model, wb.Model, np.ndarray]:
    """The network over time: as `residual`."""
    model = network(Sequence, (4, 9))
    task = noise_task(model, 3)
    return model, *applied(QUICK, model, task), task.inputs("test", 48)[0]


@pytest.mark.parametrize("kind", ["residual", "sequence"])
def test_other_networks_too(kind, request):
    _, graph, module, x = request.getfixturevalue(kind)
    error = outputs(graph, x) - outputs(module, x)
    # a value on the edge between two steps may fall to either side, and moves what follows by a step
    assert np.abs(error).mean() < 0.01 * np.abs(outputs(module, x)).max()
    onnx.checker.check_model(graph.graph, full_check=True)


def test_the_graph_holds_u8_activations_s8_weights_and_s32_biases_as_trained(lenet):
    graph, trained = lenet
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.graph.initializer}
    before = {"conv1": "conv1", "conv2": "relu1", "fc1": "relu2", "fc2": "relu3", "fc3": "relu4"}
    for name, source in before.items():
        layer, given = trained.module.get_submodule(name), trained.module.get_submodule(source)
        weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        scale = np.abs(weight.reshape(len(weight), -1)).max(1) / 127
        scale[scale == 0] = scale.max()  # a channel that training left at zero has nothing but its bias
        low, high = (given.input_range if source == name else given.output_range).tolist()
        assert tensors[f"{name}.weight"].dtype == np.int8 and tensors[f"{name}.bias"].dtype == np.int32
        np.testing.assert_allclose(tensors[f"{name}.weight_scale"], scale, rtol=1e-6)
        whole = np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1)))
        assert (tensors[f"{name}.weight"] != whole).mean() < 1e-3
        np.testing.assert_allclose(tensors[f"{name}.bias"], bias / (scale * (high - low) / 255), atol=0.51)
    quantised = [node for node in graph.graph.graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantised) == 5 and all(tensors[node.input[2]].dtype == np.uint8 for node in quantised)
    assert graph.precision == "int8" and graph.changes == ("quantised",) and graph.module is None


def test_inputs_and_outputs_stay_float32_with_an_open_batch(lenet):
    graph, _ = lenet
    for value in (*graph.graph.graph.input, *graph.graph.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_every_node_keeps_its_layer_and_no_layer_is_lost(lenet, residual):
    for model, graph in ((wb.load("lenet5"), lenet[0]), (residual[0], residual[1])):
        known = {layer for layers in provenance(model.onnx()).values() for layer in layers}
        found = provenance(graph.graph)
        assert {layer for layers in found.values() for layer in layers} == known
    assert provenance(residual[1].graph)["conv1/Conv"] == ("conv1", "bn1"), "a folded norm is part of its convolution"


def test_onnx_runtime_runs_every_convolution_and_product_in_int8(lenet, residual, few):
    found = kernels(lenet[0], few.inputs("test", 1)[0])
    assert (found["QLinearConv"], found["QGemm"], found["Conv"], found["Gemm"], found["Relu"]) == (2, 3, 0, 0, 0)
    found = kernels(residual[1], residual[3][:1])
    assert (found["QLinearConv"], found["QGemm"], found["Conv"], found["Gemm"]) == (3, 1, 0, 0)


def test_only_linear_layers_are_rounded_in_a_transformer():
    ids = np.random.default_rng(0).integers(0, 50, (40, 8))
    small = transformer(vocabulary=50, length=8, width=16, num_heads=2, layers=1, hidden=32)
    model = wb.load(small, inputs=torch.from_numpy(ids[:2]))
    task = wb.Task.from_arrays(ids, np.arange(40) % 2, ids, np.arange(40) % 2, calibration=20)
    result = QUICK.apply(model, task)
    fed = {name for node in result.graph.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    reading = Counter(node.op_type for node in result.graph.graph.node if fed & set(node.input))
    assert reading == {"MatMul": 6, "Gemm": 1}
    found = kernels(result, ids[:1])
    assert (found["MatMulIntegerToFloat"], found["QGemm"]) == (6, 1)
    # what a normalisation gives to three projections is rounded once
    assert sum(node.op_type == "QuantizeLinear" for node in result.graph.graph.node) == 5


def test_torchs_own_encoder_layers_round_in_evaluation_mode_too():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 1)
    model = wb.load(nn.Sequential(encoder, nn.Flatten(), nn.Linear(80, 2)), inputs=torch.zeros(2, 5, 16))
    task = noise_task(model, 2)
    graph, module = applied(QUICK, model, task)
    ranges = [part.input_range for part in module.module.modules() if getattr(part, "input_range", None) is not None]
    assert ranges and all(bool(kept[1] > kept[0]) for kept in ranges)
    x = task.inputs("test", 48)[0]
    error = np.abs(outputs(graph, x) - outputs(module, x))
    assert error.mean() < 0.01 * np.abs(outputs(module, x)).max()
    assert np.abs(outputs(module, x) - outputs(_qat.unrounded(module, model), x)).mean() > 2 * error.mean()


# --- where it rounds


def test_each_tensor_is_rounded_once_where_int8_kernels_want_it(residual):
    where = _qat_places.places(_folding.folded(residual[0]), products_only=False)
    # relu runs twice and the addition is a function, so their readers round; bn2's output goes to the addition
    assert where.sources == {"conv1": "conv1", "conv2": "conv2", "conv3": "conv3", "fc": "fc"}
    assert where.gives == {"bn1", "bn2", "conv3"}
    lenet = _qat_places.places(wb.load("lenet5"), products_only=False)
    assert lenet.gives == {"relu1", "relu2", "relu3", "relu4"}
    assert lenet.sources == {"conv1": "conv1", "conv2": "relu1", "fc1": "relu2", "fc2": "relu3", "fc3": "relu4"}


def test_the_rounding_module_is_rebuilt_from_its_edits(residual):
    model, _, rounding, x = residual
    rebuilt = structure.rebuild(model.module, json.loads(json.dumps(rounding.edits)), rounding.module.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(torch.from_numpy(x)), rounding.module(torch.from_numpy(x)))
    assert rounding.precision == "simulated"


# --- what it gains and what it keeps


def test_training_recovers_what_two_bit_weights_cost_and_the_record_says_so(few):
    result = wb.QAT(epochs=3, bits=2, learning_rate=2e-3).apply(wb.load("lenet5"), few)
    training, gain = result.records
    assert [row["epoch"] for row in training.rows] == [1, 2, 3]
    before, after = gain.rows
    assert (before["weights"], after["weights"]) == ("before training", "after training")
    assert before["float32_accuracy"] > 0.99
    assert before["int8_accuracy"] < 0.5 < 0.75 < after["int8_accuracy"]
    assert after["sqnr_db"] > before["sqnr_db"]
    right = outputs(result, few.inputs("test", 500)[0]).argmax(1) == few.labels("test")
    assert right.mean() > 0.75
    for tensor in result.graph.graph.initializer:
        if tensor.name.endswith(".weight"):
            assert set(np.unique(numpy_helper.to_array(tensor))) <= {-1, 0, 1}


def test_the_record_holds_distances_from_the_same_weights_in_float32(residual):
    model, graph, rounding, _ = residual
    task = noise_task(model, 4)
    held = _calibrated.samples(model, task)
    (x,) = held.inputs
    with torch.no_grad():
        folded = _folding.folded(model)
        plain = _qat.unrounded(rounding, folded).module(torch.from_numpy(x)).double()
        noise = rounding.module(torch.from_numpy(x)).double() - plain
    expected = 10 * float(torch.log10(plain.square().sum() / noise.square().sum()))
    assert graph.records[-1].rows[1]["sqnr_db"] == pytest.approx(expected, abs=1e-3)
    assert not any(isinstance(part, Aware) for part in _qat.unrounded(rounding, folded).module.modules())


def test_pruned_weights_stay_zero(few):
    pruned = wb.Prune(0.5, granularity="weight").apply(wb.load("lenet5"), few)
    result = QUICK.apply(pruned, few)
    assert result.changes == ("pruned", "quantised")
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in result.graph.graph.initializer}
    for name in ("conv1.weight", "fc1.weight", "fc3.weight"):
        assert not tensors[name][pruned.module.state_dict()[name].numpy() == 0].any()


def test_the_model_is_left_alone_and_the_same_seed_gives_the_same_bits():
    model, task = mlp(), blobs()
    before = model.fingerprint
    first = QUICK.apply(model, task, seed=1).fingerprint
    torch.manual_seed(99)
    assert QUICK.apply(model, task, seed=1).fingerprint == first != QUICK.apply(model, task, seed=2).fingerprint
    assert wb.Model.fingerprint.func(model) == before


def test_a_study_reopened_gives_back_the_same_graph_and_records(tmp_path):
    task, found = blobs(), []
    for _ in range(2):
        with wb.Study(mlp(), task, store=tmp_path) as study:
            candidate = study.run([QUICK], on=wb.OnnxRuntime())
            found.append((candidate.model().fingerprint, candidate.model().records))
            assert candidate.model().precision == "int8" and candidate.family == "quantised"
    assert found[0] == found[1] and len(found[0][1]) == 2


def test_a_cancelled_training_keeps_the_best_so_far_as_a_rounding_module_and_goes_on():
    model, task, step = mlp(), blobs(), wb.QAT(epochs=2)
    kept = Memory()
    with pytest.raises(Cancelled) as stopped:
        step.apply(model, task, checkpoint=kept, progress=stop_at("epoch 2 of 2"))
    best = stopped.value.best
    assert best.precision == "simulated" and any(isinstance(part, Aware) for part in best.module.modules())
    assert step.apply(model, task, checkpoint=kept).fingerprint == step.apply(model, task).fingerprint


# --- what it takes


def test_it_is_a_value_that_survives_being_written_down():
    step = wb.QAT(epochs=3, bits=4)
    assert step_from_dict(json.loads(json.dumps(step.to_dict()))) == step
    assert step.to_python() == "wb.QAT(3, bits=4)"
    assert (step.label, wb.QAT(epochs=1).label) == ("QAT int8 3 epochs, 4-bit weights", "QAT int8 1 epoch")
    with pytest.raises(RecipeError, match="no setting 'epoch'"):
        step_from_dict({"step": "QAT", "epoch": 1})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epochs": 0}, "QAT: epochs is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"bits": 1}, "bits is 1; a whole number of at least 2"),
        ({"bits": 9}, "bits is 9; the int8 graph holds weights of 2 to 8"),
        ({"bits": 4.0}, "bits is 4.0"),
        ({"optimizer": "lion"}, "no optimizer 'lion'"),
        ({"patience": 1, "validation": 0.0}, "patience 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(StepError, match=said):
        wb.QAT(**settings)


def test_models_it_cannot_train_are_refused_before_work(lenet):
    with pytest.raises(StepError, match="already int8"):
        QUICK.check(lenet[0])
    with pytest.raises(StepError, match="ONNX graph only"):
        QUICK.check(wb.Model("graph", {"x": torch.zeros(2, 6)}, graph=mlp().onnx()))
    with pytest.raises(StepError, match="already int8"):
        wb.Finetune().check(QUICK.preview(mlp()))

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.fc.weight)

    with pytest.raises(StepError, match="calls no convolution and no linear layer"):
        QUICK.apply(wb.load(Hidden(), inputs=torch.zeros(2, 6)), blobs())


def test_missing_calibration_data_is_an_error_that_says_so():
    task = blobs()
    empty = Split(tuple(x[:0] for x in task.calibration.inputs), task.calibration.labels[:0])
    with pytest.raises(DataError, match="0 calibration samples"):
        QUICK.apply(mlp(), replace(task, calibration=empty))
