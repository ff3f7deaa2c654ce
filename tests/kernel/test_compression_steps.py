"""Every step is a value that survives being written down, and works on every model of the zoo."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.compression import STEPS, step_from_dict
from workbench.errors import RecipeError, StepError
from workbench.models import structure

ZOO = ["lenet5", "lenet300", "mlp", "cifarnet", "resnet20", "resnet32", "resnet44", "resnet56"]

VALUES = [
    (wb.Prune(0.5), "Prune 50 %", "wb.Prune(0.5)"),
    (wb.Prune(0.125, round_to=4), "Prune 12.5 %, multiples of 4", "wb.Prune(0.125, round_to=4)"),
    (wb.Prune(0.5, scope="global", importance="l1"), "Prune 50 %, global, L1", None),
    (wb.Prune(0.5, granularity="weight"), "Prune 50 % of weights", "wb.Prune(0.5, granularity='weight')"),
    (wb.Quantize("int8"), "Quantise int8", "wb.Quantize('int8')"),
    (wb.Quantize("int8", mode="dynamic"), "Quantise int8 dynamic", "wb.Quantize('int8', mode='dynamic')"),
    (wb.Quantize("int8", reduce_range=True), "Quantise int8, 7-bit weights", None),
    (wb.Quantize("fp16"), "fp16", "wb.Quantize('fp16')"),
    (wb.Quantize("bf16"), "bf16", "wb.Quantize('bf16')"),
    (wb.Finetune(), "Finetune 2 epochs", "wb.Finetune()"),
    (wb.Finetune(epochs=1, optimizer="sgd"), "Finetune 1 epoch", None),
    (wb.Prune(layers={"fc1": 0.9}, granularity="weight"), "Prune weights of 1 layer", None),
    (wb.Cluster(16), None, "wb.Cluster()"),
    (wb.Clip("absolute", 0.5), None, "wb.Clip('absolute', value=0.5)"),
    (wb.LowRank(layers={"fc1": 20}), None, "wb.LowRank(layers={'fc1': 20})"),
    (wb.Distill("every second block"), None, "wb.Distill('every second block')"),
    (wb.FakeQuantize(4, adaptive_rounding=True), None, "wb.FakeQuantize(4, adaptive_rounding=True)"),
    (wb.QAT(), None, "wb.QAT()"),
]


@pytest.mark.parametrize(("step", "label", "python"), VALUES)
def test_a_step_is_the_same_after_json_and_after_python(step, label, python):
    assert step.label == (label or step.label) != ""
    assert step_from_dict(json.loads(json.dumps(step.to_dict()))) == step
    assert eval(step.to_python(), {"wb": wb}) == step
    assert hash(step_from_dict(step.to_dict())) == hash(step)
    if python is not None:
        assert step.to_python() == python


def test_every_registered_step_is_under_its_own_name_and_public():
    for name, kind in STEPS.items():
        assert kind.__name__ == name
        assert getattr(wb, name) is kind


def test_settings_left_out_of_a_recipe_take_their_defaults():
    assert step_from_dict({"step": "Finetune"}) == wb.Finetune()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"step": "Prun", "ratio": 0.5}, ["'Prun'", "Did you mean 'Prune'?"]),
        ({"step": ["Prune"]}, [f"Accepted: {', '.join(sorted(STEPS))}"]),
        ({"ratio": 0.5}, ["step: Prune"]),
        ("Prune", ["step: Prune"]),
        ({"step": "Prune", "ration": 0.5}, ["'ration'", "Did you mean 'ratio'?"]),
    ],
)
def test_a_recipe_that_names_what_is_not_there_is_told_what_is(data, words):
    with pytest.raises(RecipeError) as caught:
        step_from_dict(data)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: wb.Prune(0), ["ratio is 0", "above 0 and below 1"]),
        (lambda: wb.Prune(1.0), ["ratio is 1.0", "above 0 and below 1"]),
        (lambda: wb.Prune(float("nan")), ["ratio is nan"]),
        (lambda: wb.Prune("half"), ["ratio is 'half'"]),
        (lambda: wb.Prune(True), ["ratio is True"]),
        (lambda: wb.Prune(0.5, importance="l3"), ["importance 'l3'", "l1, l2, lamp"]),
        (lambda: wb.Prune(0.5, scope="globel"), ["Did you mean 'global'?"]),
        (lambda: wb.Prune(0.5, round_to=-1), ["round_to is -1", "at least 0"]),
        (lambda: wb.Prune(0.5, round_to=8.0), ["round_to is 8.0", "whole number"]),
        (lambda: wb.Prune(0.5, granularity="filter"), ["granularity 'filter'", "channel, head, kernel, weight"]),
        (lambda: wb.Quantize("int4"), ["precision 'int4'", "bf16, fp16, int4 weights, int8, int8 weights"]),
        (lambda: wb.Quantize("int8", mode="QAT"), ["mode 'QAT'", "dynamic, static"]),
        (lambda: wb.Quantize("bf16", mode="dynamic"), ['settings of "int8"']),
        (lambda: wb.Finetune(epochs=0), ["epochs is 0", "at least 1"]),
        (lambda: wb.Finetune(epochs=1.5), ["epochs is 1.5"]),
        (lambda: wb.Finetune(learning_rate=0), ["learning_rate is 0", "above 0"]),
        (lambda: wb.Finetune(learning_rate=float("inf")), ["learning_rate is inf"]),
        (lambda: wb.Finetune(batch_size=0), ["batch_size is 0"]),
        (lambda: wb.Finetune(optimizer="adamw"), ["Did you mean 'adam'?"]),
        (lambda: wb.Finetune(weight_decay=-1), ["weight_decay is -1", "at least 0"]),
    ],
)
def test_a_setting_out_of_range_is_refused_with_the_range(make, words):
    with pytest.raises(StepError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def noise_task(model: wb.Model, train: int = 24) -> wb.Task:
    """A few samples of noise of the shape a model takes, in ten classes."""
    rng = np.random.default_rng(0)
    shape = model.inputs[0].shape[1:]
    x = rng.normal(size=(train, *shape)).astype(np.float32)
    return wb.Task.from_arrays(x, np.arange(train) % 10, x[:12], np.arange(12) % 10, calibration=10)


@pytest.fixture(scope="module", params=ZOO)
def zoo(request) -> tuple[wb.Model, wb.Task]:
    """A model of the zoo, loaded and exported once for all the tests on it."""
    model = wb.load(request.param)
    return model, noise_task(model)


@pytest.mark.parametrize(
    "step",
    [
        wb.Prune(0.5),
        wb.Prune(0.5, granularity="weight"),
        wb.Finetune(epochs=1, batch_size=12),
        wb.Quantize("int8"),
        wb.Quantize("int8", mode="dynamic"),
        wb.Quantize("fp16"),
        wb.Quantize("bf16"),
        wb.FakeQuantize(4),
        wb.Cluster(4),
        wb.Clip("std", 1.0),
        wb.LowRank(energy=0.5),
    ],
    ids=lambda step: step.label,
)
def test_each_step_works_on_each_zoo_model_and_leaves_it_alone(zoo, step):
    model, task = zoo
    before = model.fingerprint
    step.check(model)
    result = step.apply(model, task)
    assert wb.Model.fingerprint.func(model) == before
    assert result.fingerprint != before
    told = step.preview(model)
    assert (told.module is None, told.precision, told.changes) == (
        result.module is None,
        result.precision,
        result.changes,
    )
    assert result.changes == ((step.family,) if step.family else ())
    if result.module is not None:
        assert not result.module.training
        output = result.run_module(*result.example.values())
        assert output.shape == (2, 10) and output.dtype == torch.float32 and bool(output.isfinite().all())


def test_a_pruned_zoo_model_is_smaller_and_can_be_rebuilt_from_the_untouched_one(zoo):
    model, task = zoo
    pruned = wb.Prune(0.5).apply(model, task)
    twice = wb.Prune(0.25, round_to=1).apply(pruned, task)
    assert pruned.parameters < 0.55 * model.parameters
    assert pruned.macs < 0.55 * model.macs
    assert twice.parameters < pruned.parameters
    for changed in (pruned, twice, wb.Quantize("bf16").apply(pruned, task)):
        rebuilt = structure.rebuild(model.module, json.loads(json.dumps(changed.edits)), changed.module.state_dict())
        inputs = list(model.example.values())
        with torch.no_grad():
            assert torch.equal(rebuilt(*inputs), changed.module(*inputs))


def test_the_steps_of_the_readme_compose(digits):
    model = wb.load("lenet5")
    for step in (wb.Prune(0.5), wb.Finetune(epochs=1), wb.Quantize("int8")):
        step.check(model)
        model = step.apply(model, digits)
    assert model.changes == ("pruned", "quantised")
    assert model.precision == "int8" and model.module is None


@pytest.mark.parametrize("first", [wb.Quantize("int8"), wb.Quantize("bf16"), wb.Quantize("fp16")])
@pytest.mark.parametrize("second", [wb.Prune(0.5), wb.Finetune(), wb.Quantize("int8"), wb.Quantize("fp16")])
def test_nothing_follows_a_quantisation_and_the_refusal_says_so_before_any_work(first, second):
    told = first.preview(wb.load("mlp"))
    with pytest.raises(StepError, match=f"already {first.precision}"):
        second.check(told)
    with pytest.raises(StepError, match=f"already {first.precision}"):
        second.apply(told, None)
