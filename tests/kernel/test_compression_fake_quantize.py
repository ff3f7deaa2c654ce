"""Simulated quantisation: rounded inputs and their ranges, chosen widths, the step as a whole."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

import workbench as wb
from workbench.compression import _activations, _bit_widths, _calibrated, _simulated, step_from_dict
from workbench.data.task import Split
from workbench.errors import Cancelled, DataError, StepError
from workbench.jobs import on_progress
from workbench.models import parts
from workbench.models.parts.fake_quantised import rounded


@pytest.fixture(scope="module")
def lenet() -> wb.Model:
    return wb.load("lenet5")


def noise(shape: tuple[int, ...] = (1, 8, 8), count: int = 64) -> wb.Task:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, *shape)).astype(np.float32)
    return wb.Task.from_arrays(x, np.arange(count) % 3, x[:9], np.arange(9) % 3, calibration=count)


def without_calibration(task: wb.Task) -> wb.Task:
    return replace(task, calibration=Split(tuple(x[:0] for x in task.calibration.inputs), task.calibration.labels[:0]))


def on_onnxruntime(model: wb.Model, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.onnx().SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


# --- inputs


def test_the_part_rounds_its_input_as_torch_does_and_runs_on_onnx_runtime():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).eval()
    x = torch.randn(6, 2, 4, 4)
    before = module(x)
    _simulated.round_input(module, "0", 4, -1.5, 2.0)
    scale = 3.5 / 15
    given = torch.fake_quantize_per_tensor_affine(x, scale, round(1.5 / scale), 0, 15)
    found = module[0](x)
    assert torch.allclose(found, functional.conv2d(given, module[0].weight, module[0].bias, padding=1), atol=1e-5)
    assert isinstance(module[0], nn.Conv2d) and "input_bits=4" in repr(module[0])
    model = wb.load(module, inputs=x[:2])
    assert np.allclose(on_onnxruntime(model, x.numpy()), module(x).detach().numpy(), atol=1e-5)
    assert not torch.allclose(module(x), before, atol=1e-3)
    assert list(model.layers["layer"]) == ["0", "1", "2", "3"]


def test_halves_are_rounded_to_even():
    values = torch.tensor([0.5, 1.5, 2.5, -0.5])
    assert rounded(values, 1.0, 1.0, 4).tolist() == [0.0, 2.0, 2.0, -0.0]


def inputs_of(model: wb.Model, layer: str, x: torch.Tensor) -> np.ndarray:
    """What a layer is given, all of it."""
    kept = []
    handle = model.module.get_submodule(layer).register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with torch.no_grad():
        model.module(x)
    handle.remove()
    return torch.cat(kept).numpy()


@pytest.fixture(scope="module")
def calibration(digits) -> torch.Tensor:
    return torch.from_numpy(digits.inputs("calibration", digits.count("calibration"))[0])


def test_ranges_over_chunks_are_those_of_all_inputs_at_once(lenet, digits, calibration):
    given = {layer: inputs_of(lenet, layer, calibration) for layer in ("conv1", "conv2", "fc2")}
    samples = _calibrated.samples(lenet, digits)
    ends = _activations.ranges(lenet, list(given), samples, method="minmax", bits=8)
    for layer, values in given.items():
        assert ends[layer].low == pytest.approx(min(values.min(), 0), rel=1e-5)
        assert ends[layer].high == pytest.approx(values.max(), rel=1e-5) and ends[layer].clipped_share == 0
    found = _activations.ranges(lenet, list(given), samples, method="percentile", bits=8, percentile=98.0)
    for layer, values in given.items():
        bin_width = (ends[layer].high - ends[layer].low) / 2048
        assert abs(found[layer].high - np.percentile(values, 99)) <= 2 * bin_width
        outside = np.mean((values < found[layer].low) | (values > found[layer].high))
        assert found[layer].clipped_share == pytest.approx(outside, abs=2e-3)


def test_the_range_of_least_error_beats_the_whole_one_on_the_inputs_themselves(lenet, digits, calibration):
    values = inputs_of(lenet, "fc1", calibration)
    samples = _calibrated.samples(lenet, digits)

    def error(method: str) -> float:
        kept = _activations.ranges(lenet, ["fc1"], samples, method=method, bits=3)["fc1"]
        found = _simulated.activation(torch.from_numpy(values), 3, kept.low, kept.high).numpy()
        return float(np.square(found - values).mean())

    tried = [
        np.square(_simulated.activation(torch.from_numpy(values), 3, 0.0, float(high)).numpy() - values).mean()
        for high in np.linspace(0.1, 1, 60) * values.max()
    ]
    assert error("mse") == pytest.approx(min(tried), rel=0.02)
    assert error("mse") < 0.9 * error("minmax")


def test_inputs_that_are_not_finite_are_refused_naming_the_layer(lenet, digits):
    class Infinite(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(784, 10)

        def forward(self, x):
            return self.fc(x.flatten(1).sub(x.flatten(1)).log())

    model = wb.load(Infinite(), inputs=torch.ones(2, 1, 28, 28))
    with pytest.raises(DataError, match="input of fc is NaN or infinite"):
        wb.FakeQuantize(8, 8).apply(model, digits)


# --- the step


def test_the_network_computes_what_its_rounded_layers_give_by_hand(lenet, digits, calibration):
    result = wb.FakeQuantize(4, 4).apply(lenet, digits)
    x = torch.from_numpy(digits.inputs("test", 40)[0])
    highs = {layer: inputs_of(lenet, layer, calibration).max() for layer in ("conv1", "conv2", "fc1", "fc2", "fc3")}

    def layer(name: str, value: torch.Tensor) -> torch.Tensor:
        part = lenet.module.get_submodule(name)
        scale = float(highs[name]) / 15
        value = torch.fake_quantize_per_tensor_affine(value, scale, 0, 0, 15)
        steps = part.weight.detach().flatten(1).abs().amax(1) / 7
        weight = torch.fake_quantize_per_channel_affine(
            part.weight.detach(), steps, torch.zeros(len(steps)).int(), 0, -7, 7
        )
        if name.startswith("conv"):
            value = functional.conv2d(value, weight, part.bias, padding=part.padding).relu()
            return functional.max_pool2d(value, 2)
        return functional.linear(value.flatten(1), weight, part.bias)

    assert float(x.min()) >= 0  # as the ranges above take for granted
    with torch.no_grad():
        value = layer("conv2", layer("conv1", x))
        expected = layer("fc3", layer("fc2", layer("fc1", value).relu()).relu())
        # a value on the edge between two steps may fall to either side
        assert (result.module(x) - expected).abs().mean() < 0.01 * expected.abs().mean()
    assert np.allclose(on_onnxruntime(result, x.numpy()), result.module(x).detach().numpy(), atol=1e-3)


def test_more_bits_leave_more_of_the_signal_and_sixteen_nearly_all(lenet, digits, calibration):
    x = calibration[:100]
    with torch.no_grad():
        exact = lenet.module(x)
        errors = [
            float((wb.FakeQuantize(bits, bits).apply(lenet, digits).module(x) - exact).square().mean())
            for bits in (2, 3, 4, 6, 8, 16)
        ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6 * float(exact.square().mean())


def test_the_record_has_a_row_per_layer_with_its_error(lenet, digits):
    rows = wb.FakeQuantize(4, layers={"fc1": 2, "fc3": 32}).apply(lenet, digits).records[-1].rows
    assert [(row["layer"], row["bits"], row["grids"]) for row in rows] == [
        ("conv1", 4, 6), ("conv2", 4, 16), ("fc1", 2, 120), ("fc2", 4, 84),
    ]  # fmt: skip
    before = lenet.module.fc2.weight.detach().double()
    error = before - _simulated.weight(lenet.module.fc2, 4).double()
    assert rows[3]["sqnr_db"] == pytest.approx(10 * float((before.square().sum() / error.square().sum()).log10()))
    with_inputs = wb.FakeQuantize(8, 4, calibration="percentile", percentile=99.0).apply(lenet, digits).records[-1]
    assert {"activation_bits", "activation_low", "activation_high", "clipped_share"} <= set(with_inputs.rows[0])
    assert all(0 <= row["clipped_share"] <= 0.02 for row in with_inputs.rows)


def test_layers_named_with_32_bits_stay_as_they_are(lenet, digits):
    result = wb.FakeQuantize(2, 2, layers={"fc3": 32}).apply(lenet, digits)
    assert torch.equal(result.module.fc3.weight, lenet.module.fc3.weight)
    assert type(result.module.fc3) is nn.Linear and type(result.module.fc2) is not nn.Linear


def test_weights_only_needs_no_calibration_samples_and_activations_do(lenet, digits):
    wb.FakeQuantize(4).apply(lenet, without_calibration(digits))
    with pytest.raises(DataError, match=r"0 calibration samples.*calibration=512"):
        wb.FakeQuantize(4, 4).apply(lenet, without_calibration(digits))


def test_layers_that_share_a_weight_go_on_sharing_it():
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    module[2].weight = module[0].weight
    model = wb.load(nn.Sequential(nn.Flatten(), module, nn.Linear(64, 3)), inputs=torch.zeros(2, 1, 8, 8))
    result = wb.FakeQuantize(3).apply(model, noise()).module
    assert result[1][0].weight is result[1][2].weight
    assert torch.allclose(result[1][0].weight, _simulated.weight(module[0], 3))


def test_a_clustered_model_keeps_its_shared_values(lenet, digits):
    clustered = wb.Cluster(8).apply(lenet, digits)
    result = wb.FakeQuantize(6).apply(clustered, digits)
    for name in ("conv2", "fc1"):
        values = clustered.module.get_submodule(name).weight.unique()
        assert len(result.module.get_submodule(name).weight.unique()) <= len(values)
    assert {row["grids"] for row in result.records[-1].rows} == {1}
    with pytest.raises(StepError, match=r"adaptive_rounding moves weights that share.*leave wb.Cluster out"):
        wb.FakeQuantize(6, adaptive_rounding=True).check(clustered)


# --- chosen widths


def test_chosen_widths_keep_to_the_mean_and_beat_the_same_width_everywhere(lenet, digits):
    result = wb.FakeQuantize(8, average_bits=4.2).apply(lenet, digits)
    rows = result.records[-1].rows
    counts = {row["layer"]: lenet.module.get_submodule(row["layer"]).weight.numel() for row in rows}
    mean = sum(counts[row["layer"]] * row["bits"] for row in rows) / sum(counts.values())
    assert 4 <= mean <= 4.2 and len({row["bits"] for row in rows}) > 1
    chosen = result.records[-2].frame().set_index("layer")
    assert dict(chosen["bits"]) == {row["layer"]: row["bits"] for row in rows}
    x = torch.from_numpy(digits.inputs("test", 200)[0])
    with torch.no_grad():
        exact = lenet.module(x)
        errors = [
            float((model.module(x) - exact).square().mean())
            for model in (result, wb.FakeQuantize(4).apply(lenet, digits))
        ]
    assert errors[0] < errors[1]


def test_the_next_bit_is_taken_where_it_costs_least_per_bit_saved(monkeypatch, lenet, digits):
    # two layers' errors by width, as if measured: lowering a costs 1 then 8 for 10 weights, b 3, 4 then 90 for 20
    noise_of = {
        ("a", 5): 0.0,
        ("a", 4): 1.0,
        ("a", 3): 9.0,
        ("b", 5): 0.0,
        ("b", 4): 3.0,
        ("b", 3): 7.0,
        ("b", 2): 97.0,
    }

    class Trial:
        def __init__(self, *_):
            pass

        def noise(self, layer, bits):
            return noise_of[layer, bits]

        def sqnr_db(self, layer, bits):
            return 0.0

    monkeypatch.setattr(_bit_widths, "_Trial", Trial)
    module = nn.Module()
    module.a, module.b = nn.Linear(5, 2), nn.Linear(5, 4)
    model = replace(lenet, module=module)
    scheme = _bit_widths.Scheme(["a", "b"], 5)
    by_mean = {mean: _bit_widths.chosen(model, digits, scheme, mean, step="…")[0] for mean in (4.7, 4.2, 3.4, 3.3)}
    assert by_mean == {
        4.7: {"a": 4, "b": 5},  # a (0.1 a bit, b 0.15), which is a third of the weights and enough
        4.2: {"a": 4, "b": 4},
        3.4: {"a": 4, "b": 3},  # b again: 4 / 20 against 8 / 10
        3.3: {"a": 3, "b": 3},  # of b's 20 bits only one was needed
    }


def test_given_widths_that_leave_no_room_are_refused(lenet, digits):
    step = wb.FakeQuantize(8, average_bits=3, layers={"fc1": 8})
    with pytest.raises(StepError, match=r"average_bits is 3.*cannot fall below 6\.69"):
        step.apply(lenet, digits)


# --- as a value, in a study


STEPS = [
    wb.FakeQuantize(4),
    wb.FakeQuantize(4, 8, calibration="mse", layers={"fc1": 3}),
    wb.FakeQuantize(4, grid="kmeans", per_channel=False),
    wb.FakeQuantize(8, average_bits=3.5, correct_bias=True),
]


def test_a_study_gives_back_the_same_weights_and_records(lenet, digits, tmp_path):
    with wb.Study(lenet, digits, tmp_path) as study:
        models = [study.run([step], on=wb.Eager(threads=1)).model() for step in STEPS]
    with wb.Study(lenet, digits, tmp_path) as study:
        for step, model in zip(STEPS, models, strict=True):
            again = study.run([step], on=wb.Eager(threads=1))
            assert again.model().fingerprint == model.fingerprint and again.model().records == model.records
            assert again.model().precision == again.measurement.precision == "simulated"
            assert model.changes == ("quantised",) and model.records


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.label)
def test_the_step_survives_being_written_down_and_gives_the_same_each_time(step, lenet, digits):
    assert step_from_dict(json.loads(json.dumps(step.to_dict()))) == step
    assert eval(step.to_python(), {"wb": wb}) == step
    results = [step.apply(lenet, digits, seed=3) for _ in range(2)]
    assert results[0].fingerprint == results[1].fingerprint and results[0].records == results[1].records
    assert (step.preview(lenet).precision, step.preview(lenet).changes) == (results[0].precision, results[0].changes)


def test_labels_say_what_is_not_the_default():
    assert wb.FakeQuantize().label == "Simulate 8-bit weights"
    step = wb.FakeQuantize(4, 8, symmetric=False, per_channel=False, clip="mse", calibration="entropy")
    assert step.label == (
        "Simulate 4-bit weights, 8-bit activations by entropy, asymmetric, per tensor, clipped by mse"
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: wb.FakeQuantize(1), ["1 bits for weights", "from 2 to 16"]),
        (lambda: wb.FakeQuantize(17), ["17 bits"]),
        (lambda: wb.FakeQuantize(True), ["True bits"]),
        (lambda: wb.FakeQuantize(4.0), ["4.0 bits"]),
        (lambda: wb.FakeQuantize(8, 1), ["1 bits for activations"]),
        (lambda: wb.FakeQuantize(8, False), ["False bits for activations"]),
        (lambda: wb.FakeQuantize(layers={"fc1": 20}), ["20 bits for fc1"]),
        (lambda: wb.FakeQuantize(layers=["fc1"]), ["value per layer"]),
        (lambda: wb.FakeQuantize(grid="k-means"), ["Did you mean 'kmeans'?"]),
        (lambda: wb.FakeQuantize(calibration="kl"), ["entropy, minmax, mse, percentile"]),
        (lambda: wb.FakeQuantize(calibration="mse"), ["Give activation_bits"]),
        (lambda: wb.FakeQuantize(grid="log", symmetric=False), ['settings of grid="uniform"']),
        (lambda: wb.FakeQuantize(grid="kmeans", clip="mse"), ['settings of grid="uniform"']),
        (lambda: wb.FakeQuantize(9, grid="kmeans"), ["at most 8 bits", "2^9 values"]),
        (lambda: wb.FakeQuantize(4, grid="kmeans", layers={"fc1": 10}), ["10 were given"]),
        (lambda: wb.FakeQuantize(percentile=100.0, clip="percentile"), ["percentile is 100"]),
        (lambda: wb.FakeQuantize(4, average_bits=5), ["average_bits is 5", "at most 4"]),
        (lambda: wb.FakeQuantize(4, average_bits=1.5), ["at least 2"]),
        (lambda: wb.FakeQuantize(equalize="yes"), ["True or False"]),
        (lambda: wb.FakeQuantize(adaptive_rounding=True, clip="mse"), ["symmetric grid up to the largest weight"]),
    ],
)
def test_a_setting_out_of_range_is_refused_with_the_range(make, words):
    with pytest.raises(StepError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_models_it_cannot_round_are_refused_before_work(lenet, digits):
    with pytest.raises(StepError, match=r"'fc9'.*Did you mean 'fc\d'"):
        wb.FakeQuantize(layers={"fc9": 4}).check(lenet)
    with pytest.raises(StepError, match="already simulated"):
        wb.FakeQuantize(4).check(wb.FakeQuantize(8).apply(lenet, digits))
    with pytest.raises(StepError, match="already simulated"):
        wb.Quantize("int8").check(wb.FakeQuantize(8).apply(lenet, digits))
    with pytest.raises(StepError, match="ONNX graph only"):
        wb.FakeQuantize().check(wb.Model("graph", dict(lenet.example), graph=lenet.onnx()))


def test_rounding_can_be_cancelled_and_leaves_the_model_as_it_was(lenet, digits):
    before = replace(lenet).fingerprint

    def stop(fraction, message):
        if "ranges, 64 of" in message:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        wb.FakeQuantize(4, 4).apply(lenet, digits, progress=on_progress(stop))
    assert replace(lenet).fingerprint == before


def test_a_part_remembers_how_it_was_made():
    part = parts.build(nn.Conv1d(2, 3, 3), "fake_quantised", {"bits": 5})
    assert part.built == {"kind": "fake_quantised", "arguments": {"bits": 5}} and part.input_bits == 5
