"""Where a study keeps its record: SQLite beside content-addressed files, or all of it in memory.

A step's output is written to a file named after its SHA-256, then made known by one row; a candidate is one row. Both
are atomic, so that a killed process leaves either a complete entry or none. What a step under way saves of itself lies
in a folder of its own until the step has ended.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workbench.compression import Checkpoint
from workbench.errors import StoreError

SCHEMA = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS states (key TEXT PRIMARY KEY, object TEXT NOT NULL, record TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS candidates (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    recipe TEXT NOT NULL,
    measurement TEXT NOT NULL,
    created TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS log (line INTEGER PRIMARY KEY AUTOINCREMENT, code TEXT NOT NULL);
"""


class Store:
    """The record of one study.

    Parameters
    ----------
    folder
        Where it lives; made if missing. None keeps everything in memory.

    Raises
    ------
    StoreError
        If the folder is not a study's, is damaged, cannot be written, or comes from a newer version.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = None if folder is None else Path(folder)
        self._objects: dict[str, bytes] = {}
        self._checkpoints: dict[str, dict[str, bytes]] = {}
        self._lock = threading.RLock()
        database = ":memory:" if self.folder is None else self._prepare(self.folder)
        try:
            self._db = sqlite3.connect(database, timeout=30, isolation_level=None, check_same_thread=False)
            if self.folder is not None:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._check()
            self._db.executescript(_TABLES)
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from None
        version = int(self.meta("schema") or 0)
        if version > SCHEMA:
            raise StoreError(
                f"{self.folder} was written by a newer version (schema {version}, this one reads {SCHEMA}). "
                "Upgrade with: pip install --upgrade inference-workbench"
            )
        self.set_meta("schema", str(SCHEMA))

    def _prepare(self, folder: Path) -> str:
        database = folder / "study.sqlite"
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"{folder} is a file; give a folder for the study, or one that does not exist yet.")
        if folder.is_dir() and not database.exists() and any(folder.iterdir()):
            raise StoreError(f"{folder} holds other files and no study; give an empty folder or a new name.")
        try:
            (folder / "objects").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{folder} cannot be written: {error.strerror}. Give a folder that can.") from None
        return str(database)

    def _check(self) -> None:
        found = self._db.execute("PRAGMA quick_check").fetchone()[0]
        if found != "ok":
            raise self._damaged(found)

    def _damaged(self, why: str) -> StoreError:
        return StoreError(
            f"{self.folder}/study.sqlite is damaged ({why}). Nothing was changed. Restore it from a copy, or start a "
            "new study in another folder."
        )

    def meta(self, key: str) -> str | None:
        """A value set before under this key, or None."""
        row = self._read("SELECT value FROM meta WHERE key = ?", (key,))
        return row[0][0] if row else None

    def set_meta(self, key: str, value: str) -> None:
        """Remember a value under this key."""
        self._write("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def put_state(self, key: str, data: bytes, record: dict[str, Any]) -> None:
        """Keep a step's output: its bytes, and what is needed to make a model of them."""
        name = hashlib.sha256(data).hexdigest()
        self._write_object(name, data)
        self._write("INSERT OR REPLACE INTO states VALUES (?, ?, ?)", (key, name, json.dumps(record)))

    def state(self, key: str) -> tuple[bytes, dict[str, Any]] | None:
        """A step's output kept under this key; None where there is none, or its file is missing or altered.

        An altered file is forgotten together with its row: the step is then run again.
        """
        rows = self._read("SELECT object, record FROM states WHERE key = ?", (key,))
        if not rows:
            return None
        name, record = rows[0]
        data = self._read_object(name)
        if data is None or hashlib.sha256(data).hexdigest() != name:
            self._write("DELETE FROM states WHERE key = ?", (key,))
            return None
        return data, json.loads(record)

    def checkpoint(self, key: str) -> Checkpoint:
        """Where the step whose output will be kept under this key saves how far it came."""
        if self.folder is None:
            return _InMemory(self._checkpoints.setdefault(key, {}))
        return _InFiles(self.folder / "checkpoints" / key)

    def add_candidate(self, key: str, state: str, recipe: dict, measurement: dict) -> tuple[int, str]:
        """Record a measured candidate; returns its number and UTC time. One already there by this key stays."""
        created = datetime.now(UTC).isoformat(timespec="seconds")
        self._write(
            "INSERT OR IGNORE INTO candidates (key, state, recipe, measurement, created) VALUES (?, ?, ?, ?, ?)",
            (key, state, json.dumps(recipe), json.dumps(measurement), created),
        )
        number, created = self._read("SELECT number, created FROM candidates WHERE key = ?", (key,))[0]
        return number, created

    def candidates(self, after: int = 0) -> list[tuple[int, str, str, dict, dict, str]]:
        """(number, key, state, recipe, measurement, created) of each candidate whose number is above `after`."""
        rows = self._read("SELECT * FROM candidates WHERE number > ? ORDER BY number", (after,))
        return [(n, key, state, json.loads(r), json.loads(m), created) for n, key, state, r, m, created in rows]

    def add_log(self, code: str) -> None:
        """Append a line of Python to the log."""
        self._write("INSERT INTO log (code) VALUES (?)", (code,))

    def log(self) -> list[str]:
        """The log, oldest line first."""
        return [row[0] for row in self._read("SELECT code FROM log ORDER BY line", ())]

    def close(self) -> None:
        """Close the database; calling anything afterwards is an error."""
        with self._lock:
            self._db.close()

    def _read(self, sql: str, values: tuple) -> list[tuple]:
        with self._lock:
            try:
                return self._db.execute(sql, values).fetchall()
            except sqlite3.ProgrammingError:
                raise StoreError("this study is closed; open it again with wb.Study(model, task, store=…).") from None
            except sqlite3.DatabaseError as error:
                raise self._damaged(str(error)) from None

    def _write(self, sql: str, values: tuple) -> None:
        with self._lock:
            try:
                self._db.execute(sql, values)
            except sqlite3.ProgrammingError:
                raise StoreError("this study is closed; open it again with wb.Study(model, task, store=…).") from None
            except sqlite3.OperationalError as error:
                raise StoreError(
                    f"{self.folder or 'the study'} cannot be written ({error}); what was finished before is kept. "
                    "Free disk space or check the folder's rights, then run again."
                ) from None
            except sqlite3.DatabaseError as error:
                raise self._damaged(str(error)) from None

    def _path(self, name: str) -> Path:
        return self.folder / "objects" / name[:2] / name

    def _write_object(self, name: str, data: bytes) -> None:
        if self.folder is None:
            self._objects[name] = data
            return
        write_whole(self._path(name), data)

    def _read_object(self, name: str) -> bytes | None:
        if self.folder is None:
            return self._objects.get(name)
        try:
            return self._path(name).read_bytes()
        except FileNotFoundError:
            return None


class _InMemory(Checkpoint):
    def __init__(self, kept: dict[str, bytes], name: str = "whole"):
        self._kept, self._name = kept, name

    def load(self) -> bytes | None:
        return self._kept.get(self._name)

    def save(self, data: bytes) -> None:
        self._kept[self._name] = data

    def part(self, name: str) -> Checkpoint:
        return _InMemory(self._kept, name)

    def clear(self) -> None:
        self._kept.clear()


class _InFiles(Checkpoint):
    def __init__(self, folder: Path, name: str = "whole"):
        self._folder, self._name = folder, name

    def load(self) -> bytes | None:
        try:
            return (self._folder / self._name).read_bytes()
        except FileNotFoundError:
            return None

    def save(self, data: bytes) -> None:
        write_whole(self._folder / self._name, data)

    def part(self, name: str) -> Checkpoint:
        return _InFiles(self._folder, name)

    def clear(self) -> None:
        # another process may be clearing it too
        shutil.rmtree(self._folder, ignore_errors=True)


def digest(*parts: Any) -> str:
    """SHA-256 of JSON values as hex; the same in every process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears complete or not at all, its folder made if missing.

    Raises
    ------
    StoreError
        If the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StoreError(
            f"{path.parent} cannot be written: {error.strerror}; what was finished before is kept. "
            "Free disk space or check the folder's rights, then run again."
        ) from None
