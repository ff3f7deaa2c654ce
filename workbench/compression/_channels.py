"""Channels removed for good: which groups can lose them, how many go, and what is said where none can."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from workbench.compression import _importance, _ranking
from workbench.compression._checks import WEIGHTED
from workbench.compression._ranking import Candidate, Rule
from workbench.compression._surgery import Group, Patch, Surgery, Trial, outputs_of, tracing
from workbench.data.task import Task
from workbench.errors import StepError
from workbench.jobs import SILENT, Progress
from workbench.models import structure
from workbench.models.model import Model

_RANKED = 0.5  # of the progress, when scores are there and attempts begin
_OUTPUT = "it feeds the output directly"


class Attempts:
    """Attempts at dropping units of one network under one rule.

    Attributes
    ----------
    trial
        The latest.
    faults
        Why a candidate cannot lose units, by name.

    Parameters
    ----------
    surgery
        On the network.
    candidates
        Its groups that may lose units, the ones most likely to fail first.
    rule, share
        See `_ranking.dropped`.
    channels
        From a group's name and its units to the channels that go.
    patches
        Ways to change the network's own settings, tried in order; None changes none.
    progress
        Told before each attempt.
    """

    def __init__(
        self,
        surgery: Surgery,
        candidates: Sequence[Candidate],
        rule: Rule,
        share: float,
        channels: Callable[[str, Sequence[int]], list[int]],
        patches: Sequence[Patch | None] = (None,),
        progress: Progress = SILENT,
    ):
        self._surgery, self._rule, self._share = surgery, rule, share
        self._candidates = {c.name: c for c in candidates}
        self._channels, self._patches, self._progress = channels, patches, progress
        self._tried: tuple[str, ...] = ()
        self.trial: Trial | None = None
        self.faults: dict[str, str] = {}

    def safe(self) -> list[str]:
        """Names of the candidates that can lose units and leave the network right."""
        return self._surgery.safe(list(self._candidates), self.attempt)

    def attempt(self, names: Sequence[str]) -> Trial:
        """Drop units of these candidates, ranked among each other."""
        if self.trial is None or self._tried != tuple(names):
            units = _ranking.dropped([self._candidates[name] for name in names], self._rule, self._share)
            lost = {name: self._channels(name, gone) for name, gone in units.items()}
            self._tried = tuple(names)
            self._progress(_RANKED, f"trying {len(names)} group{'s' * (len(names) != 1)} of layers")
            for patch in self._patches:
                self.trial = self._surgery.attempt(lost, patch)
                if not self.trial.fault:
                    break
            if len(names) == 1 and self.trial.fault:
                self.faults[names[0]] = self.trial.fault
        return self.trial


class Channels:
    """Removes channels of one model under one rule, at once or a part at a time.

    Parameters
    ----------
    model
        As it is before the first part is removed; ratios are of its widths.
    rule
        How many go, and by what measure.
    task
        What ``taylor`` takes its gradients from.
    seed
        Of ``random``.
    """

    def __init__(self, model: Model, rule: Rule, task: Task | None = None, seed: int = 0):
        self._asked, self._rule, self._task, self._seed = rule, rule, task, seed
        self._widths = widths(model.module)
        self._notes: dict[str, str] = {}

    def cut(self, model: Model, share: float = 1.0, progress: Progress = SILENT) -> Model:
        """`model` without its least important channels, down to where `share` of the ratios leads.

        Each narrowed layer has an attribute ``kept_channels``: the numbers, in the untouched module, of the output
        channels it still has. Frozen parameters stay frozen.

        Raises
        ------
        StepError
            If no layer can lose a channel, one of the rule's layers cannot, or none would under a `share` of 1.

        Notes
        -----
        Dependency groups after Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023.
        """
        with tracing():
            surgery = Surgery(model)
            candidates = self._candidates(surgery, model, progress.part(0.0, _RANKED))
            self._rule = _ranking.without_threshold(self._rule, candidates)
            wanted = [c for c in candidates if self._goes(c)]
            attempts = Attempts(surgery, wanted, self._rule, share, _in_step(surgery.groups), progress=progress)
            safe = attempts.safe()
            self._refuse(model, candidates, wanted, attempts.faults, safe)
            trial = attempts.attempt(safe)
            if trial.fault:
                raise StepError(
                    f"Layers of {model.name} can be pruned one by one but not together: {trial.fault}. {self._instead}"
                )
            if share == 1.0 and widths(trial.pruned) == self._widths:
                names = ", ".join(self._asked.layers)
                raise StepError(
                    f"{self._amount} removes no channel of {model.name if self._asked.ratio else names or model.name} "
                    f"in widths that are multiples of {self._rule.round_to}. Give a larger one or a smaller round_to."
                )
            return cut_out(model, trial)

    def _candidates(self, surgery: Surgery, model: Model, progress: Progress) -> list[Candidate]:
        scores, unscored = _importance.of_channels(
            surgery, model, self._task, self._rule.importance, self._seed, progress
        )
        self._notes = dict.fromkeys(surgery.fixed, _OUTPUT)
        for name, why in unscored.items():
            self._notes |= dict.fromkeys(surgery.groups[name].losing, why)
        return [
            Candidate(name, group.losing, scores[name], self._widths[name] // group.parts, group.parts, group.likeness)
            for name, group in surgery.groups.items()
            if name in scores
        ]

    def _goes(self, candidate: Candidate) -> bool:
        own = _ranking.own_ratio(candidate, self._rule.layers)
        return bool(self._rule.ratio if own is None else own)

    def _refuse(
        self,
        model: Model,
        candidates: Sequence[Candidate],
        wanted: Sequence[Candidate],
        faults: Mapping[str, str],
        safe: Sequence[str],
    ) -> None:
        """Say which layers cannot be pruned, and why: those asked for by name, or all."""
        for candidate in wanted:
            if candidate.name not in safe:
                why = f"{_importance.UNFOLLOWED} ({faults[candidate.name]})"
                self._notes |= dict.fromkeys(candidate.layers, why)
        can = {layer for candidate in wanted if candidate.name in safe for layer in candidate.layers}
        for layer, ratio in self._asked.layers.items():
            if ratio and layer not in can:
                why = self._notes.get(layer, "it is not called as a layer of its own")
                raise StepError(f"Layer {layer} of {model.name} cannot lose a channel: {why}. {self._instead}")
        if not safe and (wanted or not candidates):  # a threshold that nothing is below wants nothing
            left = [f"of {layer}, {why}" for layer, why in self._notes.items() if why != _OUTPUT]
            why = left[0] if left else "each of its layers feeds the output directly"
            raise StepError(f"No layer of {model.name} can lose a channel: {why}. {self._instead}")

    @property
    def _amount(self) -> str:
        if self._asked.threshold:
            return f"A threshold of {self._asked.threshold:g}"
        return f"A ratio of {self._ratio:g}"

    @property
    def _ratio(self) -> float:
        return self._asked.ratio or max(self._asked.layers.values(), default=0.5)

    @property
    def _instead(self) -> str:
        return f'Zero single weights instead: wb.Prune({self._ratio:g}, granularity="weight").'

    def rows(self, model: Model) -> list[dict[str, Any]]:
        """A row per weighted layer: layer, channels_before, channels_after, note; the last says why it stays whole."""
        return [
            {
                "layer": layer,
                "channels_before": before,
                "channels_after": after,
                "note": self._notes.get(layer, "") if after == before else "",
            }
            for (layer, before), after in zip(self._widths.items(), widths(model.module).values(), strict=True)
        ]


def cut_out(model: Model, trial: Trial) -> Model:
    """`model` with the trial's module, the edit that leads to it, and the frozen parameters it had."""
    for name, parameter in model.module.named_parameters():
        trial.pruned.get_parameter(name).requires_grad_(parameter.requires_grad)
    edit = structure.difference(model.module, trial.pruned)
    return model.changed("pruned", module=trial.pruned.eval(), edits=(*model.edits, edit))


def removable(model: Model) -> list[Group]:
    """Groups of layers that can lose channels without changing what the rest computes.

    Raises
    ------
    StepError
        If the network cannot be traced.
    """
    with tracing():
        surgery = Surgery(model)
        rule = Rule(ratio=0.5)
        scores, _ = _importance.of_channels(surgery, model, None, rule.importance, 0)
        candidates = [
            Candidate(name, group.losing, scores[name], len(scores[name]), group.parts)
            for name, group in surgery.groups.items()
            if name in scores
        ]
        safe = Attempts(surgery, candidates, rule, 1.0, _in_step(surgery.groups)).safe()
        return [surgery.groups[name] for name in safe]


def widths(module: nn.Module) -> dict[str, int]:
    """Output channels of each convolution and linear layer, by name."""
    return {name: outputs_of(layer) for name, layer in module.named_modules() if isinstance(layer, WEIGHTED)}


def _in_step(groups: Mapping[str, Group]) -> Callable[[str, Sequence[int]], list[int]]:
    """Channels that go together in each part of a group that is split into parts."""

    def channels(name: str, units: Sequence[int]) -> list[int]:
        group = groups[name]
        size = group.channels // group.parts
        return sorted(part * size + unit for part in range(group.parts) for unit in units)

    return channels
