"""Compression: each technique is one file and one line here."""

from __future__ import annotations

from typing import Any

from workbench.compression._base import Checkpoint, Step
from workbench.compression.clip import Clip
from workbench.compression.cluster import Cluster
from workbench.compression.distill import Distill
from workbench.compression.fake_quantize import FakeQuantize
from workbench.compression.finetune import Finetune
from workbench.compression.low_rank import LowRank
from workbench.compression.prune import Prune
from workbench.compression.qat import QAT
from workbench.compression.quantize import Quantize
from workbench.compression.sizes import Sizes, sizes
from workbench.errors import RecipeError, nearest

STEPS: dict[str, type[Step]] = {
    "Clip": Clip,
    "Cluster": Cluster,
    "Distill": Distill,
    "FakeQuantize": FakeQuantize,
    "Finetune": Finetune,
    "LowRank": LowRank,
    "Prune": Prune,
    "QAT": QAT,
    "Quantize": Quantize,
}

__all__ = [
    "QAT",
    "STEPS",
    "Checkpoint",
    "Clip",
    "Cluster",
    "Distill",
    "FakeQuantize",
    "Finetune",
    "LowRank",
    "Prune",
    "Quantize",
    "Sizes",
    "Step",
    "sizes",
    "step_from_dict",
]


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
