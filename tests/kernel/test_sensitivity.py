"""One layer at a time: what is changed, what comes out, and that nothing is computed twice."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional

import workbench as wb
from workbench import measure
from workbench.compression import _simulated, one_layer
from workbench.errors import BackendError, Cancelled, DataError, StepError, StoreError
from workbench.figures.sensitivity import _info, sensitivity_figure
from workbench.jobs import on_progress
from workbench.study import _sweep
from workbench.study._results import Results
from workbench.study.sensitivity import COLUMNS, sensitivity

LIMIT = 120


@pytest.fixture(scope="module")
def lenet() -> wb.Model:
    return wb.load("lenet5")


@pytest.fixture(scope="module")
def test_split(digits) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(digits.inputs("test", LIMIT)[0]), torch.from_numpy(digits.labels("test", LIMIT))


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """Each model that was scored, pruned or quantised, as it happens."""
    calls = []
    for owner, name in ((_sweep, "score"), (one_layer, "pruned"), (one_layer, "quantised"), (one_layer, "prunable")):
        original = getattr(owner, name)

        def wrapped(*args, _original=original, _name=name, **kwargs):
            calls.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)
    return calls


def right(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def swept(lenet, digits, technique, **settings):
    return sensitivity(lenet, digits, technique, **{"limit": LIMIT, "latency": False} | settings).wait()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.inner, self.head = nn.Linear(8, 6), nn.Linear(6, 10)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.inner((x + self.branch(x.relu())).mean((2, 3))).relu())


# --- rounding


def test_weights_are_rounded_to_a_symmetric_grid_of_each_output_channel():
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-3.0, 1.4, 1.6, 0.2], [0.0, 0.0, 0.0, 0.0], [0.07, 0.02, -0.05, 0.01]]))
    # 3 bits: n = 3, so the first channel is in steps of 1 and the last of 0.07 / 3
    third = [0.07, 0.07 / 3, -0.14 / 3, 0.0]
    expected = torch.tensor([[-3.0, 1.0, 2.0, 0.0], [0.0] * 4, third])
    assert torch.allclose(_simulated.weight(layer, 3), expected, atol=1e-7)


def test_two_bits_leave_three_values_in_a_channel():
    torch.manual_seed(0)
    for row in _simulated.weight(nn.Linear(64, 5), 2):
        assert len(row.unique()) == 3


def test_an_output_channel_of_a_grouped_transposed_convolution_is_a_column_of_its_group():
    layer = nn.ConvTranspose2d(4, 6, 1, groups=2, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.3)
        layer.weight[:2, 0] = torch.tensor([1.0, 0.4]).view(2, 1, 1)  # output channel 0
        layer.weight[2:, 0] = torch.tensor([10.0, 4.0]).view(2, 1, 1)  # output channel 3
    rounded = _simulated.weight(layer, 2)
    assert rounded[:, 0].flatten().tolist() == [1.0, 0.0, 10.0, 0.0]
    assert torch.equal(rounded[:, 1:], layer.weight[:, 1:])


def test_activations_are_rounded_to_an_asymmetric_grid_that_holds_zero():
    x = torch.tensor([-2.0, -1.0, -0.4, 0.0, 0.4, 1.9, 5.0])
    # 2 bits from -1 to 2: steps of 1, zero point 1
    assert _simulated.activation(x, 2, -1.0, 2.0).tolist() == [-1.0, -1.0, 0.0, 0.0, 0.0, 2.0, 2.0]
    # a range away from zero is stretched to it
    assert _simulated.activation(torch.tensor([0.0, 2.9, 6.0]), 2, 3.0, 6.0).tolist() == [0.0, 2.0, 6.0]
    assert _simulated.activation(torch.zeros(3), 8, 0.0, 0.0).tolist() == [0.0] * 3


def test_more_bits_never_lie_further_off():
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 3).requires_grad_(False)
    errors = [float((_simulated.weight(layer, bits) - layer.weight).abs().max()) for bits in (8, 6, 4, 3, 2)]
    assert errors == sorted(errors) and errors[0] < errors[-1] / 20


# --- one layer and no other


def test_only_the_named_layer_loses_channels(lenet):
    changed = one_layer.pruned(lenet, "fc1", 0.5)
    shapes = {name: tuple(p.shape) for name, p in changed.module.named_parameters()}
    before = {name: tuple(p.shape) for name, p in lenet.module.named_parameters()}
    assert {n: s for n, s in shapes.items() if s != before[n]} == {
        "fc1.weight": (60, 400),
        "fc1.bias": (60,),
        "fc2.weight": (84, 60),
    }


def test_layers_joined_by_an_addition_go_under_the_first_and_answer_to_either_name():
    model = wb.load(Residual(), inputs=torch.zeros(2, 1, 8, 8))
    assert one_layer.prunable(model) == {"stem": ("stem", "branch"), "inner": ("inner",)}
    by_either = [one_layer.pruned(model, layer, 0.25).module for layer in ("stem", "branch")]
    assert [m.stem.out_channels for m in by_either] == [m.branch.out_channels for m in by_either] == [6, 6]
    assert by_either[0].inner.out_features == 6


def test_a_layer_that_feeds_the_output_cannot_lose_channels(lenet):
    with pytest.raises(StepError, match="Layer fc3 of lenet5 cannot lose a channel"):
        one_layer.pruned(lenet, "fc3", 0.5)


def test_only_the_named_layer_is_rounded_even_where_its_weight_is_shared():
    module = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    module[2].weight = module[0].weight
    model = wb.load(module, inputs=torch.zeros(2, 6))
    changed = one_layer.quantised(model, "2", 2, (0.0, 1.0)).module
    assert torch.equal(changed[0].weight, module[0].weight) and len(changed[2].weight[0].unique()) <= 3
    assert module[2].weight is module[0].weight
    x = torch.rand(5, 6)
    hidden = module[:2](x)
    by_hand = (hidden.clamp(0, 1) * 3).round() / 3
    expected = functional.linear(by_hand, _simulated.weight(module[2], 2), module[2].bias)
    assert torch.allclose(changed(x), expected, atol=1e-6)


def test_ranges_are_those_of_the_calibration_split(lenet, digits):
    x = torch.from_numpy(digits.inputs("calibration", digits.count("calibration"))[0])
    found = one_layer.input_ranges(lenet, digits)
    assert list(found) == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    assert found["conv1"] == (float(x.min()), float(x.max()))
    with torch.no_grad():
        hidden = lenet.module[:-1](x)
    assert found["fc3"] == pytest.approx((float(hidden.min()), float(hidden.max())), rel=1e-5)


# --- what comes out


def test_pruning_gives_the_accuracy_and_loss_of_a_network_without_those_channels(lenet, digits, test_split):
    x, labels = test_split
    row = swept(lenet, digits, "prune", layers=["fc2"], levels=[0.5]).frame().iloc[0]
    kept = one_layer.pruned(lenet, "fc2", 0.5).edits[-1]["fc2"]["kept_channels"]
    fc3 = lenet.module.fc3
    with torch.no_grad():
        hidden = lenet.module[:-1](x)[:, kept]
        logits = functional.linear(hidden, fc3.weight[:, kept], fc3.bias)
    assert len(kept) == 42
    assert row["accuracy"] == right(logits, labels)
    assert row["loss"] == pytest.approx(float(functional.cross_entropy(logits.double(), labels)), rel=1e-6)


def test_rounding_gives_the_accuracy_and_loss_worked_out_by_hand(lenet, digits, test_split):
    x, labels = test_split
    found = swept(lenet, digits, "quantize", layers=["fc3"], levels=[2])
    calibrated = torch.from_numpy(digits.inputs("calibration", digits.count("calibration"))[0])
    with torch.no_grad():
        hidden, high = lenet.module[:-1](x), float(lenet.module[:-1](calibrated).max())
        weight = lenet.module.fc3.weight
        scale = weight.abs().amax(1, keepdim=True)
        rounded = (weight / scale).round() * scale
        logits = functional.linear(
            (hidden.clamp(0, high) * 3 / high).round() * high / 3, rounded, lenet.module.fc3.bias
        )
        plain = lenet.module(x)
    row = found.frame().iloc[0]
    assert row["accuracy"] == right(logits, labels)
    assert row["loss"] == pytest.approx(float(functional.cross_entropy(logits.double(), labels)), rel=1e-4)
    assert row["accuracy_drop"] == pytest.approx(right(plain, labels) - right(logits, labels))
    assert found.baseline.loss == pytest.approx(float(functional.cross_entropy(plain.double(), labels)), rel=1e-5)


def test_the_baseline_is_what_measure_says(lenet, digits):
    found = swept(lenet, digits, "prune", layers=["fc2"], levels=[0.5])
    with wb.Eager().compile(lenet) as engine:
        score, interval = measure.accuracy(engine, digits, limit=LIMIT)
    assert (found.baseline.accuracy, (found.baseline.accuracy_low, found.baseline.accuracy_high)) == (score, interval)
    assert found.samples == LIMIT


def test_every_layer_at_every_level_in_order_and_what_is_left_out_is_named(lenet, digits):
    found = swept(lenet, digits, "prune", levels=[0.05, 0.5])
    frame = found.frame()
    assert list(frame.columns) == COLUMNS
    points = list(zip(frame["layer"], frame["level"], strict=True))
    assert points == [
        (n, r) for n in ("conv1", "conv2", "fc1", "fc2") for r in (0.05, 0.5) if (n, r) != ("conv1", 0.05)
    ]
    assert [layer for layer, _ in found.left_out] == ["conv1", "fc3"]
    assert "removes no channel of conv1" in found.left_out[0][1]
    assert frame["saved_ms"].isna().all() and found.backend_label == ""


def test_eight_bits_cost_less_loss_than_two_in_every_layer(lenet, digits):
    found = swept(lenet, digits, "quantize", levels=[8, 2])
    loss = found.frame().pivot(index="layer", columns="level", values="loss")
    assert list(found.frame()["layer"].unique()) == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    assert (loss[2] > loss[8]).all() and (loss[8] - found.baseline.loss).abs().max() < 0.02
    assert list(found.curve("fc1")["level"]) == [8, 2]
    with pytest.raises(DataError, match="Did you mean 'conv2'.* Accepted: conv1, conv2, fc1, fc2, fc3"):
        found.curve("conv22")


# --- what it saves


def latency(blocks: list[float]) -> measure.Latency:
    return measure.Latency(float(np.median(blocks)), 9.0, (0.0, 9.0), tuple(blocks), False)


def test_the_exchange_rate_is_time_saved_for_each_point_lost(lenet, digits, monkeypatch):
    timed = []

    def fake(calls, **_):
        timed.append([call().shape for call in calls])
        return [latency([3.0, 4.0, 5.0]), latency([1.0, 1.0, 4.5])]

    monkeypatch.setattr(measure, "latency", fake)
    row = swept(lenet, digits, "prune", layers=["conv1"], levels=[0.5], latency=True).frame().iloc[0]
    assert timed == [[(1, 10), (1, 10)]]
    assert (row["latency_ms"], row["saved_ms"]) == (1.0, 2.0)
    assert row["saved_low_ms"] <= 2.0 <= row["saved_high_ms"]
    assert row["accuracy_drop"] > 0
    assert row["saved_ms_per_point"] == pytest.approx(2.0 / (100 * row["accuracy_drop"]))


def test_where_accuracy_did_not_fall_there_is_no_rate(lenet, digits, monkeypatch):
    monkeypatch.setattr(measure, "latency", lambda calls, **_: [latency([2.0] * 3), latency([1.0] * 3)])
    row = swept(lenet, digits, "prune", layers=["fc2"], levels=[0.02], latency=True, limit=60).frame().iloc[0]
    assert row["accuracy_drop"] <= 0 and row["saved_ms"] == 1.0 and math.isnan(row["saved_ms_per_point"])


def test_eight_bits_save_what_the_aligned_rows_of_two_profiles_differ_by(lenet, digits, monkeypatch):
    rows = pd.DataFrame(
        [
            (("conv1", "relu1"), 3.0, 1.0, "names"),
            (("conv2",), 1.0, 1.5, "names"),
            (("conv2", "pool2"), 0.5, 0.25, "structure"),
            (("fc1",), 7.0, 0.0, "unmatched"),
        ],
        columns=["layers_a", "latency_a_ms", "latency_b_ms", "how"],
    )
    profiled = []

    def fake_profile(model, on, progress):
        profiled.append((model.precision, on.title))
        return SimpleNamespace(contended=False)

    monkeypatch.setattr(_sweep, "profile", fake_profile)
    monkeypatch.setattr(_sweep, "align", lambda a, b: SimpleNamespace(frame=lambda: rows))
    names = ["conv1", "conv2", "fc1"]
    found = swept(lenet, digits, "quantize", layers=names, levels=[8, 4], latency=True).frame().set_index("level")
    assert profiled == [("fp32", "ONNX Runtime"), ("int8", "ONNX Runtime")]
    assert list(found.loc[8, "saved_ms"])[:2] == [2.0, -0.25] and math.isnan(found.loc[8, "saved_ms"].iloc[2])
    assert found.loc[4, "saved_ms"].isna().all() and found["latency_ms"].isna().all()


def test_a_real_engine_is_timed_for_both_techniques(lenet, digits):
    pruned = swept(lenet, digits, "prune", layers=["fc1"], levels=[0.75], latency=True, limit=20)
    assert pruned.frame()["latency_ms"].gt(0).all() and np.isfinite(pruned.frame()["saved_ms"]).all()
    assert pruned.backend_label == wb.OnnxRuntime().label
    rounded = swept(lenet, digits, "quantize", layers=["conv2"], levels=[8], latency=True, limit=20)
    assert np.isfinite(rounded.frame()["saved_ms"]).all()


# --- computed once


def test_a_second_call_computes_nothing(lenet, digits, tmp_path, counted):
    first = swept(lenet, digits, "prune", cache=tmp_path, levels=[0.05, 0.5])
    assert counted.count("score") == 1 + 7 and counted.count("prunable") == 1
    counted.clear()
    again = swept(wb.load("lenet5"), wb.tasks.digits(), "prune", cache=str(tmp_path), levels=[0.05, 0.5])
    assert counted == []
    pd.testing.assert_frame_equal(first.frame(), again.frame())
    assert first.left_out == again.left_out


def test_without_a_folder_this_process_remembers(lenet, digits, counted):
    settings = {"layers": ["fc1"], "levels": [3], "limit": 77}
    swept(lenet, digits, "quantize", **settings)
    assert counted == ["score", "quantised", "score"]
    swept(lenet, digits, "quantize", **settings)
    assert len(counted) == 3


@pytest.mark.parametrize("other", [{"limit": 60}, {"seed": 1}, {"technique": "quantize", "levels": [4]}])
def test_what_changes_the_result_is_computed_anew(lenet, digits, tmp_path, counted, other):
    base = {"technique": "prune", "layers": ["fc1"], "levels": [0.5]}
    swept(lenet, digits, cache=tmp_path, **base)
    counted.clear()
    swept(lenet, digits, cache=tmp_path, **base | other)
    assert counted.count("score") == 2


def test_another_backend_does_not_score_again(lenet, digits, tmp_path, counted, monkeypatch):
    monkeypatch.setattr(measure, "latency", lambda calls, **_: [latency([2.0] * 3), latency([1.0] * 3)])
    settings = {"layers": ["fc1"], "levels": [0.5], "cache": tmp_path, "latency": True}
    swept(lenet, digits, "prune", on=wb.OnnxRuntime(), **settings)
    counted.clear()
    swept(lenet, digits, "prune", on=wb.Eager(), **settings)
    assert "score" not in counted and "pruned" in counted


def test_a_damaged_file_is_computed_again(lenet, digits, tmp_path, counted):
    settings = {"layers": ["fc1"], "levels": [0.5], "cache": tmp_path}
    whole = swept(lenet, digits, "prune", **settings)
    counted.clear()
    for file in tmp_path.glob("*.json"):
        assert json.loads(file.read_text())
        file.write_text(file.read_text()[:-3])
    pd.testing.assert_frame_equal(swept(lenet, digits, "prune", **settings).frame(), whole.frame())
    assert counted.count("score") == 2


def test_cancelling_keeps_the_points_that_are_finished(lenet, digits, tmp_path, counted):
    plan = _sweep.Plan(lenet, digits, "prune", None, (0.25, 0.5), None, LIMIT, 0)
    heard = []

    def stop(fraction: float, message: str) -> None:
        heard.append((fraction, message))
        if message.startswith("fc1, 50 %"):
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        _sweep.run(plan, Results(tmp_path), progress=on_progress(stop))
    assert counted.count("score") == 1 + 5  # as it is; conv1 and conv2 twice, fc1 once
    assert [f for f, _ in heard] == sorted(f for f, _ in heard)
    assert any("conv2, 25 % · accuracy" in message for _, message in heard)
    counted.clear()
    rest = _sweep.run(plan, Results(tmp_path))
    assert counted.count("score") == 3 and len(rest.rows) == 8


def test_a_study_keeps_them_beside_its_record_and_still_opens(lenet, digits, tmp_path, counted):
    folder = tmp_path / "study"
    with wb.Study(lenet, digits, store=folder) as study:
        swept(lenet, digits, "prune", layers=["fc1"], levels=[0.5], cache=study)
    assert len(list((folder / "sensitivity").glob("*.json"))) == 3
    counted.clear()
    with wb.Study(lenet, digits, store=folder) as study:
        swept(lenet, digits, "prune", layers=["fc1"], levels=[0.5], cache=study)
    assert counted == []


def test_a_cache_that_is_a_file_is_refused(lenet, digits, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is a file; give a folder"):
        swept(lenet, digits, "prune", cache=tmp_path / "file")


# --- refusals, before any work


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"technique": "prun"}, StepError, "Did you mean 'prune'? Accepted: prune, quantize."),
        ({"levels": [0.5, 1.0]}, StepError, "ratio is 1.0; a number above 0 and below 1"),
        ({"levels": []}, StepError, "levels is \\[\\]; give a list such as \\[0.25, 0.5, 0.75\\]"),
        ({"technique": "quantize", "levels": [1]}, StepError, "1 bits cannot be simulated; .* from 2 to 16"),
        ({"technique": "quantize", "levels": [4.0]}, StepError, "4.0 bits cannot be simulated"),
        ({"layers": ["conv3"]}, StepError, "no convolution or linear layer 'conv3'. Did you mean 'conv2'"),
        ({"layers": "conv1"}, StepError, "layers is 'conv1'; give a list such as \\['conv1', 'conv2'\\]"),
        ({"limit": 0}, DataError, "limit is 0"),
        ({"technique": "quantize", "on": wb.Eager(), "latency": True}, BackendError, "module"),
    ],
)
def test_a_setting_out_of_range_names_what_is_accepted(lenet, digits, settings, error, message):
    with pytest.raises(error, match=message.replace("?", "\\?")):
        swept(lenet, digits, **{"technique": "prune"} | settings)


def test_a_layer_that_loses_no_channels_is_refused_by_name(lenet, digits):
    with pytest.raises(StepError, match="Layer fc3 of lenet5 can lose no channel. .*Accepted: conv1, conv2, fc1, fc2"):
        swept(lenet, digits, "prune", layers=["fc3"])


def test_a_graph_without_a_module_is_refused(lenet, digits):
    graph = lenet.changed("", graph=lenet.onnx())
    with pytest.raises(StepError, match="changed in a float32 torch module, and lenet5 is an ONNX graph only"):
        swept(graph, digits, "prune")


# --- the figure


def test_curves_run_from_mild_to_hard_under_the_untouched_model(lenet, digits):
    pruned, rounded = swept(lenet, digits, "prune").frame(), swept(lenet, digits, "quantize").frame()
    info = _info(pruned)
    assert [c.layer for c in info.curves] == ["conv1", "conv2", "fc1", "fc2"]
    assert [p.level for p in info.curves[0].levels] == [25, 50, 75] and not info.reverse
    assert [p.accuracy for p in info.curves[0].levels] == list(100 * pruned["accuracy"][:3])
    assert info.baseline == pytest.approx(100 * (pruned["accuracy"] + pruned["accuracy_drop"]).iloc[0])
    assert [p.level for p in _info(rounded).curves[0].levels] == [8, 6, 4, 3, 2] and _info(rounded).reverse


def test_the_selected_layer_has_its_interval_and_the_others_step_back(lenet, digits):
    frame = swept(lenet, digits, "prune").frame()
    figure = sensitivity_figure(frame, selected="conv2", dark=True)
    lines = {t.name: t for t in figure.data if t.mode == "lines+markers"}
    assert set(lines["conv2"].customdata) == {"conv2"} and lines["conv2"].opacity == 1.0 > lines["fc1"].opacity
    band = next(t for t in figure.data if t.fill == "toself")
    rows = frame[frame["layer"] == "conv2"]
    assert list(band.y) == pytest.approx([*(100 * rows["accuracy_high"]), *(100 * rows["accuracy_low"][::-1])])
    assert not [t for t in sensitivity_figure(frame).data if t.fill == "toself"]
    assert "Choose a technique" in sensitivity_figure(frame.iloc[:0]).layout.annotations[0].text
