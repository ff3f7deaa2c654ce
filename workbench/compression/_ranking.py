"""What goes: from scores of the units of each group, which of them are dropped under a ratio, a threshold, a scope."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from workbench.errors import StepError

LEAST_KEPT = 0.1  # of each group ranked with others or by a threshold: a layer cut to nothing cannot recover


@dataclass(frozen=True)
class Rule:
    """How much goes, and by what measure; the fields are those of `Prune`."""

    ratio: float = 0.0
    threshold: float = 0.0
    importance: str = "l2"
    scope: str = "layer"
    round_to: int = 1
    layers: Mapping[str, float] = field(default_factory=dict)

    def keep(self, width: int, wanted: float) -> int:
        """Channels left of `width` where `wanted` were asked for: the nearest multiple of `round_to`, at least one.

        A layer narrower than two multiples has no narrower multiple to go to and keeps the exact number.
        """
        step = self.round_to if width >= 2 * self.round_to else 1
        return min(width, max(1, int(wanted / step + 0.5)) * step)


@dataclass(frozen=True)
class Candidate:
    """Units that can be dropped: the channels of layers that lose the same ones, or the heads of an attention.

    Attributes
    ----------
    name
        Of the group.
    layers
        Names a ratio can be given under.
    scores
        ``(units,)``, any floating dtype; the least goes first.
    original
        Units before the step began.
    channels
        Channels of a unit, in which widths are counted.
    likeness
        The same for groups of the same shape of sub-graph.
    """

    name: str
    layers: tuple[str, ...]
    scores: Tensor
    original: int
    channels: int = 1
    likeness: str = ""


def own_ratio(candidate: Candidate, layers: Mapping[str, float]) -> float | None:
    """The ratio that `layers` gives one of the candidate's; None where it gives none.

    Raises
    ------
    StepError
        If it gives two of them different ones.
    """
    given = {layer: layers[layer] for layer in candidate.layers if layer in layers}
    if len(set(given.values())) > 1:
        raise StepError(
            f"Prune: {' and '.join(given)} lose the same channels, so that they cannot have the ratios "
            f"{' and '.join(f'{ratio:g}' for ratio in given.values())}. Give one of them, or all the same."
        )
    return next(iter(given.values()), None)


def without_threshold(rule: Rule, candidates: Sequence[Candidate]) -> Rule:
    """`rule` with its threshold, where it has one, as the ratio of each group that it comes to."""
    if not rule.threshold:
        return rule
    below = {c.layers[0]: float((c.scores < rule.threshold).float().mean()) for c in candidates}
    return replace(rule, threshold=0.0, layers={name: min(share, 1 - LEAST_KEPT) for name, share in below.items()})


def dropped(candidates: Sequence[Candidate], rule: Rule, share: float = 1.0) -> dict[str, list[int]]:
    """The units each group loses, ascending; groups that lose none are left out.

    Parameters
    ----------
    candidates
        The groups that can lose units.
    rule
        Without a threshold; see `without_threshold`.
    share
        Of the ratios, how far to go: each is taken of the width a group had before the step began.
    """
    lost = {}
    for together, ratio in _ranked_together(candidates, rule):
        bar = _bar(together, ratio * share)
        for candidate in together:
            width = candidate.original * candidate.channels
            if rule.scope == "layer" or own_ratio(candidate, rule.layers) is not None:
                wanted = candidate.original * (1 - ratio * share)
            else:
                wanted = max(int((candidate.scores >= bar).sum()), LEAST_KEPT * candidate.original)
            kept = max(1, rule.keep(width, wanted * candidate.channels) // candidate.channels)
            order = torch.argsort(candidate.scores, stable=True)
            units = sorted(order[: max(0, len(order) - kept)].tolist())
            if units:
                lost[candidate.name] = units
    return lost


def _ranked_together(candidates: Sequence[Candidate], rule: Rule) -> list[tuple[list[Candidate], float]]:
    together: dict[str, list[Candidate]] = {}
    alone = []
    for candidate in candidates:
        ratio = own_ratio(candidate, rule.layers)
        if ratio:
            alone.append(([candidate], ratio))
        elif ratio is None and rule.ratio:
            key = {"layer": candidate.name, "global": "", "isomorphic": candidate.likeness}[rule.scope]
            together.setdefault(key, []).append(candidate)
    return alone + [(group, rule.ratio) for group in together.values()]


def _bar(together: Sequence[Candidate], ratio: float) -> Tensor:
    """The score below which units go, where groups are ranked with each other, each unit counted by its channels."""
    everything = torch.cat([c.scores.repeat(c.channels) for c in together]).sort().values
    kept = (1 - ratio) * sum(c.original * c.channels for c in together)
    return everything[min(len(everything) - 1, max(0, round(len(everything) - kept)))]
