"""Weights set to zero: single ones, two-dimensional kernels, or all but N of every M along the input axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from workbench.compression import _importance
from workbench.compression._checks import WEIGHTED
from workbench.compression._constraints import Constraint
from workbench.compression._ranking import Rule
from workbench.compression._rounds import cubic

PATTERNS = ("2:4", "1:4", "4:8")
SETTLED = 2 / 3  # of the training, when the last masks are made at the latest


@dataclass(frozen=True)
class Units:
    """What is zeroed together: ``weight``, ``kernel``, or a pattern such as ``2:4``."""

    granularity: str

    def weights(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The weights it applies to, by layer; one that layers share is under the first."""
        kinds = nn.modules.conv._ConvNd if self.granularity == "kernel" else WEIGHTED
        layers = {name: layer.weight for name, layer in module.named_modules() if isinstance(layer, kinds)}
        first = {id(weight): name for name, weight in reversed(layers.items())}
        return {name: w for name, w in layers.items() if isinstance(w, nn.Parameter) and first[id(w)] == name}

    @property
    def pattern(self) -> tuple[int, int] | None:
        """N and M of a pattern; None for the others."""
        if self.granularity not in PATTERNS:
            return None
        kept, of = self.granularity.split(":")
        return int(kept), int(of)

    def fits(self, layer: nn.Module) -> bool:
        """Whether a pattern goes up in the layer's input axis; true of the others."""
        return self.pattern is None or layer.weight.shape[_input_axis(layer)] % self.pattern[1] == 0


def _input_axis(layer: nn.Module) -> int:
    return 0 if getattr(layer, "transposed", False) else 1


class Masks:
    """Which weights of a module stay, under a rule; deterministic.

    Parameters
    ----------
    module
        Whose weights are ranked, as they are each time masks are made.
    units, rule
        What is zeroed together, and how much of it.
    seed
        Of ``random``.
    slopes
        Gives gradients by parameter name, for ``taylor``.
    """

    def __init__(
        self, module: nn.Module, units: Units, rule: Rule, seed: int, slopes: Callable[[], Mapping[str, Tensor]]
    ):
        self._units, self._rule, self._seed, self._slopes = units, rule, seed, slopes
        self._layers = {name: module.get_submodule(name) for name in units.weights(module)}
        self.weights = {name: layer.weight for name, layer in self._layers.items() if units.fits(layer)}
        self.left = [name for name, layer in self._layers.items() if not units.fits(layer)]
        if rule.threshold:
            below = {n: float((s < rule.threshold).double().mean()) for n, s in self._scores().items()}
            self._rule = replace(rule, ratio=0.0, threshold=0.0, layers=below)

    def make(self, share: float = 1.0) -> dict[str, Tensor]:
        """Masks of bool by layer, in the weight's shape: True stays. `share` of the rule's ratios is zeroed.

        Weights that are zero already are among the first to be, so that no zero comes back.
        """
        scores = self._scores()
        if self._units.pattern is not None:
            kept, of = self._units.pattern
            count = round(share * (of - kept))
            masks = {n: _without_smallest(s.unflatten(-1, (-1, of)), count).flatten(-2) for n, s in scores.items()}
            return {n: mask.movedim(-1, _input_axis(self._layers[n])) for n, mask in masks.items()}
        masks = {}
        for together, ratio in self._ranked_together(scores):
            flat = torch.cat([scores[name].flatten() for name in together])
            kept = _without_smallest(flat, round(ratio * share * len(flat)))
            for name, part in zip(together, kept.split([scores[n].numel() for n in together]), strict=True):
                mask = part.view_as(scores[name])
                weight = self.weights[name]
                masks[name] = mask.view(*mask.shape, *[1] * (weight.dim() - mask.dim())).expand_as(weight)
        return masks

    def _ranked_together(self, scores: Mapping[str, Tensor]) -> list[tuple[list[str], float]]:
        own = [([name], self._rule.layers[name]) for name in scores if name in self._rule.layers]
        rest = [name for name in scores if name not in self._rule.layers]
        if not self._rule.ratio or not rest:
            return own
        together = [rest] if self._rule.scope == "global" else [[name] for name in rest]
        return own + [(names, self._rule.ratio) for names in together]

    def _scores(self) -> dict[str, Tensor]:
        """By layer a score per unit, the least to go first: per weight, per kernel, or with the input axis last."""
        importance, slopes = self._rule.importance, None
        if importance == "taylor":
            found = self._slopes()
            slopes = {name: found[f"{name}.weight"] for name in self.weights}
        scores = _importance.of_weights(self.weights, importance, self._seed, slopes)
        return {name: self._of_units(name, score) for name, score in scores.items()}

    def _of_units(self, name: str, score: Tensor) -> Tensor:
        zero = self.weights[name].detach() == 0
        if self._units.pattern is not None:
            axis = _input_axis(self._layers[name])
            score, zero = score.movedim(axis, -1), zero.movedim(axis, -1)
        elif self._units.granularity == "kernel":
            score, zero = score.flatten(2).sum(-1), zero.flatten(2).all(-1)
        if self._rule.importance == "l2":
            score = score.sqrt()  # a norm, in the unit of the weights, which a threshold is given in
        if self._rule.importance == "lamp":
            score = _importance.layer_adaptive(score)
        return score.masked_fill(zero, -1.0)

    def rows(self, before: Mapping[str, int]) -> list[dict[str, Any]]:
        """A row per layer: layer, weights_before, weights_after (both not zero), sparsity (0 to 1), note."""
        rows = []
        for name, layer in self._layers.items():
            after, axis = int(layer.weight.count_nonzero()), _input_axis(layer)
            note = ""
            if name in self.left:
                note = f"left: {layer.weight.shape[axis]} inputs are no multiple of {self._units.pattern[1]}"
            rows.append(
                {
                    "layer": name,
                    "weights_before": before[name],
                    "weights_after": after,
                    "sparsity": 1 - after / layer.weight.numel(),
                    "note": note,
                }
            )
        return rows

    def counts(self) -> dict[str, int]:
        """Weights of each layer that are not zero."""
        return {name: int(layer.weight.count_nonzero()) for name, layer in self._layers.items()}


def _without_smallest(scores: Tensor, count: int) -> Tensor:
    """True but for the `count` smallest along the last axis; of equals, the first go, the same everywhere."""
    order = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, order, False)


def apply_masks(weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
    """Set to zero, in place, what the masks do not keep."""
    with torch.no_grad():
        for name, mask in masks.items():
            weights[name].masked_fill_(~mask, 0)


class Gradual(Constraint):
    """Prunes while training: masks are made anew `rounds` times over the first two thirds, then stay.

    Zhu & Gupta, "To prune, or not to prune", 2017, section 3: sparsity follows a cubic, and weights that are masked
    stay zero until the masks are made anew.

    Parameters
    ----------
    masks
        Makes them.
    rounds
        How many times.
    kept
        What must hold of the weights besides, as they are when it is called: after each time masks were made.

    Attributes
    ----------
    settled_from
        The share of the training at which the last masks are made.
    """

    def __init__(self, masks: Masks, rounds: int, kept: Callable[[], Sequence[Constraint]]):
        self._maker, self._rounds, self._made = masks, rounds, kept
        self._done, self._masks = 0, {}
        self._kept: Sequence[Constraint] = ()
        self.settled_from = SETTLED * (rounds - 1) / rounds

    def before_update(self, share: float) -> None:
        due = min(self._rounds, int(share * self._rounds / SETTLED + 1e-9) + 1)
        if due > self._done:
            self._done, self._masks = due, self._maker.make(cubic(due / self._rounds))
            apply_masks(self._maker.weights, self._masks)
            # values that masks have split are no longer shared, so the groups are found anew
            self._kept = self._made()

    def after_gradients(self) -> None:
        for constraint in self._kept:
            constraint.after_gradients()

    def after_update(self) -> None:
        for constraint in self._kept:
            constraint.after_update()
        apply_masks(self._maker.weights, self._masks)

    def state(self) -> dict[str, Any]:
        return {"done": self._done, "masks": self._masks}

    def restore(self, state: dict[str, Any]) -> None:
        self._done, self._masks = state["done"], state["masks"]
        self._kept = self._made()


def rounds_that_fit(epochs: int, samples: int, validation: float, batch_size: int) -> int:
    """How many times masks can be made in the first two thirds of a training, each before an update of its own."""
    updates = epochs * max(1, (samples - round(validation * samples)) // batch_size)
    return max(1, int(updates * SETTLED))
