"""Batch norms folded into the layers before them keep the function and survive being written down."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import workbench as wb
from workbench.compression import _folding
from workbench.models import structure


class Normed(nn.Module):
    """Convolutions of several kinds with batch norms, one of which reads something else as well."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.up, self.up_norm = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), nn.BatchNorm2d(4)
        self.side, self.side_norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head, self.head_norm = nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = functional.relu(self.norm(self.stem(x)), inplace=True)
        x = self.up_norm(self.up(x)).relu()
        y = self.side(x)
        x = (self.side_norm(y) + y).relu().mean((2, 3))  # the norm is not the only reader
        return self.out(self.head_norm(self.head(x)).relu())


def normed(seed: int = 0) -> wb.Model:
    torch.manual_seed(seed)
    module = Normed()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(part.weight, 0.2, 3)
            nn.init.normal_(part.bias)
            part.running_mean.normal_()
            part.running_var.uniform_(0.2, 4)
    return wb.load(module.eval(), inputs=torch.randn(4, 1, 8, 8), name="normed")


def test_folding_keeps_the_function_and_leaves_a_norm_that_is_not_alone():
    model = normed()
    folded = _folding.folded(model)
    kinds = {name: type(part).__name__ for name, part in folded.module.named_modules() if "norm" in name}
    assert kinds == {"norm": "Folded", "up_norm": "Folded", "side_norm": "BatchNorm2d", "head_norm": "Folded"}
    x = torch.randn(8, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(folded.module(x), model.module(x), rtol=1e-4, atol=1e-5)
    rebuilt = structure.rebuild(model.module, folded.edits, folded.module.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(x), folded.module(x))


def test_folding_changes_nothing_of_the_given_model():
    model = normed()
    before = model.fingerprint
    _folding.folded(model)
    assert replace(model).fingerprint == before


def test_weights_of_a_folded_layer_are_rounded_with_the_norm_in_them():
    model, x = normed(), np.random.default_rng(0).normal(size=(9, 1, 8, 8)).astype(np.float32)
    task = wb.Task.from_arrays(x, np.arange(9) % 3, x, np.arange(9) % 3)
    result = wb.FakeQuantize(3, per_channel=False).apply(model, task)
    norm = model.module.norm
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    whole = model.module.stem.weight.detach() * factor.view(-1, 1, 1, 1)
    step = whole.abs().max() / 3
    assert torch.allclose(result.module.stem.weight, (whole / step).round() * step, atol=1e-5)
