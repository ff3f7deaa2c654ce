"""What was asked of `load`, and what every source of files needs to know of the file."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from workbench.errors import LoadError, nearest
from workbench.models.zoo import ZOO

_FILES = ".pt .pth .th .ckpt .safetensors .onnx .pt2 .ts .keras .h5".split()
_LARGEST_EXPANSION = 100  # times the size of the file; honest archives of weights stay near 1


@dataclass(frozen=True)
class Request:
    """The arguments of `load`."""

    source: Any
    inputs: Any = None
    architecture: Any = None
    weights: str | None = None
    name: str | None = None

    @cached_property
    def is_name(self) -> bool:
        """Whether the source is a zoo name; a file of that name is meant by ``./name``."""
        return isinstance(self.source, str) and self.source in ZOO

    @cached_property
    def path(self) -> Path:
        """The file meant.

        Raises
        ------
        LoadError
            If the source is no path, or there is no readable file with anything in it.
        """
        if not isinstance(self.source, (str, os.PathLike)) or not str(self.source):
            raise LoadError(self.not_understood())
        path = Path(self.source)
        if path.is_dir():
            raise LoadError(f"{path} is a folder; give a file. Accepted: {', '.join(_FILES)}.")
        if not path.exists():
            if isinstance(self.source, str) and not path.suffix and path.name == self.source:
                raise LoadError(
                    f"There is no file {self.source!r} and no such name in the zoo. {nearest(path.name, ZOO)}"
                )
            raise LoadError(f"There is no file {path}. Check the path; relative ones start from {Path.cwd()}.")
        try:
            with path.open("rb") as file:
                if not file.read(1):
                    raise LoadError(f"{path} is empty; download or save it again.")
        except OSError as error:
            raise LoadError(f"{path} cannot be read: {error.strerror}.") from error
        return path

    @cached_property
    def suffix(self) -> str:
        """The file's ending in lower case, with its dot."""
        return self.path.suffix.lower()

    @cached_property
    def members(self) -> frozenset[str]:
        """Names in the file if it is a zip archive, without its top folder; empty for any other file.

        Raises
        ------
        LoadError
            If the archive is damaged, or would unpack to far more than its own size.
        """
        if not zipfile.is_zipfile(self.path):
            with self.path.open("rb") as file:
                if file.read(4) == b"PK\x03\x04":
                    raise self.damaged("its table of contents is missing, as after an interrupted download")
            return frozenset()
        try:
            with zipfile.ZipFile(self.path) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, OSError) as error:
            raise self.damaged(error) from error
        unpacked, packed = sum(e.file_size for e in entries), self.path.stat().st_size
        if unpacked > _LARGEST_EXPANSION * packed:
            raise LoadError(
                f"{self.path} would unpack from {packed:,} to {unpacked:,} bytes; files of weights do not, so it is "
                "refused. Get it from where it came from again."
            )
        names = {e.filename for e in entries}
        tops = {n.split("/", 1)[0] for n in names}
        return frozenset(n.split("/", 1)[1] if len(tops) == 1 and "/" in n else n for n in names)

    @property
    def title(self) -> str:
        """The model's name: the one given, or the file's."""
        return self.name or self.path.stem

    def accept_only(self, options: Collection[str], kind: str) -> None:
        """Refuse arguments this kind of source has no use for."""
        for option in ("inputs", "architecture", "weights"):
            if getattr(self, option) is not None and option not in options:
                raise LoadError(f"{kind} takes no {option}=; leave it out. {_USES[option]}")

    def damaged(self, error: Exception | str) -> LoadError:
        """The error for a file that starts well and cannot be read."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return LoadError(
            f"{self.path} is damaged or incomplete ({self.path.stat().st_size:,} bytes): {lines[0].rstrip('.')}. "
            "Download or save it again."
        )

    def not_understood(self) -> str:
        """The sentence for a source of a kind nobody reads."""
        if isinstance(self.source, type) and issubclass(self.source, nn.Module):
            name = self.source.__name__
            return f"{name} is a class; give a module made of it: wb.load({name}(…), inputs=…)."
        if isinstance(self.source, (str, os.PathLike)) and str(self.source):
            return f"{self.path} is no kind of file that is known. Accepted: {', '.join(_FILES)}."
        return (
            f"A source of type {type(self.source).__name__} is not understood. Accepted: a torch.nn.Module with "
            f"inputs=…, a file ({', '.join(_FILES)}), or a zoo name ({', '.join(ZOO)})."
        )


_USES = {
    "inputs": "It is for sources that do not say what they take.",
    "architecture": "It is for checkpoints, which hold weights without a network.",
    "weights": "It is for names in the zoo, e.g. wb.load('lenet5', weights='random').",
}
