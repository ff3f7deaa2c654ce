"""Where a network has to round for its convolutions and products to run in int8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from workbench.compression import _flow
from workbench.compression._flow import Call
from workbench.errors import StepError
from workbench.models.model import Model
from workbench.models.parts.quantisation_aware import CONVOLUTIONS

# what leaves values on the grid they were on, so that engines go through it in int8
_PASSING = (nn.Identity, nn.modules.dropout._DropoutNd, nn.Flatten, nn.Unflatten, nn.modules.pooling._MaxPoolNd)
_PASSING_OPERATIONS = set("dropout flatten unflatten reshape view transpose permute squeeze unsqueeze".split())
# what engines compute within the convolution before it
_CLIPPING = (nn.Identity, nn.ReLU, nn.Hardtanh, nn.modules.dropout._DropoutNd)
# modules that give one tensor, which can be rounded as it leaves
_GIVING = (
    *(*CONVOLUTIONS, nn.Linear, *_CLIPPING, nn.Embedding),
    *(nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Softmax),
    *(nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm),
    *(nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd),
)


@dataclass(frozen=True)
class Places:
    """Where a network rounds.

    Attributes
    ----------
    gives
        Paths of the modules whose output is rounded.
    sources
        By path of each layer whose weight is rounded, in execution order, the path of what rounds its input: itself,
        or one of `gives`.
    rows
        Those of the layers that are convolutions, or linear layers that take one row per sample.
    """

    gives: frozenset[str]
    sources: dict[str, str]
    rows: frozenset[str]


def places(model: Model, *, products_only: bool) -> Places:
    """Where int8 kernels want their activations: at the input of each weighted layer and behind each convolution.

    A tensor is rounded once, as it leaves the module that gives it; where a function gives it, or a module that runs
    several times, at each layer that reads it. What goes from function to function stays float32.

    Parameters
    ----------
    products_only
        Linear layers alone are rounded, and nothing that anything else reads as well.

    Raises
    ------
    StepError
        If the network calls no layer that can be rounded.
    """
    calls = _flow.calls(model)
    flow = _Flow(calls, _flow.called_once(model, calls), (nn.Linear,) if products_only else (*CONVOLUTIONS, nn.Linear))
    gives: set[str] = set()
    sources: dict[str, str] = {}
    for call in flow.weighted:
        giver = flow.giver(call)
        alone = giver is not None and (not products_only or flow.feeds_layers_only(giver))
        at_giver = alone and call.module in flow.once and flow.can_give(giver)
        sources[call.path] = giver.path if at_giver else call.path
        gives |= {giver.path} if at_giver else set()
    for call in flow.weighted:
        chain = flow.chain(call) if isinstance(call.module, CONVOLUTIONS) else []
        rounded = any(part.module is not None and part.path in gives for part in chain)
        if chain and not rounded and not flow.feeds_layers_only(chain[-1]):
            gives.add(next((part.path for part in reversed(chain) if flow.can_give(part)), call.path))
    if not sources:
        raise StepError(
            f"{model.name} calls no {'' if products_only else 'convolution and no '}linear layer whose weight could be "
            'rounded while it is trained. Use wb.Quantize("int8"), which needs no modules.'
        )
    several = {call.path for call in flow.weighted if isinstance(call.module, nn.Linear) and len(call.taken) != 2}
    return Places(frozenset(gives), sources, frozenset(sources) - several)


class _Flow:
    """The calls of a pass as int8 kernels see them: through what leaves the grid as it is."""

    def __init__(self, calls: list[Call], once: set[nn.Module], weighted: tuple[type[nn.Module], ...]):
        self.once = once
        self.weighted = [
            call
            for call in calls
            # a subclass with a forward of its own may do anything with its weight
            if isinstance(call.module, weighted) and type(call.module).forward in {kind.forward for kind in weighted}
        ]
        self._givers = {id(reader): call for call in calls for reader in call.readers if reader is not None}

    def giver(self, call: Call) -> Call | None:
        """What puts values on the grid that a layer reads; None for the caller of the network."""
        giver = self._givers.get(id(call))
        while giver is not None and _passes(giver):
            giver = self._givers.get(id(giver))
        return giver

    def ends(self, call: Call) -> Iterator[Call | None]:
        """What reads a call's values in the end; None for the caller of the network."""
        for reader in call.readers:
            if reader is not None and _passes(reader):
                yield from self.ends(reader)
            else:
                yield reader

    def feeds_layers_only(self, call: Call) -> bool:
        """Whether nothing but layers whose input is rounded reads a call's values."""
        ends = list(self.ends(call))
        return bool(ends) and all(end in self.weighted for end in ends)

    def chain(self, call: Call) -> list[Call]:
        """A convolution and what engines compute within it."""
        found = [call]
        while (reader := found[-1].reader) is not None and (
            isinstance(reader.module, _CLIPPING) or reader.operation in ("relu", "relu6", "hardtanh", "dropout")
        ):
            found.append(reader)
        return found

    def can_give(self, call: Call) -> bool:
        """Whether a call's output can be rounded as it leaves."""
        return isinstance(call.module, _GIVING) and call.module in self.once


def _passes(call: Call) -> bool:
    return isinstance(call.module, _PASSING) or call.operation in _PASSING_OPERATIONS
