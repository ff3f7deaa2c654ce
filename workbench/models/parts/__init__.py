"""Parts that take a layer's place, by name: what a study needs to rebuild a changed module without unpickling one.

A new kind of part is a file and one line in `PARTS`: a function from the part that stood there, and settings that are
JSON values, to the new one. The weights it starts with do not matter for rebuilding; they are loaded afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from torch import nn

from workbench.errors import StepError, nearest
from workbench.models.parts import attention, blocks, fake_quantised, folded, low_rank, network, quantisation_aware

PARTS: dict[str, Callable[..., nn.Module]] = {
    "attention": attention.Attention,
    "biased": folded.biased,
    "blocks": blocks.blocks,
    "fake_quantised": fake_quantised.build,
    "folded": folded.norm,
    "low_rank_conv": low_rank.convolution,
    "low_rank_linear": low_rank.linear,
    "network": network.network,
    "quantisation_aware": quantisation_aware.build,
}


def build(old: nn.Module, kind: str, arguments: dict[str, Any]) -> nn.Module:
    """The part that `kind` makes of `old`; it remembers in ``built`` how it was made.

    Raises
    ------
    StepError
        If there is no such kind.
    """
    if kind not in PARTS:
        raise StepError(f"There is no part {kind!r} to put in a layer's place. {nearest(kind, PARTS)}")
    new = PARTS[kind](old, **arguments)
    # as JSON gives it back, so that a part compares equal to its rebuilt self
    new.built = {"kind": kind, "arguments": json.loads(json.dumps(arguments))}
    return new.train(old.training)


def put(module: nn.Module, path: str, kind: str, **arguments: Any) -> nn.Module:
    """Put a part in the place of the one at `path`, wherever in `module` that very one is used; changes `module`.

    Parameters
    ----------
    path
        As ``named_modules`` gives it; empty for the whole network.
    kind, arguments
        A name in `PARTS`, and its settings.

    Returns
    -------
    nn.Module
        `module`, or the new part where `path` is empty.
    """
    old = module.get_submodule(path)
    new = build(old, kind, arguments)
    if old is module:
        return new
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
                if isinstance(parent, nn.TransformerEncoderLayer):
                    _call_parts(module, parent)
    return module


def _call_parts(module: nn.Module, layer: nn.TransformerEncoderLayer) -> None:
    """Keep one of torch's encoder layers from its fused path, which reads the parts' weights and calls none of them.

    Evaluation mode would take it. Both settings are among those by which torch itself leaves it.
    """
    layer.activation_relu_or_gelu = 0
    for encoder in module.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(inner is layer for inner in encoder.layers):
            encoder.use_nested_tensor = False
