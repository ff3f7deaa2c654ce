"""`Preprocess`: what is done to an input before the model sees it, as frozen values that travel with a package."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch

from workbench.errors import DataError, nearest

PREPROCESSING: dict[str, type[Preprocess]] = {}  # every step by name; a class enters itself

_LARGEST_SIDE = 4096


@dataclass(frozen=True)
class Preprocess(ABC):
    """One preprocessing step: a frozen value whose fields are JSON values.

    A step that takes numbers from the data holds them once it is fitted: a `Task` fits it on its training split, and
    the fitted step is what the task keeps, describes, and hands to a package.

    Attributes
    ----------
    mends_missing
        Whether data with missing values, NaN, are accepted because of this step.
    """

    mends_missing: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        PREPROCESSING[cls.__name__] = cls

    @property
    def fitted(self) -> bool:
        """Whether `apply` has all it needs; most steps take nothing from the data."""
        return True

    def fit(self, chunks: Iterable[np.ndarray]) -> Preprocess:
        """The step that does to any sample what the training samples call for.

        Parameters
        ----------
        chunks
            All training samples as this step is given them, float32, some at a time, batch axis first.

        Raises
        ------
        DataError
            If they do not tell what the step needs.
        """
        return self

    @abstractmethod
    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one sample (no batch axis) after this step.

        Raises
        ------
        DataError
            If the step does not fit samples of this shape.
        """

    @abstractmethod
    def apply(self, x: np.ndarray) -> np.ndarray:
        """The changed batch, float32, batch axis first, images NCHW; `x` itself is left as it was."""

    def to_dict(self) -> dict[str, Any]:
        """``{"preprocess": "Scale", "factor": 0.5}``, every setting included, as JSON values."""
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"preprocess": type(self).__name__, **settings}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Preprocess:
        """The step that `to_dict` wrote; an unknown name or setting is a `DataError` that names the accepted."""
        name = str(data.get("preprocess"))
        if name not in PREPROCESSING:
            raise DataError(f"There is no preprocessing step {name!r}. {nearest(name, PREPROCESSING)}")
        step = PREPROCESSING[name]
        settings = {k: v for k, v in data.items() if k != "preprocess"}
        accepted = [f.name for f in fields(step)]
        for key in settings:
            if key not in accepted:
                raise DataError(f"{name} has no setting {key!r}. {nearest(key, accepted)}")
        for key in accepted:
            if key not in settings:
                raise DataError(f"{name} needs the setting {key!r}; given: {', '.join(settings) or 'none'}.")
        return step(**settings)


@dataclass(frozen=True)
class Scale(Preprocess):
    """Multiply every value by one factor, in float32: ``Scale(1 / 255)`` brings bytes to 0 to 1.

    Raises
    ------
    DataError
        If the factor is zero or not finite.
    """

    factor: float

    def __post_init__(self) -> None:
        (factor,) = numbers("Scale", "factor", self.factor, count=1)
        if factor == 0:
            raise DataError("Scale(0) would make every input zero; give a factor such as 1 / 255.")
        object.__setattr__(self, "factor", factor)

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def apply(self, x: np.ndarray) -> np.ndarray:
        return x * np.float32(self.factor)


@dataclass(frozen=True)
class Normalize(Preprocess):
    """Subtract a mean and divide by a standard deviation, per channel, in float32.

    Parameters
    ----------
    mean, std
        One number per channel (axis 1: the channels of images, the columns of a table), in the units of the step
        before; a single number for one channel.

    Raises
    ------
    DataError
        If the two differ in length, or a standard deviation is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        mean, std = numbers("Normalize", "mean", self.mean), numbers("Normalize", "std", self.std)
        if len(mean) != len(std):
            raise DataError(
                f"Normalize has {len(mean)} means and {len(std)} standard deviations; give one per channel."
            )
        if min(std) <= 0:
            raise DataError(f"Normalize has a standard deviation of {min(std):g}; each must be above 0.")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        check_channels("Normalize", len(self.mean), shape)
        return shape

    def apply(self, x: np.ndarray) -> np.ndarray:
        changed = x - per_channel(self.mean, x.ndim)
        changed /= per_channel(self.std, x.ndim)
        return changed


@dataclass(frozen=True)
class Resize(Preprocess):
    """Resize images bilinearly (``align_corners=False``, no antialiasing), one image independent of the next.

    Parameters
    ----------
    size
        Height and width in pixels, or one number for both.

    Raises
    ------
    DataError
        If a side is not a whole number from 1 to 4096.
    """

    size: tuple[int, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", image_size(self.size))

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) != 3:
            raise DataError(f"Resize takes images (N, C, H, W); one sample here has the shape {shape}.")
        return (shape[0], *self.size)

    def apply(self, x: np.ndarray) -> np.ndarray:
        resized = torch.nn.functional.interpolate(
            torch.from_numpy(np.ascontiguousarray(x)), size=self.size, mode="bilinear", align_corners=False
        )
        return resized.numpy()


def image_size(size: int | Iterable[int]) -> tuple[int, int]:
    """Height and width from one number or two; a `DataError` unless both are whole and from 1 to 4096."""
    sides = (size, size) if isinstance(size, (int, np.integer)) else tuple(size) if isinstance(size, Iterable) else ()
    whole = all(isinstance(s, (int, np.integer)) and not isinstance(s, bool) for s in sides)
    if len(sides) != 2 or not whole or not all(1 <= s <= _LARGEST_SIDE for s in sides):
        raise DataError(
            f"An image size of {size!r} is not usable; give one whole number of pixels or (height, width), "
            f"each from 1 to {_LARGEST_SIDE}."
        )
    return int(sides[0]), int(sides[1])


def check_channels(step: str, count: int, shape: tuple[int, ...]) -> None:
    """Refuse samples whose first axis has another length than the numbers a step holds per channel."""
    if shape and shape[0] == count:
        return
    hint = ""
    if len(shape) == 3 and shape[-1] == count:
        hint = " Images that are not u8 are taken as NCHW: pass x.transpose(0, 3, 1, 2)."
    raise DataError(
        f"{step} has {count} channels, but a sample of shape {shape} has {shape[0] if shape else 0} on its first axis; "
        f"each channel needs numbers of its own.{hint}"
    )


def per_channel(values: Iterable[float], axes: int) -> np.ndarray:
    """A number per channel as float32 that a batch of so many axes can be combined with; channels are axis 1."""
    return np.asarray(tuple(values), np.float32).reshape((1, -1) + (1,) * (axes - 2))


def numbers(step: str, setting: str, value: object, count: int | None = None) -> tuple[float, ...]:
    """Finite floats from a number, sequence, array or tensor; a `DataError` names the step and its setting."""
    try:
        read = tuple(float(v) for v in np.ravel(np.asarray(value)))
    except (TypeError, ValueError):
        read = ()
    if not read or not all(math.isfinite(v) for v in read) or (count is not None and len(read) != count):
        wanted = "one finite number" if count == 1 else "a finite number per channel"
        raise DataError(f"{step} has {setting}={value!r}; give {wanted}.")
    return read


def whole(step: str, setting: str, value: object, least: int, most: int, *, odd: bool = False) -> None:
    """Refuse a setting that is not a whole number from `least` to `most`, odd where it is to have a middle."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or not least <= value <= most or (odd and value % 2 == 0):
        kind = "an odd" if odd else "a whole"
        raise DataError(f"{step} has {setting}={value!r}; give {kind} number from {least} to {most}.")
