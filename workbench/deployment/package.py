"""The package: a folder that holds a compiled model and everything needed to run it elsewhere.

``package.json`` says what it is, with the SHA-256 of every other file; ``requirements.txt`` and ``run.py`` run it.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
import warnings
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import BackendError
from workbench.models.model import TensorSpec

FORMAT = "inference-workbench package"
VERSION = 1
MANIFEST = "package.json"
_MANIFEST_LIMIT = 32_000_000  # bytes; a manifest is some kilobytes, and it is read before anything is verified
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VERSIONED = ("torch", "onnxruntime", "onnxruntime-gpu", "openvino", "numpy")


@dataclass(frozen=True)
class Contents:
    """What a package holds, apart from the bytes of its files.

    Attributes
    ----------
    backend
        As `Backend.to_dict` writes it.
    about
        What the study knew: recipe, preprocessing, classes.
    notes
        What the backend itself finds again when it opens the package.
    paths
        The verified model files by name; empty while the package is being written.
    """

    name: str
    backend: dict[str, Any]
    precision: str
    provider: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    about: dict[str, Any]
    notes: dict[str, Any]
    paths: dict[str, Path] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """The verified file of that name; `BackendError` where the package lists none."""
        if name not in self.paths:
            raise BackendError(f"The package of {self.name} holds no {name}. Save it again.")
        return self.paths[name]


# what every package's run.py does around the lines of its engine
_RUNNER = '''"""Run this model: python run.py INPUT.npy …

One file per input of package.json, in its order and preprocessed. The outputs go to outputs.npz.
"""

import json
import sys
from pathlib import Path

import numpy as np
import LIBRARY

here = Path(__file__).parent
package = json.loads((here / "package.json").read_text(encoding="utf-8"))
names = [spec["name"] for spec in package["inputs"]]
if len(sys.argv) != 1 + len(names):
    sys.exit(f"usage: python run.py {' '.join(name + '.npy' for name in names)}")
feeds = {name: np.load(path) for name, path in zip(names, sys.argv[1:], strict=True)}
backend = package["backend"]
ENGINE
for spec, output in zip(package["outputs"], outputs, strict=True):
    print(spec["name"], output.dtype, output.shape)
np.savez("outputs.npz", *outputs)
classes = package["about"].get("classes") or package["about"].get("task", {}).get("classes")
if classes:
    print("top class:", *(classes[i] for i in outputs[0].argmax(axis=-1).reshape(-1)))
'''


def runner(library: str, engine: str) -> str:
    """The script ``run.py``: `engine` is the lines that make a list ``outputs`` of the arrays in ``feeds``."""
    return _RUNNER.replace("LIBRARY", library).replace("ENGINE\n", engine)


def library_version(name: str) -> str:
    """Installed version of a distribution without its local part: ``2.13.0`` for ``2.13.0+cpu``."""
    return metadata.version(name).partition("+")[0]


def write(
    folder: Path, contents: Contents, files: dict[str, bytes], script: str, requirements: tuple[str, ...]
) -> Path:
    """Write a package beside `folder` and move it there when it is complete.

    Raises
    ------
    FileExistsError
        If `folder` is a file, or holds anything that is not part of a package.
    """
    folder = folder.expanduser().resolve()
    replaces = _replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    everything = dict(files)
    everything["requirements.txt"] = ("\n".join(requirements) + "\n").encode()
    everything["run.py"] = script.encode()
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **{k: v for k, v in asdict(contents).items() if k != "paths"},
        "libraries": _libraries(),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in everything.items()},
    }
    everything[MANIFEST] = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()
    made = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}")
    made.mkdir()
    try:
        for name, data in everything.items():
            (made / name).write_bytes(data)
        _move(made, folder, replaces)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _move(made: Path, folder: Path, replaces: bool) -> None:
    if not replaces:
        made.rename(folder)
        return
    old = made.with_name(f"{made.name}.old")
    folder.rename(old)
    try:
        made.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def _replaceable(folder: Path) -> bool:
    """Whether there is a folder to replace; raises where replacing it would lose something else."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; give a folder that does not exist yet, or a package to replace.")
    present = {p.name for p in folder.iterdir()}
    if not present:
        return True
    try:
        ours = {MANIFEST, *_manifest(folder)["files"]}
    except BackendError as error:
        raise FileExistsError(f"{folder} is not empty and not a package ({error}) Give another folder.") from None
    if present - ours:
        raise FileExistsError(
            f"{folder} is a package, but also holds {', '.join(sorted(present - ours))}, which replacing it would "
            "delete. Move that away or give another folder."
        )
    return True


def read(folder: Path) -> Contents:
    """The contents of a package, each file checked against its SHA-256.

    Other library versions than those it was written with are a warning.

    Raises
    ------
    BackendError
        If it is not a package, is of a newer format, misses a file, or holds one that was changed.
    """
    folder = folder.expanduser().resolve()
    manifest = _manifest(folder)
    paths = {}
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise BackendError(f"The package {folder} is incomplete: {name} is missing. Save or copy it again.")
        if path.resolve().parent != folder:
            raise BackendError(f"The package {folder} is not safe to open: {name} is a link that leaves it.")
        if _digest(path) != digest:
            raise BackendError(
                f"The package {folder} is damaged: {name} is not the file that was saved (its SHA-256 differs). "
                "Save or copy it again."
            )
        paths[name] = path
    try:
        contents = Contents(
            name=str(manifest["name"]),
            backend=dict(manifest["backend"]),
            precision=str(manifest["precision"]),
            provider=str(manifest["provider"]),
            inputs=_specs(manifest["inputs"]),
            outputs=_specs(manifest["outputs"]),
            about=dict(manifest["about"]),
            notes=dict(manifest["notes"]),
            paths=paths,
        )
        written_with = dict(manifest["libraries"])
    except (KeyError, TypeError, ValueError) as error:
        raise BackendError(f"{folder / MANIFEST} is damaged: {type(error).__name__} {error}. Save it again.") from None
    _warn_of_versions(folder, written_with)
    return contents


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise BackendError(
            f"{folder} is not a package: it has no {MANIFEST}. Write one with engine.save({folder.name!r})."
        )
    if path.stat().st_size > _MANIFEST_LIMIT:
        raise BackendError(f"{path} has {path.stat().st_size} bytes, too many for a package's description.")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise BackendError(f"{path} is damaged: {error}. Save the package again.") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BackendError(f"{path} does not describe a package of this library.")
    if type(manifest.get("version")) is not int or not 1 <= manifest["version"] <= VERSION:
        raise BackendError(
            f"{path} is of package format {manifest.get('version')!r}; this version reads up to {VERSION}. "
            "Update inference-workbench."
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(v, str) for v in files.values()):
        raise BackendError(f"{path} is damaged: it lists no files. Save the package again.")
    for name in files:
        # a plain name cannot leave the folder, whatever the system's separators are
        if not _NAME.fullmatch(name):
            raise BackendError(f"{path} is not safe to open: {name!r} is not a plain file name.")
    return manifest


def _specs(entries: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    specs = []
    for entry in entries:
        shape = tuple(entry["shape"])
        if not all(n is None or (type(n) is int and n >= 0) for n in shape):
            raise ValueError(f"shape {entry['shape']}")
        dtype = np.dtype(str(entry["dtype"]))
        if dtype.kind not in "biuf":
            raise ValueError(f"dtype {entry['dtype']!r}")
        specs.append(TensorSpec(str(entry["name"]), shape, dtype.name))
    return tuple(specs)


def _warn_of_versions(folder: Path, written_with: dict[str, str]) -> None:
    here = _libraries()
    other = [f"{k} {v} (here {here[k]})" for k, v in written_with.items() if k in here and here[k] != v]
    if other:
        warnings.warn(
            f"The package {folder} was written with {', '.join(other)}; results may differ slightly. "
            f"pip install -r {folder / 'requirements.txt'} gives the versions it was written with.",
            stacklevel=3,
        )


def _libraries() -> dict[str, str]:
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = library_version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
