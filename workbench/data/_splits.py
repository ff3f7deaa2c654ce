"""The splits of a task, and what making it does to them: steps are fitted, samples with missing values left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from workbench.data import _checks
from workbench.data._prepared import Prepared
from workbench.data.cleaning import DropMissing, complete, has_missing
from workbench.data.preprocess import PREPROCESSING, Preprocess
from workbench.errors import DataError


@dataclass(frozen=True, eq=False)
class Split:
    """Raw inputs and labels of one split: one array per model input, batch axis first, and ``(N,)`` int64 labels."""

    inputs: tuple[np.ndarray, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"<Split of {len(self)} samples, {', '.join(f'{x.dtype} {x.shape[1:]}' for x in self.inputs)}>"


@dataclass(frozen=True)
class Settled:
    """What `settle` makes of splits and steps.

    Attributes
    ----------
    splits
        Without the samples that were left out.
    steps
        Each of them fitted.
    notes
        What was left out, in sentences.
    """

    splits: dict[str, Split]
    steps: tuple[Preprocess, ...]
    notes: tuple[str, ...]


def settle(splits: Mapping[str, Split], steps: Sequence[Preprocess]) -> Settled:
    """Fit the steps on the split ``train``, in order, and leave out the samples that they drop.

    What is settled already stays as it is.

    Raises
    ------
    DataError
        If one is no step, or they have nothing to act on, cannot be fitted, or would leave a split empty.
    """
    _checks.check_steps("preprocess", steps, Preprocess, PREPROCESSING)
    held, settled, notes = dict(splits), [], []
    if steps and not any(_prepared(held["train"], ()).changed):
        raise DataError("preprocess has steps, but x holds only ids or masks; cast x to float32 or leave it empty.")
    for step in steps:
        if isinstance(step, DropMissing):
            kept = {name: _complete(split, settled) for name, split in held.items() if lacks_values(split)}
            held |= {name: _chosen(name, held[name], chosen) for name, chosen in kept.items()}
            dropped = [f"{int((~k).sum())} of {len(k)} {name}" for name, k in kept.items() if not k.all()]
            notes += [f"DropMissing left out {' and '.join(dropped)} samples."] if dropped else []
        settled.append(step if step.fitted else step.fit(_training(held["train"], settled, step)))
    return Settled(held, tuple(settled), tuple(notes))


def lacks_values(split: Split) -> bool:
    """Whether a raw value of any input is missing."""
    return any(has_missing(x) for x in split.inputs)


def refuse_missing(splits: Mapping[str, Split], prepared: Prepared) -> None:
    """Refuse splits in which values are still missing after the last step.

    Raises
    ------
    DataError
        Naming the split, the input, how many samples, and what to add.
    """
    for name, split in splits.items():
        if not lacks_values(split):
            continue
        chunks = [[complete(x) if x.dtype.kind == "f" else None for x in chunk] for chunk in prepared.chunks(name)]
        for place, changed in enumerate(prepared.changed):
            kept = [chunk[place] for chunk in chunks if chunk[place] is not None]
            bad = ~np.concatenate(kept) if kept else np.zeros(0, bool)
            if bad.any():
                which = f"input {place + 1} of " if len(prepared.changed) > 1 else ""
                advice = (
                    'End preprocess with wb.data.FillMissing("mean") or wb.data.DropMissing(); a whole row that is '
                    "missing cannot be interpolated."
                    if changed
                    else "preprocess acts on the images only: repair this input first."
                )
                raise DataError(
                    f"{which}{name} still has missing values in {int(bad.sum())} of {len(bad)} samples after "
                    f"preprocess, the first at index {int(np.argmax(bad))}. {advice}"
                )


def _prepared(split: Split, steps: Sequence[Preprocess]) -> Prepared:
    return Prepared({"split": split.inputs}, steps)


def _complete(split: Split, steps: Sequence[Preprocess]) -> np.ndarray:
    """Which samples miss nothing after these steps, in any input they act on."""
    prepared = _prepared(split, steps)
    chunks = (
        [complete(x) for x, changed in zip(chunk, prepared.changed, strict=True) if changed]
        for chunk in prepared.chunks("split")
    )
    return np.concatenate([np.logical_and.reduce(chunk) for chunk in chunks])


def _chosen(name: str, split: Split, kept: np.ndarray) -> Split:
    if not kept.any():
        raise DataError(
            f"DropMissing would leave out all {len(split)} samples of {name}: each has a missing value. Leave out the "
            'columns that are always missing, or use wb.data.FillMissing("mean").'
        )
    return split if kept.all() else Split(tuple(x[kept] for x in split.inputs), split.labels[kept])


def _training(split: Split, steps: Sequence[Preprocess], step: Preprocess) -> Iterator[np.ndarray]:
    """The one input that a step is fitted on, after the steps before it, some samples at a time."""
    prepared = _prepared(split, steps)
    if sum(prepared.changed) != 1:
        raise DataError(
            f"{type(step).__name__} takes its numbers from one input, and preprocess acts on {sum(prepared.changed)} "
            "here; bring the inputs to one array, or give wb.data.Normalize numbers of your own."
        )
    place = prepared.changed.index(True)
    return (chunk[place] for chunk in prepared.chunks("split"))
