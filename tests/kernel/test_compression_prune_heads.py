"""Attention heads that go: of torch's own attention, and of modules with a number of heads and linear projections."""

from __future__ import annotations

import pytest
import torch
from _tiny import blobs
from torch import nn
from torch.nn import functional

import workbench as wb
from workbench.errors import StepError
from workbench.models import parts
from workbench.models.zoo.transformer import transformer
from workbench.study import states


class Attention(nn.Module):
    """Self-attention as many write it: sizes kept as attributes, and used in `forward`."""

    def __init__(self, width: int = 16, heads: int = 4):
        super().__init__()
        self.num_attention_heads, self.attention_head_size = heads, width // heads
        self.all_head_size = width
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.dense = nn.Linear(width, width)

    def forward(self, x):
        shape = (*x.shape[:2], self.num_attention_heads, self.attention_head_size)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / self.attention_head_size**0.5, -1)
        return self.dense((weights @ v).transpose(1, 2).reshape(*x.shape[:2], self.all_head_size))


class Net(nn.Module):
    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention, self.head = attention, nn.Linear(16, 3)

    def forward(self, x):
        return self.head((x + self.attention(x)).mean(1))


class Torchs(nn.Module):
    """torch's own attention, called as a network calls it."""

    def __init__(self, **settings):
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 4, **settings)

    def forward(self, x):
        return self.inner(x, x, x)[0]


def net(attention: nn.Module) -> wb.Model:
    torch.manual_seed(0)
    return wb.load(Net(attention), inputs=torch.zeros(2, 5, 16))


def weaken(attention: nn.Module, names: str, heads: list[int], size: int = 4) -> None:
    """Make these heads small in every projection, so that they are the least important."""
    rows = [head * size + i for head in heads for i in range(size)]
    with torch.no_grad():
        for name in names.split():
            layer = attention.get_submodule(name)
            (layer.weight.T if name in ("dense", "projection") else layer.weight)[rows] *= 1e-3


def test_the_least_important_heads_go_and_the_sizes_kept_by_the_module_follow():
    torch.manual_seed(0)
    attention = Attention()
    weaken(attention, "q k v dense", [0, 2])
    model = net(attention)
    pruned = wb.Prune(0.5, granularity="head").apply(model, None).module
    part = pruned.attention
    assert (part.num_attention_heads, part.attention_head_size, part.all_head_size) == (2, 4, 8)
    assert part.q.weight.shape == part.k.weight.shape == part.v.weight.shape == (8, 16)
    assert part.dense.weight.shape == (16, 8)
    kept = [4, 5, 6, 7, 12, 13, 14, 15]
    assert torch.equal(part.q.weight, attention.q.weight[kept])
    assert torch.equal(part.dense.weight, attention.dense.weight[:, kept])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_torchs_own_attention_loses_heads_and_computes_what_the_others_did(batch_first, bias):
    torch.manual_seed(0)
    model = net(Torchs(batch_first=batch_first, bias=bias))
    pruned = wb.Prune(0.25, granularity="head").apply(model, None)
    part = pruned.module.attention.inner
    assert part.num_heads == 3 and part.query.weight.shape == (12, 16) and part.out_proj.weight.shape == (16, 12)
    gone = next(h for h in range(4) if h * 4 not in part.query.kept_channels)
    masked = net(Torchs(batch_first=batch_first, bias=bias)).module
    masked.load_state_dict(model.module.state_dict())
    with torch.no_grad():
        masked.attention.inner.out_proj.weight[:, gone * 4 : gone * 4 + 4] = 0
        x = torch.randn(2, 5, 16)
        assert torch.allclose(pruned.module(x), masked(x), atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"batch_first": True}, {"kdim": 6, "vdim": 7, "batch_first": True}])
@pytest.mark.parametrize("need", [True, False])
def test_the_part_gives_what_torchs_attention_gives(settings, need):
    torch.manual_seed(0)
    old = nn.MultiheadAttention(16, 4, **settings).eval()
    new = parts.build(old, "attention", {})
    q, k, v = torch.randn(2, 5, 16), torch.randn(2, 3, old.kdim), torch.randn(2, 3, old.vdim)
    if not settings:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    padding = torch.tensor([[False, False, True], [False, False, False]])
    for masks in (
        {},
        {"key_padding_mask": padding},
        {"attn_mask": torch.randn(5, 3)},
        {"attn_mask": torch.randn(8, 5, 3), "key_padding_mask": padding.float()},
    ):
        for average in (True, False):
            ours, theirs = (m(q, k, v, need_weights=need, average_attn_weights=average, **masks) for m in (new, old))
            assert torch.allclose(ours[0], theirs[0], atol=1e-6)
            assert (ours[1] is None) == (theirs[1] is None) == (not need)
            assert not need or torch.allclose(ours[1], theirs[1], atol=1e-6)
    if settings.get("kdim") is None:
        assert torch.allclose(new(q[0], k[0], v[0])[0], old(q[0], k[0], v[0])[0], atol=1e-6)


def test_an_encoder_of_torch_keeps_working_with_padded_sentences():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

        def forward(self, x, padding):
            return self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])

    torch.manual_seed(0)
    padding = torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
    model = wb.load(Encoder(), inputs=(torch.randn(2, 5, 16), padding))
    pruned = wb.Prune(granularity="head", layers={"encoder.layers.1.self_attn": 0.5}).apply(model, None)
    rows = [tuple(row.values()) for row in pruned.records[0].rows]
    assert rows == [("encoder.layers.0.self_attn", 4, 4, ""), ("encoder.layers.1.self_attn", 4, 2, "")]
    assert isinstance(pruned.module.encoder.layers[0].self_attn, nn.MultiheadAttention)
    with torch.no_grad():
        assert pruned.run_module(torch.randn(2, 5, 16), padding).isfinite().all()
    pruned.onnx()
    rebuilt = states.unpack(*states.pack(pruned), model)
    assert rebuilt.fingerprint == pruned.fingerprint


def test_the_zoos_transformer_loses_heads_layer_by_layer_or_by_rank():
    torch.manual_seed(0)
    module = transformer(vocabulary=50, length=6, width=16, hidden=32)
    for heads, block in zip(([0, 1, 2], [3]), module.blocks, strict=True):
        weaken(block.attention, "query key value projection", heads)
    model = wb.load(module, inputs=torch.randint(1, 50, (2, 6)))

    def left(step: wb.Prune) -> list[int]:
        return [block.attention.num_heads for block in step.apply(model, None).module.blocks]

    assert left(wb.Prune(0.5, granularity="head")) == [2, 2]
    assert left(wb.Prune(0.5, granularity="head", scope="global")) == [1, 3]
    assert left(wb.Prune(threshold=0.1, granularity="head")) == [1, 3]
    assert left(wb.Prune(0.5, granularity="head", layers={"blocks.0.attention": 0})) == [4, 2]
    assert left(wb.Prune(0.9, granularity="head")) == [1, 1], "one head always stays"


def test_heads_go_in_rounds_with_training_between():
    class Words(nn.Module):
        """Six numbers as six words of one number each."""

        def __init__(self):
            super().__init__()
            self.embed, self.body = nn.Linear(1, 16), Net(Attention())

        def forward(self, x):
            return self.body(self.embed(x[..., None]))

    torch.manual_seed(0)
    model = wb.load(Words(), inputs=torch.zeros(2, 6))
    pruned = wb.Prune(0.75, granularity="head", rounds=2, epochs=2, batch_size=16).apply(model, blobs())
    assert pruned.module.body.attention.num_attention_heads == 1
    assert [record.title for record in pruned.records] == [*["training, by epoch"] * 2, "heads by layer", "size"]
    assert states.unpack(*states.pack(pruned), model).fingerprint == pruned.fingerprint


def test_channels_of_a_pruned_attention_are_left_and_its_weights_can_be_zeroed():
    pruned = wb.Prune(0.5, granularity="head").apply(net(Torchs(batch_first=True)), None)
    sparse = wb.Prune(0.5, granularity="weight").apply(pruned, None)
    assert int((sparse.module.attention.inner.query.weight == 0).sum()) == 64
    assert sparse.changes == ("pruned",)


def test_attention_that_cannot_lose_heads_is_refused_with_what_to_do():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.qkv, self.out = 4, nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    with pytest.raises(StepError, match=r"No attention of Net can lose a head.*three linear layers.*granularity="):
        wb.Prune(0.5, granularity="head").apply(net(Packed()), None)
    with pytest.raises(StepError, match=r"attention of Net cannot lose a head"):
        wb.Prune(granularity="head", layers={"attention": 0.5}).apply(net(Packed()), None)
    with pytest.raises(StepError, match="removes no head of Net, whose attentions have 4"):
        wb.Prune(0.1, granularity="head").apply(net(Attention()), None)
    with pytest.raises(StepError, match="has no attention whose heads can be told"):
        wb.Prune(0.5, granularity="head").check(wb.load("lenet5"))
    with pytest.raises(StepError, match="no layer 'atention'.*Did you mean 'attention'"):
        wb.Prune(0.5, granularity="head", layers={"atention": 0.5}).check(net(Attention()))
