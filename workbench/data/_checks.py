"""Whether splits, labels, classes and settings fit each other: the refusals of `Task.from_arrays` and `Task.check`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from workbench.data._arrays import layout, sample_shape
from workbench.errors import DataError

DEFAULT_CALIBRATION = 512


def check_alike(
    train_names: Sequence[str], train: Sequence[np.ndarray], test_names: Sequence[str], test: Sequence[np.ndarray]
) -> None:
    """Refuse training and test inputs that differ in number, names, shape or kind of dtype."""
    if len(train) != len(test) or tuple(train_names) != tuple(test_names):
        raise DataError(
            f"x_train has {len(train)} input(s) {list(train_names)} and x_test {len(test)} {list(test_names)}; "
            "give both the same inputs, in the same order."
        )
    for i, (a, b) in enumerate(zip(train, test, strict=True)):
        which = f"[{train_names[i]!r}]" if train_names else f"[{i}]" if len(train) > 1 else ""
        both_float = a.dtype.kind == b.dtype.kind == "f"
        if (a.dtype != b.dtype and not both_float) or layout(a) != layout(b) or sample_shape(a) != sample_shape(b):
            raise DataError(
                f"x_train{which} is {a.dtype} of sample shape {a.shape[1:]}, but x_test{which} is {b.dtype} of "
                f"sample shape {b.shape[1:]}; give both in one shape, layout and dtype."
            )


def check_steps(setting: str, steps: Iterable[object], kind: type, accepted: Iterable[str]) -> None:
    """Refuse what is not a step of this kind, naming those that are."""
    for step in steps:
        if not isinstance(step, kind):
            word = {"preprocess": "a preprocessing", "augment": "an augmentation"}[setting]
            raise DataError(
                f"{setting} holds {step!r}, which is not {word} step. Accepted: "
                f"{', '.join(f'wb.data.{name}(…)' for name in accepted)}."
            )


def calibration_size(calibration: object, train: int) -> int:
    """How many samples calibrate; the default is clipped to the training split, another size must fit in it."""
    if not isinstance(calibration, (int, np.integer)) or isinstance(calibration, bool) or calibration < 1:
        raise DataError(f"calibration is {calibration!r}; give a whole number of training samples, from 1 to {train}.")
    if calibration > train and calibration != DEFAULT_CALIBRATION:
        raise DataError(
            f"calibration asks for {calibration} samples, but the training split has {train}; give at most that."
        )
    return min(int(calibration), train)


def check_seed(seed: object) -> int:
    """The seed as an int; a `DataError` unless it is whole and from 0 to 2^32 - 1."""
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise DataError(f"seed is {seed!r}; give a whole number from 0 to 4294967295.")
    return int(seed)


def class_names(classes: Iterable[str] | None, train: np.ndarray, test: np.ndarray) -> tuple[str, ...]:
    """Names of the classes: those given, or the labels' numbers; refuses labels beyond them."""
    if classes is None:
        unseen = ~np.isin(test, train)
        if unseen.any():
            first = int(np.argmax(unseen))
            raise DataError(
                f"y_test holds the label {int(test[first])} at index {first}, which y_train never has; give "
                "classes=[…] with the name of every class if that is meant."
            )
        highest = int(train.max())
        if highest >= max(1000, 10 * len(np.unique(train))):
            raise DataError(
                f"y_train holds labels up to {highest} but only {len(np.unique(train))} different ones; number them "
                "from 0 (numpy.unique(y, return_inverse=True)) or give classes=[…]."
            )
        return tuple(str(i) for i in range(highest + 1))
    if isinstance(classes, (str, bytes)) or not isinstance(classes, Iterable):
        raise DataError(f"classes is {classes!r}; give the list of class names in the order of the labels.")
    names = tuple(str(name) for name in classes)
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"classes names {twice!r} twice; each class needs a name of its own.")
    for labels, what in ((train, "y_train"), (test, "y_test")):
        beyond = labels >= len(names)
        if beyond.any():
            first = int(np.argmax(beyond))
            raise DataError(
                f"{what} holds the label {int(labels[first])} at index {first}, but classes names {len(names)}; labels "
                f"go from 0 to {len(names) - 1}."
            )
    return names


def at_least_one(what: str, value: object) -> int:
    """`value` as an int; a `DataError` unless it is a whole number of at least 1."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise DataError(f"{what} is {value!r}; give a whole number of samples, at least 1.")
    return int(value)


def written(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """An input as `TensorSpec` writes one: ``input: float32 (N, 3, 32, 32)``."""
    return f"{name}: {dtype} ({', '.join(('N', *map(str, shape)))})"


def fits(wanted: tuple[int | None, ...], given: tuple[int, ...]) -> bool:
    """Whether samples of the shape `given` can enter an input of shape `wanted`, whose None are free."""
    return len(wanted) == len(given) and all(w in (None, g) for w, g in zip(wanted, given, strict=True))


def advice(wanted: tuple[int | None, ...], given: tuple[int, ...]) -> str:
    """What to do where samples have one shape and the model's input another."""
    axes = ", ".join(str(n) for n in wanted)
    if len(wanted) == len(given) == 3:
        if fits(wanted, (given[2], *given[:2])):
            return "The channels come last: pass x.transpose(0, 3, 1, 2)."
        if wanted[0] in (None, given[0]) and None not in wanted[1:]:
            return f"Add wb.data.Resize(({wanted[1]}, {wanted[2]})) to preprocess."
        if wanted[0] not in (None, given[0]):
            return f"The model takes {wanted[0]} channel(s), the images have {given[0]}; convert the images."
    if len(wanted) == 3 and len(given) == 2 and fits(wanted, (1, *given)):
        return "The channel axis is missing: pass x[:, None]."
    if None not in wanted and np.prod(wanted) == np.prod(given):
        return f"Pass x.reshape(-1, {axes})."
    return f"Bring the samples to the shape ({axes})."
