"""Clipping cuts off what lies beyond the bound and nothing else, and says what that does to rounding."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import workbench as wb
from workbench.compression import step_from_dict
from workbench.errors import Cancelled, StepError
from workbench.jobs import on_progress


def load(module: nn.Module, *shape: int) -> wb.Model:
    return wb.load(module, inputs=torch.zeros(2, *shape))


def linear(weight: np.ndarray | list) -> wb.Model:
    weight = torch.tensor(np.asarray(weight, np.float32))
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
    return load(nn.Sequential(layer), weight.shape[1])


def network() -> wb.Model:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
    return load(nn.Sequential(*layers), 2, 8, 8)


def weight(model: wb.Model, layer: str = "0") -> np.ndarray:
    return model.module.get_submodule(layer).weight.detach().numpy()


def heavy_tailed(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(3, shape).astype(np.float32)


def rounded(w: np.ndarray, bits: int, axis: int | None) -> np.ndarray:
    """Symmetric, to nearest, one scale for all or one for each index of `axis`."""
    most = 2 ** (bits - 1) - 1
    others = None if axis is None else tuple(i for i in range(w.ndim) if i != axis)
    scale = np.abs(w.astype(np.float64)).max(axis=others, keepdims=True) / most
    return np.round(w / scale) * scale


# --- the bound


def test_an_absolute_bound_is_the_value_itself_and_nothing_within_it_moves():
    clipped = wb.Clip("absolute", 1.5).apply(linear([[-4, -1.5, 0.25], [0, 1, 2]]), None)
    assert weight(clipped).tolist() == [[-1.5, -1.5, 0.25], [0, 1, 1.5]]


@pytest.mark.parametrize("scope", ["layer", "channel"])
@pytest.mark.parametrize(
    ("method", "value", "bound"),
    [
        ("percentile", 99, lambda w: np.percentile(np.abs(w), 99)),
        ("percentile", 87.5, lambda w: np.percentile(np.abs(w), 87.5)),
        ("std", 2, lambda w: 2 * np.sqrt(np.mean(np.square(w)))),
        ("absolute", 1.25, lambda w: 1.25),
    ],
)
def test_the_bound_is_numpys_of_the_layer_or_of_each_channel(method: str, value: float, scope: str, bound):
    w = heavy_tailed(6, 200)
    clipped = wb.Clip(method, value, scope).apply(linear(w), None)
    bounds = np.array([[bound(row)] for row in w.astype(np.float64)]) if scope == "channel" else bound(w)
    np.testing.assert_allclose(weight(clipped), np.clip(w, -bounds, bounds), rtol=1e-6)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("scope", ["layer", "channel"])
def test_the_bound_by_error_is_the_best_of_a_search(scope: str, bits: int):
    w = heavy_tailed(4, 300)
    clipped = wb.Clip("mse", bits, scope).apply(linear(w), None)
    groups = (4, 300) if scope == "channel" else (1, 1200)
    for before, after in zip(w.reshape(groups), weight(clipped).reshape(groups), strict=True):
        tried = [np.clip(before, -b, b) for b in np.linspace(0.01, 1, 100) * np.abs(before).max()]
        errors = [np.square(rounded(t, bits, None) - before).mean() for t in tried]
        assert np.square(rounded(after, bits, None) - before).mean() <= min(errors) * (1 + 1e-5)
        assert np.abs(after).max() < np.abs(before).max()


def test_pruned_weights_do_not_move_the_bound_and_stay_zero():
    w = heavy_tailed(4, 200)
    sparse = np.concatenate([w, np.zeros((4, 1800), np.float32)], axis=1)
    for step in (wb.Clip("percentile", 95), wb.Clip("std", 2, "channel"), wb.Clip("percentile", 95, "channel")):
        dense = weight(step.apply(linear(w), None))
        clipped = weight(step.apply(linear(sparse), None))
        np.testing.assert_allclose(clipped[:, :200], dense, rtol=1e-6)
        assert not clipped[:, 200:].any()


def test_shared_values_stay_shared_and_merge_only_at_the_bound():
    values = np.array([-3, -1, 0.5, 1, 2, 4], np.float32)
    which = np.random.default_rng(0).integers(0, 6, (8, 50))
    clipped = weight(wb.Clip("absolute", 1.5).apply(linear(values[which]), None))
    assert np.array_equal(clipped, np.array([-1.5, -1, 0.5, 1, 1.5, 1.5], np.float32)[which])


def test_layers_of_their_own_value_take_it_and_the_others_the_common_one():
    model = network()
    clipped = wb.Clip("absolute", 0.05, layers={"3": 0.01}).apply(model, None)
    assert np.array_equal(weight(clipped, "0"), np.clip(weight(model, "0"), -np.float32(0.05), np.float32(0.05)))
    assert np.array_equal(weight(clipped, "3"), np.clip(weight(model, "3"), -np.float32(0.01), np.float32(0.01)))


@pytest.mark.parametrize("groups", [1, 2])
def test_channels_of_a_transposed_convolution_are_its_outputs(groups: int):
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups)
    w = layer.weight.detach().numpy().copy()  # (inputs, outputs of a group, 3, 3)
    clipped = weight(wb.Clip("std", 1, "channel").apply(load(nn.Sequential(layer), 4, 5, 5), None))
    for group in np.split(np.arange(4), groups):
        for output in range(6 // groups):
            channel = w[group, output]
            bound = np.sqrt(np.square(channel, dtype=np.float64).mean())
            np.testing.assert_allclose(clipped[group, output], np.clip(channel, -bound, bound), rtol=1e-6)


def test_a_weight_that_two_layers_share_is_clipped_once_and_biases_stay():
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    second.weight = first.weight
    clipped = wb.Clip("percentile", 80).apply(load(nn.Sequential(first, second), 5), None)
    assert clipped.module[0].weight is clipped.module[1].weight
    assert [row["layer"] for row in clipped.records[0].rows] == ["0"]
    assert torch.equal(clipped.module[1].bias, second.bias)


# --- what is recorded


def test_the_record_says_what_was_cut_off_and_how_far_the_weights_moved():
    w = heavy_tailed(6, 200)
    record = wb.Clip("percentile", 95).apply(linear(w), None).records[0]
    bound = np.percentile(np.abs(w.astype(np.float64)), 95)
    noise = np.square(w - np.clip(w, -bound, bound), dtype=np.float64).sum()
    assert record.step == "Clip at the 95 percentile" and record.title == "clipping, by layer"
    (row,) = record.rows
    assert row.pop("layer") == "0"
    assert row == pytest.approx(
        {
            "largest_weight": float(np.abs(w).max()),
            "smallest_bound": bound,
            "largest_bound": bound,
            "clipped_share": 0.05,
            "weight_sqnr_db": 10 * math.log10(np.square(w, dtype=np.float64).sum() / noise),
        },
        rel=1e-5,
    )


def test_the_record_says_what_clipping_does_to_the_error_of_rounding():
    w = heavy_tailed(6, 200)
    clipped = wb.Clip("percentile", 99).apply(linear(w), None)
    rows = clipped.records[1].frame().set_index(["grid", "bits"])
    assert sorted(rows.index) == [("per channel", 4), ("per channel", 8), ("per layer", 4), ("per layer", 8)]
    for (grid, bits), row in rows.iterrows():
        axis = 0 if grid == "per channel" else None
        assert row["mse_before"] == pytest.approx(np.square(rounded(w, bits, axis) - w).mean(), rel=1e-4)
        assert row["mse_after"] == pytest.approx(np.square(rounded(weight(clipped), bits, axis) - w).mean(), rel=1e-4)


def test_an_outlier_costs_a_coarse_grid_more_than_clipping_it():
    w = np.random.default_rng(0).normal(size=(8, 500)).astype(np.float32)
    w[0, 0] = 8
    rows = wb.Clip("std", 3.5).apply(linear(w), None).records[1].frame().set_index(["grid", "bits"])
    assert rows.loc[("per layer", 4), "mse_after"] < 0.5 * rows.loc[("per layer", 4), "mse_before"]
    assert rows.loc[("per layer", 8), "mse_after"] > rows.loc[("per layer", 8), "mse_before"]


def test_a_layer_without_anything_beyond_its_bound_is_recorded_as_it_is():
    model = network()
    clipped = wb.Clip("absolute", 0.1).apply(model, None)  # the linear layer's weights all lie within
    rows = {row["layer"]: row for row in clipped.records[0].rows}
    assert rows["3"]["clipped_share"] == 0 and rows["3"]["weight_sqnr_db"] is None
    assert rows["0"]["clipped_share"] > 0
    assert np.array_equal(weight(clipped, "3"), weight(model, "3"))


# --- a step like the others

STEPS = [
    (wb.Clip(), "Clip at the 99.9 percentile", "wb.Clip()"),
    (wb.Clip("std", 3), "Clip at 3 standard deviations", "wb.Clip('std', value=3)"),
    (wb.Clip("absolute", 0.05, "channel"), "Clip at 0.05 by channel", None),
    (wb.Clip("mse", 4, layers={"0": 6, "3": 5}), "Clip for 4 bits, 2 layers apart", None),
]


@pytest.mark.parametrize(("step", "label", "python"), STEPS)
def test_a_clip_is_the_same_after_json_and_after_python(step: wb.Clip, label: str, python: str | None):
    assert step.label == label
    assert step_from_dict(json.loads(json.dumps(step.to_dict()))) == step
    assert eval(step.to_python(), {"wb": wb}) == step
    assert hash(step_from_dict(step.to_dict())) == hash(step)
    assert python is None or step.to_python() == python


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_the_given_model_is_left_alone_and_the_same_call_gives_the_same_bits(mode):
    model = network()
    before, origin = {k: v.clone() for k, v in model.module.state_dict().items()}, model.fingerprint
    with mode():
        clipped = [wb.Clip("std", 1.5).apply(model, None, seed=seed) for seed in (0, 1)]
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())
    assert clipped[0].fingerprint == clipped[1].fingerprint != origin
    assert clipped[0].changes == ("clipped",) and clipped[0].origin is model
    assert not clipped[0].module.training and not clipped[0].module[0].weight.is_inference()
    clipped[0].module(torch.randn(2, 2, 8, 8)).sum().backward()


def test_a_study_finds_the_clipped_weights_and_records_again(tmp_path, digits):
    step = wb.Clip("mse", 4, "channel")
    with wb.Study(wb.load("lenet5"), digits, store=tmp_path / "s") as study:
        first = study.run([step], on=wb.Eager(threads=1)).model()
    with wb.Study(wb.load("lenet5"), digits, store=tmp_path / "s") as study:
        (candidate,) = study.candidates
        again = candidate.model()
    assert again.fingerprint == first.fingerprint and again.records == first.records
    assert again.fingerprint == step.apply(wb.load("lenet5"), digits).fingerprint


@pytest.mark.parametrize("name", ["lenet5", "lenet300", "mlp", "cifarnet", "resnet20"])
def test_networks_of_the_zoo_are_clipped_and_still_run(name: str):
    model = wb.load(name)
    clipped = wb.Clip().apply(model, None)
    output = clipped.run_module(*clipped.example.values())
    assert output.shape == (2, 10) and bool(output.isfinite().all())
    assert clipped.parameters == model.parameters


def test_clipping_goes_before_and_after_the_other_steps(digits):
    model = wb.load("lenet5")
    pruned = wb.Prune(0.5, granularity="weight").apply(model, digits)
    clipped = wb.Clip("std", 2).apply(pruned, digits)
    zeros = {k: v == 0 for k, v in pruned.module.state_dict().items() if v.dim() > 1}
    assert all(torch.equal(clipped.module.state_dict()[k] == 0, zero) for k, zero in zeros.items())
    tuned = wb.Finetune(epochs=1, batch_size=256).apply(clipped, digits)
    assert wb.Quantize("int8").apply(tuned, digits).precision == "int8"


def test_it_can_be_cancelled():
    def stop(share: float, _: str) -> None:
        if share > 0:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        wb.Clip().apply(network(), None, progress=on_progress(stop))


# --- refusals


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: wb.Clip("percentil"), ["no method 'percentil'", "Did you mean 'percentile'?"]),
        (lambda: wb.Clip(scope="row"), ["no scope 'row'", "channel, layer"]),
        (lambda: wb.Clip(value=100), ["value is 100", "above 0 and below 100"]),
        (lambda: wb.Clip("std", 0), ["value is 0", "above 0"]),
        (lambda: wb.Clip("absolute", math.inf), ["value is inf"]),
        (lambda: wb.Clip("absolute", "big"), ["value is 'big'"]),
        (lambda: wb.Clip("mse"), ["99.9 bits for Clip's value", "a whole number from 2 to 16"]),
        (lambda: wb.Clip("mse", 4, layers={"a": 1}), ["1 bits for Clip's layers['a']"]),
        (lambda: wb.Clip(layers={"a": 0}), ["layers['a'] is 0"]),
        (lambda: wb.Clip(layers=3), ["value per layer"]),
    ],
)
def test_a_setting_out_of_range_is_refused_with_the_range(make, words: list[str]):
    with pytest.raises(StepError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


EVEN = [[1, -1, 1], [-1, 1, 1]]


@pytest.mark.parametrize(
    ("step", "model", "words"),
    [
        (wb.Clip("absolute", 9), [[1, 2], [3, 8]], ["no weight of any layer", "below 8, where the largest"]),
        (wb.Clip("std", 9), [[1, 1], [1, 5]], ["no weight of any layer", f"below {5 / math.sqrt(7):.4g}"]),
        (wb.Clip("mse", 8), EVEN, ["no weight of any layer", "fewer bits"]),
        (wb.Clip("percentile", 90), EVEN, ["no weight of any layer", "a lower percentile"]),
        (wb.Clip("absolute", 1), [[2, 0], [3, 8]], ["all 3 weights of 0", "above 2, its smallest", "layers={'0': …}"]),
        (wb.Clip("std", 0.1), [[2, 3], [3, 8]], ["all 4 weights of 0", "much larger"]),
        (wb.Clip("absolute", 1, layers={"0": 9}), [[1, 2], [3, 8]], ["no weight of 0 lies", "below 8"]),
        (wb.Clip(layers={"fc": 90}), EVEN, ["no layer 'fc'", "Accepted: 0"]),
        (wb.Clip("absolute", 1), [[0, 0], [0, 0]], ["no weight of any layer"]),
    ],
)
def test_a_bound_that_clips_nothing_or_everything_is_refused_with_what_to_give(step, model, words: list[str]):
    with pytest.raises(StepError) as caught:
        step.apply(linear(model), None)
    for word in words:
        assert word in str(caught.value)


def test_a_quantised_model_and_one_without_layers_are_refused(digits):
    with pytest.raises(StepError, match="needs float32 weights"):
        wb.Clip().check(wb.Quantize("fp16").apply(wb.load("lenet5"), digits))
    with pytest.raises(StepError, match="works on torch's own convolutions and linear layers"):
        wb.Clip().check(load(nn.Sequential(nn.BatchNorm1d(4)), 4))


# --- the classic case of small weights


def test_a_layer_of_1024_units_loses_the_eighty_percent_of_its_weights_under_a_thousandth():
    rng = np.random.default_rng(0)
    small = rng.permutation(np.arange(1024 * 125) < 0.8 * 1024 * 125).reshape(1024, 125)
    large = rng.choice([-1, 1], small.shape) * rng.uniform(0.01, 0.1, small.shape)
    w = np.where(small, rng.uniform(-0.000999, 0.000999, small.shape), large).astype(np.float32)
    model = linear(w)
    pruned = wb.Prune(threshold=0.001, granularity="weight").apply(model, None)
    assert np.array_equal(weight(pruned), np.where(small, 0, w))
    assert int((weight(pruned) == 0).sum()) == 102_400
    x = torch.from_numpy(rng.normal(size=(64, 125)).astype(np.float32))
    with torch.no_grad():
        before, after = model.run_module(x), pruned.run_module(x)
    # at worst every weight that went had the largest magnitude and the sign of its input
    assert bool(((before - after).abs() <= 0.001 * x.abs().sum(1, keepdim=True)).all())
    assert float((before - after).square().mean().sqrt()) < 0.03 * float(before.square().mean().sqrt())
