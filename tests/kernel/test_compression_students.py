"""Students: what is kept of a network, what the zoo gives, and which layers of two networks are compared."""

from __future__ import annotations

import json

import pytest
import torch
from _tiny import blobs, few_digits, mlp
from torch import nn

import workbench as wb
from workbench.compression import _students
from workbench.errors import StepError
from workbench.models import parts, structure, zoo


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.fc = nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.fc(x).relu()


def deep(*widths: int) -> wb.Model:
    blocks = [Block(a, b) for a, b in zip((6, *widths), widths, strict=False)]
    net = nn.Sequential(nn.Sequential(*blocks), nn.Linear(widths[-1], 3))
    return wb.load(net, inputs=torch.zeros(2, 6), name="deep")


def test_every_second_block_of_a_resnet_is_kept_with_its_weights():
    model = wb.load("resnet20")
    student = wb.Distill("every second block").preview(model)
    old, new = model.module.state_dict(), student.module.state_dict()
    assert {key.rsplit(".", 2)[0] for key in new if key.startswith("layer")} == {
        f"layer{stack}.{block}" for stack in (1, 2, 3) for block in (0, 1)
    }
    for key, value in new.items():
        was = key.replace(".1.", ".2.", 1) if key.startswith("layer") else key
        assert torch.equal(value, old[was])
    # 18 convolutions less six of the dropped blocks: a ResNet-14
    assert sum(isinstance(layer, nn.Conv2d) for layer in student.module.modules()) == 19 - 6
    assert student.module(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    rebuilt = structure.rebuild(model.module, json.loads(json.dumps(student.edits)), new)
    assert repr(rebuilt) == repr(student.module)


def test_every_second_block_of_the_zoos_transformer_is_kept():
    model = wb.load("transformer")
    student = wb.Distill("every second block").preview(model)
    assert len(student.module.blocks) == 1 and len(model.module.blocks) == 2
    kept, old = student.module.blocks[0].state_dict(), model.module.blocks[0].state_dict()
    assert all(torch.equal(value, old[key]) for key, value in kept.items())


def test_blocks_with_names_of_their_own_keep_them_and_the_first_may_change_the_width():
    blocks = nn.Sequential()
    for name, widths in {"in": (6, 8), "a": (8, 8), "b": (8, 8), "c": (8, 8), "d": (8, 8)}.items():
        blocks.add_module(name, Block(*widths))
    model = wb.load(nn.Sequential(blocks, nn.Linear(8, 3)), inputs=torch.zeros(2, 6))
    student = wb.Distill("every second block").preview(model)
    assert list(student.module[0]._modules) == ["in", "b", "d"]
    new = parts.put(nn.Sequential(nn.ModuleList([Block(1, 1) for _ in range(4)])), "0", "blocks", keep=[0, 2])
    assert list(new[0]._modules) == ["0", "1"] and isinstance(new[0], nn.ModuleList)


@pytest.mark.parametrize("model", [wb.load("lenet5"), deep(8, 16, 8), mlp()], ids=["lenet5", "changing widths", "mlp"])
def test_a_network_without_repeated_blocks_is_refused(model):
    with pytest.raises(StepError, match="no repeated blocks.*of one class that keep the shape"):
        wb.Distill("every second block").check(model)


def test_a_network_that_names_its_blocks_one_by_one_is_refused_with_what_failed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.ModuleList([Block(6, 6), Block(6, 6)]), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.blocks[1](self.blocks[0](x)))

    with pytest.raises(StepError, match="without every second block of blocks the network does not run"):
        wb.Distill("every second block").check(wb.load(Net(), inputs=torch.zeros(2, 6)))


def test_a_zoo_student_has_the_random_weights_of_the_seed():
    step, model, task = wb.Distill("lenet5-quarter", epochs=1, learning_rate=1e-12), wb.load("lenet5"), few_digits()
    first, again, other = (step.apply(model, task, seed=seed) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert torch.allclose(first.module.conv1.weight, zoo.build("lenet5-quarter", seed=1).conv1.weight, atol=1e-8)
    assert first.edits == ({"": {"part": {"kind": "network", "arguments": {"name": "lenet5-quarter", "seed": 1}}}},)
    assert first.changes == ("distilled",) and first.origin is model
    assert wb.load("lenet5-quarter").parameters == first.parameters


# which layers are compared


@pytest.mark.parametrize(
    ("teacher", "student", "on", "layers"),
    [
        ("lenet5", "lenet5-quarter", "features", ("pool2", "pool2")),
        ("lenet5", "lenet5-quarter", "attention", ("pool2", "pool2")),
        ("resnet56", "resnet20", "attention", ("layer3", "layer3")),
        ("lenet5", "mlp", "features", ("relu4", "relu1")),
        ("resnet20", "cifarnet", "features", ("layer3", "pool2")),
    ],
)
def test_by_default_the_last_hidden_stage_of_a_kind_both_have_is_compared(teacher, student, on, layers):
    found = _students.counterparts("x", wb.load(teacher), wb.load(student), ("", ""), on == "attention")
    assert tuple(stage.layer for stage in found) == layers


def test_a_named_layer_is_compared_with_the_last_of_its_kind():
    pair = _students.counterparts("x", wb.load("lenet5"), wb.load("lenet5-quarter"), ("fc1", ""), False)
    assert [s.layer for s in pair] == ["fc1", "relu4"] and [s.channels for s in pair] == [120, 42]
    pair = _students.counterparts("x", wb.load("transformer"), wb.load("transformer"), ("", "blocks.0"), True)
    assert [s.layer for s in pair] == ["norm", "blocks.0"] and pair[0].places == (32,) and pair[0].channels == 128


def test_layers_that_cannot_be_compared_are_refused():
    model = wb.load("lenet5")
    with pytest.raises(StepError, match="no layer 'con1' among the layers of the teacher. Did you mean 'conv1'"):
        wb.Distill(on="features", teacher_layer="con1").check(model)
    with pytest.raises(StepError, match="no layer 'fc9' among the layers of the student. Did you mean"):
        wb.Distill(on="features", student_layer="fc9").check(model)
    with pytest.raises(StepError, match="conv1 \\(N, 6, 28, 28\\) and fc1 \\(N, 120\\)"):
        wb.Distill(on="features", teacher_layer="conv1", student_layer="fc1").check(model)
    with pytest.raises(StepError, match="finds no layer of mlp and of the student"):
        wb.Distill(on="attention").check(wb.load("mlp"))


@pytest.mark.parametrize(
    ("model", "steps"),
    [
        (wb.load("lenet5"), [wb.Distill("lenet5-quarter", epochs=1), wb.Prune(0.5), wb.LowRank(0.8)]),
        (deep(6, 6, 6, 6), [wb.LowRank(ratio=0.2), wb.Distill("every second block", epochs=1)]),
        (deep(6, 6, 6, 6), [wb.Distill("every second block", epochs=1), wb.Prune(0.5, round_to=1)]),
    ],
    ids=["zoo", "blocks last", "blocks first"],
)
def test_what_steps_make_of_each_others_models_can_be_written_down_and_rebuilt(model, steps):
    task = blobs() if model.name == "deep" else few_digits()
    result = model
    for step in steps:
        step.check(result)
        result = step.apply(result, task)
    rebuilt = structure.rebuild(model.module, json.loads(json.dumps(result.edits)), result.module.state_dict())
    assert repr(rebuilt) == repr(result.module) != repr(model.module)
    with torch.no_grad():
        assert torch.equal(rebuilt(*model.example.values()), result.module(*model.example.values()))
