"""Low rank: the factors are the nearest ones, they stand where the layer stood, and only where that costs less."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import workbench as wb
from workbench import measure
from workbench.compression import _factors, _waist, step_from_dict
from workbench.errors import Cancelled, StepError
from workbench.jobs import SILENT, on_progress
from workbench.models import structure

CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(0, 2), bias=False),
    nn.Conv2d(4, 6, 3, dilation=(2, 3), padding="same", padding_mode="reflect"),
    nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="circular"),
    nn.Conv2d(4, 6, 1, stride=2),
]


def plain(*layers: nn.Module, shape: tuple[int, ...] = (6,)) -> wb.Model:
    return wb.load(nn.Sequential(*layers), inputs=torch.zeros(2, *shape), name="plain")


def seeded(make):
    torch.manual_seed(0)
    return make()


def task_for(model: wb.Model, count: int = 24) -> wb.Task:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, *model.inputs[0].shape[1:])).astype(np.float32)
    y = np.arange(count) % 3
    return wb.Task.from_arrays(x, y, x, y, calibration=8)


def outputs(model: wb.Model) -> torch.Tensor:
    noise = torch.randn(5, *model.inputs[0].shape[1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.run_module(noise)


def rows(model: wb.Model) -> dict[str, dict]:
    return {row["layer"]: row for row in model.records[-1].rows}


@pytest.mark.parametrize("split", ["channel", "spatial"])
@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_at_full_rank_two_convolutions_compute_what_one_did(layer, split):
    split = _factors.split_of(layer, split)
    found = _factors.decompose(layer, split)
    pair = _factors.factorised(layer, found.full_rank, found)
    x = torch.randn(2, 4, 11, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(pair(x), layer(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(7, 5), (7,)), (nn.Linear(7, 9, bias=False), (3, 7)), (nn.Conv1d(4, 6, 3, stride=2), (4, 11))],
    ids=str,
)
def test_at_full_rank_linear_layers_and_other_dimensions_are_exact_too(layer, shape):
    found = _factors.decompose(layer, _factors.split_of(layer, "spatial"))
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(_factors.factorised(layer, found.full_rank, found)(x), layer(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("split", ["channel", "spatial"])
def test_the_error_of_a_truncated_kernel_is_the_root_of_the_squares_left_out(split):
    layer = CONVOLUTIONS[1]
    rank = 4
    first, second = _factors.factorised(layer, rank, _factors.decompose(layer, split))
    # the kernel of two convolutions one after the other, put together by hand
    sums = "oryz,rihw->oihw" if split == "channel" else "orhw,riyz->oiyw"
    product = np.einsum(sums, second.weight.detach().double().numpy(), first.weight.detach().double().numpy())
    weight = layer.weight.detach().double().numpy()
    o, i, h, w = weight.shape
    matrix = weight.reshape(o, -1) if split == "channel" else weight.transpose(0, 3, 1, 2).reshape(o * w, i * h)
    left_out = np.linalg.svd(matrix, compute_uv=False)[rank:]
    assert np.linalg.norm(product - weight) == pytest.approx(np.sqrt((left_out**2).sum()), rel=1e-5)


def test_the_record_tells_energy_and_error_of_the_rank_that_energy_asks_for():
    model = seeded(lambda: plain(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3)))
    with torch.no_grad():  # singular values 8, 4, 2, 1, 0 … : squares 64, 16, 4, 1 of 85
        left, right = (torch.linalg.qr(torch.randn(n, 4))[0] for n in (30, 40))
        model.module[2].weight.copy_(left @ torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0])) @ right.T)
    for energy, rank in ((0.75, 1), (0.76, 2), (0.94, 2), (0.95, 3), (0.99, 4)):
        result = wb.LowRank(energy=energy).apply(model, task_for(model))
        row = rows(result)["2"]
        assert (row["rank"], row["full_rank"], row["replaced"]) == (rank, 30, True)
        kept = sum((64, 16, 4, 1)[:rank]) / 85
        assert row["energy"] == pytest.approx(kept, rel=1e-5)
        assert row["relative_error"] == pytest.approx(np.sqrt(1 - kept), rel=1e-4, abs=1e-6)
        first, second = result.module[2]
        error = second.weight @ first.weight - model.module[2].weight
        assert float(error.detach().norm()) == pytest.approx(np.sqrt(85 * (1 - kept)), rel=1e-4, abs=1e-5)


def test_multiply_accumulates_told_are_those_of_the_layer_table(digits):
    model = wb.load("lenet5")
    for split in ("spatial", "channel"):
        result = wb.LowRank(split=split).apply(model, digits)
        counted = result.layers.assign(owner=result.layers["layer"].str.split(".").str[0])
        counted = counted.groupby("owner")["macs"].sum()
        told = rows(result)
        assert {n for n, row in told.items() if row["replaced"]} == {"conv1", "conv2", "fc1", "fc2", "fc3"}
        for name, row in told.items():
            assert row["macs_of_pair"] == counted[name] < row["macs"]
        assert result.macs == counted.sum()


def test_a_spatial_split_counts_the_rows_it_strides_over_later():
    model = plain(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(8 * 25, 3), shape=(8, 9, 9))
    result = wb.LowRank(layers={"0": 3}).apply(model, task_for(model))
    # 3 × 1 to three channels on 5 × 9 places, then 1 × 3 to eight on 5 × 5
    assert rows(result)["0"]["macs_of_pair"] == 8 * 3 * 3 * 5 * 9 + 3 * 3 * 8 * 5 * 5
    assert result.layers.set_index("layer").loc[["0.0", "0.1"], "macs"].sum() == rows(result)["0"]["macs_of_pair"]


def test_a_layer_is_left_where_its_rank_saves_nothing_and_the_record_says_so():
    model = seeded(lambda: plain(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3)))
    result = wb.LowRank(ratio=0.5).apply(model, task_for(model))
    told = rows(result)
    assert told["2"]["rank"] == 20 and told["2"]["largest_rank_that_saves"] == 19
    assert told["2"]["reason"] == "rank 20 saves no multiply-accumulates; at most 19 would"
    assert isinstance(result.module[2], nn.Linear) and torch.equal(result.module[2].weight, model.module[2].weight)
    assert told["0"]["replaced"] and [type(part) for part in result.module[0]] == [nn.Linear, nn.Linear]


def test_layers_that_cannot_be_factorised_are_listed_with_the_reason():
    class Odd(nn.Linear):
        pass

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
            self.up = nn.ConvTranspose2d(4, 4, 2)
            self.odd, self.wide, self.tied, self.again = Odd(4, 4), nn.Linear(4, 32), nn.Linear(4, 4), nn.Linear(4, 4)
            self.again.weight = self.tied.weight
            self.uncalled, self.head = nn.Linear(4, 4), nn.Linear(32, 3)

        def forward(self, x):
            x = self.again(self.tied(self.odd(self.up(self.depthwise(x)).mean((2, 3)))))
            return self.head(self.wide(x @ self.uncalled.weight))

    model = wb.load(seeded(Net), inputs=torch.zeros(2, 4, 6, 6))
    told = rows(wb.LowRank(ratio=0.3).apply(model, task_for(model)))
    reasons = {name: row["reason"] for name, row in told.items()}
    assert reasons.pop("wide") == "" and reasons.pop("head") == ""
    assert reasons == {
        "depthwise": "a convolution in 4 groups",
        "up": "a transposed convolution",
        "odd": "of class Odd, which may compute something else than the plain layer",
        "tied": "its weight is another layer's too",
        "again": "its weight is another layer's too",
        "uncalled": "its weight is used without a call to it",
    }


def test_the_layer_left_behind_and_torchs_generator_are_as_before(digits):
    model = wb.load("lenet5")
    before, state = model.fingerprint, torch.random.get_rng_state()
    first = wb.LowRank().apply(model, digits)
    assert wb.Model.fingerprint.func(model) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert wb.LowRank().apply(model, digits, seed=3).fingerprint == first.fingerprint
    assert first.changes == ("factorised",) and first.origin is model
    with torch.inference_mode():
        inside = wb.LowRank().apply(model, digits)
    assert not any(p.is_inference() for p in inside.module.parameters())


def test_a_preview_has_the_layers_that_apply_gives(digits):
    model = wb.load("lenet5")
    told = wb.LowRank().preview(model)
    assert (
        dict(told.module.named_modules()).keys()
        == dict(wb.LowRank().apply(model, digits).module.named_modules()).keys()
    )
    wb.LowRank(layers={"conv2.0": 2}).check(told)


def test_later_steps_and_a_rebuild_take_the_factors_as_layers(digits):
    model = wb.load("lenet5")
    low = wb.LowRank(energy=0.8).apply(model, digits)
    tuned = wb.Finetune(epochs=1).apply(low, digits)
    pruned = wb.Prune(0.5, round_to=1).apply(tuned, digits)
    assert pruned.parameters < low.parameters < model.parameters
    twice = wb.LowRank(ratio=0.3).apply(wb.Prune(0.5).apply(model, digits), digits)
    for result in (pruned, twice):
        edits = json.loads(json.dumps(result.edits))
        rebuilt = structure.rebuild(model.module, edits, result.module.state_dict())
        assert repr(rebuilt) == repr(result.module)
        with torch.no_grad():
            assert torch.equal(rebuilt(model.example["x"]), result.module(model.example["x"]))
    assert wb.Quantize("int8").apply(tuned, digits).precision == "int8"


def test_a_study_gives_back_the_same_weights_and_records(tmp_path, digits):
    steps = [wb.LowRank(energy=0.8)]
    with wb.Study(wb.load("lenet5"), digits, tmp_path) as study:
        first = study.run(steps, on=wb.Eager(threads=1)).model()
    with wb.Study(wb.load("lenet5"), digits, tmp_path) as study:
        again = study.run(steps, on=wb.Eager(threads=1)).model()
    assert again.fingerprint == first.fingerprint and again.module is not first.module
    assert again.records == first.records and len(first.records) == 1


def test_torchs_fused_encoder_layers_compute_with_the_factors():
    layer = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.encoder(x, src_key_padding_mask=torch.zeros(x.shape[:2]).bool()).mean(1))

    model = wb.load(seeded(Net), inputs=torch.zeros(2, 5, 16))
    result = wb.LowRank(ratio=0.5).apply(model, task_for(model))
    low = result.module.encoder.layers[0]
    # the same weights multiplied out, in the network as it was
    for path in [name for name, row in rows(result).items() if row["replaced"]]:
        first, second = result.module.get_submodule(path)
        with torch.no_grad():
            model.module.get_submodule(path).weight.copy_(second.weight @ first.weight)
    assert isinstance(low.linear1, nn.Sequential)
    torch.testing.assert_close(outputs(result), outputs(model), rtol=0, atol=1e-5)
    rebuilt = structure.rebuild(model.module, result.edits, result.module.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(torch.ones(2, 5, 16)), result.module(torch.ones(2, 5, 16)))


class FakeEngine:
    """Stands for a compiled layer; `fake_latency` says how long it took."""

    def __init__(self, model: wb.Model):
        self.module = model.module

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __call__(self, x):
        raise AssertionError("its time is given, it is not run")


@pytest.fixture
def timed_as(monkeypatch):
    """Engines that are not compiled, and latencies by width of a pair's waist; 0 stands for the layer itself."""

    class Backend:
        def compile(self, model):
            return FakeEngine(model)

    def given(times_ms: dict[int, float]):
        def latency(calls, *, progress):
            found = []
            for call in calls:
                module = call.func.module
                t = times_ms[module[0].out_features if isinstance(module, nn.Sequential) else 0]
                # five blocks that scatter by a thousandth
                found.append(measure.Latency(t, t, (t, t), (t, t * 1.001, t * 0.999, t, t), False))
            return found

        monkeypatch.setattr("workbench.compression._waist.OnnxRuntime", Backend)
        monkeypatch.setattr("workbench.compression._waist.latency", latency)

    return given


@pytest.mark.parametrize(
    ("times_ms", "rank"),
    [
        ({0: 2.0, 20: 1.0, 24: 1.4, 32: 1.5}, 20),  # the rank asked for is the fastest
        ({0: 2.0, 20: 1.0, 24: 1.0, 32: 1.0}, 32),  # all the same: the one that keeps most
        ({0: 2.0, 20: 1.3, 24: 1.0, 32: 1.4}, 24),
    ],
)
def test_a_measured_rank_is_the_largest_of_the_fastest(timed_as, times_ms, rank):
    model = seeded(lambda: plain(nn.Linear(6, 80), nn.ReLU(), nn.Linear(80, 80), nn.ReLU(), nn.Linear(80, 3)))
    timed_as({**times_ms, 2: 4.0, 1: 4.0})
    result = wb.LowRank(ratio=0.25, measured=True).apply(model, task_for(model))
    row = rows(result)["2"]
    assert result.module[2][0].out_features == row["rank"] == rank
    assert (row["layer_ms"], row["pair_ms"]) == (2.0, times_ms[rank])
    assert row["speedup"] == pytest.approx(2.0 / times_ms[rank], rel=1e-2)
    assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]


def test_a_layer_that_is_not_really_faster_is_left(timed_as):
    model = seeded(lambda: plain(nn.Linear(6, 80), nn.ReLU(), nn.Linear(80, 80), nn.ReLU(), nn.Linear(80, 3)))
    timed_as({0: 2.0, 20: 1.0, 24: 1.0, 32: 1.0, 2: 2.0, 1: 4.0})
    result = wb.LowRank(ratio=0.25, measured=True).apply(model, task_for(model))
    told = rows(result)
    assert [told[name]["replaced"] for name in ("0", "2", "4")] == [False, True, False]
    assert told["0"]["reason"] == "not faster at rank 2: 1.00 × (95 % from 1.00 to 1.00)"
    assert told["4"]["speedup"] == pytest.approx(0.5, rel=1e-2)
    timed_as({0: 2.0, 20: 3.0, 24: 3.0, 32: 3.0, 2: 2.0, 1: 4.0})
    with pytest.raises(StepError, match="no layer of plain would gain \\(0: not faster at rank 2"):
        wb.LowRank(ratio=0.25, measured=True).apply(model, task_for(model))


def test_a_rank_given_by_hand_is_timed_alone_and_kept(timed_as):
    model = seeded(lambda: plain(nn.Linear(6, 80), nn.ReLU(), nn.Linear(80, 80)))
    timed_as({0: 2.0, 5: 1.0})
    result = wb.LowRank(layers={"2": 5}, measured=True).apply(model, task_for(model))
    assert rows(result)["2"]["rank"] == 5 and rows(result)["0"]["reason"] == "not among the layers given"
    assert rows(result)["0"]["layer_ms"] is None


def test_layers_are_really_timed_on_onnx_runtime():
    layer = seeded(lambda: nn.Linear(64, 64))
    found = _factors.decompose(layer, "linear")
    choice = _factors.Choice("fc", "", 64 * 64, found, 4, 128.0, (64,))
    timed = _waist.fastest(layer, choice, (), SILENT)
    assert timed.rank == 4 and set(timed.times) == set(_factors.TIMES)
    assert min(timed.times.values()) > 0
    assert (timed.reason == "") == (timed.times["speedup_low"] > 1)


def test_a_step_is_the_same_after_json_and_after_python():
    for step, label, python in [
        (wb.LowRank(), "Low rank, 90 % energy", "wb.LowRank()"),
        (wb.LowRank(0.8, split="channel"), "Low rank, 80 % energy, channel", "wb.LowRank(0.8, split='channel')"),
        (wb.LowRank(ratio=0.25, measured=True), "Low rank, 25 % of full rank, measured", None),
        (wb.LowRank(layers={"fc1": 8}), "Low rank, 1 layer", "wb.LowRank(layers={'fc1': 8})"),
    ]:
        assert step.label == label
        assert python in (None, step.to_python())
        assert eval(step.to_python(), {"wb": wb}) == step
        assert step_from_dict(json.loads(json.dumps(step.to_dict()))) == step


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"energy": 1.0}, "energy is 1.0.*above 0 and below 1"),
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"split": "channels"}, "Did you mean 'channel'"),
        ({"measured": 1}, "measured is 1; True or False"),
        ({"layers": {"fc1": 0}}, "rank of fc1 is 0.*at least 1"),
        ({"layers": {"fc1": 4}, "ratio": 0.5}, "ratio 0.5 and ranks by layer.*give one of them"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, words):
    with pytest.raises(StepError, match=words):
        wb.LowRank(**settings)


def test_what_cannot_be_factorised_is_refused_before_work(digits):
    model = wb.load("lenet5")
    with pytest.raises(StepError, match="no layer 'fc11' among the layers it can factorise. Did you mean 'fc1'"):
        wb.LowRank(layers={"fc11": 8}).check(model)
    with pytest.raises(StepError, match="rank of 85 for fc2 is above its full rank, 84"):
        wb.LowRank(layers={"fc2": 85}).check(model)
    with pytest.raises(StepError, match="ONNX graph only"):
        wb.LowRank().check(wb.Model("graph", model.example, graph=wb.load("mlp").onnx()))
    with pytest.raises(StepError, match="zero would come back.*wb.LowRank\\(\\), wb.Prune"):
        wb.LowRank().check(wb.Prune(0.5, granularity="weight").apply(model, digits))
    wb.LowRank().check(wb.Prune(0.5).apply(model, digits))
    with pytest.raises(StepError, match="shared values.*wb.LowRank\\(\\), wb.Cluster"):
        wb.LowRank().check(model.changed("clustered", module=model.module))
    with pytest.raises(StepError, match="shows none"):
        wb.LowRank().check(plain(nn.BatchNorm1d(6)))


def test_a_step_that_gains_nothing_is_an_error_with_the_ranks_that_would():
    model = seeded(lambda: plain(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)))
    with pytest.raises(StepError) as caught:
        wb.LowRank(ratio=0.9).apply(model, task_for(model))
    assert "no layer of plain would gain" in str(caught.value)
    assert "0: rank 4 saves no multiply-accumulates; at most 2 would" in str(caught.value)
    assert wb.LowRank(ratio=0.9).preview(model).changes == ("factorised",)


def test_progress_runs_to_the_end_and_a_cancel_stops(digits):
    seen = []
    wb.LowRank().apply(wb.load("lenet5"), digits, progress=on_progress(lambda share, _: seen.append(share)))
    assert seen == sorted(seen) and seen[-1] == 1.0 and len(seen) > 5

    def stop(share, message):
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        wb.LowRank().apply(wb.load("lenet5"), digits, progress=on_progress(stop))
