"""What a profile suggests to do: rows of finding, evidence, what to do and how much it could save."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

import pandas as pd

from workbench.errors import DataError
from workbench.models.model import Model
from workbench.profiling import _call_rules, _layer_rules
from workbench.profiling._case import Case, Finding
from workbench.profiling.profile import Profile

if TYPE_CHECKING:
    from workbench.profiling.roofline import Roofline

# a new rule is one function in either file and one entry here
RULES: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    _layer_rules.memory_bound,
    _layer_rules.fell_back,
    _layer_rules.unaligned,
    _call_rules.blocked_fusion,
    _call_rules.reformats,
    _layer_rules.tiny_but_slow,
    _layer_rules.slow_grouped,
    _call_rules.outside_the_layers,
    _call_rules.unsure_measurement,
    _call_rules.did_not_load,
)


def advice(profile: Profile, *, roofline: Roofline | None = None, model: Model | None = None) -> pd.DataFrame:
    """What to do about where the time goes, what could save most first.

    Parameters
    ----------
    profile
        Of the model on one engine.
    roofline
        Of the same profile; without it nothing is said of layers that wait for memory.
    model
        The model that was profiled: its layers tell channel counts apart where an engine pads or turns its tensors.

    Returns
    -------
    pandas.DataFrame
        Columns finding, evidence, what_to_do, saving_ms (the most that one piece of advice could save of one call, NaN
        where the profile cannot tell; savings of several do not add up) and layer (several joined by `` + ``; empty
        for the whole call).

    Raises
    ------
    DataError
        If the roofline is of another profile.
    """
    frame = None
    if roofline is not None:
        frame, own = roofline.frame(), profile.frame()
        if not frame[["name", "latency_ms"]].reset_index(drop=True).equals(own[["name", "latency_ms"]]):
            raise DataError(
                f"The roofline is of another profile than {profile!r}. Give wb.profiling.roofline(profile)."
            )
    case = Case(profile, frame, None if model is None else model.layers)
    found = pd.DataFrame([asdict(f) for rule in RULES for f in rule(case)], columns=[f.name for f in fields(Finding)])
    found["saving_ms"] = found["saving_ms"].astype(float)
    return found.sort_values("saving_ms", ascending=False, kind="stable", na_position="last", ignore_index=True)
