"""Rules of advice about single layers: each yields what it finds in a case, or nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator

from workbench import formatting as fmt
from workbench.profiling import _channels
from workbench.profiling._case import BITS, LEAST, Case, Finding, named, took

_TINY_SHARE, _TINY_FACTOR = 0.02, 20
_GROUPED_SHARE, _GROUPED_FACTOR = 0.05, 4


def memory_bound(case: Case) -> Iterator[Finding]:
    """Layers that wait for memory: more arithmetic per second does not help them, fewer bytes do.

    At most saved: everything where there are no products, since an operation that is fused into its neighbour moves
    nothing of its own; else what is beyond the time its bytes would take in int8. Source: Williams, Waterman and
    Patterson, "Roofline", CACM 52(4), 2009.
    """
    if case.roofline is None:
        return
    for row in case.roofline[case.roofline["bound"] == "memory"].itertuples():
        if row.kind != "layer" or row.latency_ms < row.attainable_ms:
            continue  # faster than main memory: its numbers stay in the cache
        saving = row.latency_ms
        if row.macs > 0:
            saving -= row.attainable_ms * 8 / BITS.get(row.precision, math.nan)
        if case.share(saving) < LEAST:
            continue
        weights = row.read_bytes + row.written_bytes - row.activation_bytes
        if weights > row.activation_bytes:
            remedy = (
                "Most of its bytes are weights: quantise them, or use a larger batch, which reads them once for all."
            )
        elif row.macs > 0:
            remedy = (
                "Quantise it, so that its inputs and outputs have fewer bytes, or let it be fused with the next layer."
            )
        else:
            remedy = (
                "Use an engine that fuses it into the layer whose output it reads; it then moves nothing of its own."
            )
        yield Finding(
            "Memory-bound layer",
            f"{row.type}: {took(case, row.latency_ms)}, at {fmt.significant(row.intensity)} operations per byte; its "
            f"bytes alone take {fmt.milliseconds(row.attainable_ms)} at the bandwidth measured here.",
            remedy,
            saving,
            named(row),
        )


def fell_back(case: Case) -> Iterator[Finding]:
    """Layers with products that run in a wider precision than the model was given.

    At most saved: what is beyond the time its MACs take at the best rate that a row in the narrow precision reaches.
    Source: ONNX Runtime, "Quantize ONNX models"; NVIDIA TensorRT developer guide, "Q/DQ layer-placement
    recommendations": an engine takes its int8 kernel where all inputs of an operation are quantised.
    """
    wanted = case.profile.precision
    rate = case.rate(row for row in case.layer_rows if row.precision == wanted)
    for row in case.layer_rows:
        wider = BITS.get(row.precision, 0) > BITS.get(wanted, math.inf)
        if wider and row.macs > 0 and case.share(row.latency_ms) >= LEAST:
            saving = row.latency_ms - row.macs / rate
            yield Finding(
                f"Layer fell back to {row.precision}",
                f"{row.type} runs in {row.precision} in a model of {wanted}: {took(case, row.latency_ms)}.",
                f"Give the engine what its {wanted} kernel needs: inputs, weights and output all in {wanted}; or leave "
                "the layer as it is, where it was kept out for its accuracy.",
                saving if math.isnan(saving) else max(saving, 0.0),
                named(row),
            )


def unaligned(case: Case) -> Iterator[Finding]:
    """Channel counts that leave part of each vector, or of each tile of a tensor core, empty.

    At most saved: what is beyond the time the filled-up layer would take at the best rate that an aligned one reaches.
    The inputs of the first layer and the outputs of the last are given by the data. Source: TREx, lint.py,
    ``alignment_lint``; for processors, the widths in which oneDNN and ONNX Runtime's NCHWc kernels block channels.
    """
    weighted = [row.Index for row in case.layer_rows if row.macs > 0]
    found, aligned = [], []
    for index, width in case.widths.items():
        row = case.rows[index]
        fit = _channels.fit(
            row.precision or case.profile.precision, case.profile.backend_label, case.profile.environment
        )
        if fit is None or width.grouped:
            continue
        free = {
            "input": 0 if index == weighted[0] else width.inputs,
            "output": 0 if index == weighted[-1] else width.outputs,
        }
        off = {side: count for side, count in free.items() if count % fit.multiple}
        if off:
            found.append((row, fit, off))
        elif all(free.values()):
            aligned.append(row)
    for row, fit, off in found:
        filled = {side: math.ceil(count / fit.multiple) * fit.multiple for side, count in off.items()}
        work = row.macs * math.prod(filled[side] / off[side] for side in off)
        saving = row.latency_ms - work / case.rate(a for a in aligned if a.precision == row.precision)
        if case.share(row.latency_ms if math.isnan(saving) else saving) < LEAST:
            continue
        counts = " and ".join(f"{count} {side} channels" for side, count in off.items())
        better = " and ".join(f"{_nearby(count, fit.multiple)} {side}" for side, count in off.items())
        # pruning takes channels away, so it is of no use to a layer that is narrower than one multiple
        pruned = f"; wb.Prune(…, round_to={fit.multiple}) makes such widths" if max(off.values()) > fit.multiple else ""
        yield Finding(
            "Channels do not fill the vectors",
            f"{row.type} with {counts}: {took(case, row.latency_ms)}; {fit.why}.",
            f"Use {better} channels{pruned}.",
            saving,
            named(row),
        )


def _nearby(count: int, multiple: int) -> str:
    below = count // multiple * multiple
    return f"{below} or {below + multiple}" if below else str(multiple)


def tiny_but_slow(case: Case) -> Iterator[Finding]:
    """A layer whose share of the time is far above its share of MACs and of bytes: what it costs is being called.

    It takes 2 % of the call or more, and 20 times its share of either. At most saved: all of it.
    """
    macs = sum(row.macs for row in case.layer_rows if row.macs > 0)
    moved = {row.Index: row.read_bytes + row.written_bytes for row in case.layer_rows}
    total = sum(moved.values())
    if not (macs > 0 and total > 0):
        return  # where bytes of one row are not known, no row's share of them is
    for row in case.layer_rows:
        share, work = case.share(row.latency_ms), max(row.macs / macs, moved[row.Index] / total)
        if share >= _TINY_SHARE and share >= _TINY_FACTOR * work:
            yield Finding(
                "A tiny layer costs much",
                f"{row.type}: {took(case, row.latency_ms)}, with {100 * row.macs / macs:.2f} % of the MACs and "
                f"{100 * moved[row.Index] / total:.2f} % of the bytes.",
                "Its time goes into being launched: use an engine that fuses it with the next, or a larger batch.",
                row.latency_ms,
                named(row),
            )


def slow_grouped(case: Case) -> Iterator[Finding]:
    """Depthwise and grouped convolutions that reach under a quarter of the rate of ordinary ones.

    At most saved: what is beyond the time their MACs would take at that rate. Source: Tan and Le, "EfficientNetV2",
    ICML 2021, section 3.2, who replace them in the first stages.
    """
    ordinary = case.rate(case.rows[index] for index, width in case.widths.items() if not width.grouped)
    for index, width in case.widths.items():
        row = case.rows[index]
        if not width.grouped or case.share(row.latency_ms) < _GROUPED_SHARE:
            continue
        rate = row.macs / row.latency_ms
        if rate * _GROUPED_FACTOR < ordinary:
            yield Finding(
                "Grouped convolution is slow",
                f"{row.type} with {width.inputs} channels, each output reading few of them: "
                f"{took(case, row.latency_ms)}, at {fmt.factor(ordinary / rate)} fewer MACs a second than an ordinary "
                "layer here.",
                "Use an ordinary convolution instead, as EfficientNetV2 does in its first stages, or fewer channels.",
                row.latency_ms - row.macs / ordinary,
                named(row),
            )
