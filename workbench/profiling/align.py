"""`align`: the rows of two profiles side by side, where they stand for the same layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd

from workbench import formatting
from workbench.errors import DataError
from workbench.profiling import _groups
from workbench.profiling.profile import Profile

_COLUMNS = [
    *("layers_a", "layers_b", "names_a", "names_b", "rows_a", "rows_b"),
    *("latency_a_ms", "latency_b_ms", "ratio", "how"),
]


@dataclass(frozen=True)
class Group:
    """Rows of two profiles that stand for the same layers.

    Attributes
    ----------
    rows_a, rows_b
        Their numbers in the frames of the two profiles, ascending; never empty.
    how
        ``names`` where they share layers, ``structure`` where only what they compute and in which order tells.
    """

    rows_a: tuple[int, ...]
    rows_b: tuple[int, ...]
    how: str


@dataclass(frozen=True, eq=False)
class Alignment:
    """Two profiles side by side.

    A row is in one group at most; what is in none is listed by `unmatched`. The call itself and what is unattributed
    are no rows here.
    """

    profile_a: Profile
    profile_b: Profile
    groups: tuple[Group, ...]

    def frame(self) -> pd.DataFrame:
        """A row per group in the order of the first profile, and at the end one for the unmatched rows of each side.

        Columns: layers_a and layers_b (the model's layers), names_a and names_b (the engines' own), rows_a and rows_b
        (row numbers in the profiles' frames), each a tuple; latency_a_ms and latency_b_ms (sums over the rows), ratio
        (a over b; NaN where b took no time) and how (names, structure, unmatched). Each side's latencies add up to
        its rows. The last two rows are called ``(unmatched in a)`` and ``(unmatched in b)``.
        """
        rows = [self._entry(group.rows_a, group.rows_b, group.how) for group in self.groups]
        rows.append(self._entry(self._left(0), (), "unmatched", a="(unmatched in a)"))
        rows.append(self._entry((), self._left(1), "unmatched", b="(unmatched in b)"))
        return pd.DataFrame(rows, columns=_COLUMNS)

    def unmatched(self) -> pd.DataFrame:
        """The rows without a partner: side (a or b), name, layer, type, kind, latency_ms; in execution order."""
        found = []
        for number, (side, profile) in enumerate(zip("ab", self._profiles, strict=True)):
            rows = profile.rows.iloc[list(self._left(number))]
            found.append(rows[["name", "layer", "type", "kind", "latency_ms"]].assign(side=side))
        return pd.concat(found, ignore_index=True)[["side", "name", "layer", "type", "kind", "latency_ms"]]

    @property
    def matched_share_a(self) -> float:
        """Time of the first profile's matched rows over that of all its rows, 0 to 1; NaN where they took none."""
        return self._matched_share(0)

    @property
    def matched_share_b(self) -> float:
        """The same of the second profile."""
        return self._matched_share(1)

    @property
    def _profiles(self) -> tuple[Profile, Profile]:
        return self.profile_a, self.profile_b

    def _rows(self, side: int) -> list[int]:
        return [i for i, operation in enumerate(self._profiles[side].operations) if operation.kind != "call"]

    def _left(self, side: int) -> tuple[int, ...]:
        """Numbers of the rows in no group."""
        taken = {row for group in self.groups for row in (group.rows_a, group.rows_b)[side]}
        return tuple(row for row in self._rows(side) if row not in taken)

    def _matched_share(self, side: int) -> float:
        whole = self._time_ms(side, self._rows(side))
        return 1 - self._time_ms(side, self._left(side)) / whole if whole else math.nan

    def _time_ms(self, side: int, rows: Sequence[int]) -> float:
        return float(self._profiles[side].rows["latency_ms"].iloc[list(rows)].sum())

    def _entry(self, rows_a: tuple[int, ...], rows_b: tuple[int, ...], how: str, *, a: str = "", b: str = "") -> dict:
        entry: dict[str, Any] = {"how": how}
        for side, (letter, rows, label) in enumerate((("a", rows_a, a), ("b", rows_b, b))):
            operations = [self._profiles[side].operations[row] for row in rows]
            layers = tuple(dict.fromkeys(layer for operation in operations for layer in operation.layers))
            entry[f"layers_{letter}"] = (label,) if label else layers
            entry[f"names_{letter}"] = (label,) if label else tuple(operation.name for operation in operations)
            entry[f"rows_{letter}"] = rows
            entry[f"latency_{letter}_ms"] = self._time_ms(side, rows)
        took_b = entry["latency_b_ms"]
        return entry | {"ratio": entry["latency_a_ms"] / took_b if took_b else math.nan}

    def __repr__(self) -> str:
        a, b = self._profiles
        return (
            f"<Alignment of {a.model_name} on {a.backend_label} with {b.model_name} on {b.backend_label}: "
            f"{len(self.groups)} group{'' if len(self.groups) == 1 else 's'}, "
            f"{formatting.share(self.matched_share_a)} and {formatting.share(self.matched_share_b)} of time matched>"
        )

    def _repr_html_(self) -> str:
        shown = self.frame().drop(columns=["rows_a", "rows_b"])
        for column in ("layers_a", "layers_b", "names_a", "names_b"):
            shown[column] = shown[column].map(" + ".join)
        return f"<p>{escape(repr(self)[1:-1])}</p>" + shown.to_html(index=False, border=0, escape=True)


def align(a: Profile, b: Profile) -> Alignment:
    """Match the rows of two profiles that stand for the same layers of a model.

    The two may be of different engines, precisions or, before and after pruning, widths. Four steps:

    1. Rows that share layers belong together, many to many where one engine fused what the other did not, and no more
       than that; so does a layer with its parts (``fc1`` with ``fc1.0`` and ``fc1.1``). Numbers that an exporter gave
       (``Conv_3``) count only where both profiles have most of them in common and what they stand for is alike.
    2. Rows left over are matched by what they compute (kind of operation, kernel, weights, output shape, MACs) and by
       their order in dataflow, which a match never crosses.
    3. A batch normalisation, activation, sum or view without a partner joins the operation it works on, where the other
       engine folded that kind of operation into its neighbours.
    4. What only moves or rewrites numbers (quantise, reformat, reorder) is a cost of the layers it serves and joins
       their group: those it is named after, and otherwise what reads from it or, where several rows or none do, what
       it reads from, matched rows first. Where both engines have such a move in the same place, the two are a group.

    Returns
    -------
    Alignment
        ``align(b, a)`` is its mirror image.

    Raises
    ------
    DataError
        If one of them is no profile.
    """
    for given in (a, b):
        if not isinstance(given, Profile):
            raise DataError(
                f"align takes two profiles, as wb.profile(model) gives them, but got a {type(given).__name__}."
            )
    # one order for both calls, so that a tie is decided alike
    swapped = _content(b) < _content(a)
    found = _groups.align(b, a) if swapped else _groups.align(a, b)
    mirrored = sorted((y, x, how) if swapped else (x, y, how) for x, y, how in found)
    return Alignment(a, b, tuple(Group(*group) for group in mirrored))


def _content(profile: Profile) -> tuple:
    return len(profile.operations), [(o.name, o.type, o.layers, o.times_ms) for o in profile.operations]
