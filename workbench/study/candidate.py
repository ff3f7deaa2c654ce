"""`Candidate`: a recipe and what it measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from typing import Any

from workbench import formatting
from workbench.deployment import Engine
from workbench.measure import Measurement
from workbench.models.model import Model
from workbench.study.recipe import Recipe


@dataclass(frozen=True)
class Candidate:
    """One point of the chart; it can be explained, run again and shipped.

    Attributes
    ----------
    number
        Its number in the study, from 1.
    recipe, measurement
        What was done, and what came of it.
    created
        UTC time in ISO 8601.
    """

    number: int
    recipe: Recipe
    measurement: Measurement
    created: str
    _make_model: Callable[[], Model] = field(repr=False, compare=False)
    _about: Callable[[], dict[str, Any]] = field(repr=False, compare=False)

    @property
    def label(self) -> str:
        """The recipe's steps as a person reads them."""
        return self.recipe.label

    @property
    def family(self) -> str:
        """The technique that decides its colour."""
        return self.recipe.family

    def model(self) -> Model:
        """The model its steps made: from the cache, or made again where the cache lost it."""
        return self._make_model()

    def engine(self) -> Engine:
        """A freshly compiled engine that knows its recipe, preprocessing and classes; close it after use."""
        engine = self.recipe.backend.compile(self.model())
        engine.about = {**self._about(), "recipe": self.recipe.to_dict(), "measurement": self.measurement.to_dict()}
        return engine

    def to_python(self) -> str:
        """The call that runs its recipe on a study named ``study``."""
        return self.recipe.to_python()

    def summary(self) -> str:
        """The numbers in one line: ``91.62 % ± 0.54 · 0.131 ms · 8.2 × · 98 KB``."""
        m = self.measurement
        interval = formatting.plus_minus(m.accuracy, m.accuracy_interval, 100)
        return " · ".join(
            (
                f"{formatting.accuracy(m.accuracy)} {interval}".strip(),
                formatting.milliseconds(m.latency_ms),
                formatting.factor(m.speedup),
                formatting.size(m.size_bytes),
            )
        )

    def __repr__(self) -> str:
        return f"<Candidate {self.number}: {self.label} on {self.recipe.backend_label}; {self.summary()}>"

    def _repr_html_(self) -> str:
        name = f"<b>Candidate {self.number}</b>: {escape(self.label)}, {escape(self.recipe.backend_label)}"
        return f"<p>{name}<br>{escape(self.summary())}</p>"
