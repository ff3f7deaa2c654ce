"""The training loop: what a plain torch loop gives, the best epoch told apart, and nothing lost by breaking off."""

from __future__ import annotations

import json
import math

import pytest
import torch
from _tiny import Memory, blobs, fails, heard, mlp, stop_at
from torch import nn
from torch.nn import functional

import workbench as wb
from workbench.compression import _training
from workbench.compression._training import Batch, Constraint, KeepZeros, Plan
from workbench.errors import Cancelled, StepError, TrainingDiverged

PLAN = Plan(epochs=4, learning_rate=0.01, batch_size=16)


def trained(model: wb.Model, task: wb.Task, plan: Plan = PLAN, constraints=None, **more) -> wb.Model:
    """The model after training; `constraints` makes them from the module."""
    copy = _training.copied(model)
    made = constraints(copy.module) if constraints else []
    return _training.train(copy, task, plan, step="Train", constraints=made, **more)


def rows(model: wb.Model) -> tuple[dict, ...]:
    return model.records[-1].rows


def held_out(task: wb.Task, share: float = 0.1, seed: int = 0) -> list[int]:
    """The samples held out: the front of the first permutation the seed gives."""
    count = task.count("train")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: round(share * count)].tolist()


class Growing(Constraint):
    """Zeroes ever more of the smallest weights, once and for all: its mask is a state of its own."""

    def __init__(self, module: nn.Module):
        self.weight = module[0].weight
        self.mask = torch.ones_like(self.weight)

    def before_update(self, share: float) -> None:
        kept = self.weight.detach().abs().where(self.mask.bool(), torch.inf)
        wanted = int(0.8 * share * kept.numel()) - int((self.mask == 0).sum())
        if wanted > 0:
            self.mask.view(-1)[kept.flatten().argsort(stable=True)[:wanted]] = 0

    def after_update(self) -> None:
        self.weight.mul_(self.mask)

    def state(self) -> dict:
        return {"mask": self.mask}

    def restore(self, state: dict) -> None:
        self.mask.copy_(state["mask"])


# what is computed


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_it_gives_what_a_plain_torch_loop_gives(optimizer):
    task = blobs()
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    model = wb.load(net, inputs=torch.zeros(2, 6))
    ours = trained(model, task, Plan(3, 0.05, 16, optimizer, weight_decay=0.1, validation=0))
    kinds = {
        "adam": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    }
    x, y = torch.from_numpy(task.inputs("train", 65)[0]), torch.from_numpy(task.labels("train"))
    order = torch.Generator().manual_seed(0)
    used = torch.randperm(65, generator=order).sort().values
    optimiser = kinds[optimizer](net.train().parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 3 * 4)
    means = []
    for _ in range(3):
        shuffled, losses = used[torch.randperm(65, generator=order)], []
        for start in (0, 16, 32, 48):  # the 65th alone is left out
            chosen = shuffled[start : start + 16]
            optimiser.zero_grad()
            loss = functional.cross_entropy(net(x[chosen]), y[chosen])
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        means.append(sum(losses) / 4)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(ours.module.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert [row["loss"] for row in rows(ours)] == pytest.approx(means, rel=1e-5)


def test_a_row_says_what_each_epoch_was():
    model = trained(mlp(), blobs())
    assert [set(row) for row in rows(model)] == [
        {"epoch", "loss", "validation_loss", "validation_accuracy", "learning_rate", "kept"}
    ] * 4
    assert [row["epoch"] for row in rows(model)] == [1, 2, 3, 4]
    cosine = [0.01 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert [row["learning_rate"] for row in rows(model)] == pytest.approx(cosine)
    assert model.records[-1].step == "Train"


def test_the_weights_are_those_of_the_epoch_that_is_most_accurate_on_the_held_out_samples():
    task = blobs(count=130, spread=4.0)
    model = trained(mlp(), task, Plan(12, 0.1, 16, validation=0.3))
    kept = [row for row in rows(model) if row["kept"]]
    best = max(rows(model), key=lambda row: (row["validation_accuracy"], -row["validation_loss"], row["epoch"]))
    assert kept == [best] and best is not rows(model)[-1], "the last epoch must not be the best one for this test"
    chosen = held_out(task, 0.3)
    x, y = torch.from_numpy(task.inputs("train", 130)[0])[chosen], torch.from_numpy(task.labels("train"))[chosen]
    with torch.no_grad():  # batch normalisation too must be as it was in that epoch
        scores = model.module(x)
    assert float((scores.argmax(1) == y).float().mean()) == pytest.approx(best["validation_accuracy"])
    assert float(functional.cross_entropy(scores, y)) == pytest.approx(best["validation_loss"], rel=1e-5)


def test_without_held_out_samples_the_last_epoch_is_taken_and_the_record_is_json():
    model = trained(mlp(), blobs(), Plan(3, 0.01, 16, validation=0))
    assert [row["kept"] for row in rows(model)] == [False, False, True]
    assert {row["validation_loss"] for row in rows(model)} == {None}
    json.dumps(model.records[-1].to_dict(), allow_nan=False)


def test_patience_ends_it_so_many_epochs_after_the_best():
    model = trained(mlp(), blobs(count=130, spread=3.0), Plan(40, 0.1, 16, validation=0.3, patience=3))
    best = next(row["epoch"] for row in rows(model) if row["kept"])
    assert len(rows(model)) == best + 3 < 40


def test_an_epoch_under_a_schedule_is_not_the_best():
    task = blobs(count=130, spread=4.0)
    plan = Plan(12, 0.1, 16, validation=0.3)
    free = next(row["epoch"] for row in rows(trained(mlp(), task, plan)) if row["kept"])
    late = trained(mlp(), task, plan, settled_from=free / 12)
    # the epoch that ends there made its updates before
    assert free < next(row["epoch"] for row in rows(late) if row["kept"])
    assert rows(trained(mlp(), task, plan, settled_from=1.0))[-1]["kept"]


def test_a_constraint_hears_before_each_update_how_much_is_done():
    class Listening(Constraint):
        shares, updates = [], 0

        def before_update(self, share):
            self.shares.append(share)

        def after_update(self):
            assert not torch.is_grad_enabled()
            Listening.updates += 1

    trained(mlp(), blobs(), Plan(2, 0.01, 16, validation=0), constraints=lambda _: [Listening()])
    assert Listening.shares == [n / 8 for n in range(8)] and Listening.updates == 8


def test_helpers_are_trained_along_and_thrown_away():
    projection = nn.Linear(3, 6)
    before = projection.weight.detach().clone()
    seen = []

    def loss(output, batch: Batch):
        seen.append(batch)
        return functional.mse_loss(projection(output), batch.inputs[0])

    model = trained(mlp(), blobs(), Plan(2, 0.01, 16, validation=0), loss=loss, helpers=[projection])
    assert not torch.equal(projection.weight, before)
    assert model.module.state_dict().keys() == mlp().module.state_dict().keys()
    data = torch.from_numpy(blobs().inputs("train", 65)[0])
    assert all(torch.equal(data[batch.indices], batch.inputs[0]) for batch in seen)
    assert sorted(i for batch in seen[:4] for i in batch.indices.tolist()) != sorted(range(64))  # drawn, not in order


def test_tied_and_frozen_parameters_stay_so():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.b.weight = self.a.weight
            self.out.bias.requires_grad_(False)

        def forward(self, x):
            return self.out(self.b(self.a(x).relu()).relu())

    torch.manual_seed(0)
    model = wb.load(Tied(), inputs=torch.zeros(2, 6))
    module = trained(model, blobs()).module
    assert module.a.weight is module.b.weight
    assert not torch.equal(module.a.weight, model.module.a.weight)
    assert torch.equal(module.out.bias, model.module.out.bias)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32_weights():
    seen = set()

    def loss(output, batch):
        seen.add((torch.is_grad_enabled(), output.dtype))
        return functional.cross_entropy(output.float(), batch.labels)

    plan = Plan(2, 0.01, 16, mixed_precision=True)
    model = trained(mlp(), blobs(), plan, loss=loss)
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    assert trained(mlp(), blobs(), plan).fingerprint != trained(mlp(), blobs(), Plan(2, 0.01, 16)).fingerprint


def test_a_validation_share_that_leaves_nothing_is_refused():
    with pytest.raises(StepError, match=r"validation 0\.99 of 10 training samples holds all"):
        trained(mlp(), blobs(count=10), Plan(1, 0.01, validation=0.99))


# what goes wrong


@pytest.mark.parametrize("spoilt", ["loss", "weights"])
def test_a_training_that_diverges_keeps_the_best_epoch_before(spoilt):
    task, calls = blobs(), []

    def loss(output, batch):
        value = functional.cross_entropy(output, batch.labels)
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 3 * 4:  # the last update of epoch 3
            # the root of nothing has no slope: the loss is fine, the weights are not
            value = value * math.nan if spoilt == "loss" else value + (output * 0).sum().sqrt()
        return value

    error = fails(lambda: trained(mlp(), task, loss=loss), TrainingDiverged)
    what = "the loss is nan" if spoilt == "loss" else "'0.weight' holds NaN"
    assert str(error).startswith(f"Train: {what}") and "epoch 3" in str(error)
    assert "learning_rate below 0.01" in str(error)
    kept = [row["epoch"] for row in rows(error.best) if row["kept"]]
    assert f"epoch of Train so far, {kept[0]}" in str(error)
    assert len(rows(error.best)) == 2
    assert all(bool(torch.isfinite(p).all()) for p in error.best.module.parameters())


def test_a_training_that_diverges_at_once_keeps_nothing_and_says_so():
    error = fails(lambda: trained(mlp(), blobs(), loss=lambda o, b: o.sum() * math.inf), TrainingDiverged)
    assert error.best is None and "No epoch of Train was finished" in str(error)


def test_a_cancel_keeps_the_best_epoch_so_far():
    task = blobs()
    error = fails(lambda: trained(mlp(), task, progress=stop_at("epoch 3 of 4")), Cancelled)
    assert str(error).startswith("stopped by hand. The best epoch of Train so far, 2,")
    # nothing of the third epoch is in it: an uninterrupted training that counts the same epochs has the same weights
    assert len(rows(error.best)) == 2
    assert not error.best.module.training
    early = fails(lambda: trained(mlp(), task, progress=stop_at("epoch 1 of 4")), Cancelled)
    assert early.best is None and "No epoch of Train was finished" in str(early)


# going on


CASES = {
    "dropout and batch normalisation": {},
    "SGD": {"plan": Plan(4, 0.01, 16, "sgd")},
    "mixed precision": {"plan": Plan(4, 0.01, 16, mixed_precision=True)},
    "patience": {"plan": Plan(12, 0.1, 16, validation=0.3, patience=3)},
    "zeros": {"constraints": lambda module: [KeepZeros([module[0].weight])]},
    "a mask that grows": {"constraints": lambda module: [Growing(module)]},
}


@pytest.mark.parametrize("epoch", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_training_broken_off_goes_on_to_the_same_bits(case, epoch):
    model, task, settings = mlp(), blobs(count=130, spread=3.0), CASES[case]
    with torch.no_grad():
        model.module[0].weight[:, :3] = 0
    whole = trained(model, task, **settings)
    checkpoint = Memory()
    broken = {**settings, "checkpoint": checkpoint, "progress": stop_at(f"epoch {epoch} of")}
    stop = fails(lambda: trained(model, task, **broken), Cancelled)
    assert f"The same recipe goes on from epoch {epoch}." in str(stop)
    assert checkpoint.saved == epoch - 1
    progress, words = heard()
    torch.manual_seed(99)
    again = trained(model, task, **settings, checkpoint=checkpoint, progress=progress)
    assert again.fingerprint == whole.fingerprint
    assert again.records == whole.records
    epochs = settings.get("plan", PLAN).epochs
    assert words[0] == f"goes on after epoch {epoch - 1} of {epochs}"
    assert words[1] == f"epoch {epoch} of {epochs}"


def test_helpers_go_on_too():
    task = blobs()

    def run(**more):
        torch.manual_seed(5)
        projection = nn.Linear(3, 6)
        trained(
            mlp(), task, loss=lambda o, b: functional.mse_loss(projection(o), b.inputs[0]), helpers=[projection], **more
        )
        return projection.weight

    checkpoint = Memory()
    fails(lambda: run(checkpoint=checkpoint, progress=stop_at("epoch 3 of 4")), Cancelled)
    assert torch.equal(run(checkpoint=checkpoint), run())


def test_a_training_that_had_ended_is_not_done_again():
    checkpoint = Memory()
    done = trained(mlp(), blobs(), checkpoint=checkpoint)
    progress, words = heard()
    again = trained(mlp(), blobs(), checkpoint=checkpoint, progress=progress)
    assert (again.fingerprint, again.records) == (done.fingerprint, done.records)
    assert checkpoint.saved == 4 and not any(words[1:])


def test_a_checkpoint_is_left_alone_by_a_training_that_diverges_and_the_error_says_where_it_goes_on():
    def spoilt(output, batch):
        value = functional.cross_entropy(output, batch.labels)
        return value * math.nan if torch.is_grad_enabled() and next(updates) >= 2 * 4 else value

    checkpoint, updates = Memory(), iter(range(100))
    error = fails(lambda: trained(mlp(), blobs(), loss=spoilt, checkpoint=checkpoint), TrainingDiverged)
    assert "The same recipe goes on from epoch 3 and would diverge there again. Give a learning_rate" in str(error)
    assert checkpoint.saved == 2


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: data[:40] + b"x" + data[41:], lambda data: b"", lambda data: b"nonsense" * 9],
    ids=["cut", "altered", "empty", "nonsense"],
)
def test_a_damaged_checkpoint_is_said_and_the_training_starts_over(damage):
    task, checkpoint = blobs(), Memory()
    fails(lambda: trained(mlp(), task, checkpoint=checkpoint, progress=stop_at("epoch 3 of 4")), Cancelled)
    checkpoint.data = damage(checkpoint.data)
    progress, words = heard()
    assert (
        trained(mlp(), task, checkpoint=checkpoint, progress=progress).fingerprint == trained(mlp(), task).fingerprint
    )
    assert words[0] == "what was saved of this training is damaged: it starts over"


@pytest.mark.parametrize("other", ["data", "seed", "plan", "weights", "constraint"])
def test_a_checkpoint_of_another_training_is_said_and_the_training_starts_over(other):
    checkpoint, model, task = Memory(), mlp(), blobs()
    fails(lambda: trained(model, task, checkpoint=checkpoint, progress=stop_at("epoch 3 of 4")), Cancelled)
    if other == "weights":
        with torch.no_grad():
            model = _training.copied(model)
            model.module[0].weight += 0.1
    if other == "data":
        task = blobs(count=70)
    settings = {
        "seed": {"seed": 1},
        "plan": {"plan": Plan(4, 0.02, 16)},
        "constraint": {"constraints": lambda module: [KeepZeros([module[0].weight])]},
    }.get(other, {})
    progress, words = heard()
    again = trained(model, task, **settings, checkpoint=checkpoint, progress=progress)
    assert again.fingerprint == trained(model, task, **settings).fingerprint
    assert words[0] == "what was saved of this training is of another training: it starts over"
