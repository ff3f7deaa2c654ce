"""Distillation: losses as the papers write them, students that fit, and a teacher that is only asked."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from _tiny import Memory, blobs, fails, few_digits, mlp, stop_at
from torch import nn

import workbench as wb
from workbench.compression import _distillation, _students, step_from_dict
from workbench.compression._losses import Batch
from workbench.errors import Cancelled, StepError
from workbench.jobs import SILENT, on_progress

QUICK = wb.Distill(epochs=1)


def stage(*shape: int, tokens: bool = False) -> _students.Stage:
    return _students.Stage("x", (2, *shape), tokens, True)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(count: int = 24, **kwargs) -> wb.Task:
    x = noise(count, 1, 8, 8).numpy()
    y = np.arange(count) % 3
    return wb.Task.from_arrays(x, y, x, y, calibration=8, **kwargs)


def convnet(width: int, name: str = "convnet") -> wb.Model:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(width * 16, 3)
    return wb.load(nn.Sequential(*layers), inputs=torch.zeros(2, 1, 8, 8), name=name)


# what is minimised


def test_soft_targets_are_the_divergence_at_temperature_times_its_square():
    scores, targets, temperature = noise(5, 4), noise(5, 4, seed=1) * 3, 2.5
    q, p = (np.exp(x.double().numpy() / temperature) for x in (scores, targets))
    q, p = q / q.sum(1, keepdims=True), p / p.sum(1, keepdims=True)
    by_hand = temperature**2 * (p * np.log(p / q)).sum(1).mean()
    assert float(_distillation.soft_target_loss(scores, targets, temperature)) == pytest.approx(by_hand, rel=1e-5)
    assert float(_distillation.soft_target_loss(targets, targets, temperature)) == pytest.approx(0, abs=1e-6)


def test_an_attention_map_adds_up_the_squares_of_the_channels():
    features = torch.tensor([[[[1.0, -2.0], [0.0, 3.0]], [[2.0, 0.0], [0.0, 4.0]]]])
    assert _distillation.attention_map(features).tolist() == [[[[5.0, 4.0], [0.0, 25.0]]]]
    # against a map of the same everywhere: 2 - 2 cos
    flat = torch.full((1, 3, 2, 2), 2.0)
    cosine = (5 + 4 + 25) / (np.linalg.norm([5, 4, 0, 25]) * 2)
    assert float(_distillation.attention_loss(features, flat)) == pytest.approx(2 - 2 * cosine, rel=1e-5)
    assert float(_distillation.attention_loss(features, 7 * features)) == pytest.approx(0, abs=1e-6)


def test_the_larger_of_two_feature_maps_is_averaged_down_to_the_smaller():
    large, small = noise(2, 3, 4, 4), noise(2, 3, 2, 4, seed=1)
    pooled = large.numpy().reshape(2, 3, 2, 2, 4).mean(3)
    by_hand = ((pooled - small.numpy()) ** 2).mean()
    assert float(_distillation.feature_loss(large, small)) == pytest.approx(by_hand, rel=1e-5)
    assert float(_distillation.feature_loss(small, large)) == pytest.approx(by_hand, rel=1e-5)
    maps = (large.numpy() ** 2).sum(1).reshape(2, 2, 2, 4).mean(2), (small.numpy() ** 2).sum(1)
    unit = [m.reshape(2, -1) / np.linalg.norm(m.reshape(2, -1), axis=1, keepdims=True) for m in maps]
    by_hand = ((unit[0] - unit[1]) ** 2).sum(1).mean()
    assert float(_distillation.attention_loss(large, small)) == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "kind"),
    [
        (stage(8, 4, 4), stage(8, 2, 2), None),
        (stage(4, 4, 4), stage(8, 4, 4), nn.Conv2d),
        (stage(5, 4, tokens=True), stage(5, 6, tokens=True), nn.Conv1d),
        (stage(5, 4, tokens=True), stage(7, 4, tokens=True), None),
        (stage(12), stage(16), nn.Linear),
    ],
)
def test_there_is_a_projection_only_where_widths_differ(student, teacher, kind):
    state = torch.random.get_rng_state()
    found = _distillation.projection(student, teacher, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    if kind is None:
        assert found is None
        return
    assert type(found) is kind and (found.weight.shape[1], found.weight.shape[0]) == (
        student.channels,
        teacher.channels,
    )
    value = student.channels_first(noise(*student.shape))
    assert found(value).shape[:2] == (2, teacher.channels)


@pytest.mark.parametrize("on", ["logits", "features", "attention"])
def test_the_loss_is_the_weighted_sum_of_its_parts(on):
    task, teacher, student = images(), convnet(4), convnet(6)
    pair = None
    if on != "logits":
        pair = _students.counterparts("x", teacher, student, ("", ""), on == "attention")
        assert [s.layer for s in pair] == ["2", "2"]
    one, two = (_distillation.Classifier.of("x", m, task) for m in (student, teacher))
    inputs, labels = torch.from_numpy(task.inputs("train", 24)[0]), torch.from_numpy(task.labels("train"))
    chosen = torch.tensor([3, 1, 20])
    with torch.no_grad(), _distillation.compared(teacher, student, pair, on, 0.5, seed=0) as comparison:
        answers = _distillation.Teacher(two, task, comparison and comparison.teacher, SILENT)
        loss = _distillation.Distillation(one, answers, 2.0, 0.75, comparison)
        batch = Batch((inputs[chosen],), labels[chosen], chosen)
        given = float(loss(student.module(inputs[chosen]), batch))
        theirs, its = teacher.module(inputs[chosen]), student.module(inputs[chosen])
        q, p = torch.log_softmax(its.double() / 2, 1), torch.softmax(theirs.double() / 2, 1)
        soft = 4 * float((p * (p.log() - q)).sum(1).mean())
        hard = -float(torch.log_softmax(its, 1)[torch.arange(3), labels[chosen]].mean())
        features = [m.module[:3](inputs[chosen]) for m in (student, teacher)]
        if on == "features":
            weight, bias = comparison.project.weight[:, :, 0, 0], comparison.project.bias
            mapped = torch.einsum("oi,nihw->nohw", weight, features[0]) + bias[:, None, None]
            apart = float((mapped - features[1]).square().mean())
        elif on == "attention":
            unit = [f.square().sum(1).flatten(1) for f in features]
            unit = [m / m.norm(dim=1, keepdim=True) for m in unit]
            apart = float((unit[0] - unit[1]).square().sum(1).mean())
        else:
            apart = 0.0
    assert given == pytest.approx(0.25 * hard + 0.75 * soft + 0.5 * apart, rel=1e-5)
    assert not student.module[2]._forward_hooks and not teacher.module[2]._forward_hooks


def test_a_teacher_that_ends_in_a_softmax_teaches_what_its_logits_would():
    task = blobs()
    classifiers = [_distillation.Classifier.of("x", m, task) for m in (mlp(), mlp(nn.Softmax(1)))]
    assert [c.of_probabilities for c in classifiers] == [False, True]
    batch = Batch((torch.from_numpy(task.inputs("train", 65)[0][:9]),), torch.zeros(9).long(), torch.arange(9))
    scores = noise(9, 3)
    losses = [
        _distillation.soft_target_loss(scores, _distillation.Teacher(c, task, None, SILENT).answers(batch)[0], 3.0)
        for c in classifiers
    ]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-4)


def test_a_teacher_answers_each_sample_once_unless_they_are_augmented(monkeypatch):
    calls = []

    def asked(task):
        calls.clear()
        model = convnet(4)
        model.module.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
        found = _distillation.Teacher(_distillation.Classifier(model, False), task, None, SILENT)
        for chosen in torch.arange(24).split(8):
            batch = Batch((-torch.from_numpy(task.inputs("train", 24)[0][chosen]),), chosen % 3, chosen)
            answer = found.answers(batch)[0]
        with torch.no_grad():
            return answer, [convnet(4).module(sign * batch.inputs[0]) for sign in (1, -1)]

    answer, (given, kept) = asked(images())
    assert calls == [24] and torch.allclose(answer, kept, atol=1e-6)
    answer, (given, kept) = asked(images(augment=[wb.data.Flip()]))
    assert calls == [8, 8, 8] and torch.equal(answer, given)
    monkeypatch.setattr(_distillation, "_REMEMBERED_BYTES", 24 * 3 * 4 - 1)
    answer, (given, kept) = asked(images())
    assert calls == [24, 8, 8, 8] and torch.equal(answer, given)


# the step


def noisy_labels() -> tuple[wb.Model, wb.Task]:
    """A teacher that knows the classes, and training samples two fifths of whose labels are wrong."""
    clean, rng = blobs(count=240, spread=2.0), np.random.default_rng(0)
    teacher = wb.Finetune(epochs=20, learning_rate=0.01).apply(mlp(), clean)
    x, y = clean.raw("train")
    wrong = rng.random(len(y)) < 0.4
    noisy = wb.Task.from_arrays(x, np.where(wrong, (y + 1) % 3, y), x, y, calibration=60)
    return wb.load(teacher.module, inputs=torch.zeros(2, 6), name="teacher"), noisy


def agreement(teacher: wb.Model, student: wb.Model) -> float:
    points = 3 * noise(2000, 6, seed=5)
    with torch.no_grad():
        return float((teacher.module(points).argmax(1) == student.module(points).argmax(1)).float().mean())


@pytest.mark.parametrize("on", ["logits", "features"])
def test_a_distilled_student_agrees_with_its_teacher_more_than_one_trained_alone(on):
    teacher, task = noisy_labels()
    student = wb.Prune(0.5, round_to=1).apply(teacher, task)
    plan = {"epochs": 5, "learning_rate": 0.01, "on": on}
    alone = wb.Distill(**{**plan, "on": "logits"}, weight=0.0).apply(student, task)
    taught = wb.Distill(**plan).apply(student, task)
    assert agreement(teacher, taught) > agreement(teacher, alone) + 0.05
    told = {row["samples"]: row for row in taught.records[-1].rows}
    assert told["held out"]["count"] == 24 and told["calibration"]["count"] == 60
    x, y = task.inputs("calibration", 60)[0], task.labels("calibration")
    with torch.no_grad():
        theirs, its = (m.module(torch.from_numpy(x)).argmax(1).numpy() for m in (teacher, taught))
    assert told["calibration"]["agreement"] == pytest.approx((theirs == its).mean())
    assert told["calibration"]["teacher_accuracy"] == pytest.approx((theirs == y).mean())
    assert told["calibration"]["student_accuracy"] == pytest.approx((its == y).mean())
    assert [record.title for record in taught.records][-2:] == ["training, by epoch", "agreement with the teacher"]


def test_with_labels_alone_it_is_plain_training():
    task, model = blobs(), mlp()
    plan = {"epochs": 2, "learning_rate": 0.01, "batch_size": 16}
    alone = wb.Distill(weight=0.0, **plan).apply(model, task, seed=4)
    tuned = wb.Finetune(**plan).apply(model, task, seed=4)
    assert alone.fingerprint == tuned.fingerprint


@pytest.mark.parametrize("on", ["logits", "features", "attention"])
def test_the_same_call_gives_the_same_bits_and_leaves_all_as_it_was(on):
    task, model = images(), convnet(4)
    pruned = wb.Prune(0.5, round_to=1).apply(model, task)
    before, state = (model.fingerprint, pruned.fingerprint), torch.random.get_rng_state()
    step = wb.Distill(on=on, epochs=2, batch_size=8)
    first = step.apply(pruned, task, seed=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert step.apply(pruned, task, seed=1).fingerprint == first.fingerprint
    finally:
        torch.set_num_threads(threads)
    assert step.apply(pruned, task, seed=2).fingerprint != first.fingerprint
    assert (wb.Model.fingerprint.func(model), wb.Model.fingerprint.func(pruned)) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(m._forward_hooks for part in (model, pruned, first) for m in part.module.modules())
    assert first.changes == ("pruned", "distilled") and first.edits == pruned.edits and first.origin is model
    assert first.module.state_dict().keys() == pruned.module.state_dict().keys()
    with torch.inference_mode():
        assert step.apply(pruned, task, seed=1).fingerprint == first.fingerprint


def test_zeros_of_a_pruned_student_stay_zero():
    task = blobs()
    pruned = wb.Prune(0.5, granularity="weight").apply(mlp(), task)
    taught = wb.Distill(epochs=2).apply(pruned, task)
    for name in ("0.weight", "4.weight"):
        before, after = pruned.module.state_dict()[name], taught.module.state_dict()[name]
        assert torch.equal(before == 0, after == 0) and not torch.equal(before, after)


def test_a_training_broken_off_goes_on_to_the_same_result():
    task, model, checkpoint = images(), convnet(4), Memory()
    pruned = wb.Prune(0.5, round_to=1).apply(model, task)
    step = wb.Distill(on="features", epochs=3, batch_size=8)
    whole = step.apply(pruned, task)
    stopped = fails(lambda: step.apply(pruned, task, progress=stop_at("epoch 3"), checkpoint=checkpoint), Cancelled)
    assert stopped.best.changes == ("pruned", "distilled") and checkpoint.saved == 2
    again = step.apply(pruned, task, checkpoint=checkpoint)
    assert again.fingerprint == whole.fingerprint and again.records == whole.records
    assert checkpoint.saved == 3


def test_progress_runs_from_nothing_to_all():
    seen = []
    wb.Distill(on="features", epochs=2).apply(mlp(), blobs(), progress=on_progress(lambda share, _: seen.append(share)))
    assert seen[0] == 0.0 and seen[-1] == 1.0 and seen == sorted(seen)


def test_a_study_gives_back_the_same_weights_and_records(tmp_path):
    steps, task = [wb.Distill("lenet5-quarter", on="attention", epochs=1)], few_digits()
    with wb.Study(wb.load("lenet5"), task, tmp_path) as study:
        first = study.run(steps, on=wb.Eager(threads=1)).model()
    with wb.Study(wb.load("lenet5"), task, tmp_path) as study:
        again = study.run(steps, on=wb.Eager(threads=1)).model()
    assert again.fingerprint == first.fingerprint and again.module is not first.module
    assert again.records == first.records and again.records[-1].title == "agreement with the teacher"


def test_a_step_is_the_same_after_json_and_after_python():
    for step, label in [
        (wb.Distill(), "Distil, 10 epochs"),
        (wb.Distill("lenet5-quarter", epochs=1), "Distil into lenet5-quarter, 1 epoch"),
        (wb.Distill("every second block", on="attention"), "Distil every second block, attention, 10 epochs"),
        (wb.Distill(weight=0.0), "Distil, labels alone, 10 epochs"),
        (wb.Distill(weight=1.0, temperature=2), "Distil, weight 1, T 2, 10 epochs"),
        (wb.Distill(on="features", weight=0, teacher_layer="a"), "Distil, features, no soft targets, 10 epochs"),
    ]:
        assert step.label == label
        assert eval(step.to_python(), {"wb": wb}) == step
        assert step_from_dict(json.loads(json.dumps(step.to_dict()))) == step
    assert wb.Distill("lenet5-quarter").to_python() == "wb.Distill('lenet5-quarter')"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"student": "lenet5-quater"}, "no student 'lenet5-quater'. Did you mean 'lenet5-quarter'"),
        ({"on": "logit"}, "Did you mean 'logits'"),
        ({"temperature": 0}, "temperature is 0; a number above 0"),
        ({"weight": 1.1}, "weight is 1.1; a number at least 0 and at most 1"),
        ({"on": "features", "feature_weight": 0}, "feature_weight is 0"),
        ({"teacher_layer": "fc1"}, "teacher_layer is 'fc1', but layers are compared with on='features'"),
        ({"on": "features", "student_layer": 3}, "student_layer is 3"),
        ({"epochs": 0}, "epochs is 0"),
        ({"patience": 2, "validation": 0}, "patience 2"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, words):
    with pytest.raises(StepError, match=words):
        wb.Distill(**settings)


def test_what_cannot_be_distilled_is_refused_before_work():
    model = wb.load("lenet5")
    with pytest.raises(StepError, match="ONNX graph only"):
        QUICK.check(wb.Model("graph", model.example, graph=wb.load("mlp").onnx()))
    with pytest.raises(StepError, match=r"resnet20 takes x: float32 \(2, 3, 32, 32\).*lenet5 is given x: float32"):
        wb.Distill("resnet20").check(model)
    with pytest.raises(StepError, match="would be thrown away. Leave them out, or give student='as is'"):
        wb.Distill("lenet5-quarter").check(wb.Prune(0.5).preview(model))
    small = wb.load(nn.Sequential(nn.Flatten(), nn.Linear(784, 7)), inputs=torch.zeros(2, 1, 28, 28), name="seven")
    with pytest.raises(StepError, match=r"student gives \(10,\) per sample and its teacher seven gives \(7,\)"):
        wb.Distill("lenet5-quarter").check(small)
    with pytest.raises(StepError, match="label 4, but the network has 3 outputs"):
        QUICK.apply(mlp(), blobs(classes=5))
