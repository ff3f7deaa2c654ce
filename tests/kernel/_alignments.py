"""Profiles made by hand for alignment, and what holds of every alignment."""

from __future__ import annotations

import itertools

import pytest
from _hand_profiles import profile

from workbench.deployment import OpTiming, Port
from workbench.profiling.align import align


def made(operations, label="made"):
    """A profile of hand-made operations, a tenth of whose time none of them accounts for."""
    whole_ms = sum(operation.times_ms[0] for operation in operations) * 1.1
    return profile(*operations, whole_ms=whole_ms, model_name=label, backend_label=label)


def op(name, sort, layers=None, ms=1.0, *, reads=(), writes=(), shape=(), kind="layer", **about):
    """One operation; `reads` and `writes` are tensors' names, `shape` that of one sample of what it writes."""
    return OpTiming(
        name, sort, (name,) if layers is None else tuple(layers), (ms,), kind,
        tuple(Port(tensor, (1,), "float32") for tensor in reads),
        tuple(Port(tensor, (1, *shape), "float32") for tensor in writes), **about,
    )  # fmt: skip


def pairs(alignment):
    """Names of the rows in each group."""
    found = []
    for group in alignment.groups:
        a, b = alignment.profile_a.operations, alignment.profile_b.operations
        found.append(({a[i].name for i in group.rows_a}, {b[i].name for i in group.rows_b}))
    return found


def check(alignment):
    """What holds of any alignment: every row once, times conserved, the mirror image."""
    frame, left = alignment.frame(), alignment.unmatched()
    for side, taken in (("a", alignment.profile_a), ("b", alignment.profile_b)):
        rows = taken.frame()
        counted = rows[~rows["kind"].isin(["call", "unattributed"])]
        assert sorted(itertools.chain(*frame[f"rows_{side}"])) == list(counted.index)
        assert frame[f"latency_{side}_ms"].sum() == pytest.approx(counted["latency_ms"].sum())
        unmatched_ms = left.loc[left["side"] == side, "latency_ms"].sum()
        matched = frame[frame["how"] != "unmatched"]
        assert matched[f"latency_{side}_ms"].sum() + unmatched_ms == pytest.approx(counted["latency_ms"].sum())
        share = getattr(alignment, f"matched_share_{side}")
        assert share == pytest.approx(1 - unmatched_ms / counted["latency_ms"].sum())
    mirrored = align(alignment.profile_b, alignment.profile_a)
    assert {(g.rows_a, g.rows_b, g.how) for g in alignment.groups} == {
        (g.rows_b, g.rows_a, g.how) for g in mirrored.groups
    }
