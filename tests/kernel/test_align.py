"""Rows of two profiles meet where they stand for the same layers, and nowhere else."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from _alignments import check, made, op, pairs

from workbench.errors import DataError
from workbench.profiling.align import align


def test_fusion_makes_many_to_many_and_no_more_than_that():
    apart = made(
        [
            op("conv1", "Conv2d"),
            op("bn1", "BatchNorm2d"),
            op("relu1", "ReLU"),
            op("conv2", "Conv2d"),
            op("fc", "Linear"),
        ]
    )
    fused = made([op("k0", "Conv", ["conv1", "bn1", "relu1"]), op("k1", "Conv", ["conv2"]), op("k2", "Gemm", ["fc"])])
    assert pairs(align(apart, fused)) == [({"conv1", "bn1", "relu1"}, {"k0"}), ({"conv2"}, {"k1"}), ({"fc"}, {"k2"})]
    other = made(
        [op("c", "Conv", ["conv1"]), op("rest", "Subgraph", ["bn1", "relu1"]), op("conv2", "Conv"), op("fc", "Gemm")]
    )
    assert pairs(align(fused, other))[0] == ({"k0"}, {"c", "rest"})
    crosswise = made([op("c", "Conv", ["conv1", "bn1"]), op("d", "Conv", ["relu1", "conv2"]), op("fc", "Gemm")])
    assert pairs(align(fused, crosswise)) == [({"k0", "k1"}, {"c", "d"}), ({"k2"}, {"fc"})]


def test_a_layer_that_is_called_twice_does_not_join_what_lies_between():
    names = ["conv1", "conv2", "conv3"]
    apart = made(
        [
            op(f"{n}{part}", kind, [n if kind == "Conv2d" else "relu"])
            for n in names
            for part, kind in (("", "Conv2d"), (" act", "ReLU"))
        ]
    )
    fused = made([op(f"k{n}", "Conv", [n, "relu"]) for n in names])
    assert pairs(align(apart, fused)) == [({n, f"{n} act"}, {f"k{n}"}) for n in names]
    # one of them was lost on the way
    less = made([op("kconv1", "Conv", ["conv1"]), *(op(f"k{n}", "Conv", [n, "relu"]) for n in names[1:])])
    alignment = align(apart, less)
    assert pairs(alignment) == [({"conv1"}, {"kconv1"})] + [({n, f"{n} act"}, {f"k{n}"}) for n in names[1:]]
    assert alignment.unmatched()["name"].tolist() == ["conv1 act"]


def test_an_operation_in_pieces_is_whole_again():
    whole = made([op("fc1", "Linear"), op("gelu", "GELU"), op("lstm", "LSTM"), op("fc2", "Linear")])
    pieces = made([
        op("m", "MatMul", ["fc1"], reads=["x"], writes=["m"]),
        op("b", "BiasGelu", ["fc1", "gelu"], reads=["m"], writes=["g"]),
        *(op(f"l{i}", "LSTM", ["lstm"], reads=["g" if i == 0 else f"l{i - 1}"], writes=[f"l{i}"]) for i in range(3)),
        op("o", "Gemm", ["fc2"], reads=["l2"], writes=["y"]),
    ])  # fmt: skip
    assert pairs(align(whole, pieces)) == [
        ({"fc1", "gelu"}, {"m", "b"}), ({"lstm"}, {"l0", "l1", "l2"}), ({"fc2"}, {"o"}),
    ]  # fmt: skip


def test_a_layer_meets_the_parts_it_was_replaced_by():
    whole = made([op("conv", "Conv2d"), op("fc1", "Linear"), op("fc2", "Linear")])
    parts = made([op("conv", "Conv2d"), op("fc1.0", "Linear"), op("fc1.1", "Linear"), op("fc2", "Linear")])
    expected = [({"conv"}, {"conv"}), ({"fc1"}, {"fc1.0", "fc1.1"}), ({"fc2"}, {"fc2"})]
    assert pairs(align(whole, parts)) == expected
    # a block's own work is no layer that its parts stand for
    block = made([op("block", "Block"), op("block.fc", "Linear")])
    other = made([op("block.fc", "Gemm"), op("block.norm", "LayerNorm")])
    assert pairs(align(block, other)) == [({"block.fc"}, {"block.fc"})]


def test_a_move_costs_the_layer_it_serves_and_joins_no_two():
    plain = made([op("conv1", "Conv"), op("conv2", "Conv"), op("fc", "Gemm")])
    moving = made([
        op("q", "QuantizeLinear", ["conv1"], kind="move", reads=["x"], writes=["q"]),
        op("c1", "QLinearConv", ["conv1"], reads=["q"], writes=["c1"]),
        # named after both of its neighbours; it writes the numbers of the first
        op("between", "Reorder", ["conv2", "conv1"], kind="move", reads=["c1"], writes=["b"]),
        op("c2", "QLinearConv", ["conv2"], reads=["b"], writes=["c2"]),
        # named after nothing; one layer reads from it
        op("nameless", "Reorder", [], kind="move", reads=["c2"], writes=["n"]),
        op("f", "QGemm", ["fc"], reads=["n"], writes=["y"]),
    ])  # fmt: skip
    alignment = align(plain, moving)
    check(alignment)
    assert pairs(alignment) == [({"conv1"}, {"q", "c1", "between"}), ({"conv2"}, {"c2"}), ({"fc"}, {"nameless", "f"})]


def test_a_move_that_serves_nothing_matched_is_listed():
    plain = made([op("conv1", "Conv"), op("fc", "Gemm")])
    moving = made([op("c1", "Conv", ["conv1"]), op("odd", "Reorder", [], kind="move", ms=3), op("f", "Gemm", ["fc"])])
    alignment = align(plain, moving)
    assert alignment.unmatched()[["side", "name", "kind", "latency_ms"]].values.tolist() == [["b", "odd", "move", 3.0]]
    assert alignment.matched_share_b == pytest.approx(2 / 5)


def test_the_same_move_on_both_sides_is_a_group_of_its_own():
    def twin(ms):
        return made([op("q", "QuantizeLinear", ["conv"], ms, kind="move"), op("c", "Conv", ["conv"], ms)])

    assert pairs(align(twin(1.0), twin(2.0))) == [({"q"}, {"q"}), ({"c"}, {"c"})]


def test_branches_may_run_in_either_order():
    def network(names, order):
        rows = {
            "long": op(names[0], "Conv", reads=["x"], writes=["l"], kernel=(3, 3), parameters=900, shape=(8, 9, 9)),
            "short": op(names[1], "Conv", reads=["x"], writes=["s"], kernel=(1, 1), parameters=100, shape=(8, 9, 9)),
        }
        last = op(names[2], "Conv", reads=["l"], writes=["m"], kernel=(3, 3), parameters=900, shape=(8, 9, 9))
        add = op(names[3], "Add", reads=["m", "s"], writes=["y"], shape=(8, 9, 9))
        return made([rows[branch] for branch in order] + [last, add])

    alignment = align(network("abcd", ["long", "short"]), network("efgh", ["short", "long"]))
    assert pairs(alignment) == [({"a"}, {"e"}), ({"b"}, {"f"}), ({"c"}, {"g"}), ({"d"}, {"h"})]


def test_structure_does_not_match_what_computes_something_else():
    a = made(
        [
            op("a", "Conv", kernel=(3, 3), parameters=100, writes=["t"], shape=(4, 8, 8)),
            op("b", "Softmax", writes=["u"], shape=(4,)),
        ]
    )
    b = made(
        [
            op("c", "Conv", kernel=(5, 5), parameters=100, writes=["t"], shape=(4, 8, 8)),
            op("d", "LayerNorm", writes=["u"], shape=(4,)),
        ]
    )
    alignment = align(a, b)
    assert alignment.groups == ()
    assert alignment.unmatched()["name"].tolist() == list("abcd")
    assert alignment.matched_share_a == 0
    frame = alignment.frame()
    assert frame["how"].tolist() == ["unmatched", "unmatched"]
    assert frame["layers_a"][0] == ("(unmatched in a)",)
    assert frame["layers_b"][1] == ("(unmatched in b)",)


def test_numbers_of_two_exports_do_not_count_as_names():
    def network(*numbers):
        about = {"kernel": (3, 3), "parameters": 900, "shape": (10, 8, 8)}
        return made(
            [op(f"Conv_{n}", "Conv", reads=[f"t{i}"], writes=[f"t{i + 1}"], **about) for i, n in enumerate(numbers)]
        )

    # the second of one graph and the first of the other are called alike
    alignment = align(network(0, 3, 6), network(3, 8, 13))
    assert pairs(alignment) == [({"Conv_0"}, {"Conv_3"}), ({"Conv_3"}, {"Conv_8"}), ({"Conv_6"}, {"Conv_13"})]
    assert {group.how for group in alignment.groups} == {"structure"}
    assert {group.how for group in align(network(0, 3, 6), network(0, 3, 6)).groups} == {"names"}


def test_pruned_layers_under_other_names_are_told_by_kernel_kind_and_order():
    widths, kernels = [16, 32, 64], [5, 3, 3]

    def network(prefix, share):
        rows, before = [], 3
        for i, (width, kernel) in enumerate(zip(widths, kernels, strict=True)):
            maps = int(width * share)
            count = before * maps * kernel**2
            rows.append(
                op(
                    f"{prefix}{i}",
                    "Conv",
                    kernel=(kernel, kernel),
                    parameters=count,
                    writes=[f"t{i}"],
                    shape=(maps, 32 >> i, 32 >> i),
                )
            )
            rows.append(op(f"{prefix}{i}r", "Relu", reads=[f"t{i}"], writes=[f"r{i}"], shape=(maps, 32 >> i, 32 >> i)))
            before = maps
        return made(rows)

    expected = [({f"a{i}{r}"}, {f"b{i}{r}"}) for i in range(3) for r in ("", "r")]
    assert pairs(align(network("a", 1), network("b", 0.5))) == expected


def test_two_profiles_are_needed():
    with pytest.raises(DataError, match="takes two profiles.*got a str"):
        align(made([op("a", "Conv")]), "profile")


def test_the_frame_and_the_printed_form_say_what_matched():
    a = made([op("conv", "Conv2d", ms=3), op("fc", "Linear", ms=1)], "one")
    b = made([op("k", "Conv", ["conv"], 1.5), op("<x>", "Loop", [], 0.5)], "two")
    alignment = align(a, b)
    frame = alignment.frame()
    assert frame.columns.tolist() == [
        "layers_a", "layers_b", "names_a", "names_b", "rows_a", "rows_b",
        "latency_a_ms", "latency_b_ms", "ratio", "how",
    ]  # fmt: skip
    assert frame.iloc[0].tolist() == [("conv",), ("conv",), ("conv",), ("k",), (0,), (0,), 3.0, 1.5, 2.0, "names"]
    assert repr(alignment) == "<Alignment of one on one with two on two: 1 group, 75.0 % and 75.0 % of time matched>"
    assert "&lt;Alignment" not in alignment._repr_html_()
    assert "conv" in alignment._repr_html_()


def test_empty_profiles_have_nothing_to_match():
    call = op("(call)", "call", [], kind="call")
    alignment = align(made([call]), made([call, op("conv", "Conv")]))
    assert alignment.groups == ()
    assert np.isnan(alignment.matched_share_a)
    assert alignment.matched_share_b == 0
    assert "–" in repr(alignment)


# -- random networks ---------------------------------------------------------------------------------------------------


def chain(seed, length=40):
    """Operations of a network without branches, each with a number that says what it truly is."""
    rng = random.Random(seed)
    found, maps, side = [], 16, 32
    for i in range(length):
        kind = rng.choice(["Conv", "Conv", "BatchNormalization", "Relu", "MaxPool", "Gemm", "Softmax", "Transpose"])
        count = kernel = 0
        if kind == "Conv":
            kernel, before, maps = rng.choice([1, 3, 5]), maps, rng.choice([16, 32, 64])
            count = kernel**2 * before * maps
        elif kind == "Gemm":
            count = maps * maps
        elif kind == "MaxPool":
            side = max(side // 2, 4)
        about = {"kernel": (kernel, kernel) if kernel else (), "parameters": count, "shape": (maps, side, side)}
        layers = [f"block{i // 5}.op{i}"]
        found.append(({i}, kind, layers, rng.uniform(0.1, 2), about, "move" if kind == "Transpose" else "layer"))
    return found


def chained(rows):
    """The profile of a chain, and what each row truly is."""
    operations = [
        op(f"row{i}", kind, layers, ms, kind=sort, reads=[f"t{i}"], writes=[f"t{i + 1}"], **about)
        for i, (_, kind, layers, ms, about, sort) in enumerate(rows)
    ]
    return made(operations), [truth for truth, *_ in rows]


def spoiled(rows, rng, *, fuse=0.0, rename=0.0, drop=0.0):
    """The same network as another engine may run it."""
    found = []
    for number, (truth, kind, layers, ms, about, sort) in enumerate(rows):
        if rng.random() < drop:
            continue
        if rng.random() < rename:
            layers = [f"other{number}"]
        if found and rng.random() < fuse and sort == "layer" == found[-1][5] and kind in ("BatchNormalization", "Relu"):
            before = found[-1]
            found[-1] = (before[0] | truth, before[1], before[2] + layers, before[3] + ms, before[4], "layer")
        else:
            found.append((truth, kind, layers, ms, about, sort))
    return found


@pytest.mark.parametrize("seed", range(10))
def test_a_profile_meets_itself_row_by_row(seed):
    profile, _ = chained(chain(seed))
    alignment = align(profile, profile)
    assert [(g.rows_a, g.rows_b) for g in alignment.groups] == [((i,), (i,)) for i in range(len(profile.operations))]
    nameless, _ = chained([(*row[:2], [], *row[3:]) for row in chain(seed)])
    alignment = align(nameless, nameless)
    assert [(g.rows_a, g.rows_b) for g in alignment.groups] == [((i,), (i,)) for i in range(len(nameless.operations))]


@pytest.mark.parametrize("seed", range(10))
def test_fused_and_renamed_rows_meet_only_what_they_are(seed):
    rows = chain(seed)
    a, truth_a = chained(spoiled(rows, random.Random(seed + 100), fuse=0.5, rename=0.3))
    b, truth_b = chained(spoiled(rows, random.Random(seed + 200), fuse=0.5, rename=0.3))
    alignment = align(a, b)
    check(alignment)
    for group in alignment.groups:
        mine, theirs = (
            {n for row in rows for n in truth[row]}
            for rows, truth in ((group.rows_a, truth_a), (group.rows_b, truth_b))
        )
        assert mine & theirs
    assert alignment.matched_share_a >= 0.8
    assert alignment.matched_share_b >= 0.8


@pytest.mark.parametrize("seed", range(20))
def test_a_match_never_crosses(seed):
    rows = chain(seed)
    a, _ = chained(spoiled(rows, random.Random(seed + 100), fuse=0.3, rename=0.4, drop=0.2))
    b, _ = chained(spoiled(rows, random.Random(seed + 200), fuse=0.3, rename=0.4, drop=0.2))
    alignment = align(a, b)
    check(alignment)
    computing = [[i for i, o in enumerate(profile.operations) if o.kind == "layer"] for profile in (a, b)]
    spans = []
    for group in alignment.groups:
        own = [
            sorted(set(rows) & set(known)) for rows, known in zip((group.rows_a, group.rows_b), computing, strict=True)
        ]
        if all(own):
            spans.append((own[0][0], own[0][-1], own[1][0], own[1][-1]))
    for (_, end_a, _, end_b), (start_a, _, start_b, _) in itertools.pairwise(sorted(spans)):
        assert end_a < start_a
        assert end_b < start_b


def test_five_hundred_rows_on_each_side_match_in_full():
    rows = chain(1, 500)
    a, _ = chained(rows)
    b, _ = chained([(*row[:2], [f"x{i}"], *row[3:]) for i, row in enumerate(rows)])
    for other in (a, b):
        alignment = align(a, other)
        assert len(alignment.groups) == 500
        assert alignment.matched_share_a == pytest.approx(1)
