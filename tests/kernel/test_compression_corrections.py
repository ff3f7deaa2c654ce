"""Corrections keep the function or bring the rounded network nearer to it, say by how much, and never make it worse."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import workbench as wb
from workbench.compression import _adaptive_rounding, _bias, _corrections, _equalize, _flow, _folding, _simulated
from workbench.compression._calibrated import Samples
from workbench.compression._scheme import Scheme, simulate
from workbench.data.task import Split
from workbench.errors import Cancelled, DataError, StepError
from workbench.jobs import SILENT, on_progress

OFF = {"equalize": False, "correct_bias": False, "adaptive_rounding": False}


class Chain(nn.Module):
    """Layers in a row, by modules and by functions, with a depthwise and a grouped convolution among them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_norm, self.act = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.b = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.c = nn.Conv2d(4, 6, 1, groups=2)
        nn.init.ones_(self.c.bias)  # so that the ReLU behind it lets something through
        self.pool = nn.MaxPool2d(2)
        self.d, self.e, self.out = nn.Linear(6 * 4 * 4, 10), nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.b(self.act(self.a_norm(self.a(x))))
        x = self.pool(functional.relu(self.c(x), inplace=True))
        x = self.e(self.d(x.flatten(1)).relu())
        return self.out(x.tanh())


CHANNELS = ["a", "b", "c", "d", "e", "out"]


class Branches(nn.Module):
    """Two layers that something else reads as well, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.twice, self.d, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.a(x.flatten(1)).relu()
        x = self.b(x) + x  # a is read twice
        x = self.twice(self.twice(x).relu()).relu()
        x = self.d(self.c(x).sigmoid())  # a scale does not pass a sigmoid
        return self.out(x), x  # d is an output as well


def model_of(module: nn.Module, shape: tuple[int, ...], uneven: float = 0.0) -> wb.Model:
    """A network whose channels differ in scale by powers of `uneven`."""
    torch.manual_seed(1)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
            elif uneven and isinstance(part, (nn.Conv2d, nn.Linear)):
                spread = torch.exp(uneven * torch.randn(len(part.weight)))
                part.weight.mul_(spread.view(-1, *[1] * (part.weight.ndim - 1)))
    return wb.load(module.eval(), inputs=torch.randn(4, *shape), name=type(module).__name__)


@pytest.fixture
def chain() -> wb.Model:
    torch.manual_seed(0)
    return model_of(Chain(), (2, 8, 8), uneven=1.5)


def noise(shape: tuple[int, ...], count: int = 128) -> wb.Task:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, *shape)).astype(np.float32)
    return wb.Task.from_arrays(x, np.arange(count) % 3, x[:9], np.arange(9) % 3, calibration=count)


def samples_of(task: wb.Task) -> Samples:
    return Samples(task.inputs("calibration", task.count("calibration")), task.labels("calibration"))


def output(model: wb.Model, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model.module(x)
    return found[0] if isinstance(found, tuple) else found


# --- who reads what


def test_flow_tells_readers_apart_from_what_is_changed_in_place(chain):
    readers = {c.path: [r.path or r.operation if r else None for r in c.readers] for c in _flow.calls(chain) if c.path}
    assert readers["a"] == ["a_norm"] and readers["c"] == ["relu"] and readers["out"] == [None]
    calls = _flow.calls(model_of(Branches(), (6,)))
    a_relu = next(c for c in calls if c.path == "a").reader
    assert [r.path or r.operation for r in a_relu.readers] == ["b", "add"] and a_relu.reader is None


# --- cross-layer equalisation


def test_pairs_are_layers_that_a_scale_passes_between(chain):
    found = [(p.first, p.second) for p in _equalize.pairs(_folding.folded(chain))]
    assert found == [("a", "b"), ("b", "c"), ("c", "d"), ("d", "e")]
    assert _equalize.pairs(model_of(Branches(), (6,))) == []


def test_equalising_keeps_the_function_and_makes_the_ranges_meet(chain):
    folded = _folding.folded(chain)
    equal = _equalize.equalized(folded, _equalize.pairs(folded))
    x = torch.randn(16, 2, 8, 8)
    assert torch.allclose(output(equal, x), output(chain, x), rtol=1e-5, atol=1e-5)
    part = equal.module
    rows = {name: part.get_submodule(name).weight.detach() for name in CHANNELS}
    assert torch.allclose(rows["a"].abs().amax((1, 2, 3)), rows["b"].abs().amax((1, 2, 3)), rtol=1e-2)
    of_c = torch.cat([half.abs().amax((0, 2, 3)) for half in rows["c"].chunk(2)])  # two groups of two inputs
    assert torch.allclose(rows["b"].abs().amax((1, 2, 3)), of_c, rtol=1e-2)
    of_d = rows["d"].view(10, 6, 16).abs().amax((0, 2))
    assert torch.allclose(rows["c"].abs().amax((1, 2, 3)), of_d, rtol=1e-2)
    assert torch.allclose(rows["d"].abs().amax(1), rows["e"].abs().amax(0), rtol=1e-2)


def test_one_pair_is_scaled_by_the_equation_of_the_paper():
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[8.0, 1.0], [0.5, -0.25]]))
        module[0].bias.copy_(torch.tensor([4.0, 1.0]))
        module[2].weight.copy_(torch.tensor([[0.5, -2.0]]))
    model = model_of(module, (2,))
    found = _equalize.equalized(model, _equalize.pairs(model)).module
    # s = sqrt(r1 · r2) / r2 = sqrt(8 · 0.5) / 0.5 = 4 and sqrt(0.5 · 2) / 2 = 0.5
    assert torch.allclose(found[0].weight, torch.tensor([[2.0, 0.25], [1.0, -0.5]]))
    assert torch.allclose(found[0].bias, torch.tensor([1.0, 2.0]))
    assert torch.allclose(found[2].weight, torch.tensor([[2.0, -1.0]]))


def test_equalising_undoes_scales_that_rounding_per_tensor_suffers_from():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 3))
    scale = torch.exp(1.5 * torch.randn(32))
    with torch.no_grad():
        module[1].weight.mul_(scale[:, None])
        module[1].bias.mul_(scale)
        module[3].weight.div_(scale)
    model = model_of(module, (2, 8, 8))
    row = wb.FakeQuantize(5, per_channel=False, equalize=True).apply(model, noise((2, 8, 8))).records[0].rows[0]
    assert row["correction"] == "cross-layer equalisation" and row["applied"] and row["note"] == "1 pair of layers"
    assert row["sqnr_after_db"] > row["sqnr_before_db"] + 6


def test_where_nothing_can_be_equalised_the_record_says_so():
    model = model_of(Branches(), (6,))
    row = wb.FakeQuantize(4, equalize=True).apply(model, noise((6,))).records[0].rows[0]
    assert not row["applied"] and "no layer is read by one other alone" in row["note"]
    assert row["sqnr_after_db"] == row["sqnr_before_db"]


# --- bias correction


def test_corrected_biases_give_each_channel_the_mean_it_has_in_float(chain):
    task = noise((2, 8, 8))
    folded = _folding.folded(chain)
    rounded = simulate(folded, Scheme(CHANNELS, 3), None).model
    found = _bias.corrected(folded, folded, rounded, CHANNELS, samples_of(task))
    again = simulate(found, Scheme(CHANNELS, 3), None).model
    x = torch.from_numpy(task.inputs("calibration", 128)[0])

    def means(model: wb.Model) -> dict[str, torch.Tensor]:
        kept = {}
        for name in CHANNELS:
            model.module.get_submodule(name).register_forward_hook(
                lambda _, args, out, name=name: kept.update({name: out.mean((0, *range(2, out.ndim)))})
            )
        output(model, x)
        return kept

    wanted, before, after = means(folded), means(rounded), means(again)
    for name in CHANNELS:
        assert torch.allclose(after[name], wanted[name], atol=1e-4), name
    assert max(float((before[name] - wanted[name]).abs().max()) for name in CHANNELS) > 0.05
    for name in CHANNELS:  # and nothing but biases moved
        assert torch.equal(found.module.get_submodule(name).weight, folded.module.get_submodule(name).weight)


def test_a_layer_without_a_bias_is_given_one_that_survives_a_study(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(20, 30, bias=False), nn.ReLU(), nn.Linear(30, 3, bias=False))
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(200, 20)).astype(np.float32)  # a mean that rounding shifts
    task = wb.Task.from_arrays(x, np.arange(200) % 3, x[:30], np.arange(30) % 3, calibration=200)
    model = wb.load(module.eval(), inputs=torch.rand(2, 20))
    step = wb.FakeQuantize(2, correct_bias=True)
    with wb.Study(model, task, tmp_path) as study:
        made = study.run([step], on=wb.Eager(threads=1)).model()
    with wb.Study(model, task, tmp_path) as study:
        kept = study.run([step], on=wb.Eager(threads=1)).model()
    assert made.records[0].rows[0]["applied"] and made.module[1].bias is not None
    assert kept.fingerprint == made.fingerprint and kept.records == made.records
    assert model.module[1].bias is None


# --- adaptive rounding


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2),
        nn.Conv2d(4, 6, (3, 1), padding="same", padding_mode="reflect", bias=False),
        nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"),
        nn.Conv3d(4, 6, 2, stride=(1, 2, 1)),
        nn.Linear(9, 5),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_the_rows_drawn_of_inputs_give_those_drawn_of_outputs(layer):
    sizes = {nn.Conv1d: (4, 9), nn.Conv3d: (4, 5, 5, 5), nn.Linear: (7, 9)}.get(type(layer), (4, 9, 9))
    x = torch.randn(12, *sizes)
    samples = Samples((x.numpy(),), np.zeros(12, np.int64))
    drawn = [_adaptive_rounding._Drawn(layer, samples, seed=3) for _ in range(2)]
    with torch.no_grad():
        y = layer(x)
        drawn[0].inputs(x, y)
        drawn[1].outputs(x, y)
    groups = getattr(layer, "groups", 1)
    weight = layer.weight.detach().flatten(1).unflatten(0, (groups, -1))
    products = torch.einsum("rgd,god->rgo", drawn[0].rows().unflatten(1, (groups, -1)), weight).flatten(1)
    assert len(products) == min(8196 if layer.weight[0].numel() > 1 else 0, y.numel() // weight[:, :, 0].numel())
    assert torch.allclose(products, drawn[1].rows(), atol=1e-5)


def test_rounding_is_found_that_no_other_choice_beats():
    torch.manual_seed(0)
    rows, scale, given = torch.randn(4, 6) * 2, torch.full((4, 1), 0.8), torch.randn(4000, 6)
    given[:, 1:] += 2 * given[:, :1]  # inputs that go together, so that errors can make up for each other
    problem = _adaptive_rounding._Problem(rows, scale, 50, 1, given, given @ rows.T)
    found = problem.solve(0, SILENT)
    steps = (rows / scale).floor()
    total = {"found": 0.0, "nearest": 0.0}
    for row in range(4):
        choices = [steps[row] + torch.tensor([(number >> place) & 1 for place in range(6)]) for number in range(2**6)]
        errors = sorted(float((given @ (c * scale[row] - rows[row])).square().mean()) for c in choices)
        nearest = float((given @ ((rows / scale).round()[row] * scale[row] - rows[row])).square().mean())
        mine = float((given @ (found[row] - rows[row])).square().mean())
        assert mine <= errors[3] + 1e-6, (mine, errors[:5])
        total = {"found": total["found"] + mine, "nearest": total["nearest"] + nearest}
    assert total["found"] < 0.7 * total["nearest"], total


def test_adapted_weights_lie_on_their_grid_so_that_rounding_them_again_changes_nothing():
    torch.manual_seed(0)
    chain, task = model_of(Chain(), (2, 8, 8)), noise((2, 8, 8))
    layers = {"a": 32, "b": 32, "e": 3, "out": 32}
    for per_channel in (True, False):
        given = {"bits": 4, "per_channel": per_channel, "step": "…", "layers": layers}
        found = _corrections.corrected(chain, task, **given, **(OFF | {"adaptive_rounding": True}))
        assert found.records[0].rows[0]["applied"]
        assert found.precision == "fp32" and found.changes == ()
        folded = _folding.folded(chain)
        for name in ("a", "b", "out"):
            assert torch.equal(found.module.get_submodule(name).weight, folded.module.get_submodule(name).weight)
        moved = 0
        for name in ("c", "d", "e"):
            part, bits = found.module.get_submodule(name), 3 if name == "e" else 4
            nearest = _simulated.weight(folded.module.get_submodule(name), bits, per_channel=per_channel)
            assert torch.allclose(part.weight, _simulated.weight(part, bits, per_channel=per_channel), rtol=1e-6)
            step = nearest.abs().max() / (2 ** (bits - 1) - 1)
            assert float((part.weight.detach() - nearest).abs().max()) <= 1.001 * step
            moved += int((part.weight - nearest).abs().gt(1e-6).sum())
        assert moved > 20


def test_adaptive_rounding_brings_three_bits_nearer_and_says_by_how_much(digits):
    lenet = wb.load("lenet5")
    step = wb.FakeQuantize(3, adaptive_rounding=True)
    result = step.apply(lenet, digits)
    row = result.records[0].rows[0]
    assert row["applied"] and row["correction"] == "adaptive rounding"
    x = torch.from_numpy(digits.inputs("test", 300)[0])
    exact = output(lenet, x)

    def decibels(model: wb.Model) -> float:
        return 10 * math.log10(float(exact.square().sum() / (output(model, x) - exact).square().sum()))

    plain = wb.FakeQuantize(3).apply(lenet, digits)
    assert decibels(result) > decibels(plain) + 4
    assert row["sqnr_after_db"] - row["sqnr_before_db"] > 4


def test_pruned_weights_stay_zero_through_all_corrections(chain):
    task = noise((2, 8, 8))
    pruned = wb.Prune(0.6, granularity="weight").apply(chain, task)
    result = wb.FakeQuantize(4, **dict.fromkeys(OFF, True)).apply(pruned, task)
    rows = next(record.rows for record in result.records if record.title.startswith("corrections"))
    assert {row["correction"] for row in rows if row["applied"]} >= {"adaptive rounding"}
    for name in CHANNELS:
        before, after = (m.module.get_submodule(name).weight for m in (pruned, result))
        assert not after[before == 0].any() and after.any()


# --- all of them


def test_each_correction_asked_for_has_a_row_with_its_gain_on_samples_held_out(chain):
    task = noise((2, 8, 8))
    step = wb.FakeQuantize(4, 6, per_channel=False, **dict.fromkeys(OFF, True))
    result, again = (step.apply(chain, task, seed=2) for _ in range(2))
    assert again.fingerprint == result.fingerprint and again.records == result.records
    record = result.records[0]
    assert record.title == "corrections, on 32 calibration samples held out"
    frame = record.frame()
    assert list(frame["correction"]) == ["cross-layer equalisation", "adaptive rounding", "bias correction"]
    for before, after in zip(record.rows, record.rows[1:], strict=False):
        kept = before["sqnr_after_db"] if before["applied"] else before["sqnr_before_db"]
        assert after["sqnr_before_db"] == kept
    held = task.calibration.inputs[0][np.arange(128) % 4 == 1]
    exact, found = (output(m, torch.from_numpy(held)).double() for m in (chain, result))
    last = record.rows[-1]["sqnr_after_db" if record.rows[-1]["applied"] else "sqnr_before_db"]
    # the step takes its ranges from all samples, the corrections theirs from those not held out
    assert last == pytest.approx(10 * float((exact.square().sum() / (found - exact).square().sum()).log10()), abs=1.5)


def test_a_correction_that_makes_it_worse_is_not_applied(chain, monkeypatch):
    def worse(model, *_, **__):
        found = replace(model, module=copy.deepcopy(model.module))
        with torch.no_grad():
            found.module.out.bias.add_(5)
        return found

    monkeypatch.setattr(_bias, "corrected", worse)
    task = noise((2, 8, 8))
    result = wb.FakeQuantize(4, correct_bias=True).apply(chain, task)
    row = result.records[0].rows[0]
    assert not row["applied"] and row["sqnr_after_db"] < row["sqnr_before_db"]
    assert row["note"] == "the error grew, so it was not applied"
    plain = wb.FakeQuantize(4).apply(chain, task)
    assert replace(result, records=()).fingerprint == plain.fingerprint


def test_layers_of_fp32_are_left_out_and_unknown_ones_refused(chain):
    task = noise((2, 8, 8))
    given = {"bits": 3, "per_channel": True, "step": "Quantise int8", "layers": dict.fromkeys(CHANNELS[1:], 32)}
    found = _corrections.corrected(chain, task, **given, **(OFF | {"adaptive_rounding": True, "correct_bias": True}))
    folded = _folding.folded(chain)
    for name in CHANNELS[1:]:
        assert torch.equal(found.module.get_submodule(name).weight, folded.module.get_submodule(name).weight)
    assert found.records[0].step == "Quantise int8" and found.records[0].rows[0]["note"] == "1 layer"
    with pytest.raises(StepError, match=r"Quantise int8: there is no layer 'aa'"):
        _corrections.corrected(chain, task, **(given | {"layers": {"aa": 32}}), **(OFF | {"equalize": True}))


def test_too_few_or_unsound_calibration_samples_are_refused(chain):
    task = noise((2, 8, 8))
    few = replace(task, calibration=Split(tuple(x[:3] for x in task.calibration.inputs), task.calibration.labels[:3]))
    step = wb.FakeQuantize(4, correct_bias=True)
    with pytest.raises(StepError, match=r"has 3; at least 4 are needed.*calibration=512"):
        step.apply(chain, few)
    with torch.no_grad():
        zeros = model_of(nn.Sequential(nn.Flatten(), nn.Linear(128, 3)), (2, 8, 8))
        zeros.module[1].weight.zero_()
        zeros.module[1].bias.zero_()
    with pytest.raises(DataError, match="nothing but zeros"):
        step.apply(zeros, task)


def test_correcting_can_be_cancelled_and_leaves_the_model_as_it_was(chain):
    before = replace(chain).fingerprint
    seen = []

    def stop(fraction, message):
        seen.append(fraction)
        if "adaptive rounding · c" in message:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        wb.FakeQuantize(4, adaptive_rounding=True).apply(chain, noise((2, 8, 8)), progress=on_progress(stop))
    assert seen == sorted(seen) and replace(chain).fingerprint == before
