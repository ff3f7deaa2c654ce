"""Fine-tuning recovers accuracy, is the same every time, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from _tiny import blobs, mlp
from torch import nn

import workbench as wb
from workbench.errors import Cancelled, StepError
from workbench.jobs import on_progress

QUICK = wb.Finetune(epochs=1)


def accuracy(model: wb.Model, task: wb.Task) -> float:
    with torch.no_grad():
        scores = model.run_module(*map(torch.from_numpy, task.inputs("test", task.count("test"))))
    return float((scores.argmax(1).numpy() == task.labels("test")).mean())


def test_finetuning_recovers_what_pruning_cost(digits):
    model = wb.load("lenet5")
    pruned = wb.Prune(0.5).apply(model, digits)
    tuned = wb.Finetune(epochs=2).apply(pruned, digits)
    assert accuracy(pruned, digits) < 0.9 < 0.95 < accuracy(tuned, digits)
    assert tuned.parameters == pruned.parameters
    assert tuned.changes == ("pruned",) and tuned.edits == pruned.edits


def test_the_same_call_gives_the_same_bits_and_another_seed_others():
    model, task = mlp(), blobs()
    first = QUICK.apply(model, task, seed=1).fingerprint
    torch.manual_seed(99)
    assert QUICK.apply(model, task, seed=1).fingerprint == first
    assert QUICK.apply(model, task, seed=2).fingerprint != first


def test_torchs_generator_and_threads_are_as_before():
    threads = torch.get_num_threads()
    model, task = mlp(), blobs()
    state = torch.random.get_rng_state()
    torch.set_num_threads(1)
    try:
        once = QUICK.apply(model, task).fingerprint
        assert torch.get_num_threads() == 1
        with pytest.raises(StepError):
            wb.Finetune(epochs=1, learning_rate=1e30, optimizer="sgd").apply(model, task)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert QUICK.apply(model, task).fingerprint == once, "the result must not depend on the threads set outside"


def test_pruned_zeros_stay_zero_and_the_rest_moves():
    task = blobs()
    pruned = wb.Prune(0.5, granularity="weight").apply(mlp(), task)
    tuned = wb.Finetune(epochs=2, weight_decay=0.01).apply(pruned, task)
    for name in ("0.weight", "4.weight"):
        before, after = pruned.module.state_dict()[name], tuned.module.state_dict()[name]
        assert torch.equal(before == 0, after == 0)
        assert int((before == 0).sum()) == before.numel() // 2
        assert not torch.equal(before, after)


def test_a_layer_that_starts_at_zero_learns():
    model, task = mlp(), blobs()
    nn.init.zeros_(model.module[4].weight)
    for changes in ((), ("pruned",)):
        tuned = QUICK.apply(model.changed(*changes or ("",), module=model.module), task)
        assert bool((tuned.module[4].weight != 0).any())


@pytest.mark.parametrize("last", [[nn.Softmax(1)], [nn.LogSoftmax(1)]], ids=["softmax", "log softmax"])
def test_a_network_that_ends_in_probabilities_trains_like_one_with_logits(last):
    task = blobs()
    steps = wb.Finetune(epochs=2, batch_size=16)
    plain = steps.apply(mlp(), task).module[4].weight
    assert torch.allclose(steps.apply(mlp(*last), task).module[4].weight, plain, atol=1e-4)


def test_a_batch_of_logits_that_happens_to_add_up_to_one_is_no_softmax():
    task = blobs()
    net = nn.Linear(6, 3)
    nn.init.zeros_(net.weight)
    with torch.no_grad():
        net.weight[0, 0], net.bias[0] = 0.5, 1.0
    x, y = task.raw("train")
    x = x.copy()
    x[:, 0] = 1.0 * (y == 2)  # two samples of three put out (1, 0, 0): probabilities, as far as a batch can tell
    model = wb.load(net, inputs=torch.zeros(2, 6))
    tuned = wb.Finetune(epochs=1, batch_size=2, learning_rate=1e-9).apply(model, wb.Task.from_arrays(x, y, x, y))
    scores = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [1.5, 0, 0]])
    per_class = torch.nn.functional.cross_entropy(scores, torch.arange(3), reduction="none")
    assert tuned.records[0].rows[0]["loss"] <= float(per_class.max()) + 1e-6, "as probabilities it costs 27 nats"


def test_frozen_parameters_stay_and_the_rest_trains():
    model, task = mlp(), blobs()
    model.module[0].requires_grad_(False)
    tuned = QUICK.apply(model, task)
    assert torch.equal(tuned.module[0].weight, model.module[0].weight)
    assert not torch.equal(tuned.module[4].weight, model.module[4].weight)
    model.module.requires_grad_(False)
    with pytest.raises(StepError, match="frozen"):
        QUICK.apply(model, task)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_trains_inside_a_callers_inference_mode(mode):
    task = blobs()
    with mode():
        tuned = QUICK.apply(mlp(), task)
    assert tuned.fingerprint == QUICK.apply(mlp(), task).fingerprint


def test_inputs_by_keyword_reach_the_module_by_keyword():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, *, a, b):
            return {"logits": self.left(a) - self.right(b)}

    x, y = blobs().raw("train")
    task = wb.Task.from_arrays({"a": x, "b": -x}, y, {"a": x, "b": -x}, y)
    torch.manual_seed(0)
    model = wb.load(Two(), inputs={"a": torch.zeros(2, 6), "b": torch.zeros(2, 6)})
    tuned = wb.Finetune(epochs=10, learning_rate=0.05).apply(model, task)
    with torch.no_grad():
        scores = tuned.run_module(torch.from_numpy(x), torch.from_numpy(-x))["logits"]
    assert float((scores.argmax(1).numpy() == y).mean()) > 0.9


def test_cancelling_stops_at_the_next_batch_and_keeps_the_model():
    model, task, seen = mlp(), blobs(), []
    before = model.fingerprint

    def stop(fraction, message):
        seen.append((fraction, message))
        if len(seen) == 3:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        wb.Finetune(epochs=2, batch_size=8).apply(model, task, progress=on_progress(stop))
    assert [message.partition(", loss ")[0] for _, message in seen] == ["epoch 1 of 2"] * 3
    assert float(seen[2][1].partition(", loss ")[2]) > 0
    assert wb.Model.fingerprint.func(model) == before


def test_progress_runs_from_nothing_to_all():
    seen = []
    wb.Finetune(epochs=2).apply(mlp(), blobs(), progress=on_progress(lambda fraction, _: seen.append(fraction)))
    assert seen[0] == 0.0 and seen[-1] == 1.0 and seen == sorted(seen)


def test_a_loss_that_is_no_number_is_an_error_that_names_the_learning_rate():
    with pytest.raises(StepError, match=r"epoch 1.*learning_rate below 1e\+30"):
        wb.Finetune(epochs=1, learning_rate=1e30, optimizer="sgd").apply(mlp(), blobs())


def test_patience_without_held_out_samples_is_refused():
    with pytest.raises(StepError, match="patience 2 waits for a better epoch"):
        wb.Finetune(patience=2, validation=0)


def test_outputs_that_are_no_logits_for_the_labels_are_refused():
    with pytest.raises(StepError, match=r"label 4, but the network has 3 outputs"):
        QUICK.apply(mlp(), blobs(classes=5))
    with pytest.raises(StepError, match=r"\(N, classes\) logits; this network gives float32 \(32, 3, 1\)"):
        QUICK.apply(mlp(nn.Unflatten(1, (3, 1))), blobs())


def test_models_that_cannot_be_trained_are_refused_before_work():
    graph = wb.Model("graph", {"x": torch.zeros(2, 6)}, graph=mlp().onnx())
    with pytest.raises(StepError, match="ONNX graph only"):
        QUICK.check(graph)
    broken = mlp()
    with torch.no_grad():
        broken.module[0].weight[0, 0] = float("nan")
    with pytest.raises(StepError, match=r"'0.weight'.*NaN"):
        QUICK.check(broken)
    fixed = mlp()
    fixed.module.fixed_batch = 4
    with pytest.raises(StepError, match="batches of 4 alone"):
        QUICK.check(fixed)
    with pytest.raises(StepError, match="needs weights"):
        QUICK.check(wb.load(nn.ReLU(), inputs=torch.zeros(2, 6)))
