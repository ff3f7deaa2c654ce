"""Any two steps in any order run through, or are refused before work with the reason and the right order."""

from __future__ import annotations

import functools
import itertools
import json
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import workbench as wb
from workbench.compression import STEPS, Step
from workbench.errors import StepError
from workbench.study import states

# each step with its quickest settings; a new one needs its line here
QUICK: dict[str, Step] = {
    "clip": wb.Clip("std", 1.2),
    "cluster": wb.Cluster(4),
    "cluster and train": wb.Cluster(4, epochs=1),
    "distil": wb.Distill(epochs=1),
    "fake-quantise": wb.FakeQuantize(4),
    "fake-quantise activations": wb.FakeQuantize(8, 8),
    "finetune": wb.Finetune(epochs=1),
    "low rank": wb.LowRank(ratio=0.5),
    "prune channels": wb.Prune(0.5, round_to=4),
    "prune channels and train": wb.Prune(0.5, round_to=4, rounds=2, epochs=2),
    "prune weights": wb.Prune(0.5, granularity="weight"),
    "prune weights and train": wb.Prune(0.5, granularity="weight", epochs=1),
    "qat": wb.QAT(epochs=1),
    "int8": wb.Quantize("int8"),
    "fp16": wb.Quantize("fp16"),
}
# the same step with more in it: on one network alone
VARIANTS = {"cluster and train", "fake-quantise activations", "prune channels and train", "prune weights and train"}
QUANTISES = {"qat", "fake-quantise", "fake-quantise activations", "int8", "fp16"}
PRUNES_WEIGHTS = {"prune weights", "prune weights and train"}
CLUSTERS = {"cluster", "cluster and train"}
# what a refusal tells to do
ADVICE = re.compile(r"\b(Put|Use|Give|Load|Leave|keep one)\b")


def refused(first: str, second: str) -> bool:
    """Whether the second would undo what the first one made, or has nothing left to work on."""
    if first in QUANTISES:
        return True  # float32 weights are gone
    return second == "low rank" and first in PRUNES_WEIGHTS | CLUSTERS  # a product of factors is dense


def near_low_rank(*shape: int) -> Tensor:
    """Weights that two factors nearly give, as those of trained networks are."""
    rows, columns = shape[0], int(np.prod(shape[1:]))
    product = torch.randn(rows, 2) @ torch.randn(2, columns) + 0.05 * torch.randn(rows, columns)
    return (product / columns**0.5).view(shape)


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "mlp":
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
    else:
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 4),
        )  # fmt: skip
    for layer in net:
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and len(layer.weight) > 8:
            layer.weight = nn.Parameter(near_low_rank(*layer.weight.shape))
    return net


@functools.cache
def untouched(kind: str) -> wb.Model:
    return wb.load(network(kind), inputs=torch.zeros(2, 1, 8, 8), name=kind)


@functools.cache
def quadrants() -> wb.Task:
    """Noise with one bright quarter."""
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 4
    x = 0.1 * rng.normal(size=(48, 1, 8, 8)).astype(np.float32)
    for sample, label in zip(x, labels, strict=True):
        row, column = divmod(int(label), 2)
        sample[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    return wb.Task.from_arrays(x, labels, x, labels, calibration=16)


@functools.cache
def after(kind: str, first: str) -> wb.Model:
    return QUICK[first].apply(untouched(kind), quadrants())


def refusal(model: wb.Model, *steps: Step) -> str | None:
    """What a study says before any work; None where it begins."""
    try:
        for step in steps:
            step.check(model)
            model = step.preview(model)
    except StepError as error:
        return str(error)
    return None


def outputs(model: wb.Model) -> np.ndarray:
    (x,) = quadrants().inputs("test", 8)
    on = wb.Eager() if model.module is not None else wb.OnnxRuntime()
    with on.compile(model) as engine:
        return engine(x)


def check_stored(model: wb.Model, kind: str) -> None:
    data, record = states.pack(model)
    back = states.unpack(data, json.loads(json.dumps(record, allow_nan=False)), untouched(kind))
    assert (back.fingerprint, back.changes, back.precision) == (model.fingerprint, model.changes, model.precision)
    assert [json.dumps(r.to_dict()) for r in back.records] == [json.dumps(r.to_dict()) for r in model.records]


def test_every_step_stands_in_the_table():
    assert {type(step).__name__ for step in QUICK.values()} == set(STEPS)


PAIRS = [
    (first, second, kind)
    for first, second, kind in itertools.product(QUICK, QUICK, ("mlp", "cnn"))
    if kind == "mlp" or not {first, second} & VARIANTS
]


@pytest.mark.parametrize(("first", "second", "kind"), PAIRS)
def test_two_steps_run_through_or_are_refused_before_work(first, second, kind):
    model, steps = untouched(kind), (QUICK[first], QUICK[second])
    said = refusal(model, *steps)
    assert (said is not None) == refused(first, second), said
    if said is not None:
        assert ADVICE.search(said), f"it does not say what to do: {said}"
        # which of two quantising steps comes first does not matter: one has to go
        assert ("one" in said) == ({first, second} <= QUANTISES), said
        return
    before = after(kind, first)
    result = steps[1].apply(before, quadrants())
    scores = outputs(result)
    assert scores.shape == (8, 4) and np.isfinite(scores).all()
    check_stored(result, kind)
    previewed = functools.reduce(lambda so_far, step: step.preview(so_far), steps, model)
    assert (previewed.precision, previewed.changes) == (result.precision, result.changes)
    assert (previewed.module is None) == (result.module is None)
    if result.precision == "fp32":
        check_kept(before, result)


def weights(model: wb.Model) -> dict[str, Tensor]:
    return {name: value for name, value in model.module.state_dict().items() if name.endswith("weight")}


def check_kept(before: wb.Model, now: wb.Model) -> None:
    """Single weights that are zero stay zero, and shared values stay shared, in layers that are still there."""
    held = weights(now)
    for name, old in weights(before).items():
        if name not in held or held[name].shape != old.shape:
            continue
        if "pruned" in before.changes:
            assert bool((held[name][old == 0] == 0).all()), f"pruned weights of {name} came back"
        if "clustered" in before.changes and old.ndim > 1:
            assert len(held[name].unique()) <= len(old.unique()) + 1, f"values of {name} are no longer shared"


@pytest.mark.parametrize("step", QUICK)
def test_a_model_that_is_only_a_graph_takes_what_onnx_allows(step):
    graph = wb.Model("graph", untouched("cnn").example, graph=untouched("cnn").onnx())
    said = refusal(graph, QUICK[step])
    if step in ("int8", "fp16"):
        result = QUICK[step].apply(graph, quadrants())
        assert outputs(result).shape == (8, 4) and result.graph is not None
    else:
        assert "ONNX graph only" in said and "Load the network as a module" in said


def test_a_study_refuses_a_wrong_order_before_any_work(monkeypatch):
    worked = []
    monkeypatch.setattr(wb.Quantize, "apply", lambda *_, **__: worked.append(1))
    with (
        wb.Study(untouched("mlp"), quadrants()) as study,
        pytest.raises(StepError, match=r"already int8.*Put it before.*\[wb\.Finetune\(\), wb\.Quantize"),
    ):
        study.submit([wb.Quantize("int8"), wb.Finetune()], on=wb.OnnxRuntime())
    assert worked == []
