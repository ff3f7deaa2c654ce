"""Small results kept under the hash of what they came from: one JSON file each in a folder, or in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from workbench.errors import StoreError
from workbench.study.store import digest, write_whole

_HERE: dict[str, Any] = {}  # of this process; as long as it lives


class Results:
    """Values by key.

    Parameters
    ----------
    folder
        Where the files live; made when the first is written. None keeps the values in this process.

    Raises
    ------
    StoreError
        If the folder is a file.
    """

    def __init__(self, folder: Path | None):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise StoreError(f"{folder} is a file; give a folder for the cache, or one that does not exist yet.")
        self._folder = folder

    def get(self, *key: Any) -> Any | None:
        """The value kept under these JSON values; None where there is none, or its file is damaged."""
        name = digest(*key)
        if self._folder is None:
            return _HERE.get(name)
        try:
            return json.loads((self._folder / f"{name}.json").read_bytes())
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return None  # computed again and written over

    def put(self, value: Any, *key: Any) -> None:
        """Keep a JSON value; raises `StoreError` where it cannot be written."""
        name = digest(*key)
        if self._folder is None:
            _HERE[name] = value
        else:
            write_whole(self._folder / f"{name}.json", json.dumps(value).encode())
