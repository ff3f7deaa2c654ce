"""Rules of advice about what lies between and around the layers: each yields what it finds in a case, or nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from workbench import formatting as fmt
from workbench.deployment.doctor import doctor
from workbench.profiling._case import BITS, LEAST, STEADY, Case, Finding, named, took

_CALL_SHARE, _REST_SHARE = 0.10, 0.15
_QUANTISERS = re.compile("(de|fake)?quantize", re.IGNORECASE)
_WHOLE_NUMBERS = ("int8", "uint8")


def blocked_fusion(case: Case) -> Iterator[Finding]:
    """Quantise and dequantise operations that stand between layers instead of being fused into them.

    Two cases: both neighbours run in int8 already; or one is a single operation in floating point between int8 layers.
    Those at the edge of the network are needed. At most saved: their own time. Source: TREx, lint.py, ``QDQLinter``;
    NVIDIA TensorRT developer guide, "Q/DQ layer-placement recommendations".
    """
    around: dict[tuple[int, ...], list[Any]] = {}
    for row in case.rows:
        if row.kind != "move" or not _converts(case, row):
            continue
        before, after = case.nearest(row.Index, forward=False), case.nearest(row.Index, forward=True)
        if _all_int8(before) and _all_int8(after):
            around.setdefault(tuple(sorted({r.Index for r in (*before, *after)})), []).append(row)
        elif _all_int8(after) and _single_float(before) and _all_int8(case.nearest(before[0].Index, forward=False)):
            around.setdefault((before[0].Index,), []).append(row)
        elif _all_int8(before) and _single_float(after) and _all_int8(case.nearest(after[0].Index, forward=True)):
            around.setdefault((after[0].Index,), []).append(row)
    for neighbours, rows in around.items():
        saving = sum(row.latency_ms for row in rows)
        if case.share(saving) < LEAST:
            continue
        names = [named(case.rows[index]) for index in neighbours]
        single = len(neighbours) == 1
        where = (
            f"around {names[0]}, which runs in floating point" if single else f"between {', '.join(names)}, all int8"
        )
        yield Finding(
            "Q/DQ pair blocks a fusion",
            f"{', '.join(row.name for row in rows)} {'stand' if len(rows) > 1 else 'stands'} {where}: "
            f"{took(case, saving)}.",
            f"Quantise {names[0]} too, so that its neighbours pass int8 on."
            if single
            else "Quantise every input of the addition or concatenation between them alike, so that none is left over.",
            saving,
            " + ".join(dict.fromkeys(name for name in names if name)),
        )


def _converts(case: Case, row: Any) -> bool:
    """Whether a row of kind ``move`` quantises or dequantises; one that finds its scale at run time cannot be fused."""
    operation = case.profile.operations[row.Index]
    if "dynamic" in row.type.lower():
        return False
    if _QUANTISERS.search(row.type) or _QUANTISERS.match(row.name):
        return True
    whole = [[port.dtype in _WHOLE_NUMBERS for port in ports[:1]] for ports in (operation.reads, operation.writes)]
    return all(whole) and whole[0] != whole[1]


def _all_int8(rows: Sequence[Any]) -> bool:
    return bool(rows) and all(row.precision == "int8" for row in rows)


def _single_float(rows: Sequence[Any]) -> bool:
    return len(rows) == 1 and BITS.get(rows[0].precision, 0) > BITS["int8"]


def reformats(case: Case) -> Iterator[Finding]:
    """Time that goes into changing how numbers lie: reorders, transposes, casts, copies.

    At most saved: all of it. Source: TREx, lint.py, ``ReformatLinter``.
    """
    rows = [row for row in case.rows if row.kind == "move" and not _converts(case, row)]
    total = sum(row.latency_ms for row in rows)
    if not rows or case.share(total) < STEADY:
        return
    worst = max(rows, key=lambda row: row.latency_ms)
    beside = [*case.nearest(worst.Index, forward=True), *case.nearest(worst.Index, forward=False)]
    yield Finding(
        "Time goes into reformatting",
        f"{len(rows)} operation{'s' if len(rows) > 1 else ''} that only move numbers: {took(case, total)}; the "
        f"longest is {worst.name}, {fmt.milliseconds(worst.latency_ms)}.",
        "Keep neighbouring layers in one layout and precision: channel counts that are multiples of the vector width, "
        "no transposes in the model, and no single layer in another precision than those around it.",
        total,
        worst.layer or next((row.layer for row in beside if row.layer), ""),
    )


def outside_the_layers(case: Case) -> Iterator[Finding]:
    """Time of entering and leaving the engine, and time that no row accounts for.

    At most saved: that time, which one call pays however many samples it brings. Source: NVIDIA TensorRT best
    practices, "Batching" and "CUDA Graphs".
    """
    for row in case.rows:
        if row.kind == "call" and case.share(row.latency_ms) >= _CALL_SHARE:
            yield Finding(
                "Entering and leaving the engine costs much",
                f"{took(case, row.latency_ms)}, at batch {case.profile.batch}.",
                "Use a larger batch: a call pays this once for all its samples.",
                row.latency_ms,
            )
    rest = case.profile.unattributed_ms
    if case.share(rest) >= _REST_SHARE:
        yield Finding(
            "Much time between the layers",
            f"No row accounts for {took(case, rest)}.",
            "Launching operations takes this long: use a compiled engine in place of eager, a larger batch, fewer and "
            "wider layers, or CUDA graphs on a GPU.",
            rest,
        )


def unsure_measurement(case: Case) -> Iterator[Finding]:
    """A measurement that should be made again before anything is concluded from it; saves nothing."""
    if case.profile.contended:
        yield Finding(
            "The machine was busy",
            "Other processes took processor time while the whole call was timed.",
            "Stop what else runs and profile again.",
        )
    rest = case.profile.unattributed_ms
    if case.share(rest) <= -_REST_SHARE:
        yield Finding(
            "The rows add up to more than the call",
            f"They are {fmt.milliseconds(-rest)} over, {fmt.share(case.share(-rest))} of the call.",
            "They were timed one by one and do not overlap: go by their shares of each other, not by their sum."
            if case.profile.environment is None
            else "Recording slowed them: profile again with more repeats or a larger batch.",
        )


def did_not_load(case: Case) -> Iterator[Finding]:
    """Engines that could run here but do not, by trying each; not for a profile that was read from files."""
    if case.profile.environment is None:
        return
    for row in doctor():
        # without a command nothing can be done about it on this machine
        if not row.usable and row.command:
            yield Finding(f"{row.title} does not load", f"{row.why.rstrip('.')}.", f"Run: {row.command}")
