"""The file of compressed weights: bit-exact, near the entropy, and never more than one clear error."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import workbench as wb
from workbench.compression import _bits, coding
from workbench.errors import LoadError

HEADER_BYTES = 25


def model_of(*layers: nn.Module, shape: tuple[int, ...] = (2, 6), dtype: torch.dtype = torch.float32) -> wb.Model:
    return wb.load(nn.Sequential(*layers), inputs=torch.zeros(shape, dtype=dtype))


def with_weights(*matrices: np.ndarray) -> wb.Model:
    """Linear layers without biases with these weights."""
    layers = [nn.Linear(m.shape[1], m.shape[0], bias=False) for m in matrices]
    with torch.no_grad():
        for layer, matrix in zip(layers, matrices, strict=True):
            layer.weight.copy_(torch.from_numpy(np.asarray(matrix, np.float32)))
    return wb.Model("linear", {"x": torch.zeros(2, matrices[0].shape[1])}, module=nn.Sequential(*layers))


def blank(model: wb.Model) -> wb.Model:
    """The same structure, all tensors zero."""
    copied = wb.compression._training.copied(model)
    with torch.no_grad():
        for tensor in copied.module.state_dict().values():
            tensor.zero_()
    return copied


def assert_same_bits(a: wb.Model, b: wb.Model) -> None:
    ours, theirs = a.module.state_dict(), b.module.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape
        assert tensor.numpy(force=True).tobytes() == theirs[name].numpy(force=True).tobytes(), name


def assert_same_initialisers(a: onnx.ModelProto, b: onnx.ModelProto) -> None:
    assert a is not b
    for before, after in zip(a.graph.initializer, b.graph.initializer, strict=True):
        assert before.name == after.name and before.data_type == after.data_type and before.dims == after.dims
        ours, theirs = onnx.numpy_helper.to_array(before), onnx.numpy_helper.to_array(after)
        assert ours.tolist() == theirs.tolist()


def entropy_bytes(symbols: np.ndarray) -> float:
    share = np.unique(symbols, return_counts=True)[1] / len(symbols)
    return float(-(share * np.log2(share)).sum() * len(symbols) / 8)


def lenet_300_100(nonzero: float, values: int) -> wb.Model:
    """LeNet-300-100 of Deep Compression's shape: normal weights, the largest kept, rounded to so many values."""
    rng = np.random.default_rng(0)
    module = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    with torch.no_grad():
        for layer in module[::2]:
            weight = rng.normal(scale=0.05, size=layer.weight.shape).astype(np.float32)
            kept = np.abs(weight) > np.quantile(np.abs(weight), 1 - nonzero)
            grid = np.linspace(weight.min(), weight.max(), values).astype(np.float32)
            rounded = grid[np.abs(weight[..., None] - grid).argmin(-1)]
            layer.weight.copy_(torch.from_numpy(np.where(kept, rounded, np.float32(0))))
            layer.bias.copy_(torch.from_numpy(rng.normal(scale=0.05, size=layer.bias.shape).astype(np.float32)))
    return wb.load(module, inputs=torch.zeros(2, 784))


# how small


@pytest.mark.parametrize("nonzero", [0.06, 0.08])
def test_the_file_is_within_5_per_cent_of_the_entropy(nonzero):
    model = lenet_300_100(nonzero, values=32)
    bound = 0.0
    for tensor in model.module.state_dict().values():
        values = tensor.numpy().ravel()
        if tensor.ndim == 1:
            bound += values.nbytes
            continue
        positions = np.flatnonzero(values)
        bound += entropy_bytes(np.diff(positions, prepend=-1)) + entropy_bytes(values[positions])
        bound += 4 * len(np.unique(values[positions]))
    data = coding.encode(model)
    assert len(data) <= 1.05 * bound
    assert_same_bits(coding.decode(data, blank(model)), model)


def test_lenet_300_100_with_6_per_cent_of_its_weights_and_32_values_is_40_times_smaller():
    model = lenet_300_100(0.06, values=32)
    assert 4 * model.parameters / len(coding.encode(model)) >= 40


def test_dense_weights_of_16_values_take_their_huffman_code():
    rng = np.random.default_rng(0)
    grid = rng.normal(size=16).astype(np.float32)
    share = rng.dirichlet(np.ones(16))
    weight = grid[rng.choice(16, size=(200, 500), p=share)]
    length = len(coding.encode(with_weights(weight)))
    assert entropy_bytes(weight.ravel()) < length <= 1.05 * entropy_bytes(weight.ravel()) + 200


def test_weights_that_share_nothing_still_lose_the_repetition_of_their_exponents():
    weight = np.random.default_rng(0).normal(size=(300, 300))
    assert len(coding.encode(with_weights(weight))) < 0.95 * 4 * weight.size


def test_zeros_left_negative_by_a_mask_cost_nothing_and_come_back_as_zeros():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(100, 100)).astype(np.float32) * (rng.random((100, 100)) < 0.05)
    assert np.signbit(weight[weight == 0]).any()
    model = with_weights(weight)
    data = coding.encode(model)
    assert len(data) == len(coding.encode(with_weights(weight + np.float32(0))))
    back = coding.decode(data, model).module[0].weight.detach().numpy()
    np.testing.assert_array_equal(back, weight)
    assert not np.signbit(back[back == 0]).any()


# the way back


@pytest.mark.parametrize(
    "weight",
    [
        np.zeros((4, 5)),
        np.full((4, 5), 0.25),
        np.eye(300)[:2],  # gaps of more than a byte
        np.r_[np.zeros(255), 1.0, np.zeros(254), 2.0, np.zeros(256), 3.0, np.zeros(510)].reshape(2, -1),
        np.repeat(np.random.default_rng(0).normal(size=300), 20).reshape(60, 100),  # two-byte indices
        np.where(np.random.default_rng(1).random((60, 100)) < 0.2, 0, 1) * np.arange(6000).reshape(60, 100) % 700,
        np.random.default_rng(2).normal(size=(1, 1)),
    ],
    ids=["all zero", "one value", "far apart", "gaps of 254 to 256", "300 values", "sparse, 699 values", "one weight"],
)
def test_weights_come_back_bit_for_bit(weight):
    model = with_weights(weight)
    assert_same_bits(coding.decode(coding.encode(model), blank(model)), model)


def test_statistics_whole_numbers_and_tied_weights_come_back_too():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64)
    model = model_of(*layers, shape=(2, 1, 6, 6))
    model.module[4].weight = model.module[3].weight
    model.module[1].num_batches_tracked.fill_(12345)
    model.module[1].running_var.fill_(float("nan"))
    data = coding.encode(model)
    back = coding.decode(data, blank(model))
    assert_same_bits(back, model)
    assert back.module[4].weight is back.module[3].weight
    assert len(data) < 4 * 64 * 64 + 2 * 64 * 4 + 300, "tied weights are written once"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_come_back(dtype):
    torch.manual_seed(0)
    model = model_of(nn.Linear(6, 40).to(dtype), nn.Linear(40, 3).to(dtype), dtype=dtype)
    back = coding.decode(coding.encode(model), model)
    assert back.fingerprint == model.fingerprint and back.module is not model.module


def test_a_clustered_model_comes_back_into_the_untouched_one(digits):
    untouched = wb.load("lenet5")
    shared = wb.Cluster(16).apply(untouched, digits)
    data = coding.encode(shared)
    assert coding.decode(data, untouched).fingerprint == shared.fingerprint
    assert len(data) < 4 * untouched.parameters / 8


def test_resnet20_comes_back():
    model = wb.load("resnet20")
    assert coding.decode(coding.encode(model), model).fingerprint == model.fingerprint


def test_an_int8_graph_comes_back(digits):
    model = wb.Quantize("int8").apply(wb.load("lenet5"), digits)
    data = coding.encode(model)
    back = coding.decode(data, model)
    assert_same_initialisers(back.graph, model.graph)
    x = digits.inputs("test", 50)
    with wb.OnnxRuntime().compile(model) as first, wb.OnnxRuntime().compile(back) as second:
        np.testing.assert_array_equal(first(*x), second(*x))
    assert len(data) < sum(len(t.raw_data) for t in model.graph.graph.initializer)


def test_initialisers_of_four_bits_bfloat16_and_words_come_back():
    tensors = [
        helper.make_tensor("four", TensorProto.INT4, [3, 5], [-8, 7, 0, 1, -1] * 3),
        helper.make_tensor("brain", TensorProto.BFLOAT16, [2, 2], [1.0, -2.0, 0.0, 3.0]),
        helper.make_tensor("words", TensorProto.STRING, [1], [b"left alone"]),
        helper.make_tensor("scale", TensorProto.FLOAT, [], [0.5]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 2])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y], tensors)
    model = wb.Model("g", {"x": torch.zeros(2, 2)}, graph=helper.make_model(graph))
    assert_same_initialisers(coding.decode(coding.encode(model), model).graph, model.graph)


# bad input


@pytest.fixture(scope="module")
def small() -> wb.Model:
    """Sparse weights of few values, sparse ones of many, dense ones, biases: every part that a file can have."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    model = model_of(nn.Linear(6, 20), nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 3))
    with torch.no_grad():
        for index, values in ((1, rng.choice([0, 0, 0, 0, 0.5, -0.25], (20, 20))), (2, rng.normal(size=(20, 20)))):
            model.module[index].weight.copy_(torch.from_numpy(values))
        model.module[2].weight[torch.from_numpy(rng.random((20, 20)) < 0.8)] = 0
    return model


def test_a_file_cut_anywhere_is_refused_as_truncated(small):
    data = coding.encode(small)
    for length in range(1, len(data)):
        with pytest.raises(LoadError, match="truncated"):
            coding.decode(data[:length], small)


def test_a_flipped_bit_anywhere_is_refused(small):
    data = coding.encode(small)
    for place in range(len(data)):
        spoilt = bytearray(data)
        spoilt[place] ^= 1 << place % 8
        with pytest.raises(LoadError):
            coding.decode(bytes(spoilt), small)


def test_files_of_others_and_of_other_versions_are_refused_saying_so(small):
    data = coding.encode(small)
    for foreign in (b"", b"PK\x03\x04 a zip", bytes(100)):
        with pytest.raises(LoadError, match="no file of compressed weights"):
            coding.decode(foreign, small)
    with pytest.raises(LoadError, match="version 7"):
        coding.decode(data[:4] + b"\x07" + data[5:], small)
    with pytest.raises(LoadError, match="followed by something else"):
        coding.decode(data + b"\0", small)


def test_the_weights_of_a_model_of_another_structure_are_refused(small):
    wider = model_of(nn.Linear(6, 21), nn.Linear(21, 20), nn.Linear(20, 20), nn.Linear(20, 3))
    with pytest.raises(LoadError, match="another model than Sequential"):
        coding.decode(coding.encode(wider), small)


def test_a_file_made_to_deceive_gives_one_clear_error_or_weights_and_never_anything_else(small):
    data = coding.encode(small)
    rng = np.random.default_rng(0)
    refused = 0
    for place in range(HEADER_BYTES, len(data)):
        body = bytearray(data[HEADER_BYTES:])
        body[place - HEADER_BYTES] = rng.integers(256)
        header = data[:13] + struct.pack("<IQ", zlib.crc32(body), len(body))  # a checksum that fits
        try:
            back = coding.decode(header + bytes(body), small)
        except LoadError as error:
            refused += 1
            assert "damaged" in str(error)
        else:
            assert back.parameters == small.parameters
    assert refused > 100


# streams


@pytest.mark.parametrize(
    "symbols",
    [
        np.zeros(0, np.uint8),
        np.zeros(1000, np.uint8),
        np.full(5, 255, np.uint8),
        np.arange(11, dtype=np.uint8),
        np.random.default_rng(0).integers(0, 256, 3000).astype(np.uint8),
        np.random.default_rng(0).geometric(0.3, 100_000).astype(np.uint8),
        np.tile(np.random.default_rng(0).integers(0, 256, 100).astype(np.uint8), 50),
    ],
    ids=["none", "zeros", "five", "few", "uniform", "geometric", "repeated"],
)
def test_streams_come_back_and_take_little_more_than_their_entropy(symbols):
    data = _bits.pack(symbols)
    np.testing.assert_array_equal(_bits.unpack(data, len(symbols)), symbols)
    assert len(data) <= 1.05 * (entropy_bytes(symbols) if len(symbols) else 0) + 30
    for count in {max(len(symbols) - 9, 0), len(symbols) + 9} - {len(symbols)}:
        if symbols.any():
            with pytest.raises(ValueError):
                _bits.unpack(data, count)


def test_a_stream_that_would_inflate_to_more_than_was_said_is_not_inflated():
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = bytes([10]) + deflate.compress(bytes(10**7)) + deflate.flush()
    with pytest.raises(ValueError, match="another length"):
        _bits.unpack(bomb, 1000)


def test_the_huffman_bound_is_that_of_the_textbook():
    # a b c d e f of 45 13 12 16 9 5: lengths 1 3 3 3 4 4 (Cormen et al., Introduction to Algorithms, section 16.3)
    symbols = np.repeat(np.arange(6, dtype=np.uint8), [45, 13, 12, 16, 9, 5])
    assert _bits.huffman_bytes(symbols) == 224 / 8
    assert _bits.huffman_bytes(np.zeros(7, np.uint8)) == 0
