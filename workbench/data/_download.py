"""Verified downloads: a file is kept only if its size and SHA-256 are the ones pinned here."""

from __future__ import annotations

import hashlib
import http.client
import os
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from workbench.errors import DataError
from workbench.jobs import SILENT, Progress

_TIMEOUT_S = 30
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Remote:
    """A public file whose content is known: tried at each address in turn, and accepted only byte for byte."""

    name: str
    urls: tuple[str, ...]
    size_bytes: int
    sha256: str


def fetch(remote: Remote, folder: Path, progress: Progress = SILENT) -> Path:
    """Path of the file in `folder`, downloaded unless it is there already.

    It is written beside its place and moved there once verified, so that a broken download leaves nothing behind.

    Raises
    ------
    DataError
        If no address gave the pinned content; what each of them gave is named, and where to place the file by hand.
    """
    target = folder / remote.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if target.is_file() and _sha256(target) == remote.sha256:
            return target
    except OSError as error:
        raise DataError(f"{folder} cannot be used for downloads ({error}); make it writable.") from None
    failures = []
    for url in remote.urls:
        handle, part = tempfile.mkstemp(dir=folder, prefix=f".{remote.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                failure = _download(url, remote, file, progress)
            if not failure:
                Path(part).replace(target)
                return target
            failures.append(f"{url} {failure}")
        except (OSError, http.client.HTTPException) as error:
            failures.append(f"{url} cannot be read ({error})")
        finally:
            Path(part).unlink(missing_ok=True)
    raise DataError(
        f"{remote.name} could not be downloaded: {'; '.join(failures)}. Check the network, or place the file of "
        f"{remote.size_bytes} bytes and SHA-256 {remote.sha256} at {target} yourself."
    )


def _download(url: str, remote: Remote, file, progress: Progress) -> str:
    """Write the content of `url`; what is wrong with it in words, empty where it is the pinned content."""
    digest, size = hashlib.sha256(), 0
    # the addresses are constants of this package, and what comes is checked against a pinned hash
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
        while chunk := response.read(_CHUNK_BYTES):
            size += len(chunk)
            if size > remote.size_bytes:
                return f"is longer than the {remote.size_bytes} bytes it should have"
            digest.update(chunk)
            file.write(chunk)
            progress(size / remote.size_bytes, f"downloading {remote.name}")
    if size < remote.size_bytes:
        return f"ended after {size} of {remote.size_bytes} bytes"
    if digest.hexdigest() != remote.sha256:
        return f"has the SHA-256 {digest.hexdigest()} instead of {remote.sha256}"
    return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
