"""Readers of data-set files: ``.npz``, MNIST's idx files, CIFAR-10's binary batches. None of them runs code."""

from __future__ import annotations

import gzip
import math
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from workbench.errors import DataError

_LARGEST_BYTES = 4 * 2**30
_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
CIFAR10_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")

_CIFAR10_RECORD = 1 + 3 * 32 * 32
_CIFAR10_BATCH_BYTES = 10_000 * _CIFAR10_RECORD


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays ``x_train, y_train, x_test, y_test`` of a file, and ``classes`` where it has them.

    Raises
    ------
    DataError
        If the file is damaged, lacks an array, holds Python objects, or unpacks to more than 4 GiB.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > _LARGEST_BYTES:
            raise DataError(f"{path} unpacks to {unpacked} bytes; at most {_LARGEST_BYTES} are accepted.")
        with np.load(path, allow_pickle=False) as arrays:
            missing = [key for key in _NPZ_KEYS if key not in arrays]
            if missing:
                raise DataError(
                    f"{path} lacks {', '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}. Write it with "
                    "numpy.savez(path, x_train=…, y_train=…, x_test=…, y_test=…)."
                )
            return {key: arrays[key] for key in (*_NPZ_KEYS, "classes") if key in arrays}
    except (OSError, ValueError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read as .npz ({error}). It must hold plain arrays, without Python objects; if it was "
            "copied, copy it again."
        ) from None


def mnist_files(folder: Path) -> dict[str, Path]:
    """Those of MNIST's four files that are in `folder`, packed or unpacked, by name without ``.gz``."""
    found = {}
    for name in MNIST_FILES:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                found.setdefault(name, path)
    return found


def read_mnist(folder: Path) -> dict[str, np.ndarray]:
    """MNIST from its four idx files, each packed (``.gz``) or not; images (N, 28, 28) u8."""
    files = mnist_files(folder)
    _refuse_missing(folder, [name for name in MNIST_FILES if name not in files], "MNIST's idx files (.gz or unpacked)")
    arrays = [_read_idx(files[name], axes=3 if "images" in name else 1) for name in MNIST_FILES]
    return dict(zip(_NPZ_KEYS, arrays, strict=True))


def cifar10_folder(folder: Path) -> Path:
    """The folder that holds the batches: `folder` itself or the one its archive unpacks to."""
    inner = folder / "cifar-10-batches-bin"
    return inner if inner.is_dir() else folder


def read_cifar10(folder: Path) -> dict[str, np.ndarray]:
    """CIFAR-10 from the binary version's six batches; images (N, 3, 32, 32) u8.

    The Python version is refused: its batches are pickles, which can run code when they are read.
    """
    folder = cifar10_folder(folder)
    pickled = [p for p in (folder / "data_batch_1", folder / "cifar-10-batches-py" / "data_batch_1") if p.exists()]
    missing = [name for name in CIFAR10_FILES if not (folder / name).is_file()]
    if missing and pickled:
        raise DataError(
            f"{pickled[0].parent} holds the Python version of CIFAR-10, whose pickles can run code. Use the binary "
            "version (cifar-10-binary.tar.gz): wb.tasks.cifar10(download=True) gets it."
        )
    _refuse_missing(folder, missing, "CIFAR-10's binary batches")
    batches = [_read_cifar10_batch(folder / name) for name in CIFAR10_FILES]
    images, labels = zip(*batches, strict=True)
    return {
        "x_train": np.concatenate(images[:-1]),
        "y_train": np.concatenate(labels[:-1]),
        "x_test": images[-1],
        "y_test": labels[-1],
    }


def unpack_cifar10(archive: Path, folder: Path) -> None:
    """Write the six batches of ``cifar-10-binary.tar.gz`` to `folder`, each in one atomic step; nothing else."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for name in CIFAR10_FILES:
                member = tar.extractfile(f"cifar-10-batches-bin/{name}")
                content = b"" if member is None else member.read(_CIFAR10_BATCH_BYTES + 1)
                with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name}.", suffix=".part", delete=False) as part:
                    part.write(content)
                Path(part.name).replace(folder / name)
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{archive} cannot be unpacked ({error}); delete it and download it again.") from None


def _refuse_missing(folder: Path, missing: Sequence[str], what: str) -> None:
    if missing:
        raise DataError(f"{folder} is to hold {what}, but lacks {', '.join(missing)}; add them or give an .npz file.")


def _read_idx(path: Path, axes: int) -> np.ndarray:
    """An idx file of bytes: two zero bytes, type 8, the number of axes, their big-endian lengths, then the data."""
    header_bytes = 4 + 4 * axes
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(header_bytes)
            if len(header) < header_bytes or header[:4] != bytes((0, 0, 8, axes)):
                raise DataError(
                    f"{path} is not an idx file of bytes with {axes} axes; it starts with {header[:4].hex()}."
                )
            shape = struct.unpack(f">{axes}I", header[4:])
            size = math.prod(shape)
            if size > _LARGEST_BYTES:
                raise DataError(f"{path} announces {size} bytes; at most {_LARGEST_BYTES} are accepted.")
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); copy or download it again.") from None
    if len(content) != size:
        found = "more" if len(content) > size else str(len(content))
        raise DataError(f"{path} announces {size} bytes of data but holds {found}; copy or download it again.")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _read_cifar10_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        size = path.stat().st_size
        if size == 0 or size % _CIFAR10_RECORD or size > _CIFAR10_BATCH_BYTES:
            raise DataError(
                f"{path} has {size} bytes; a batch has up to 10000 records of {_CIFAR10_RECORD}. Copy or download it "
                "again."
            )
        records = np.fromfile(path, np.uint8).reshape(-1, _CIFAR10_RECORD)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}).") from None
    return np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, 32, 32), records[:, 0].copy()
