"""`Step`: one change to a model, as a frozen value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from workbench.data.task import Task
from workbench.errors import RecipeError, StepError, nearest
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model


class PerLayer(Mapping[str, Any]):
    """Settings by layer name that can be hashed and not be changed: ``{"conv1": 0.3, "fc1": 0.9}``.

    Parameters
    ----------
    values
        A mapping with layer names as keys and numbers or words as values.

    Raises
    ------
    StepError
        If it is no mapping, or a key is no layer name.
    """

    def __init__(self, values: Mapping[str, Any] = {}):
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise StepError(f"{values!r} does not say a value per layer; give a mapping such as {{'conv1': 0.3}}.")
        self._values = dict(sorted(values.items()))

    def __getitem__(self, layer: str) -> Any:
        return self._values[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __repr__(self) -> str:
        return repr(self._values)


class Checkpoint:
    """Where a long step keeps how far it came, so that the same step goes on there after a cancel or a crash.

    The base class keeps nothing: a step without a study starts from the beginning.
    """

    def load(self) -> bytes | None:
        """What was saved last; None where nothing was."""
        return None

    def save(self, data: bytes) -> None:
        """Replace what was saved, atomically."""

    def part(self, name: str) -> Checkpoint:
        """A place for one of several trainings of the step, forgotten together with this one.

        By default this place itself, so that only the latest training is kept.
        """
        return self

    def clear(self) -> None:
        """Forget it: the step has ended and its result is kept."""


NO_CHECKPOINT = Checkpoint()


@dataclass(frozen=True)
class Step(ABC):
    """One change to a model: hashable, comparable, and pure, so that its result can be cached.

    A subclass is a frozen dataclass whose fields are JSON values and which checks them in ``__post_init__``.

    Attributes
    ----------
    family
        What the technique makes of a model, in one word of the palette: ``pruned``, ``quantised``; empty for a step
        that only recovers accuracy.
    """

    family: ClassVar[str] = ""

    @property
    @abstractmethod
    def label(self) -> str:
        """What a person reads on a card or in a legend: ``Prune 50 %``."""

    @abstractmethod
    def check(self, model: Model) -> None:
        """Refuse, before any work, a model this step cannot be applied to.

        Raises
        ------
        StepError
            Saying what was given, what is accepted, and what to do next.
        """

    def preview(self, model: Model) -> Model:
        """What `apply` would give, without its work: the same kind, precision and changes, the old weights.

        A study walks a whole recipe with it, so that a step which cannot follow is refused before any work. A step
        that leaves a graph instead of a module, or another precision, overrides it.
        """
        return model.changed(self.family, module=model.module, graph=model.graph)

    @abstractmethod
    def apply(
        self,
        model: Model,
        task: Task,
        *,
        seed: int = 0,
        progress: Progress = SILENT,
        checkpoint: Checkpoint = NO_CHECKPOINT,
    ) -> Model:
        """The changed model; `model` itself is left as it was. Same arguments, same result.

        A step that trains saves to `checkpoint` after each epoch and goes on from what it finds there.
        """

    def to_dict(self) -> dict[str, Any]:
        """``{"step": "Prune", "ratio": 0.5, …}``, every setting included."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {k: dict(v) if isinstance(v, PerLayer) else v for k, v in values.items()}
        return {"step": type(self).__name__, **plain}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Step:
        """The step with these settings; an unknown or missing one is a `RecipeError` that names the accepted."""
        accepted = [f.name for f in fields(cls)]
        for key in data:
            if key != "step" and key not in accepted:
                raise RecipeError(f"{cls.__name__} has no setting {key!r}. {nearest(key, accepted)}")
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "step"})
        except TypeError as error:
            raise RecipeError(f"{cls.__name__} cannot be made from {data}: {error}.") from None

    def to_python(self) -> str:
        """The expression that makes this step, settings at their defaults left out: ``wb.Prune(0.5)``."""
        first = fields(self)[0].name
        given = [
            f"{'' if f.name == first else f.name + '='}{getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"wb.{type(self).__name__}({', '.join(given)})"
