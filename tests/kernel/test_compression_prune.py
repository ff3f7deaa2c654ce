"""Pruning really shrinks, keeps what the rest computes, and falls into none of torch-pruning's traps."""

from __future__ import annotations

import pytest
import torch
import torch_pruning
from torch import nn
from torch.nn import functional

import workbench as wb
from workbench.errors import StepError


def load(module: nn.Module, *shape: int) -> wb.Model:
    return wb.load(module, inputs=torch.zeros(2, *shape))


def widths(model: wb.Model) -> dict[str, int]:
    """Output width of every convolution and linear layer, as its weight really is."""
    return {
        name: layer.weight.shape[0]
        for name, layer in model.module.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    }


def cnn(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), *middle, nn.Flatten(), nn.Linear(32 * 36, 5)
    )


class Residual(nn.Module):
    """Two blocks, the second of which widens its shortcut by padding channels, as option A does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.b = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 32, 3, padding=1)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        y = self.b(self.a(x).relu())
        x = (y + functional.pad(x, (0, 0, 0, 0, 8, 8))).relu()
        return self.head(x.mean((2, 3)))


# --- what is removed


def test_half_the_channels_go_and_the_next_layer_reads_fewer():
    pruned = wb.Prune(0.5).apply(load(cnn(), 3, 8, 8), None).module
    assert pruned[0].weight.shape == (16, 3, 3, 3) and pruned[0].out_channels == 16
    assert pruned[1].running_mean.shape == (16,) and pruned[1].num_features == 16
    assert pruned[4].weight.shape == (5, 16 * 36) and pruned[4].in_features == 16 * 36


def test_the_least_important_channels_go():
    module = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        module[0].weight[::2] *= 1e-3
        module[2].weight[:, ::2] *= 1e-3
    pruned = wb.Prune(0.5).apply(load(module, 4), None).module
    assert torch.equal(pruned[0].weight, module[0].weight[1::2])
    assert torch.equal(pruned[2].weight, module[2].weight[:, 1::2])


def test_removing_channels_that_do_nothing_changes_nothing():
    module = Residual().eval()
    dead = torch.arange(0, 24, 2)
    with torch.no_grad():
        module.a.weight[dead] = 0
        module.a.bias[dead] = 0
        module.b.weight[:, dead] = 0
    x = torch.randn(3, 3, 8, 8)
    pruned = wb.Prune(0.5, round_to=1).apply(load(module, 3, 8, 8), None).module
    assert pruned.a.out_channels == 12
    assert torch.allclose(pruned(x), module(x), atol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "round_to", "expected"),
    [(0.5, 8, 16), (0.3, 8, 24), (0.3, 1, 22), (0.9, 8, 8), (0.99, 1, 1), (0.3, 16, 16), (0.3, 32, 22), (0.4, 4, 20)],
)
def test_widths_are_the_nearest_multiple_of_round_to(ratio, round_to, expected):
    pruned = wb.Prune(ratio, round_to=round_to).apply(load(cnn(), 3, 8, 8), None)
    assert widths(pruned)["0"] == expected


def test_a_layer_too_narrow_for_a_multiple_gets_its_exact_share():
    pruned = wb.Prune(0.5).apply(wb.load("lenet5"), None)
    assert list(widths(pruned).values()) == [3, 8, 64, 40, 10]


def test_global_ranking_spares_important_layers_and_empties_none():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 2))
    with torch.no_grad():  # one layer of even channels, one with a few that dwarf the rest
        module[0].weight.fill_(1.0).add_(torch.rand_like(module[0].weight) * 0.01)
        module[2].weight[4:] *= 1e-4
    local = widths(wb.Prune(0.5, round_to=1).apply(load(module, 8), None))
    pruned = widths(wb.Prune(0.5, scope="global", round_to=1).apply(load(module, 8), None))
    assert local == {"0": 20, "2": 20, "4": 2}
    assert 4 <= pruned["2"] < 20 < pruned["0"]


def test_both_norms_are_told_apart():
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.eye(4) * 1.5)  # one weight of 1.5: L1 1.5, L2 squared 2.25
        module[0].weight[2:] = 0.5  # four of 0.5: L1 2.0, L2 squared 1.0
        module[1].weight.fill_(1.0)
    kept = {}
    for norm in ("l1", "l2"):
        step = wb.Prune(0.5, importance=norm, round_to=1)
        kept[norm] = step.apply(load(module, 4), None).module[0].weight
    assert torch.equal(kept["l1"], module[0].weight[2:])
    assert torch.equal(kept["l2"], module[0].weight[:2])


# --- traps


@pytest.mark.parametrize(
    "tail", [[], [nn.Softmax(1)], [nn.LogSoftmax(1), nn.Identity()]], ids=["bare", "softmax", "log"]
)
def test_the_classifier_keeps_its_width(tail):
    model = load(nn.Sequential(*cnn(), *tail), 3, 8, 8)
    pruned = wb.Prune(0.9).apply(model, None)
    assert widths(pruned)["4"] == 5
    assert pruned.run_module(torch.zeros(1, 3, 8, 8)).shape == (1, 5)


def test_every_head_of_a_network_with_several_outputs_keeps_its_width():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 16), nn.Linear(32, 24)

        def forward(self, x):
            x = self.body(x).relu()
            return {"a": self.first(x), "rest": (self.second(x).softmax(1),)}

    assert widths(wb.Prune(0.5).apply(load(Heads(), 8), None)) == {"body": 16, "first": 16, "second": 24}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_prunes_where_gradients_are_switched_off(mode):
    model = load(cnn(), 3, 8, 8)
    with mode():
        pruned = wb.Prune(0.5).apply(model, None)
    assert widths(pruned)["0"] == 16
    assert not pruned.module[0].weight.is_inference()
    pruned.module(torch.randn(2, 3, 8, 8)).sum().backward()


def test_grouped_convolutions_stay_whole_and_leave_no_trace_on_the_next_model():
    defaults = torch_pruning.pruner.BasePruner.__init__.__defaults__
    grouped = cnn(nn.Conv2d(32, 32, 3, padding=1, groups=4), nn.ReLU())
    pruned = wb.Prune(0.5).apply(load(grouped, 3, 8, 8), None).module
    assert pruned[3].groups == 4 and pruned[3].weight.shape == (16, 4, 3, 3)
    assert widths(wb.Prune(0.3, round_to=1).apply(load(cnn(), 3, 8, 8), None))["0"] == 22
    assert all(not value for value in defaults if isinstance(value, dict))


def test_depthwise_convolutions_follow_their_input():
    module = cnn(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU(), nn.Conv2d(32, 32, 1))
    pruned = wb.Prune(0.5).apply(load(module, 3, 8, 8), None).module
    assert pruned[3].groups == pruned[3].out_channels == 16
    assert pruned[5].weight.shape == (16, 16, 1, 1)


def test_channels_behind_a_padded_shortcut_are_left_alone():
    model = load(Residual(), 3, 8, 8)
    assert widths(wb.Prune(0.5).apply(model, None)) == {"stem": 16, "a": 16, "b": 32, "head": 4}


@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_only_inner_channels_of_the_zoos_resnets_shrink(name):
    model = wb.load(name)
    before, after = widths(model), widths(wb.Prune(0.5).apply(model, None))
    for layer in before:
        inner = layer.endswith(".conv1")
        assert after[layer] == (before[layer] // 2 if inner else before[layer]), layer


def test_layers_joined_by_an_addition_lose_the_same_channels():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 32), nn.Linear(32, 32), nn.Linear(32, 2)

        def forward(self, x):
            x = self.a(x).relu()
            return self.c(x + self.b(x).relu())

    assert widths(wb.Prune(0.5).apply(load(Block(), 4), None)) == {"a": 16, "b": 16, "c": 2}


def test_concatenated_channels_are_found_behind_the_concatenation():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.norm, self.head = nn.BatchNorm2d(32), nn.Linear(32, 4)

        def forward(self, x):
            x = self.a(x).relu()
            return self.head(self.norm(torch.cat([x, self.b(x).relu()], 1)).mean((2, 3)))

    assert widths(wb.Prune(0.5).apply(load(Dense(), 3, 8, 8), None)) == {"a": 8, "b": 8, "head": 4}


def test_attention_keeps_its_heads_and_its_feed_forward_part_shrinks():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = load(nn.Sequential(layer, nn.Linear(32, 3)), 5, 32)
    pruned = wb.Prune(0.5).apply(model, None)
    part = pruned.module[0]
    assert (part.linear1.out_features, part.linear2.in_features) == (32, 32)
    assert part.self_attn.num_heads == 4 and part.self_attn.in_proj_weight.shape == (96, 32)
    assert widths(pruned)["1"] == 3


def test_heads_written_out_by_hand_are_left_alone():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
            self.wide, self.narrow = nn.Linear(32, 64), nn.Linear(64, 3)

        def forward(self, x):
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
            x = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], 32)
            return self.narrow(self.wide(self.out(x)).relu()).mean(1)

    pruned = widths(wb.Prune(0.5).apply(load(Attention(), 5, 32), None))
    assert pruned["qkv"] == 96 and pruned["wide"] == 32 and pruned["narrow"] == 3


def test_a_size_fixed_in_forward_protects_its_layer_and_no_other():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.head = nn.Linear(16 * 64, 4)

        def forward(self, x):
            return self.head(self.b(self.a(x).relu()).relu().view(-1, 16 * 64))

    assert widths(wb.Prune(0.5).apply(load(Fixed(), 3, 8, 8), None)) == {"a": 8, "b": 16, "head": 4}


def test_inputs_by_keyword_and_ids_are_traced():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.hidden, self.head = nn.Embedding(10, 16), nn.Linear(16, 32), nn.Linear(32, 2)

        def forward(self, *, ids, mask):
            return self.head(self.hidden(self.embed(ids) * mask[..., None]).relu().mean(1))

    inputs = {"ids": torch.ones(2, 6, dtype=torch.int64), "mask": torch.ones(2, 6)}
    pruned = wb.Prune(0.5).apply(wb.load(Text(), inputs=inputs), None)
    assert widths(pruned)["hidden"] == 16 and widths(pruned)["head"] == 2


def test_frozen_parameters_are_pruned_and_stay_frozen():
    module = cnn()
    module[0].requires_grad_(False)
    pruned = wb.Prune(0.5).apply(load(module, 3, 8, 8), None).module
    assert pruned[0].weight.shape[0] == 16
    assert not pruned[0].weight.requires_grad and not pruned[0].bias.requires_grad and pruned[4].weight.requires_grad


# --- single weights


def test_the_smallest_weights_of_each_layer_become_zero():
    module = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 4))
    pruned = wb.Prune(0.25, granularity="weight").apply(load(module, 10), None).module
    for i, dropped in ((0, 25), (1, 10)):
        before, after = module[i].weight, pruned[i].weight
        assert int((after == 0).sum()) == dropped
        assert before[after == 0].abs().max() < before[after != 0].abs().min()
        assert torch.equal(after[after != 0], before[after != 0])
        assert torch.equal(pruned[i].bias, module[i].bias)


def test_the_smallest_weights_of_all_layers_become_zero_under_global_ranking():
    module = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    with torch.no_grad():
        module[0].weight.add_(module[0].weight.sign())
    pruned = wb.Prune(0.5, granularity="weight", scope="global").apply(load(module, 10), None).module
    assert int((pruned[0].weight == 0).sum()) == 0 and int((pruned[1].weight == 0).sum()) == 100


def test_equal_weights_are_still_zeroed_in_the_exact_number():
    module = nn.Sequential(nn.Linear(10, 10))
    nn.init.ones_(module[0].weight)
    assert int((wb.Prune(0.3, granularity="weight").apply(load(module, 10), None).module[0].weight == 0).sum()) == 30


# --- the step as a whole


@pytest.mark.parametrize("step", [wb.Prune(0.5), wb.Prune(0.5, scope="global"), wb.Prune(0.5, granularity="weight")])
def test_the_result_is_the_same_every_time_and_the_model_untouched(step):
    model = wb.load("lenet5")
    before = model.fingerprint
    first = step.apply(model, None, seed=0)
    torch.manual_seed(7)
    assert step.apply(model, None, seed=1).fingerprint == first.fingerprint
    assert wb.Model.fingerprint.func(model) == before
    assert not any(module._forward_pre_hooks for module in first.module.modules())


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated, yet its files are about
def test_what_cannot_be_pruned_is_refused_with_what_to_do():
    line = load(nn.Sequential(nn.Linear(8, 4)), 8)
    with pytest.raises(StepError, match=r"feeds the output directly.*granularity=\"weight\""):
        wb.Prune(0.5).apply(line, None)
    with pytest.raises(StepError, match=r"removes no channel.*multiples of 8.*smaller round_to"):
        wb.Prune(0.1).apply(load(cnn(), 3, 8, 8), None)
    with pytest.raises(StepError, match="convolutions and linear layers, and .* shows none"):
        wb.Prune(0.5).check(load(nn.Sequential(nn.PReLU()), 8))
    with pytest.raises(StepError, match="ONNX graph only"):
        wb.Prune(0.5).check(wb.Model("graph", {"x": torch.zeros(2, 8)}, graph=line.onnx()))
    with pytest.raises(StepError, match="TorchScript"):
        wb.Prune(0.5).check(load(torch.jit.trace(cnn(), torch.zeros(2, 3, 8, 8)), 3, 8, 8))
