"""Sizes: every form of the weights by an independent count, and speed told beside them."""

from __future__ import annotations

import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from torch import nn

import workbench as wb
from workbench.compression import coding
from workbench.study.candidate import Candidate
from workbench.study.recipe import Recipe

BY_HAND = np.float32(
    [[0, 0, 0.5, 0, -0.5, 0, 0, 0.5], [0, 0.25, 0, 0, 0, 0, 0, 0], [0] * 8, [0.5, 0, 0, 0, 0, 0, 0, 1]]
)


def linear(weight: np.ndarray, name: str = "fc") -> wb.Model:
    module = nn.Sequential()
    module.add_module(name, nn.Linear(weight.shape[1], weight.shape[0]))
    with torch.no_grad():
        module.get_submodule(name).weight.copy_(torch.from_numpy(weight))
        module.get_submodule(name).bias.copy_(torch.arange(weight.shape[0]))
    return wb.load(module, inputs=torch.zeros(2, weight.shape[1]))


def pruned_and_shared() -> wb.Model:
    rng = np.random.default_rng(0)
    weight = rng.choice(np.float32([-0.3, -0.1, 0.1, 0.2, 0.4]), (200, 300)) * (rng.random((200, 300)) < 0.1)
    return linear(weight.astype(np.float32) + 0)


def entropy_bytes(symbols: np.ndarray) -> float:
    share = np.unique(symbols, return_counts=True)[1] / len(symbols)
    return float(-(share * np.log2(share)).sum() * len(symbols) / 8)


def test_a_small_weight_is_counted_as_by_hand():
    row, rest = wb.sizes(linear(BY_HAND)).frame().to_dict("records")
    assert (row["layer"], row["tensor"]) == ("fc", "fc.weight")
    assert (row["weights"], row["nonzero"], row["bits"], row["dense_bytes"]) == (32, 6, 32, 128)
    # -0.5, 0.25, 0.5 and 1: four values, of which two bits tell
    assert (row["clusters"], row["codebook_bytes"], row["index_bytes"]) == (4, 16, 2)
    assert (rest["layer"], rest["weights"], rest["nonzero"]) == ("everything else", 4, 3)
    assert rest["dense_bytes"] == rest["sparse_bytes"] == rest["huffman_bytes"] == 16


@pytest.mark.parametrize("weight", [BY_HAND, np.ones((3, 5), np.float32), np.zeros((3, 5), np.float32)])
def test_sparse_bytes_are_those_of_scipys_compressed_rows(weight):
    theirs = csr_matrix(weight)
    row = wb.sizes(linear(weight)).frame().iloc[0]
    assert row["sparse_bytes"] == theirs.data.nbytes + theirs.indices.nbytes + theirs.indptr.nbytes


def test_the_huffman_bound_lies_within_a_bit_a_symbol_above_the_entropy_and_the_file_close_to_it():
    model = pruned_and_shared()
    row = wb.sizes(model).frame().iloc[0]
    values = model.module.fc.weight.detach().numpy().ravel()
    positions = np.flatnonzero(values)
    entropy = entropy_bytes(np.diff(positions)) + entropy_bytes(values[positions]) + 4 * 5
    assert entropy <= row["huffman_bytes"] <= entropy + 2 * len(positions) / 8
    assert row["huffman_bytes"] <= row["coded_bytes"] <= 1.05 * row["huffman_bytes"]


def test_totals_add_up_and_the_coded_one_is_the_length_of_the_file():
    model = pruned_and_shared()
    sizes = wb.sizes(model)
    frame = sizes.frame()
    totals = sizes.totals()
    assert totals["coded_bytes"] == frame["coded_bytes"].sum() == len(coding.encode(model))
    assert totals["dense_bytes"] == 4 * model.parameters
    assert totals["sparse_bytes"] == frame["sparse_bytes"].sum()
    held = int(frame["nonzero"][0])
    assert totals["shared_bytes"] == 5 * 4 + int(np.ceil(held * 3 / 8)) + 4 * 200
    graph = model.onnx().SerializeToString()
    assert totals["deflate_bytes"] == len(zlib.compress(graph, 6))


def test_a_frame_can_be_changed_without_changing_the_sizes():
    sizes = wb.sizes(linear(BY_HAND))
    frame = sizes.frame()
    frame.loc[0, "weights"] = 0
    assert sizes.frame()["weights"][0] == 32


def test_elements_count_in_their_own_bits(digits):
    model = wb.load("lenet5")
    dense = wb.sizes(model)
    half = wb.sizes(wb.Quantize("fp16").apply(model, digits))
    assert half.dense_bytes * 2 == dense.dense_bytes
    weights = wb.sizes(wb.Quantize("int8").apply(model, digits)).frame().iloc[:-1]
    assert (weights["bits"] == 8).all()
    assert (weights["dense_bytes"] * 4).tolist() == dense.frame()["dense_bytes"][:-1].tolist()
    assert weights["weights"].tolist() == dense.frame()["weights"][:-1].tolist()


def test_it_is_told_in_a_line_and_as_a_table():
    sizes = wb.sizes(linear(BY_HAND))
    assert repr(sizes).startswith("<Sizes of Sequential: 144 B dense, 84 B sparse, ")
    assert "fc.weight" in sizes._repr_html_()


# beside speed


@pytest.fixture(scope="module")
def measured(digits_candidate):
    """A measurement to be changed: real in all that does not matter here."""
    return replace(
        digits_candidate.measurement,
        latency_ms=1.0,
        latency_interval_ms=(0.9, 1.1),
        reference_ms=10.0,
        contended=False,
    )


def candidate(number: int, model: wb.Model, steps: tuple, measurement, backend=None, batch: int = 1) -> Candidate:
    recipe = Recipe(steps, backend or wb.OnnxRuntime(), batch)
    return Candidate(number, recipe, measurement, "", lambda: model, dict)


def test_a_study_tells_bytes_and_speed_of_each_candidate(measured):
    untouched, shared = linear(np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)), pruned_and_shared()
    candidates = [
        candidate(1, untouched, (), measured),
        candidate(2, shared, (wb.Cluster(5),), replace(measured, size_bytes=77)),
        candidate(3, shared, (wb.Cluster(5),), measured, backend=wb.Eager()),
        candidate(4, shared, (wb.Cluster(5),), measured, batch=8),
    ]
    table = wb.size_table(SimpleNamespace(model=untouched, candidates=candidates))
    assert table["candidate"].tolist() == [1, 2, 3, 4] and table["batch"].tolist() == [1, 1, 1, 8]
    assert table["label"].tolist() == ["as is", *["Share 5 values"] * 3]
    sizes = wb.sizes(shared)
    for column in ("dense_bytes", "sparse_bytes", "coded_bytes"):
        assert table[column].tolist() == [getattr(wb.sizes(untouched), column), *[getattr(sizes, column)] * 3]
    assert table["size_bytes"][1] == 77
    assert table["compression"][1] == 4 * untouched.parameters / sizes.coded_bytes
    assert table["faster"].tolist() == [
        "baseline",
        "indistinguishable",
        "baseline not measured",
        "baseline not measured",
    ]


@pytest.mark.parametrize(
    "latency_ms, interval_ms, reference_ms, said",
    [
        (0.5, (0.45, 0.55), 10.0, "2.0 × faster"),
        (2.0, (1.9, 2.2), 10.0, "2.0 × slower"),
        (0.95, (0.85, 1.0), 10.0, "indistinguishable"),
        (0.5, (0.45, 0.55), 5.0, "indistinguishable"),  # the whole machine ran twice as fast by then
        (2.0, (1.9, 2.2), 20.0, "indistinguishable"),
        (1.05, (1.0, 1.15), 20.0, "indistinguishable"),  # faster by the drift alone, which is noise as well
        (0.5, (0.45, 0.55), 20.0, "4.0 × faster"),
    ],
)
def test_faster_and_slower_are_said_only_where_intervals_and_drift_agree(
    measured, latency_ms, interval_ms, reference_ms, said
):
    model = linear(BY_HAND)
    other = replace(measured, latency_ms=latency_ms, latency_interval_ms=interval_ms, reference_ms=reference_ms)
    study = SimpleNamespace(
        model=model, candidates=[candidate(1, model, (), measured), candidate(2, model, (wb.Cluster(4),), other)]
    )
    assert wb.size_table(study)["faster"][1] == said


def test_nothing_is_said_of_speed_that_was_measured_on_a_busy_machine(measured):
    model = linear(BY_HAND)
    busy = replace(measured, latency_ms=0.1, latency_interval_ms=(0.09, 0.11), contended=True)
    study = SimpleNamespace(
        model=model, candidates=[candidate(1, model, (), measured), candidate(2, model, (wb.Cluster(4),), busy)]
    )
    assert wb.size_table(study)["faster"][1] == "not told: the machine was busy"


def test_a_real_study_has_a_row_for_each_of_its_candidates(digits_study, digits_candidate):
    table = wb.size_table(digits_study)
    assert table["candidate"].tolist() == [c.number for c in digits_study.candidates]
    row = table[table["candidate"] == digits_candidate.number].iloc[0]
    assert row["faster"] == "baseline" and row["size_bytes"] == digits_candidate.measurement.size_bytes
    assert row["coded_bytes"] == len(coding.encode(wb.load("lenet5")))
