"""Weights set to zero: the right ones, in the right number, and they stay zero."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from _tiny import Memory, blobs, stop_at
from torch import nn

import workbench as wb
from workbench.compression._ranking import Rule
from workbench.compression._rounds import cubic
from workbench.compression._unstructured import Gradual, Masks, Units, rounds_that_fit
from workbench.errors import Cancelled, StepError


def load(module: nn.Module, *shape: int) -> wb.Model:
    return wb.load(module, inputs=torch.zeros(2, *shape))


def weight(model: wb.Model, layer: str) -> torch.Tensor:
    return model.module.get_submodule(layer).weight.detach()


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4 * 36, 3))


# --- what becomes zero


def test_a_threshold_zeroes_what_is_below_it_and_nothing_else():
    model = load(mlp(), 6)
    pruned = wb.Prune(threshold=0.1, granularity="weight").apply(model, None)
    for layer in ("0", "2"):
        before, after = weight(model, layer), weight(pruned, layer)
        assert torch.equal(after, torch.where(before.abs() < 0.1, 0, before))
        assert 0 < int((after == 0).sum()) < after.numel()


@pytest.mark.parametrize(("importance", "norm"), [("l1", 1), ("l2", 2)])
def test_whole_kernels_of_smallest_norm_become_zero(importance, norm):
    model = load(cnn(), 4, 8, 8)
    pruned = wb.Prune(0.25, granularity="kernel", importance=importance).apply(model, None)
    norms = weight(model, "0").flatten(2).norm(norm, dim=2)
    gone = weight(pruned, "0").flatten(2).eq(0).all(2)
    assert int(gone.sum()) == 8
    assert norms[gone].max() < norms[~gone].min()
    assert torch.equal(weight(pruned, "0")[~gone], weight(model, "0")[~gone])
    assert torch.equal(weight(pruned, "4"), weight(model, "4")), "a linear layer has no kernels"


def test_kernels_below_a_threshold_of_their_norm_become_zero():
    model = load(cnn(), 4, 8, 8)
    norms = weight(model, "0").flatten(2).norm(dim=2)
    limit = float(norms.flatten().sort().values[5:7].mean())
    pruned = wb.Prune(threshold=limit, granularity="kernel").apply(model, None)
    assert torch.equal(weight(pruned, "0").flatten(2).eq(0).all(2), norms < limit)


@pytest.mark.parametrize(("pattern", "kept", "of"), [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8)])
def test_a_pattern_keeps_the_n_largest_of_every_m_along_the_input_axis(pattern, kept, of):
    model = load(nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6 * 36, 2)), 8, 8, 8)
    pruned = wb.Prune(granularity=pattern).apply(model, None)
    before, after = weight(model, "0").numpy(), weight(pruned, "0").numpy()
    for out in range(6):
        for row in range(3):
            for column in range(3):
                for start in range(0, 8, of):
                    place = (out, slice(start, start + of), row, column)
                    largest = np.argsort(-np.abs(before[place]))[:kept]
                    expected = np.zeros(of, np.float32)
                    expected[largest] = before[place][largest]
                    assert np.array_equal(after[place], expected)


def test_a_transposed_convolution_has_its_inputs_on_the_first_axis():
    model = load(nn.Sequential(nn.ConvTranspose2d(4, 3, 2), nn.Flatten(), nn.Linear(27, 2)), 4, 2, 2)
    after = weight(wb.Prune(granularity="2:4").apply(model, None), "0")
    assert bool((after.ne(0).sum(0) == 2).all())


def test_layers_a_pattern_does_not_fit_are_left_and_the_record_says_so():
    pruned = wb.Prune(granularity="2:4").apply(wb.load("lenet5"), None)
    rows = {row["layer"]: row for row in pruned.records[-1].rows}
    assert "1 inputs are no multiple of 4" in rows["conv1"]["note"]
    assert rows["conv1"]["weights_after"] == rows["conv1"]["weights_before"]
    assert rows["fc2"]["note"] == "" and rows["fc2"]["sparsity"] >= 0.5
    with pytest.raises(StepError, match='multiple of 8.*granularity="weight"'):
        wb.Prune(granularity="4:8").apply(load(mlp()[:1], 6), None)


def test_a_ratio_by_layer_overrides_and_zero_leaves_a_layer_whole():
    step = wb.Prune(0.5, granularity="weight", layers={"0": 0.25, "2": 0})
    model = load(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), 8)
    pruned = step.apply(model, None)
    assert [int((weight(pruned, name) == 0).sum()) for name in "012"] == [16, 32, 0]
    alone = wb.Prune(granularity="weight", layers={"1": 0.125}).apply(model, None)
    assert [int((weight(alone, name) == 0).sum()) for name in "012"] == [0, 8, 0]


def test_lamp_ranks_a_weight_by_its_share_of_those_not_smaller():
    module = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 3, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0, 2.0, 3.0]]))  # shares 1/14, 4/13, 1
        module[1].weight.copy_(torch.tensor([[10.0], [11.0], [60.0]]))  # 100/3821, 121/3721, 1
    pruned = wb.Prune(0.5, granularity="weight", importance="lamp", scope="global").apply(load(module, 3), None)
    assert weight(pruned, "0").tolist() == [[0.0, 2.0, 3.0]]
    assert weight(pruned, "1").tolist() == [[0.0], [0.0], [60.0]]


def test_taylor_keeps_the_weights_the_loss_depends_on():
    task, module = blobs(), mlp()
    model = load(module, 6)
    pruned = wb.Prune(0.5, granularity="weight", importance="taylor").apply(model, task)
    x, y = task.inputs("calibration", 8)[0], task.labels("calibration")
    nn.functional.cross_entropy(module(torch.from_numpy(x)), torch.from_numpy(y)).backward()
    for layer in (module[0], module[2]):
        saliency = (layer.weight * layer.weight.grad).abs()
        gone = weight(pruned, "0" if layer is module[0] else "2") == 0
        assert saliency[gone].max() <= saliency[~gone].min() * (1 + 1e-4)


def test_chance_follows_the_seed_and_takes_zeros_first():
    model = load(mlp(), 6)
    step = wb.Prune(0.5, granularity="weight", importance="random")
    first = step.apply(model, None, seed=3)
    assert step.apply(model, None, seed=3).fingerprint == first.fingerprint != step.apply(model, None).fingerprint
    more = wb.Prune(0.75, granularity="weight", importance="random").apply(first, None, seed=8)
    assert not bool(((weight(first, "0") == 0) & (weight(more, "0") != 0)).any())
    assert int((weight(more, "0") == 0).sum()) == 72


def test_a_weight_that_two_layers_share_is_pruned_once():
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    module[2].weight = module[0].weight
    pruned = wb.Prune(0.5, granularity="weight").apply(load(module, 8), None)
    assert pruned.module[2].weight is pruned.module[0].weight
    assert int((weight(pruned, "0") == 0).sum()) == 32
    assert [row["layer"] for row in pruned.records[-1].rows] == ["0"]


def test_the_record_counts_what_is_left():
    pruned = wb.Prune(0.25, granularity="weight").apply(load(mlp(), 6), None)
    again = wb.Prune(0.5, granularity="weight").apply(pruned, None)
    assert [tuple(row.values()) for row in again.records[-1].rows] == [("0", 72, 48, 0.5, ""), ("2", 36, 24, 0.5, "")]


def test_pruning_lenet_in_three_moves_leaves_ever_fewer_weights():
    model, left = wb.load("lenet5"), []
    images = np.random.default_rng(0).normal(size=(48, 1, 28, 28)).astype(np.float32)
    task = wb.Task.from_arrays(images, np.arange(48) % 10, images, np.arange(48) % 10)
    moves = [
        wb.Prune(0.3, granularity="kernel"),
        wb.Finetune(epochs=1),
        wb.Prune(0.5, granularity="weight"),
        wb.Finetune(epochs=1),
        wb.Prune(threshold=0.03, granularity="weight"),
    ]
    for step in moves:
        step.check(model)
        zeros = {name: p == 0 for name, p in model.module.named_parameters()}
        model = step.apply(model, task)
        for name, parameter in model.module.named_parameters():
            if name.endswith("weight") and "pruned" in model.changes and left:
                assert bool((parameter[zeros[name]] == 0).all()), "a zero came back"
        left.append(sum(int(p.count_nonzero()) for p in model.module.parameters() if p.dim() > 1))
    assert left[0] == left[1] > left[2] == left[3] > left[4]


# --- while training


def test_the_schedule_is_the_cubic_of_zhu_and_gupta():
    assert [cubic(k / 4) for k in range(5)] == [0, 1 - 27 / 64, 1 - 8 / 64, 1 - 1 / 64, 1]


def test_masks_are_made_anew_in_each_round_and_never_after_two_thirds():
    module = nn.Sequential(nn.Linear(10, 10))
    masks = Masks(module, Units("weight"), Rule(0.8), 0, dict)
    gradual = Gradual(masks, rounds=4, kept=list)
    zeros = []
    for update in range(30):
        gradual.before_update(update / 30)
        with torch.no_grad():
            module[0].weight.add_(0.01)  # the optimiser knows no masks
            gradual.after_update()
        zeros.append(int((module[0].weight == 0).sum()))
    # of 100 weights 80 go: 1 - (1 - k/4)^3 of them from updates 0, 5, 10, 15 on
    assert zeros == [46] * 5 + [70] * 5 + [79] * 5 + [80] * 15
    assert gradual.settled_from == 0.5


@pytest.mark.parametrize(
    ("step", "zeros"),
    [
        (wb.Prune(0.75, granularity="weight", rounds=3, epochs=3, batch_size=8), [72, 36]),
        (wb.Prune(0.5, granularity="weight", layers={"0": 0.25}, rounds=2, epochs=3, batch_size=8), [24, 24]),
        (wb.Prune(0.5, granularity="weight", importance="taylor", rounds=2, epochs=2, batch_size=8), [48, 24]),
    ],
)
def test_pruning_while_training_ends_at_the_ratio_and_the_rest_has_moved(step, zeros):
    model, task = load(mlp(), 6), blobs()
    pruned = step.apply(model, task)
    assert [int((weight(pruned, layer) == 0).sum()) for layer in ("0", "2")] == zeros
    alive = weight(pruned, "0") != 0
    assert not torch.equal(weight(pruned, "0")[alive], weight(model, "0")[alive])
    assert [record.title for record in pruned.records] == ["training, by epoch", "weight pruning by layer"]
    assert step.apply(model, task).fingerprint == pruned.fingerprint


def test_only_epochs_after_the_last_masks_count_as_the_best():
    pruned = wb.Prune(0.9, granularity="weight", rounds=4, epochs=4, batch_size=8).apply(load(mlp(), 6), blobs())
    kept = [row["kept"] for row in pruned.records[0].rows]
    assert sum(kept) == 1 and not any(kept[:2])  # the fourth masks come half way through


def test_a_pattern_while_training_ends_in_the_pattern():
    model = load(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), 6)
    pruned = wb.Prune(granularity="2:4", rounds=2, epochs=2, batch_size=8).apply(model, blobs())
    assert bool((weight(pruned, "2").unflatten(1, (4, 4)).ne(0).sum(2) == 2).all())
    assert int((weight(pruned, "0") == 0).sum()) == 0


def test_zeros_of_an_earlier_step_stay_zero_while_a_smaller_ratio_trains():
    task = blobs()
    sparse = wb.Prune(0.5, granularity="weight").apply(load(mlp(), 6), task)
    tuned = wb.Prune(0.25, granularity="weight", epochs=1, batch_size=8).apply(sparse, task)
    assert torch.equal(weight(tuned, "0") == 0, weight(sparse, "0") == 0)


def test_values_that_clustering_shares_stay_shared_while_weights_are_pruned():
    task = blobs()
    shared = wb.Cluster(4).apply(load(mlp(), 6), task)
    pruned = wb.Prune(0.4, granularity="weight", rounds=2, epochs=2, batch_size=8).apply(shared, task)
    before, after = weight(shared, "0"), weight(pruned, "0")
    assert int((after == 0).sum()) == round(0.4 * 96)
    for value in before.unique():
        assert len(after[(before == value) & (after != 0)].unique()) <= 1
    assert not set(after.unique().tolist()) & set(before.unique().tolist()), "the shared values have been trained"


def test_a_broken_off_schedule_goes_on_to_the_same_result():
    model, task, place = load(mlp(), 6), blobs(), Memory()
    step = wb.Prune(0.8, granularity="weight", rounds=4, epochs=4, batch_size=16)
    with pytest.raises(Cancelled):
        step.apply(model, task, progress=stop_at("epoch 3 of 4"), checkpoint=place)
    assert place.saved == 2
    resumed = step.apply(model, task, checkpoint=place)
    whole = step.apply(model, task)
    assert resumed.fingerprint == whole.fingerprint and resumed.records == whole.records


def test_rounds_that_do_not_fit_into_the_training_are_refused_before_it():
    assert rounds_that_fit(epochs=2, samples=60, validation=0.1, batch_size=10) == 6
    with pytest.raises(StepError, match="50 rounds do not fit.*at most 1 do"):
        wb.Prune(0.5, granularity="weight", rounds=50, epochs=1).apply(load(mlp(), 6), blobs())


# --- the step as a value


def test_a_study_gives_back_the_same_weights_and_records(tmp_path):
    recipe = [wb.Prune(0.6, granularity="weight", layers={"2": 0.1}, rounds=2, epochs=1, batch_size=8)]
    made = []
    for _ in range(2):
        with wb.Study(load(mlp(), 6), blobs(), store=tmp_path / "store") as study:
            made.append(study.run(recipe, on=wb.Eager()).model())
    assert made[0].fingerprint == made[1].fingerprint
    assert made[0].records == made[1].records and len(made[0].records) == 2


def test_it_survives_json_and_python():
    for step in (
        wb.Prune(granularity="2:4"),
        wb.Prune(threshold=0.01, granularity="weight"),
        wb.Prune(0.5, granularity="kernel", layers={"conv1": 0.1}, rounds=3, epochs=6, learning_rate=1e-3),
    ):
        assert wb.Prune.from_dict(json.loads(json.dumps(step.to_dict()))) == step
        assert eval(step.to_python(), {"wb": wb}) == step
        assert hash(step) == hash(wb.Prune.from_dict(step.to_dict()))
    assert wb.Prune(granularity="2:4").to_python() == "wb.Prune(granularity='2:4')"
