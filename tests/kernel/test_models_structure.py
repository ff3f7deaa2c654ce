"""Structure as JSON: what a step changed, and the module rebuilt from it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

import workbench as wb
from workbench.errors import StepError
from workbench.models.cast import cast, cast_dtype
from workbench.models.structure import difference, rebuild


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.norm = nn.LayerNorm((8, 4, 4))
        self.fc = nn.Linear(128, 5)
        self.tied = nn.Linear(128, 5)
        self.tied.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.bn(self.conv(x)).relu()).flatten(1)
        return self.fc(y) + self.tied(y)


X = torch.rand(2, 3, 4, 4)


def narrowed(module: Net, width: int) -> Net:
    """The first `width` channels, as a pruner leaves them: tensors cut and settings changed."""
    module = copy.deepcopy(module)
    module.conv.weight = nn.Parameter(module.conv.weight[:width].detach().clone())
    module.conv.bias = nn.Parameter(module.conv.bias[:width].detach().clone())
    module.conv.out_channels = module.bn.num_features = width
    for name in ("weight", "bias"):
        setattr(module.bn, name, nn.Parameter(getattr(module.bn, name)[:width].detach().clone()))
        setattr(module.norm, name, nn.Parameter(getattr(module.norm, name)[:width].detach().clone()))
    module.bn.running_mean, module.bn.running_var = module.bn.running_mean[:width], module.bn.running_var[:width]
    module.norm.normalized_shape = (width, 4, 4)
    module.fc.in_features = module.tied.in_features = width * 16
    module.fc.weight = module.tied.weight = nn.Parameter(module.fc.weight[:, : width * 16].detach().clone())
    return module.eval()


@pytest.fixture
def base() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def through_json(edit: dict) -> dict:
    return json.loads(json.dumps(edit))


def test_rebuilt_module_computes_exactly_what_the_changed_one_does(base: Net):
    changed = narrowed(base, 5)
    edit = through_json(difference(base, changed))
    assert edit["conv"] == {"out_channels": 5}
    assert edit["norm"] == {"normalized_shape": [5, 4, 4]}
    rebuilt = rebuild(base, [edit], changed.state_dict())
    assert torch.equal(rebuilt(X), changed(X))
    assert rebuilt.norm.normalized_shape == (5, 4, 4)
    assert rebuilt.conv.out_channels == 5 and not rebuilt.training


def test_rebuilding_leaves_the_base_alone(base: Net):
    before = base(X)
    rebuild(base, [through_json(difference(base, narrowed(base, 3)))], narrowed(base, 3).state_dict())
    assert torch.equal(base(X), before)


def test_edits_apply_one_after_another(base: Net):
    once = narrowed(base, 6)
    twice = narrowed(once, 2)
    edits = [through_json(difference(base, once)), through_json(difference(once, twice))]
    assert torch.equal(rebuild(base, edits, twice.state_dict())(X), twice(X))


def test_tied_weights_stay_tied(base: Net):
    changed = narrowed(base, 5)
    rebuilt = rebuild(base, [difference(base, changed)], changed.state_dict())
    assert rebuilt.fc.weight is rebuilt.tied.weight


def test_changed_weights_alone_are_no_edit_and_still_rebuilt(base: Net):
    changed = copy.deepcopy(base)
    nn.init.zeros_(changed.fc.weight)
    assert difference(base, changed) == {}
    assert torch.equal(rebuild(base, [{}], changed.state_dict())(X), changed(X))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cast_module_is_rebuilt_in_its_dtype(base: Net, dtype: torch.dtype):
    changed = cast(narrowed(base, 5), dtype)
    edit = through_json(difference(base, changed))
    assert edit["cast"] == str(dtype).removeprefix("torch.")
    rebuilt = rebuild(base, [edit], changed.state_dict())
    assert cast_dtype(rebuilt) == dtype == rebuilt.fc.weight.dtype
    assert torch.equal(rebuilt(X), changed(X))
    assert cast_dtype(copy.deepcopy(rebuilt)) == dtype


def test_every_zoo_network_survives_the_round_trip():
    for name in ("lenet5", "resnet20"):
        module = wb.load(name).module
        rebuilt = rebuild(module, [through_json(difference(module, copy.deepcopy(module)))], module.state_dict())
        assert torch.equal(rebuilt(wb.load(name).example["x"]), module(wb.load(name).example["x"]))


def test_added_removed_and_replaced_parts_are_refused_by_name(base: Net):
    grown, swapped = copy.deepcopy(base), copy.deepcopy(base)
    grown.extra = nn.ReLU()
    swapped.bn = nn.Identity()
    with pytest.raises(StepError, match="added extra, removed nothing"):
        difference(base, grown)
    with pytest.raises(StepError, match="added nothing, removed extra"):
        difference(grown, base)
    with pytest.raises(StepError, match="bn was a BatchNorm2d and is now a Identity"):
        difference(base, swapped)


def test_edit_of_an_unknown_part_names_the_nearest(base: Net):
    with pytest.raises(StepError, match=r"'conw'.*Did you mean 'conv'"):
        rebuild(base, [{"conw": {"out_channels": 3}}], base.state_dict())


def test_weights_of_another_module_are_refused_by_key(base: Net):
    state = base.state_dict()
    state["other"] = state.pop("fc.bias")
    with pytest.raises(StepError, match=r"missing fc\.bias, unexpected other"):
        rebuild(base, [], state)
