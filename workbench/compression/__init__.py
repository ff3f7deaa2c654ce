"""Compression: each technique is one file and one line here."""

from __future__ import annotations

from typing import Any

from workbench.compression._base import Step
from workbench.compression.finetune import Finetune
from workbench.compression.prune import Prune
from workbench.compression.quantize import Quantize
from workbench.errors import RecipeError, nearest

STEPS: dict[str, type[Step]] = {
    "Finetune": Finetune,
    "Prune": Prune,
    "Quantize": Quantize,
}

__all__ = ["STEPS", "Finetune", "Prune", "Quantize", "Step", "step_from_dict"]


def step_from_dict(data: dict[str, Any]) -> Step:
    """The step that `Step.to_dict` wrote; settings left out take their defaults.

    Raises
    ------
    RecipeError
        If `data` is not a mapping, or names a step or a setting that does not exist; the accepted ones are listed.
    """
    if not isinstance(data, dict) or "step" not in data:
        raise RecipeError(f"A step is a mapping such as {{step: Prune, ratio: 0.5}}; this is {data!r}.")
    name = data["step"]
    if not isinstance(name, str) or name not in STEPS:
        raise RecipeError(f"There is no step {name!r}. {nearest(str(name), STEPS)}")
    return STEPS[name].from_dict(data)
