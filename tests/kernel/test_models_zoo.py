"""The zoo: our own networks, their shapes and their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import workbench as wb
from workbench.errors import LoadError
from workbench.models import zoo

PARAMETERS = {
    "lenet5": 61_706,
    "lenet5-caffe": 431_080,
    "lenet5-quarter": 15_252,
    "lenet300": 266_610,
    "mlp": 101_770,
    "cifarnet": 62_006,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    # 8192 · 128 + 32 · 128; twice 4 · (128² + 128) + 2 · 128 · 512 + 512 + 128 + 4 · 128; 2 · 128; 2 · 128 + 2
    "transformer": 1_449_730,
}
CLASSES = dict.fromkeys(PARAMETERS, 10) | {"transformer": 2}


def test_every_network_is_covered_here():
    assert PARAMETERS.keys() == zoo.ZOO.keys()


@pytest.mark.parametrize("name", zoo.ZOO)
def test_network_has_its_published_size_and_gives_a_logit_per_class(name: str):
    model = wb.load(name)
    assert model.parameters == PARAMETERS[name]
    with torch.no_grad():
        assert model.run_module(*model.example.values()).shape == (2, CLASSES[name])
    assert not any(module.training for module in model.module.modules())
    assert model.inputs[0].shape == (None, *zoo.ZOO[name].shape)


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("lenet5", 416_520),
        ("lenet5-caffe", 2_293_000),
        ("lenet5-quarter", 133_256),
        ("cifarnet", 651_720),
        ("resnet20", 40_551_040),
        ("transformer", 13_107_456),
    ],
)
def test_network_costs_what_its_layers_cost_by_hand(name: str, macs: int):
    # lenet5: 28² · 6 · 25 + 10² · 16 · 150 + 400 · 120 + 120 · 84 + 84 · 10
    # lenet5-caffe: 24² · 20 · 25 + 8² · 50 · 500 + 800 · 500 + 500 · 10
    # transformer: twice 32 · (4 · 128² + 2 · 128 · 512) and 2 · 32² · 128 of attention; 128 · 2
    assert wb.load(name).macs == macs


@pytest.mark.parametrize("name", [n for n, entry in zoo.ZOO.items() if entry.trained_on == "digits"])
def test_shipped_weights_classify_the_digits(name: str, digits: wb.Task):
    model = wb.load(name)
    assert model.weights == "digits"
    x = torch.from_numpy(digits.inputs("test", digits.count("test"))[0])
    with torch.no_grad():
        right = (model.module(x).argmax(1).numpy() == digits.labels("test")).mean()
    assert right >= 0.96


def test_shipped_weights_stay_small():
    folder = Path(zoo.__file__).parent / "weights"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 900_000


def test_network_without_shipped_weights_says_it_is_random():
    assert wb.load("resnet20").weights == "random (seed 0)"
    assert wb.load("lenet5", weights="random").weights == "random (seed 0)"


def test_random_weights_are_the_same_each_time_and_not_the_shipped_ones():
    one, other = wb.load("lenet5", weights="random"), wb.load("lenet5", weights="random")
    assert one.fingerprint == other.fingerprint != wb.load("lenet5").fingerprint


@pytest.mark.parametrize("name", ["lenet5", "resnet20"])
def test_loading_leaves_the_global_random_state_alone(name: str):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    wb.load(name)
    assert torch.equal(torch.rand(3), expected)


def test_unknown_weights_name_those_there_are():
    with pytest.raises(LoadError, match=r"no weights 'imagenet'.*Accepted: digits, random"):
        wb.load("lenet5", weights="imagenet")


def test_mistyped_name_is_answered_with_the_nearest():
    with pytest.raises(LoadError, match=r"Did you mean 'lenet5'\?"):
        wb.load("lenet6")


def test_the_transformer_takes_ids_and_does_not_see_its_padding():
    model = wb.load("transformer")
    ids = model.example["x"]
    assert ids.dtype == torch.int64 and ids.shape == (2, 32) and 0 < int(ids.min()) <= int(ids.max()) < 8192
    short, cut = ids.clone(), model.module
    short[:, 20:] = 0
    with torch.no_grad():
        padded = cut(short)
        # what the padded places hold must not matter: give the padding id another vector
        cut.embed.weight[0] = 5.0
        assert torch.allclose(cut(short), padded, atol=1e-6)
        assert not torch.allclose(cut(ids), padded, atol=1e-3)
        assert torch.isfinite(cut(torch.zeros_like(ids))).all()


def test_the_transformers_attention_is_torchs_own():
    attention = wb.load("transformer").module.blocks[0].attention
    own = torch.nn.MultiheadAttention(128, 4, batch_first=True)
    with torch.no_grad():
        parts = attention.query, attention.key, attention.value
        own.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        own.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        own.out_proj.load_state_dict(attention.projection.state_dict())
        x = torch.rand(3, 7, 128)
        hidden = torch.arange(7) >= torch.tensor([[7], [4], [1]])
        expected = own(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
        assert torch.allclose(attention(x, hidden[:, None, None] * -1e4), expected, atol=1e-5)
