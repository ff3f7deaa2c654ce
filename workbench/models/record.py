"""`Record`: what a step measured while it worked, as a small table that is kept with the model it made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class Record:
    """A table of measurements, a row each.

    Attributes
    ----------
    step
        Label of the step that measured it: ``Finetune 2 epochs``.
    title
        What the rows are, in words: ``training, by epoch``.
    rows
        JSON values by column, units in the names; the same columns in each row.
    """

    step: str
    title: str
    rows: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, step: str, title: str, rows: Sequence[Mapping[str, Any]]) -> Record:
        """A record of rows that are any mappings."""
        return cls(step, title, tuple(dict(row) for row in rows))

    def frame(self) -> pd.DataFrame:
        """The rows as a table."""
        return pd.DataFrame(list(self.rows))

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        """What `to_dict` wrote."""
        return cls.of(data["step"], data["title"], data["rows"])
