"""Augmentation: training images moved, turned and mirrored at random. Calibration and test never are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from workbench.data.preprocess import numbers, whole
from workbench.errors import DataError

_LARGEST_PADDING = 512


@dataclass(frozen=True)
class Augment(ABC):
    """One random change to training images: a frozen value whose fields are JSON values.

    Where a change brings in pixels from outside the image they repeat its nearest border pixel: no value appears that
    the image does not have, whatever normalisation came before. On a digit that is the background.
    """

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse images of this shape, (C, H, W), with a `DataError`; most steps take any."""

    @abstractmethod
    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """What is to happen to each of `count` samples, as `apply` takes it; the same for all images of a sample."""

    @abstractmethod
    def apply(self, x: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """The changed images, float32 (N, C, H, W) as they come; `x` itself is left as it was."""

    def to_dict(self) -> dict[str, Any]:
        """``{"augment": "Crop", "padding": 2}``, every setting included, as JSON values."""
        return {"augment": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class Crop(Augment):
    """Pad each side and cut the old size out at a random place: images move by up to so many pixels each way.

    Parameters
    ----------
    padding
        Pixels on each side; fewer than the image has.

    Raises
    ------
    DataError
        If it is not a whole number from 1 to 512.
    """

    padding: int = 2

    def __post_init__(self) -> None:
        whole("Crop", "padding", self.padding, 1, _LARGEST_PADDING)

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse images that could move out of sight."""
        if self.padding >= min(shape[1:]):
            raise DataError(
                f"Crop({self.padding}) can move images of {shape[1]} × {shape[2]} pixels out of sight; give a padding "
                f"below {min(shape[1:])}."
            )

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Rows and columns by which the cut is moved, ``(count, 2)``, from -padding to padding."""
        return rng.integers(-self.padding, self.padding, (count, 2), endpoint=True)

    def apply(self, x: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        by = self.padding
        padded = np.pad(x, [(0, 0), (0, 0), (by, by), (by, by)], mode="edge")
        cuts = np.lib.stride_tricks.sliding_window_view(padded, x.shape[2:], axis=(2, 3))
        down, right = drawn.T + by
        return np.ascontiguousarray(cuts[np.arange(len(x)), :, down, right])


@dataclass(frozen=True)
class Rotate(Augment):
    """Turn each image about its centre by a random angle, bilinearly.

    Parameters
    ----------
    degrees
        The largest angle, either way; each is equally likely.

    Raises
    ------
    DataError
        If it is not above 0 and at most 180.
    """

    degrees: float = 10.0

    def __post_init__(self) -> None:
        (degrees,) = numbers("Rotate", "degrees", self.degrees, count=1)
        if not 0 < degrees <= 180:
            raise DataError(f"Rotate has degrees={self.degrees!r}; give a largest angle above 0 and at most 180.")
        object.__setattr__(self, "degrees", degrees)

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Angles in degrees, ``(count,)``, counterclockwise."""
        return rng.uniform(-self.degrees, self.degrees, count)

    def apply(self, x: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        height, width = x.shape[2:]
        angles = drawn * (math.pi / 180)
        cos, sin, none = np.cos(angles), np.sin(angles), np.zeros(len(x))
        # where each new pixel comes from, in units of half the width and half the height
        rows = [[cos, -sin * height / width, none], [sin * width / height, cos, none]]
        turns = torch.from_numpy(np.array(rows, np.float32).transpose(2, 0, 1))
        places = functional.affine_grid(turns, list(x.shape), align_corners=False)
        turned = functional.grid_sample(torch.from_numpy(x), places, padding_mode="border", align_corners=False)
        return turned.numpy()


@dataclass(frozen=True)
class Flip(Augment):
    """Mirror each image with probability one half, along each way that is chosen.

    Parameters
    ----------
    horizontal
        Left becomes right.
    vertical
        Top becomes bottom.

    Raises
    ------
    DataError
        If neither is chosen, or one is not True or False.
    """

    horizontal: bool = True
    vertical: bool = False

    def __post_init__(self) -> None:
        if not all(isinstance(way, bool) for way in (self.horizontal, self.vertical)):
            raise DataError(
                f"Flip has horizontal={self.horizontal!r} and vertical={self.vertical!r}; give True or False."
            )
        if not (self.horizontal or self.vertical):
            raise DataError("Flip(horizontal=False) mirrors nothing; choose horizontal, vertical or both.")

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Whether to mirror left and right, and top and bottom, ``(count, 2)`` bool."""
        return (rng.random((count, 2)) < 0.5) & [self.horizontal, self.vertical]

    def apply(self, x: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        flipped = x.copy()
        for axis, chosen in ((3, drawn[:, 0]), (2, drawn[:, 1])):
            flipped[chosen] = np.flip(flipped[chosen], axis)
        return flipped


AUGMENTATIONS: dict[str, type[Augment]] = {"Crop": Crop, "Flip": Flip, "Rotate": Rotate}
