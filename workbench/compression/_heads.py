"""Attention heads removed for good: the projections lose their channels, the output projection its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from workbench.compression import _importance, _ranking
from workbench.compression._channels import Attempts, cut_out
from workbench.compression._ranking import Candidate, Rule
from workbench.compression._surgery import Group, Patch, Surgery, outputs_of, tracing
from workbench.compression._training import copied
from workbench.data.task import Task
from workbench.errors import StepError
from workbench.jobs import SILENT, Progress
from workbench.models import parts, structure
from workbench.models.model import Model

_HEADS = ("num_heads", "n_heads", "n_head", "nhead", "heads", "num_attention_heads")
_INSTEAD = 'Remove channels of its linear layers instead: wb.Prune(0.5, granularity="channel").'


def attentions(module: nn.Module) -> dict[str, nn.Module]:
    """Modules that say how many heads they have, by name: torch's own, and those with a ``num_heads`` and layers."""
    return {
        name: part
        for name, part in module.named_modules()
        if _count(part) and any(isinstance(child, nn.Linear) for child in part.children())
    }


class Heads:
    """Removes heads of one model under one rule, at once or a part at a time; as `_channels.Channels` does channels.

    Notes
    -----
    Michel et al., "Are Sixteen Heads Really Better than One?", NeurIPS 2019.
    """

    def __init__(self, model: Model, rule: Rule, task: Task | None = None, seed: int = 0):
        self._asked, self._rule, self._task, self._seed = rule, rule, task, seed
        self._before = {name: _count(part) for name, part in attentions(model.module).items()}
        self._notes: dict[str, str] = {}

    def cut(self, model: Model, share: float = 1.0, progress: Progress = SILENT) -> Model:
        """`model` without its least important heads, down to where `share` of the ratios leads; one head always stays.

        torch's own attention becomes the part "attention", because it insists on as many channels inside as outside.

        Raises
        ------
        StepError
            If no attention can lose a head, one of the rule's cannot, or none would under a `share` of 1.
        """
        asked = {n for n in self._before if self._asked.layers.get(n, self._asked.ratio or self._asked.threshold)}
        model = _with_plain_projections(model, asked)
        with tracing():
            surgery = Surgery(model)
            scores, _ = _importance.of_channels(surgery, model, self._task, self._rule.importance, self._seed, progress)
            owners = dict(_owned(surgery, model.module, asked))
            candidates = [
                Candidate(name, (owner,), scores[name].view(_count(part), -1).mean(1), self._before[owner])
                for name, (owner, part) in owners.items()
                if name in scores
            ]
            self._rule = _ranking.without_threshold(self._rule, candidates)
            sizes = {c.name: surgery.groups[c.name].channels // len(c.scores) for c in candidates}
            paths = {name: owner for name, (owner, _) in owners.items()}
            attempts = Attempts(
                surgery, candidates, self._rule, share, lambda name, heads: _channels_of(heads, sizes[name]),
                [_patch(paths, sizes, widths=False), _patch(paths, sizes, widths=True)], progress,
            )  # fmt: skip
            safe = attempts.safe()
            self._refuse(model, asked, [paths[name] for name in safe])
            trial = attempts.attempt(safe)
            if trial.fault:
                raise StepError(
                    f"Attentions of {model.name} can lose heads one by one but not together: {trial.fault}. {_INSTEAD}"
                )
            changed = cut_out(model, trial)
        if share == 1.0 and self._counts(changed) == self._before:
            raise StepError(
                f"Prune: so small a ratio or threshold removes no head of {model.name}, whose attentions have "
                f"{', '.join(map(str, sorted(set(self._before.values()))))} of them. Give a larger one."
            )
        return changed

    def _refuse(self, model: Model, asked: set[str], safe: Sequence[str]) -> None:
        left = sorted(asked - set(safe))
        self._notes |= dict.fromkeys(left, "its heads cannot be followed")
        named = [name for name in left if self._asked.layers.get(name)]
        if named or not safe:
            subject = f"{named[0]} of {model.name}" if named else f"No attention of {model.name}"
            raise StepError(
                f"{subject} can{'not' if named else ''} lose a head: its query, key and value must be three linear "
                f"layers of equal width that only its output projection reads. {_INSTEAD}"
            )

    def _counts(self, model: Model) -> dict[str, int]:
        return {name: _count(model.module.get_submodule(name)) for name in self._before}

    def rows(self, model: Model) -> list[dict[str, Any]]:
        """A row per attention: layer, heads_before, heads_after, note; the last says why it stays whole."""
        return [
            {"layer": name, "heads_before": self._before[name], "heads_after": after, "note": self._notes.get(name, "")}
            for name, after in self._counts(model).items()
        ]


def _count(part: nn.Module) -> int:
    """Heads of an attention; 0 for any other module."""
    found = [vars(part).get(name) for name in _HEADS]
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), 0)


def _with_plain_projections(model: Model, asked: set[str]) -> Model:
    """`model` with torch's own attentions of these names as parts of plain layers, where they can be."""
    copy = copied(model)
    owned = [
        name
        for name, part in copy.module.named_modules()
        if name in asked and type(part) is nn.MultiheadAttention and part.bias_k is None and not part.add_zero_attn
    ]
    if not owned:
        return model
    module = copy.module
    for name in owned:
        module = parts.put(module, name, "attention")
    for part in module.modules():
        # it would hand nested tensors to its layers, which only torch's own attention understands
        if isinstance(part, nn.TransformerEncoder) and getattr(part, "use_nested_tensor", False):
            part.use_nested_tensor = False
    edit = structure.difference(model.module, module)
    return replace(model, module=module.eval(), graph=None, edits=(*model.edits, edit))


def _owned(surgery: Surgery, module: nn.Module, asked: set[str]) -> Iterator[tuple[str, tuple[str, nn.Module]]]:
    """Groups that are the inside of an attention, with its name and itself."""
    found = attentions(module)
    for group in surgery.groups.values():
        for name in sorted(found, key=len, reverse=True):  # the innermost first
            if name in asked and _is_inside(group, name, module, _count(found[name])):
                yield group.name, (name, found[name])
                break


def _is_inside(group: Group, name: str, module: nn.Module, heads: int) -> bool:
    inside = [layer for layer in group.losing if layer.startswith(f"{name}." if name else "")]
    widths = {outputs_of(module.get_submodule(layer)) for layer in inside}
    return len(inside) == len(group.losing) == 3 and len(widths) == 1 and widths.pop() % heads == 0


def _channels_of(heads: Sequence[int], size: int) -> list[int]:
    return [head * size + channel for head in heads for channel in range(size)]


def _patch(owners: Mapping[str, str], sizes: Mapping[str, int], *, widths: bool) -> Patch:
    """Tell each attention how many heads it has left and, with `widths`, how many channels they have in all."""

    def patch(module: nn.Module, lost: Mapping[str, Sequence[int]]) -> None:
        for name, channels in lost.items():
            part, size = module.get_submodule(owners[name]), sizes[name]
            before = _count(part)
            after = before - len(channels) // size
            new = {key: after for key in _HEADS if vars(part).get(key) == before}
            if widths:
                old = before * size
                new |= {key: after * size for key, value in vars(part).items() if key not in new and value == old}
            for key, value in new.items():
                setattr(part, key, value)

    return patch
