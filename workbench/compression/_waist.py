"""How narrow the waist of a factorised layer is best, by time measured on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from workbench.compression import _factors
from workbench.deployment import OnnxRuntime
from workbench.jobs import Progress
from workbench.measure import latency, ratio
from workbench.models.model import Model


def fastest(layer: nn.Module, choice: _factors.Choice, widths: Sequence[int], progress: Progress) -> _factors.Choice:
    """The choice with the rank at which the pair is really faster than its layer, or with the reason to leave it.

    Layer and pairs are timed alone on ONNX Runtime at batch 1, interleaved.

    Parameters
    ----------
    widths
        The next multiple of each is tried besides the rank chosen, where it saves multiply-accumulates too.

    Returns
    -------
    Choice
        Of the ranks whose pair is faster than the layer (the 95 % interval of the ratio lies above 1), the largest that
        cannot be told from the fastest; `times` are those of that rank, or of the fastest where none is faster.
    """
    rounded = {-(-choice.rank // width) * width for width in widths}
    ranks = sorted({choice.rank, *(rank for rank in rounded if rank <= choice.largest_rank)})
    modules = [layer, *(_factors.factorised(layer, rank, choice.found) for rank in ranks)]
    noise = torch.randn(2, *choice.input_shape, generator=torch.Generator().manual_seed(0), dtype=layer.weight.dtype)
    with ExitStack() as stack:
        calls = []
        for done, module in enumerate(modules):
            progress(0.5 * done / len(modules), "compiling")
            engine = stack.enter_context(OnnxRuntime().compile(Model(choice.layer, {"x": noise}, module=module)))
            calls.append(partial(engine, noise[:1].numpy()))
        whole, *pairs = latency(calls, progress=progress.part(0.5, 1.0))
    speedups = [ratio(whole, pair) for pair in pairs]
    best = max(range(len(ranks)), key=lambda i: speedups[i][0])
    even = [i for i, pair in enumerate(pairs) if i == best or ratio(pair, pairs[best])[1][0] <= 1]
    faster = [i for i in even if speedups[i][1][0] > 1]
    taken = faster[-1] if faster else best
    speedup, (low, high) = speedups[taken]
    times = dict(zip(_factors.TIMES, (whole.median_ms, pairs[taken].median_ms, speedup, low, high), strict=True))
    reason = "" if faster else f"not faster at rank {ranks[taken]}: {speedup:.2f} × (95 % from {low:.2f} to {high:.2f})"
    return replace(choice, rank=ranks[taken], times=times, reason=reason)
