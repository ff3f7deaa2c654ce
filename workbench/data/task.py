"""`Task`: the data a model is judged on, how they are preprocessed, and the metric that decides "accuracy"."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.data import _arrays, _checks
from workbench.data._prepared import Prepared
from workbench.data._sentences import WordTokenizer
from workbench.data._splits import Split, refuse_missing, settle
from workbench.data.augment import AUGMENTATIONS, Augment
from workbench.data.metric import Accuracy, Metric
from workbench.data.preprocess import Preprocess
from workbench.errors import DataError, nearest

if TYPE_CHECKING:
    from workbench.models.model import Model

SPLITS = ("train", "calibration", "test")


@dataclass(frozen=True, eq=False, repr=False)
class Task:
    """Three data splits, their preprocessing and the metric; made by `Task.from_arrays` or by ``workbench.tasks``.

    The raw arrays are kept as they were given (images as bytes) and preprocessed batch by batch; do not change them
    afterwards. Splits asked for as a whole are remembered preprocessed, up to 256 MiB, since a study asks again.

    Attributes
    ----------
    name
        What a person calls it, e.g. ``cifar10``.
    classes
        Name of each class; a label is an index into it.
    preprocess
        Steps in order, fitted on the training split where they take numbers from the data. They act on the images
        among the inputs, or, where there are none, on every input that is not ids; see `from_arrays`.
    metric
        What decides accuracy.
    seed
        What the calibration sample was drawn with.
    train, calibration, test
        The raw splits; `calibration` is a sample of `train`.
    input_names
        Names of the inputs where they were given by name, else empty: by position.
    tokenizer
        What made the ids of sentences, for sentences to come; None for other data.
    augment
        Random changes to the images of a training batch, in order; see `augmented`.
    notes
        What making it had to say, in sentences: samples that preprocessing left out.
    """

    name: str
    classes: tuple[str, ...]
    preprocess: tuple[Preprocess, ...]
    metric: Metric
    seed: int
    train: Split
    calibration: Split
    test: Split
    input_names: tuple[str, ...] = ()
    tokenizer: WordTokenizer | None = None
    augment: tuple[Augment, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _checks.check_steps("augment", self.augment, Augment, AUGMENTATIONS)
        if not isinstance(self.metric, Metric):
            raise DataError(f"metric is {self.metric!r}; give a metric such as wb.data.Accuracy(), or None.")
        settled = settle({split: getattr(self, split) for split in SPLITS}, self.preprocess)
        changed = {**settled.splits, "preprocess": settled.steps, "notes": (*self.notes, *settled.notes)}
        for name, value in changed.items():
            object.__setattr__(self, name, value)
        # asking for the prepared samples makes every step say whether it fits, before any work
        refuse_missing(settled.splits, self._prepared)
        if self.augment and not any(self._images):
            raise DataError("augment changes images, and x holds none: (N, C, H, W), or u8 (N, H, W); leave it empty.")
        for (_, shape, _), is_image in zip(self._samples, self._images, strict=True):
            for step in self.augment if is_image else ():
                step.check(shape)

    @classmethod
    def from_arrays(
        cls,
        x_train: Any,
        y_train: Any,
        x_test: Any,
        y_test: Any,
        *,
        calibration: int = _checks.DEFAULT_CALIBRATION,
        preprocess: Sequence[Preprocess] = (),
        augment: Sequence[Augment] = (),
        classes: Sequence[str] | None = None,
        name: str = "arrays",
        metric: Metric | None = None,
        seed: int = 0,
    ) -> Task:
        """A task from NumPy arrays, torch tensors or lists.

        Parameters
        ----------
        x_train, x_test
            Batch axis first. Images are u8 ``(N, H, W, C)`` with 1, 3 or 4 channels, u8 ``(N, H, W)`` (one channel), or
            of any dtype ``(N, C, H, W)``; u8 of four axes whose last is 1, 3 or 4 is always read as NHWC. Tables are
            ``(N, F)``; other shapes pass as they are. int32, int64 and bool are ids or masks and stay so; every other
            dtype becomes float32. A dict (by name) or a tuple (by position) of arrays feeds several inputs. NaN is a
            missing value, accepted where `preprocess` has a step that deals with it.
        y_train, y_test
            ``(N,)`` whole numbers from 0.
        calibration
            How many training samples calibrate quantisation: a sample drawn with `seed`, each class as frequent as in
            `y_train`. The default, 512, means all of a smaller training split.
        preprocess
            Steps applied in order to float32, channels first: to the images where there are any, else to every input
            that is not ids. Those that take numbers from the data are fitted on `x_train` alone.
        augment
            Random changes to the images of each training batch, in order: ``[wb.data.Crop(2), wb.data.Rotate(10)]``.
        classes
            Name of each class. By default the labels' numbers; the test split may then hold no label that training
            lacks.
        name
            What a person calls the task.
        metric
            By default `Accuracy`.

        Raises
        ------
        DataError
            Before any work, if the arrays, labels, classes or steps do not fit each other.
        """
        for setting, steps, example in (("preprocess", preprocess, "Scale(1 / 255)"), ("augment", augment, "Crop(2)")):
            if not isinstance(steps, (list, tuple)):
                raise DataError(f"{setting} is {steps!r}; give a list of steps, e.g. [wb.data.{example}].")
        missing = any(isinstance(step, Preprocess) and step.mends_missing for step in preprocess)
        names, train_x = _arrays.read_inputs(x_train, "x_train", missing=missing)
        test_names, test_x = _arrays.read_inputs(x_test, "x_test", missing=missing)
        train = Split(train_x, _arrays.read_labels(y_train, "y_train"))
        test = Split(test_x, _arrays.read_labels(y_test, "y_test"))
        for split, which in ((train, "train"), (test, "test")):
            if len(split.inputs[0]) != len(split):
                raise DataError(
                    f"x_{which} has {len(split.inputs[0])} samples but y_{which} has {len(split)} labels; give one "
                    "label per sample."
                )
        _checks.check_alike(names, train_x, test_names, test_x)
        seed = _checks.check_seed(seed)
        class_names = _checks.class_names(classes, train.labels, test.labels)
        # before the calibration sample is drawn, so that it has the size that was asked for
        settled = settle({"train": train, "test": test}, preprocess)
        train, test = settled.splits["train"], settled.splits["test"]
        picked = _arrays.stratified(train.labels, _checks.calibration_size(calibration, len(train)), seed)
        return cls(
            name=str(name),
            classes=class_names,
            preprocess=settled.steps,
            metric=Accuracy() if metric is None else metric,
            seed=seed,
            train=train,
            calibration=Split(tuple(x[picked] for x in train.inputs), train.labels[picked]),
            test=test,
            input_names=names,
            augment=tuple(augment),
            notes=settled.notes,
        )

    def count(self, split: str) -> int:
        """Number of samples of ``train``, ``calibration`` or ``test``."""
        return len(self._split(split))

    def labels(self, split: str, limit: int | None = None) -> np.ndarray:
        """Labels of the first `limit` samples of a split (all by default), ``(N,)`` int64; the caller's own."""
        labels = self._split(split).labels
        return labels[: len(labels) if limit is None else _checks.at_least_one("limit", limit)].copy()

    def raw(self, split: str) -> tuple[Any, np.ndarray]:
        """Inputs and labels of a split as `from_arrays` takes them: an array, or a dict or tuple; not copied."""
        chosen = self._split(split)
        if self.input_names:
            return dict(zip(self.input_names, chosen.inputs, strict=True)), chosen.labels
        return (chosen.inputs if len(chosen.inputs) > 1 else chosen.inputs[0]), chosen.labels

    def batches(
        self, split: str, size: int, limit: int | None = None
    ) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
        """Preprocessed batches of a split in order, the last one possibly smaller.

        Parameters
        ----------
        split
            ``train``, ``calibration`` or ``test``.
        size
            Samples per batch.
        limit
            Stop after this many samples; by default the whole split.

        Returns
        -------
        Iterator
            Of ``(inputs, labels)``: a tuple of C-contiguous arrays, one per model input, and ``(n,)`` int64 labels. The
            arrays are the caller's own.
        """
        chosen, size = self._split(split), _checks.at_least_one("size", size)
        stop = len(chosen) if limit is None else min(_checks.at_least_one("limit", limit), len(chosen))

        def each() -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
            if stop == len(chosen):
                self._prepared.remember(split)
            for start in range(0, stop, size):
                end = min(start + size, stop)
                yield self._prepared.slice(split, start, end), chosen.labels[start:end].copy()

        return each()

    def inputs(self, split: str, count: int) -> tuple[np.ndarray, ...]:
        """The first `count` preprocessed samples of a split, one array per model input; the caller's own.

        Raises
        ------
        DataError
            If the split holds fewer.
        """
        held, count = self.count(split), _checks.at_least_one("count", count)
        if count > held:
            raise DataError(
                f"{count} samples of {split} were asked for, but {self.name} has {held}; ask for at most that."
            )
        if count == held:
            self._prepared.remember(split)
        return self._prepared.slice(split, 0, count)

    def augmented(self, inputs: Sequence[np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """A preprocessed training batch with its images changed at random, by the steps of `augment` in order.

        Parameters
        ----------
        inputs
            One array per model input, as `batches` gives them; left as they are.
        rng
            What is drawn comes from here: for each sample its own, the same for all images of one sample.

        Returns
        -------
        tuple
            The same shapes and dtypes; inputs that are not images are passed on.
        """
        changed = list(inputs)
        for step in self.augment:
            drawn = step.draw(len(changed[0]), rng)
            changed = [
                step.apply(x, drawn) if is_image else x for x, is_image in zip(changed, self._images, strict=True)
            ]
        return tuple(changed)

    def check(self, model: Model) -> None:
        """Refuse a model whose inputs these data do not fit, in number, name, shape or dtype.

        Raises
        ------
        DataError
            Naming both sides and what to change.
        """
        wanted, given = model.inputs, self._samples
        both = (
            f"{self.name} gives {'; '.join(_checks.written(*sample) for sample in given)}, but {model.name} takes "
            f"{'; '.join(str(spec) for spec in wanted)}. "
        )
        if len(wanted) != len(given):
            raise DataError(f"{both}Pass x as a dict or tuple with one array per input.")
        if self.input_names and self.input_names != tuple(spec.name for spec in wanted):
            raise DataError(f"{both}Name the arrays as the model's inputs, in the same order.")
        for spec, (_, shape, dtype) in zip(wanted, given, strict=True):
            if not _checks.fits(spec.shape[1:], shape):
                raise DataError(both + _checks.advice(spec.shape[1:], shape))
            if spec.dtype != dtype:
                advice = (
                    f"pass x.astype({spec.dtype!r})"
                    if spec.dtype in ("int32", "int64", "bool")
                    else "cast x to float32"
                )
                raise DataError(f"{both}The dtypes differ: {advice}, or load a model whose inputs are {dtype}.")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of data, preprocessing, augmentation and metric, as hex, the same everywhere; names do not count."""
        steps = [step.to_dict() for step in self.preprocess]
        settings = [steps, repr(self.metric), list(self.input_names), *(step.to_dict() for step in self.augment)]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for which in SPLITS:
            split = self._split(which)
            for array in (*split.inputs, split.labels):
                digest.update(f"{which} {array.dtype.str} {array.shape}".encode())
                digest.update(array)
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a package carries of the task, as JSON values.

        Each of ``inputs`` has its name, shape and dtype as the model sees them, how its raw data look (``raw_shape``,
        ``raw_dtype``, and ``raw_layout``: ``ids``, ``values``, ``NHW``, ``NHWC`` or ``NCHW``), and whether the steps of
        ``preprocessing`` act on it. The batch axis is None. A task of sentences adds its ``tokenizer``, words included.
        """
        columns = zip(self._samples, self.train.inputs, self._prepared.changed, strict=True)
        return {
            "name": self.name,
            "classes": list(self.classes),
            "inputs": [
                {
                    "name": name,
                    "shape": [None, *shape],
                    "dtype": dtype,
                    "raw_shape": [None, *raw.shape[1:]],
                    "raw_dtype": raw.dtype.name,
                    "raw_layout": _arrays.layout(raw),
                    "preprocessed": changed,
                }
                for (name, shape, dtype), raw, changed in columns
            ],
            "preprocessing": [step.to_dict() for step in self.preprocess],
            "augmentation": [step.to_dict() for step in self.augment],
            "notes": list(self.notes),
            "metric": self.metric.name,
            "counts": {split: self.count(split) for split in SPLITS},
            "seed": self.seed,
            **({"tokenizer": self.tokenizer.to_dict()} if self.tokenizer else {}),
        }

    def __repr__(self) -> str:
        return f"<Task {self.name}: {'; '.join(text for _, text in self._rows())}>"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{escape(head)}</th><td>{escape(text)}</td></tr>" for head, text in self._rows())
        return f"<p>Task {escape(self.name)}</p><table><tbody>{rows}</tbody></table>"

    def _rows(self) -> list[tuple[str, str]]:
        names = ", ".join(self.classes[:10]) + (", …" if len(self.classes) > 10 else "")
        return [
            ("splits", ", ".join(f"{self.count(split):,} {split}" for split in SPLITS)),
            ("classes", f"{len(self.classes)} classes ({names})"),
            ("inputs", ", ".join(_checks.written(*sample) for sample in self._samples)),
            ("preprocessing", " → ".join(repr(step) for step in self.preprocess) or "no preprocessing"),
            *([("augmentation", " → ".join(repr(step) for step in self.augment))] if self.augment else []),
            ("metric", self.metric.name),
            *([("notes", " ".join(self.notes))] if self.notes else []),
        ]

    def _split(self, split: str) -> Split:
        if split not in SPLITS:
            raise DataError(f"There is no split {split!r}. {nearest(str(split), SPLITS)}")
        return getattr(self, split)

    @cached_property
    def _prepared(self) -> Prepared:
        return Prepared({split: self._split(split).inputs for split in SPLITS}, self.preprocess)

    @property
    def _images(self) -> tuple[bool, ...]:
        """Which inputs are images."""
        return tuple(_arrays.layout(x) in _arrays.IMAGES for x in self.train.inputs)

    @property
    def _samples(self) -> tuple[tuple[str, tuple[int, ...], str], ...]:
        """Name, shape without the batch axis, and dtype of each input as the model sees it."""
        count = len(self.train.inputs)
        names = self.input_names or (("input",) if count == 1 else tuple(f"input {i + 1}" for i in range(count)))
        return tuple((name, *sample) for name, sample in zip(names, self._prepared.samples, strict=True))
