"""JSON that another tool recorded: read with bounds, and every value taken from it checked and named in errors."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import LoadError

_MOST_BYTES = 10**9
_MOST = 2**48  # past any length, count or size of a tensor that fits a machine


def load(path: Path) -> Any:
    """What a JSON file holds.

    Raises
    ------
    LoadError
        If there is no such file, it is past 1 GB, or it is no JSON; for the last with line and column.
    """
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.json"))
        there = f"It holds {', '.join(beside[:8])}" + (" and more." if len(beside) > 8 else ".")
        raise LoadError(
            f"{path.parent} holds no file {path.name}. {there if beside else 'It holds no JSON files.'} "
            "Give the names of the recorded files as graph=… and profile=…."
        )
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise LoadError(f"{path} has {size / 1e9:.3g} GB; a recorded engine has at most 1 GB. Is it another file?")
    try:
        return json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise LoadError(
            f"{path} is no JSON from line {error.lineno}, column {error.colno} on: {error.msg}. "
            "It may have been cut off while it was written or copied; record it again."
        ) from None
    except (ValueError, RecursionError) as error:  # bytes that are no text, endless digits, endless nesting
        raise LoadError(f"{path} is no JSON that can be read: {error}. Record it again.") from None


@dataclass(frozen=True)
class Entry:
    """A JSON object and where it stands, so that an error can name the place."""

    values: dict[str, Any]
    where: str

    @classmethod
    def of(cls, value: Any, where: str) -> Entry:
        """The entry, if it is an object."""
        if not isinstance(value, dict):
            raise LoadError(f"{where} is {_shown(value)}, where an object is expected.")
        return cls(value, where)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def part(self, key: str) -> Entry:
        """The object under a key; an empty one where there is none."""
        return Entry.of(self.values.get(key, {}), f"{self.where}, {key}")

    def parts(self, key: str) -> list[Entry]:
        """The objects in the list under a key; none where there is no such key."""
        return [Entry.of(value, f"{self.where}, {key}[{i}]") for i, value in enumerate(self.listed(key))]

    def listed(self, key: str) -> list[Any]:
        """The list under a key; empty where there is no such key."""
        return self._taken(key, list, [], "a list")

    def text(self, key: str) -> str:
        """The text under a key; empty where there is no such key."""
        return self._taken(key, str, "", "a text")

    def whole(self, key: str) -> int | None:
        """The whole number of at least 0 under a key; None where there is no such key."""
        value = self.values.get(key)
        if value is not None and not _is_whole(value):
            raise self._wrong(key, value, f"a whole number from 0 to {_MOST}")
        return value

    def wholes(self, key: str) -> tuple[int, ...]:
        """The whole numbers of at least 0 in the list under a key; none where there is no such key."""
        values = self.listed(key)
        if not all(_is_whole(value) for value in values):
            raise self._wrong(key, values, f"whole numbers from 0 to {_MOST}")
        return tuple(values)

    def lengths(self, key: str) -> tuple[int | None, ...]:
        """A shape; None for a length that the file gives as -1 because it was open."""
        values = self.listed(key)
        if not all(value == -1 or _is_whole(value) for value in values):
            raise self._wrong(key, values, f"lengths from 0 to {_MOST}, or -1 for an open one")
        return tuple(None if value == -1 else value for value in values)

    def milliseconds(self, key: str) -> float:
        """The time under a key, which must be there."""
        return _time(self.values.get(key), f"{self.where}: {key}")

    def times(self, key: str) -> tuple[float, ...]:
        """The times in milliseconds in the list under a key; none where there is no such key."""
        return tuple(_time(value, f"{self.where}: {key}[{i}]") for i, value in enumerate(self.listed(key)))

    def _taken(self, key: str, kind: type, default: Any, wanted: str) -> Any:
        value = self.values.get(key, default)
        if not isinstance(value, kind):
            raise self._wrong(key, value, wanted)
        return value

    def _wrong(self, key: str, value: Any, wanted: str) -> LoadError:
        return LoadError(f"{self.where}: {key} is {_shown(value)}, where {wanted} is expected.")


def _time(value: Any, where: str) -> float:
    # bool is an int to Python
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise LoadError(f"{where} is {_shown(value)}, where a time of at least 0 milliseconds is expected.")
    return float(value)


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
