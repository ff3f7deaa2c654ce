"""What the rules of advice look at, and what they say."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from workbench import formatting as fmt
from workbench.profiling import _channels
from workbench.profiling.profile import Profile

# shares of the call: what saves less is not worth a row; what takes less gives no rate that can be relied on
LEAST = 0.005
STEADY = 0.01
BITS = {"fp64": 64, "fp32": 32, "fp16": 16, "bf16": 16, "int8": 8}


@dataclass(frozen=True)
class Finding:
    """One piece of advice.

    Attributes
    ----------
    finding, evidence, what_to_do
        Sentences: what is wrong, the numbers that say so, and the remedy.
    saving_ms
        The most it could save of one call; NaN where the profile cannot tell.
    layer
        The layers it is about, joined by `` + ``; empty where it is about the whole call.
    """

    finding: str
    evidence: str
    what_to_do: str
    saving_ms: float = math.nan
    layer: str = ""


@dataclass(frozen=True, eq=False)
class Case:
    """What the rules look at: a profile and, where they are there, its roofline and the model's layers."""

    profile: Profile
    roofline: pd.DataFrame | None
    layers: pd.DataFrame | None

    @cached_property
    def rows(self) -> list[Any]:
        """The rows of the profile's frame, named as its columns; ``Index`` is the row's number."""
        return list(self.profile.frame().itertuples())

    @cached_property
    def layer_rows(self) -> list[Any]:
        """Those that compute something of the model."""
        return [row for row in self.rows if row.kind == "layer"]

    @cached_property
    def widths(self) -> dict[int, _channels.Widths]:
        """Channels of each row that has some, by its number."""
        found = ((row.Index, _channels.widths(row, self.profile.batch, self.layers)) for row in self.layer_rows)
        return {index: width for index, width in found if width is not None}

    @cached_property
    def _links(self) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        before: dict[int, list[int]] = {}
        after: dict[int, list[int]] = {}
        for writer, reader in self.profile.edges:
            before.setdefault(reader, []).append(writer)
            after.setdefault(writer, []).append(reader)
        return before, after

    def nearest(self, index: int, *, forward: bool) -> list[Any]:
        """The rows next to this one in the data flow, before or after it, with moves and conversions passed over."""
        links = self._links[forward]
        found, waiting, seen = [], list(links.get(index, ())), {index}
        while waiting:
            if (other := waiting.pop()) in seen:
                continue
            seen.add(other)
            if self.rows[other].kind == "move":
                waiting += links.get(other, ())
            else:
                found.append(self.rows[other])
        return found

    def share(self, milliseconds: float) -> float:
        """Of the whole call."""
        return milliseconds / self.profile.end_to_end_ms

    def rate(self, rows: Iterable[Any]) -> float:
        """The most MACs a millisecond that any of these rows reaches, of those that take long enough to trust; NaN."""
        rates = [row.macs / row.latency_ms for row in rows if row.macs > 0 and self.share(row.latency_ms) >= STEADY]
        return max(rates, default=math.nan)


def named(row: Any) -> str:
    """What a person calls a row: its layers, or the engine's own name where it has none."""
    return row.layer or row.name


def took(case: Case, milliseconds: float) -> str:
    """``0.12 ms, 3.4 % of the call``."""
    return f"{fmt.milliseconds(milliseconds)}, {fmt.share(case.share(milliseconds))} of the call"
