"""`Recipe`: steps and a backend, as one immutable value that JSON, YAML and Python can all write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from workbench.compression import Step, step_from_dict
from workbench.deployment import Backend, backend_from_dict
from workbench.errors import RecipeError, nearest

_KEYS = ("steps", "backend", "batch", "seed")  # not `on`, which YAML 1.1 reads as true
_PAIR = {"pruned", "quantised"}  # so common together that it has a colour of its own


@dataclass(frozen=True)
class Recipe:
    """What to do to a model and where to run it.

    Parameters
    ----------
    steps
        Applied in order; empty for the model as it is.
    backend
        What runs the result.
    batch
        Samples per timed call.
    seed
        Seed of every random choice in the steps.
    """

    steps: tuple[Step, ...]
    backend: Backend
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for step in self.steps:
            if not isinstance(step, Step):
                raise RecipeError(f"{step!r} is not a step. Give a list such as [wb.Prune(0.5), wb.Quantize('int8')].")
        if not isinstance(self.backend, Backend):
            raise RecipeError(f"{self.backend!r} is not a backend. Give an instance such as on=wb.OnnxRuntime().")
        for name in ("batch", "seed"):
            value, least = getattr(self, name), 1 if name == "batch" else 0
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise RecipeError(f"{name} is {value!r}; a whole number of at least {least} is needed.")

    @property
    def label(self) -> str:
        """The steps as a person reads them: ``Prune 50 % → Quantise int8``, or ``as is``."""
        return " → ".join(step.label for step in self.steps) or "as is"

    @property
    def backend_label(self) -> str:
        """Where it runs: ``ONNX Runtime, 2 threads``."""
        return self.backend.label

    @property
    def family(self) -> str:
        """The technique that decides its colour.

        ``dense``; that of its one technique: ``pruned``, ``quantised``, ``clustered``, ``factorised``, ``distilled`` or
        ``clipped``; ``pruned+quantised``; or ``mixed``.
        """
        families = {step.family for step in self.steps if step.family}
        if len(families) > 1:
            return "pruned+quantised" if families == _PAIR else "mixed"
        return families.pop() if families else "dense"

    @property
    def hash(self) -> str:
        """SHA-256 of the recipe alone, as hex."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """JSON values: ``steps``, ``backend``, ``batch``, ``seed``."""
        return {
            "steps": [step.to_dict() for step in self.steps],
            "backend": self.backend.to_dict(),
            "batch": self.batch,
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """What `to_dict` wrote; also by hand, with settings left at their defaults and ``backend: OnnxRuntime`` alone.

        Raises
        ------
        RecipeError
            Naming the key, step or backend that is not known, and the accepted ones.
        """
        if not isinstance(data, dict):
            raise RecipeError(f"a recipe is a mapping with the keys {', '.join(_KEYS)}; this is {data!r}.")
        for key in data:
            if key not in _KEYS:
                raise RecipeError(f"a recipe has no key {key!r}. {nearest(str(key), _KEYS)}")
        steps, backend = data.get("steps") or [], data.get("backend")
        if not isinstance(steps, Sequence) or isinstance(steps, str):
            raise RecipeError(f"steps is a list of mappings such as {{step: Prune, ratio: 0.5}}; this is {steps!r}.")
        if backend is None:
            raise RecipeError("the recipe names no backend; add a line such as `backend: OnnxRuntime`.")
        return cls(
            steps=tuple(step_from_dict(step) for step in steps),
            backend=backend_from_dict({"backend": backend} if isinstance(backend, str) else backend),
            batch=data.get("batch", 1),
            seed=data.get("seed", 0),
        )

    def to_yaml(self) -> str:
        """The recipe as a YAML document."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """What `to_yaml` wrote; `RecipeError` where it is not YAML or not a recipe."""
        try:
            return cls.from_dict(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise RecipeError(f"the recipe is not YAML: {error}") from None

    def to_python(self) -> str:
        """The call that runs it: ``study.run([wb.Prune(0.5)], on=wb.OnnxRuntime(), batch=1)``."""
        extra = "".join(
            f", {k}={v}" for k, v, default in (("batch", self.batch, 1), ("seed", self.seed, 0)) if v != default
        )
        steps = ", ".join(step.to_python() for step in self.steps)
        return f"study.run([{steps}], on={self.backend.to_python()}{extra})"
