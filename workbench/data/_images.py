"""Reading a folder of images into arrays; Pillow loads when the first one is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from workbench.errors import DataError
from workbench.jobs import Progress

SUFFIXES = (".png", ".jpg", ".jpeg")

_MOST_PIXELS = 64 * 10**6
_LARGEST_BYTES = 4 * 2**30


def find_images(root: Path) -> tuple[tuple[str, ...], dict[str, list[tuple[Path, int]]]]:
    """Class names, sorted, and each split's image files with their labels, in the order of their paths.

    Raises
    ------
    DataError
        If `root` is not laid out as ``train/<class>/…`` and ``test/<class>/…``, or a class has no images.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give one that holds train/<class>/*.png and test/<class>/*.png.")
    folders = {}
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise DataError(
                f"{root} has no folder {split!r}; lay it out as train/<class>/*.png and test/<class>/*.png."
            )
        inside = (root / split).iterdir()
        folders[split] = sorted((p for p in inside if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.name)
    classes = tuple(folder.name for folder in folders["train"])
    found: dict[str, list[tuple[Path, int]]] = {}
    for split, given in folders.items():
        if not given:
            raise DataError(f"{root / split} holds no class folders; each class is a folder of images.")
        found[split] = []
        for folder in given:
            if folder.name not in classes:
                raise DataError(
                    f"{folder} is a class that training lacks; {root / 'train'} has {', '.join(classes)}. Rename or "
                    "remove it."
                )
            images = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
            if not images:
                raise DataError(f"{folder} holds no images; accepted: {', '.join(SUFFIXES)}.")
            found[split] += [(path, classes.index(folder.name)) for path in images]
    return classes, found


def read_images(paths: list[Path], size: tuple[int, int], channels: int, progress: Progress) -> np.ndarray:
    """Images brought to one size and to 1 or 3 channels, ``(N, H, W, C)`` u8.

    Raises
    ------
    DataError
        If Pillow is missing, a file is damaged or too large (it is named), or all together would take over 4 GiB.
    """
    total_bytes = len(paths) * size[0] * size[1] * channels
    if total_bytes > _LARGEST_BYTES:
        raise DataError(
            f"{len(paths)} images of {size[0]} × {size[1]} × {channels} take {total_bytes} bytes; at most "
            f"{_LARGEST_BYTES} are accepted. Give a smaller size, or fewer images."
        )
    images = np.empty((len(paths), *size, channels), np.uint8)
    for i, path in enumerate(paths):
        progress(i / len(paths), f"reading {path.name}")
        images[i] = _read_image(path, size, channels)
    return images


def _read_image(path: Path, size: tuple[int, int], channels: int) -> np.ndarray:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise DataError("Images are read by Pillow, which is not installed: pip install pillow") from None
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            # only the header has been read so far: a small file may unpack to any size
            if image.width * image.height > _MOST_PIXELS:
                raise DataError(
                    f"{path} has {image.width} × {image.height} pixels; at most {_MOST_PIXELS} are accepted."
                )
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{path} has 16 bits or more per channel (mode {image.mode}); convert it to 8 bits.")
            converted = image.convert("RGB" if channels == 3 else "L")
            resized = converted.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as PNG or JPEG ({error}); repair or remove it.") from None
    return np.asarray(resized, np.uint8).reshape(*size, channels)
