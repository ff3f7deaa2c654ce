"""Channels that go: ranked by each importance and scope, by layer, by a threshold, in rounds, and what is recorded."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch_pruning
from _tiny import Memory, blobs, mlp
from torch import nn

import workbench as wb
from workbench.compression import _widths
from workbench.compression._channels import Channels
from workbench.compression._ranking import Candidate, Rule, dropped
from workbench.compression._rounds import epochs_of_rounds
from workbench.compression._surgery import Surgery
from workbench.errors import Cancelled, StepError
from workbench.jobs import on_progress
from workbench.study import states


def load(module: nn.Module, *shape: int) -> wb.Model:
    return wb.load(module, inputs=torch.zeros(2, *shape))


def kept(model: wb.Model, layer: str) -> list[int]:
    """Channels of the untouched layer that are left."""
    part = model.module.get_submodule(layer)
    return list(getattr(part, "kept_channels", range(part.weight.shape[0])))


def two(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


def conv() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6 * 16, 3)
    )


# --- by what they are ranked


def test_batch_norm_scale_decides_and_layers_without_one_stay_whole():
    module = conv()
    with torch.no_grad():
        module[1].weight.copy_(torch.tensor([5.0, 0.1, -4.0, 0.2, 3.0, -0.3, 2.0, 0.4]))
    pruned = wb.Prune(0.5, importance="bn", round_to=1).apply(load(module, 3, 8, 8), None)
    assert kept(pruned, "0") == [0, 2, 4, 6] and kept(pruned, "3") == list(range(6))
    notes = {row["layer"]: row["note"] for row in pruned.records[0].rows}
    assert notes == {"0": "", "3": "no batch norm follows it", "5": "it feeds the output directly"}
    with pytest.raises(StepError, match="no batch norm follows it"):
        wb.Prune(0.5, importance="bn").apply(load(two(), 6), None)
    with pytest.raises(StepError, match="Layer 3 of .* cannot lose a channel: no batch norm follows it"):
        wb.Prune(importance="bn", layers={"3": 0.5}).apply(load(module, 3, 8, 8), None)


def test_fpgm_drops_the_filters_the_others_stand_in_for_and_knows_opposites_apart():
    module = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.9, 0.1], [9.0, 9.0]]))
        module[2].weight.fill_(1.0)
    pruned = wb.Prune(0.25, importance="fpgm", round_to=1).apply(load(module, 2), None)
    rows = module[0].weight.detach().numpy()
    distances = np.linalg.norm(rows[:, None] - rows[None], axis=2).sum(1)
    assert kept(pruned, "0") == sorted(set(range(4)) - {int(distances.argmin())}) == [0, 1, 3]


def test_lamp_drops_the_channels_of_least_norm_within_a_layer():
    module = two()
    pruned = wb.Prune(0.5, importance="lamp", round_to=1).apply(load(module, 6), None)
    plain = wb.Prune(0.5, round_to=1).apply(load(module, 6), None)
    assert kept(pruned, "0") == kept(plain, "0")


def test_taylor_drops_the_channels_the_loss_does_not_depend_on():
    module, task = two(), blobs()
    with torch.no_grad():  # large, and of no consequence
        module[0].weight[:4] *= 3
        module[0].bias[:4] = 30.0
        module[2].weight[:, :4] = 1e-6
    pruned = wb.Prune(0.5, importance="taylor", round_to=1, layers={"2": 0}).apply(load(module, 6), task)
    assert kept(pruned, "0") == [4, 5, 6, 7]
    assert all(parameter.grad is None for parameter in pruned.module.parameters())


def test_taylor_is_weight_times_gradient_over_what_the_channel_runs_through():
    module, task = two(), blobs()
    pruned = wb.Prune(0.5, importance="taylor", round_to=1, layers={"2": 0}).apply(load(module, 6), task)
    x, y = task.inputs("calibration", 8)[0], task.labels("calibration", 8)
    nn.functional.cross_entropy(module(torch.from_numpy(x)), torch.from_numpy(y)).backward()
    first, second = ((layer.weight * layer.weight.grad).abs() for layer in (module[0], module[2]))
    order = (first.sum(1) + second.sum(0)).argsort()
    assert kept(pruned, "0") == sorted(order[4:].tolist())


def test_chance_follows_the_seed():
    model = load(two(32), 6)
    step = wb.Prune(0.5, importance="random")
    assert kept(step.apply(model, None, seed=1), "0") == kept(step.apply(model, None, seed=1), "0")
    assert kept(step.apply(model, None, seed=1), "0") != kept(step.apply(model, None, seed=2), "0")


# --- among whom


def test_units_are_dropped_by_hand_counts():
    def group(name: str, scores: list[float], likeness: str = "", channels: int = 1) -> Candidate:
        return Candidate(name, (name,), torch.tensor(scores), len(scores), channels, likeness)

    a, b, c = group("a", [1, 2, 3, 4], "x"), group("b", [5, 6, 7, 8], "x"), group("c", [0.1, 0.2, 0.3, 0.4], "y")
    assert dropped([a, b, c], Rule(0.5)) == {"a": [0, 1], "b": [0, 1], "c": [0, 1]}
    # 12 channels, 6 go: all of c, which keeps one, and 1 and 2 of a
    assert dropped([a, b, c], Rule(0.5, scope="global")) == {"a": [0, 1], "c": [0, 1, 2]}
    # a with b, whose first four are a's and which keeps one; c with itself
    assert dropped([a, b, c], Rule(0.5, scope="isomorphic")) == {"a": [0, 1, 2], "c": [0, 1]}
    assert dropped([a, b, c], Rule(0.5, layers={"b": 0.25, "c": 0.0})) == {"a": [0, 1], "b": [0]}
    assert dropped([a, b], Rule(0.5), share=0.5) == {"a": [0], "b": [0]}
    assert dropped([group("d", [3, 1], channels=4)], Rule(0.5, round_to=4)) == {"d": [1]}


def test_isomorphic_ranking_compares_blocks_of_one_shape_only():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)
            self.c, self.norm, self.d = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

        def forward(self, x):
            return self.d(self.norm(self.c(self.b(self.a(x).relu()).relu())).relu())

    likeness = {name: group.likeness for name, group in Surgery(load(Net(), 6)).groups.items()}
    assert likeness["a"] == likeness["b"] != likeness["c"]


# --- which layers


def test_a_ratio_by_layer_is_that_layers_and_zero_leaves_it_whole():
    pruned = wb.Prune(0.5, round_to=1, layers={"0": 0.25}).apply(load(two(), 6), None)
    assert (len(kept(pruned, "0")), len(kept(pruned, "2"))) == (6, 4)
    pruned = wb.Prune(0.5, round_to=1, layers={"0": 0}).apply(load(two(), 6), None)
    assert (len(kept(pruned, "0")), len(kept(pruned, "2"))) == (8, 4)
    pruned = wb.Prune(round_to=1, layers={"2": 0.75}).apply(load(two(), 6), None)
    assert (len(kept(pruned, "0")), len(kept(pruned, "2"))) == (8, 2)


def test_layers_that_lose_the_same_channels_share_one_ratio():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.c(self.a(x) + self.b(x))

    model = load(Sum(), 6)
    pruned = wb.Prune(round_to=1, layers={"b": 0.5}).apply(model, None)
    assert kept(pruned, "a") == kept(pruned, "b") and len(kept(pruned, "a")) == 4
    with pytest.raises(StepError, match=r"a and b lose the same channels.*ratios 0.5 and 0.25"):
        wb.Prune(layers={"a": 0.5, "b": 0.25}).apply(model, None)


def test_a_layer_that_cannot_be_pruned_or_is_not_there_is_refused():
    model = wb.load("lenet5")
    with pytest.raises(StepError, match="Layer fc3 of lenet5 cannot lose a channel: it feeds the output directly"):
        wb.Prune(layers={"fc3": 0.5}).apply(model, None)
    with pytest.raises(StepError, match=r"no layer 'conv3'.*Did you mean 'conv\d'\? Accepted: conv1, conv2, fc1"):
        wb.Prune(0.5, layers={"conv3": 0.5}).check(model)
    with pytest.raises(StepError, match="no layer 'fc1'.*Accepted: conv1, conv2"):
        wb.Prune(granularity="kernel", layers={"fc1": 0.5}).check(model)


def test_a_threshold_removes_channels_below_that_share_of_their_layers_mean():
    module = nn.Sequential(nn.Linear(1, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0], [2.0], [3.0], [6.0]]))
        module[2].weight.zero_()
    model = load(module, 1)
    # magnitudes over their mean: 1/3, 2/3, 1, 2
    for threshold, left in ((0.5, [1, 2, 3]), (0.9, [2, 3]), (1.5, [3])):
        step = wb.Prune(threshold=threshold, importance="l1", round_to=1)
        assert kept(step.apply(model, None), "0") == left
    with pytest.raises(StepError, match="A threshold of 0.1 removes no channel"):
        wb.Prune(threshold=0.1, importance="l1").apply(model, None)
    assert kept(wb.Prune(threshold=9, importance="l1", round_to=1).apply(model, None), "0") == [3]


# --- in rounds


def test_epochs_are_divided_over_the_rounds():
    assert epochs_of_rounds(6, 3) == [2, 2, 2] and epochs_of_rounds(5, 3) == [1, 2, 2] and epochs_of_rounds(0, 1) == [0]


def test_each_round_is_of_the_width_there_was_at_first():
    model = load(two(64), 6)
    channels, widths = Channels(model, Rule(0.5)), []
    for number in (1, 2, 3):
        model = channels.cut(model, 1 - (1 - number / 3) ** 3)
        widths.append(model.module[0].out_features)
    assert widths == [41, 33, 32]  # 64 × (1 - 0.5 × 19/27), 64 × (1 - 0.5 × 26/27), 32


def test_pruning_in_rounds_trains_between_and_can_be_rebuilt():
    model, task = mlp(), blobs()
    step = wb.Prune(0.5, rounds=2, epochs=3, batch_size=16, round_to=1)
    pruned = step.apply(model, task)
    assert pruned.module[0].out_features == 8 and model.module[0].out_features == 16
    titles = [(record.step, record.title) for record in pruned.records]
    assert titles == [
        ("Prune 50 %, multiples of 1, 2 rounds, 3 epochs, round 1", "training, by epoch"),
        ("Prune 50 %, multiples of 1, 2 rounds, 3 epochs, round 2", "training, by epoch"),
        (step.label, "channels by layer"),
        (step.label, "size"),
    ]
    assert [len(record.rows) for record in pruned.records[:2]] == [1, 2]
    assert step.apply(model, task).fingerprint == pruned.fingerprint
    assert states.unpack(*states.pack(pruned), model).fingerprint == pruned.fingerprint
    once = wb.Prune(0.5, round_to=1).apply(model, task)
    assert pruned.parameters == once.parameters


def test_a_broken_off_round_goes_on_to_the_same_result():
    class Parts(Memory):
        """A checkpoint with a place for each training."""

        def __init__(self) -> None:
            super().__init__()
            self.parts: dict[str, Memory] = {}

        def part(self, name: str) -> Memory:
            return self.parts.setdefault(name, Memory())

    model, task = mlp(), blobs()
    step = wb.Prune(0.5, rounds=2, epochs=4, batch_size=16, round_to=1)
    whole, place = step.apply(model, task), Parts()

    def stop(_: float, words: str) -> None:
        if "round 2" in place.parts and "epoch 2 of 2" in words:
            raise Cancelled("stopped by hand.")

    with pytest.raises(Cancelled):
        step.apply(model, task, progress=on_progress(stop), checkpoint=place)
    before = place.parts["round 1"].saved
    resumed = step.apply(model, task, checkpoint=place)
    assert place.parts["round 1"].saved == before == 2, "the first round must not be trained again"
    assert resumed.fingerprint == whole.fingerprint and resumed.records == whole.records


def test_zeros_stay_zero_in_the_training_between_rounds():
    task = blobs()
    sparse = wb.Prune(0.5, granularity="weight").apply(mlp(), task)
    pruned = wb.Prune(0.5, epochs=2, rounds=2, batch_size=16, round_to=1).apply(sparse, task)
    before = sparse.module[4].weight[:, kept(pruned, "0")]
    assert torch.equal(pruned.module[4].weight == 0, before == 0)


# --- what is recorded, and how wide


def test_the_records_say_what_each_layer_lost_and_what_it_comes_to():
    model = wb.load("lenet5")
    pruned = wb.Prune(0.5, layers={"conv1": 0}).apply(model, None)
    layers, size = (record.rows for record in pruned.records)
    found = {row["layer"]: (row["channels_before"], row["channels_after"]) for row in layers}
    assert found == {"conv1": (6, 6), "conv2": (16, 8), "fc1": (120, 64), "fc2": (84, 40), "fc3": (10, 10)}
    assert size[0] == {"quantity": "parameters", "before": model.parameters, "after": pruned.parameters}
    assert size[1] == {"quantity": "macs", "before": model.macs, "after": pruned.macs}


def test_round_to_zero_takes_the_multiple_that_is_fastest_per_channel(monkeypatch):
    took = {84: 8.4, 56: 5.0, 80: 8.8}  # of fc1 for multiples of 1 and 4, of 8, of 16

    def timed(cases, progress):
        return [took.get(width, 1.0 * width / 10) for case, width in cases]

    monkeypatch.setattr(_widths, "_timed", timed)
    model = load(nn.Sequential(nn.Linear(6, 120), nn.ReLU(), nn.Linear(120, 3)), 6)
    best, rows = _widths.fastest_multiple(model, Rule(0.3))
    # 84 channels exactly, 84 in multiples of 4, 88 of 8, 80 of 16: 0.1, 0.1, 0.1 and 0.11 ms a channel
    assert [row["width"] for row in rows] == [84, 84, 88, 80]
    assert best == 8 and [row["chosen"] for row in rows] == [False, False, True, False]


def test_widths_are_really_timed_and_kept_in_the_record():
    model = load(nn.Sequential(nn.Conv2d(3, 20, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 36, 3)), 3, 8, 8)
    pruned = wb.Prune(0.3, round_to=0).apply(model, None)
    rows = pruned.records[0].rows
    assert pruned.records[0].title == "widths, timed here"
    assert [(row["multiple"], row["width"]) for row in rows] == [(1, 14), (4, 16), (8, 16), (16, 14)]
    assert all(row["latency_ms"] > 0 for row in rows)
    (chosen,) = (row for row in rows if row["chosen"])
    assert pruned.module[0].out_channels == chosen["width"]
    with pytest.raises(StepError, match="threshold, give round_to"):
        wb.Prune(threshold=0.5, round_to=0)


# --- what the library does behind one's back


def test_the_network_is_traced_once(monkeypatch):
    built = []
    build = torch_pruning.DependencyGraph.build_dependency
    monkeypatch.setattr(
        torch_pruning.DependencyGraph, "build_dependency", lambda *a, **k: (built.append(1), build(*a, **k))[1]
    )
    wb.Prune(0.5).apply(wb.load("resnet20"), None)
    assert len(built) == 1


def test_the_library_ignores_types_where_it_wants_instances():
    # why layers that feed the output are found by the graph here, and never named to the library
    ignored = torch_pruning.pruner.BasePruner(
        two(), torch.zeros(2, 6), importance=torch_pruning.importance.MagnitudeImportance(), ignored_layers=[nn.Linear]
    )
    assert ignored.ignored_layers == []


def test_weights_that_two_layers_share_are_not_torn_apart():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.wide = nn.Linear(8, 8), nn.Linear(8, 8)
            self.wide.weight = self.inner.weight
            self.free, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.free(self.wide(self.inner(x).relu()).relu()).relu())

    pruned = wb.Prune(0.5, round_to=1).apply(load(Tied(), 8), None)
    assert pruned.module.wide.weight is pruned.module.inner.weight
    assert pruned.module.free.out_features == 8


# --- what is refused


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: wb.Prune(), ["ratio is 0.0", "above 0 and below 1"]),
        (lambda: wb.Prune(0.5, threshold=0.1), ["ratio", "or a threshold, not both"]),
        (lambda: wb.Prune(threshold=-1), ["threshold is -1", "above 0"]),
        (lambda: wb.Prune(layers={"a": 1.0}), ["the ratio of a is 1.0", "at least 0 and below 1"]),
        (lambda: wb.Prune(layers={"a": 0}), ["every ratio in layers is 0"]),
        (lambda: wb.Prune(layers=[0.5]), ["a value per layer"]),
        (lambda: wb.Prune(0.5, granularity="2:4"), ["2:4 says itself how much goes"]),
        (lambda: wb.Prune(granularity="3:4"), ["granularity '3:4'", "2:4"]),
        (lambda: wb.Prune(0.5, granularity="weight", importance="bn"), ["'bn' does not go with", "l2, l1, random"]),
        (lambda: wb.Prune(granularity="2:4", importance="lamp"), ["'lamp' does not go with granularity '2:4'"]),
        (lambda: wb.Prune(0.5, granularity="head", importance="fpgm"), ["'fpgm' does not go with"]),
        (lambda: wb.Prune(0.5, granularity="weight", scope="isomorphic"), ["'isomorphic' ranks groups of channels"]),
        (lambda: wb.Prune(threshold=0.1, importance="random"), ["no meaning for importance 'random'"]),
        (lambda: wb.Prune(threshold=0.1, granularity="weight", importance="taylor"), ["no meaning", "'l2' or 'l1'"]),
        (lambda: wb.Prune(0.5, rounds=2), ["rounds is 2 with no training", "Give epochs"]),
        (lambda: wb.Prune(0.5, rounds=3, epochs=2), ["3 rounds of channels", "epochs is 2"]),
        (lambda: wb.Prune(0.5, rounds=0), ["rounds is 0", "at least 1"]),
        (lambda: wb.Prune(0.5, epochs=-1), ["epochs is -1", "at least 0"]),
        (lambda: wb.Prune(0.5, learning_rate=0), ["learning_rate is 0"]),
    ],
)
def test_a_setting_out_of_range_is_refused_with_the_range(make, words):
    with pytest.raises(StepError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "step",
    [
        wb.Prune(0.5, importance="taylor", round_to=1),
        wb.Prune(0.5, rounds=2, epochs=2, batch_size=16, round_to=1),
        wb.Prune(0.5, granularity="weight", rounds=2, epochs=2, batch_size=16),
    ],
    ids=["at once", "in rounds", "while training"],
)
def test_progress_runs_from_nothing_to_all_and_a_cancel_stops_it(step):
    model, task, seen = mlp(), blobs(), []
    step.apply(model, task, progress=on_progress(lambda share, _: seen.append(share)))
    assert seen[0] == 0.0 and seen[-1] == 1.0 and seen == sorted(seen)

    def stop(share: float, _: str) -> None:
        if share >= 0.05:
            raise Cancelled("stopped by hand.")

    with pytest.raises(Cancelled):
        step.apply(model, task, progress=on_progress(stop))


def test_nothing_of_the_model_given_is_changed():
    model = mlp()
    state = copy.deepcopy(model.module.state_dict())
    wb.Prune(0.5, epochs=1, importance="taylor", round_to=1).apply(model, blobs())
    assert all(torch.equal(value, state[name]) for name, value in model.module.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.module.modules())
    assert all(parameter.grad is None for parameter in model.module.parameters())
