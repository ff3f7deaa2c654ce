"""Data sets that come ready as a `Task`: digits (embedded), MNIST, CIFAR-10, folders of images and of sentences."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from workbench.data import _arrays, _checks, _files, _images, _sentences
from workbench.data._download import Remote, fetch
from workbench.data.augment import Augment
from workbench.data.preprocess import Normalize, Preprocess, Resize, Scale, image_size
from workbench.data.task import Task
from workbench.errors import DataError
from workbench.jobs import SILENT, Progress

_DIGITS = tuple(str(i) for i in range(10))


def digits(*, augment: Sequence[Augment] = ()) -> Task:
    """Scikit-learn's handwritten digits as 28 × 28 images: nothing is fetched.

    Parameters
    ----------
    augment
        Random changes to the images of each training batch, in order; see `Task.from_arrays`.

    Returns
    -------
    Task
        1297 training and 500 test images of 8 × 8, in a fixed split that keeps the classes' shares; 256 of the training
        images calibrate. Values are scaled to 0 to 1 and resized bilinearly to float32 (N, 1, 28, 28).

    References
    ----------
    E. Alpaydin, C. Kaynak, "Optical recognition of handwritten digits", UCI Machine Learning Repository (1998).
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x = x.reshape(-1, 8, 8).astype(np.uint8)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=500, stratify=y, random_state=0)
    return Task.from_arrays(
        x_train, y_train, x_test, y_test,
        calibration=256, preprocess=[Scale(1 / 16), Resize(28)], augment=augment, classes=_DIGITS, name="digits",
    )  # fmt: skip


def mnist(
    path: str | Path | None = None,
    *,
    download: bool = False,
    augment: Sequence[Augment] = (),
    progress: Progress = SILENT,
) -> Task:
    """MNIST: 28 × 28 handwritten digits, normalised to float32 (N, 1, 28, 28) by ``(x / 255 - 0.1307) / 0.3081``.

    Parameters
    ----------
    path
        An ``.npz`` file with x_train, y_train, x_test, y_test, or a folder with ``mnist.npz`` or the four original idx
        files, packed or not. By default ``mnist.npz`` or ``mnist/`` in ``$WORKBENCH_DATA``, else in
        ``~/.cache/inference-workbench``.
    download
        Whether to download the original files (12 MB) to the latter if nothing is found there, verified by SHA-256.
    augment
        Random changes to the images of each training batch, in order; see `Task.from_arrays`.
    progress
        Told of the download, which it can cancel.

    Raises
    ------
    DataError
        If the files are not there, damaged, or not MNIST's.

    References
    ----------
    Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document recognition",
    Proceedings of the IEEE 86 (1998).
    """
    arrays = _read(_MNIST, path, download, progress)
    steps = [Scale(1 / 255), Normalize(0.1307, 0.3081)]
    return Task.from_arrays(**arrays, preprocess=steps, augment=augment, classes=_MNIST.classes, name="mnist")


def cifar10(
    path: str | Path | None = None,
    *,
    download: bool = False,
    augment: Sequence[Augment] = (),
    progress: Progress = SILENT,
) -> Task:
    """CIFAR-10: 32 × 32 colour photographs of ten classes, normalised per channel to float32 (N, 3, 32, 32).

    Values are scaled to 0 to 1, then normalised by mean (0.485, 0.456, 0.406) and standard deviation
    (0.229, 0.224, 0.225).

    Parameters
    ----------
    path
        An ``.npz`` file with x_train, y_train, x_test, y_test, or a folder with ``cifar10.npz`` or the batches of the
        data set's binary version. By default ``cifar10.npz`` or ``cifar10/`` in ``$WORKBENCH_DATA``, else in
        ``~/.cache/inference-workbench``.
    download
        Whether to download the binary version (170 MB) to the latter if nothing is found there, verified by SHA-256.
    augment
        Random changes to the images of each training batch, in order; see `Task.from_arrays`.
    progress
        Told of the download, which it can cancel.

    Raises
    ------
    DataError
        If the files are not there, damaged, not CIFAR-10's, or its Python version, whose pickles can run code.

    References
    ----------
    A. Krizhevsky, "Learning multiple layers of features from tiny images", University of Toronto (2009).
    """
    arrays = _read(_CIFAR10, path, download, progress)
    steps = [Scale(1 / 255), Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    return Task.from_arrays(**arrays, preprocess=steps, augment=augment, classes=_CIFAR10.classes, name="cifar10")


def image_folder(
    path: str | Path,
    size: int | Iterable[int],
    *,
    channels: int = 3,
    preprocess: Sequence[Preprocess] = (Scale(1 / 255),),
    augment: Sequence[Augment] = (),
    calibration: int | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Task:
    """A task from PNG and JPEG files laid out as ``train/<class>/…`` and ``test/<class>/…``.

    Parameters
    ----------
    path
        The folder that holds ``train`` and ``test``; its name becomes the task's. Classes are the folders in ``train``,
        sorted.
    size
        Height and width every image is resized to (bilinear, antialiased, not cropped), or one number for both.
    channels
        3 for RGB, 1 for grey.
    preprocess
        Steps on float32 (N, channels, height, width); by default bytes are scaled to 0 to 1.
    augment
        Random changes to the images of each training batch, in order; see `Task.from_arrays`.
    calibration
        How many training images calibrate quantisation; by default 512, or all if there are fewer.
    seed
        What the calibration images are drawn with.
    progress
        Told of each image, and can cancel.

    Raises
    ------
    DataError
        If the layout is another, a file is damaged, over 64 million pixels or deeper than 8 bits (it is named), or
        Pillow is missing.
    """
    root, sides = Path(path).expanduser(), image_size(size)
    if channels not in (1, 3):
        raise DataError(f"channels is {channels!r}; give 3 for RGB or 1 for grey.")
    classes, found = _images.find_images(root)
    share = len(found["train"]) / (len(found["train"]) + len(found["test"]))
    parts = {"train": progress.part(0, share, "train"), "test": progress.part(share, 1, "test")}
    arrays = {}
    for split, files in found.items():
        arrays[f"x_{split}"] = _images.read_images([file for file, _ in files], sides, channels, parts[split])
        arrays[f"y_{split}"] = np.array([label for _, label in files])
    settings = {} if calibration is None else {"calibration": calibration}
    return Task.from_arrays(
        **arrays, **settings, preprocess=preprocess, augment=augment, classes=classes, name=root.resolve().name,
        seed=seed,
    )  # fmt: skip


def sentences(
    path: str | Path,
    *,
    length: int = 32,
    vocabulary: int = 8192,
    classes: Sequence[str] | None = None,
    judged_by: str = "test",
    calibration: int | None = None,
    seed: int = 0,
) -> Task:
    """A task from files of labelled sentences: ``train.tsv`` and ``test.tsv`` with ``sentence<TAB>label`` lines.

    Parameters
    ----------
    path
        The folder that holds the files; its name becomes the task's.
    length
        Ids per sentence: what is longer is cut, what is shorter padded with 0.
    vocabulary
        Ids in all: 0 pads, 1 is any word without an id, the others are the most frequent words of the training split,
        lower-cased. The task keeps them as `Task.tokenizer`.
    classes
        Name of each class; by default the labels' numbers.
    judged_by
        ``test``, or ``dev`` to choose settings by ``dev.tsv`` and keep the test sentences unseen.
    calibration
        How many training sentences calibrate quantisation; by default 512, or all if there are fewer.
    seed
        What the calibration sentences are drawn with.

    Returns
    -------
    Task
        Of int64 ids (N, length).

    Raises
    ------
    DataError
        If a file is missing, over 256 MiB, or has a line that is not of this form (it is named), or a setting is out
        of range.
    """
    root = Path(path).expanduser()
    if judged_by not in ("test", "dev"):
        raise DataError(f"judged_by is {judged_by!r}; give 'test' or 'dev'.")
    for setting, value, least, most in (
        ("length", length, 1, _sentences.LONGEST),
        ("vocabulary", vocabulary, 3, _sentences.LARGEST_VOCABULARY),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise DataError(f"{setting} is {value!r}; give a whole number from {least} to {most}.")
    train, y_train = _sentences.read(root / "train.tsv")
    test, y_test = _sentences.read(root / f"{judged_by}.tsv")
    tokenizer = _sentences.WordTokenizer.fitted(train, length, vocabulary)
    task = Task.from_arrays(
        tokenizer.ids(train), y_train, tokenizer.ids(test), y_test,
        calibration=_checks.DEFAULT_CALIBRATION if calibration is None else calibration,
        classes=classes, name=root.resolve().name, seed=seed,
    )  # fmt: skip
    return replace(task, tokenizer=tokenizer)


@dataclass(frozen=True)
class _DataSet:
    """A public data set: what its images look like, how its own files are read, and where they can be had."""

    name: str
    sample: tuple[int, int, int]
    classes: tuple[str, ...]
    read_folder: Callable[[Path], dict[str, np.ndarray]]
    is_complete: Callable[[Path], bool]
    remotes: tuple[Remote, ...]


def _read(data_set: _DataSet, path: str | Path | None, download: bool, progress: Progress) -> dict[str, np.ndarray]:
    place = _place(data_set, path, download, progress)
    inner = place / f"{data_set.name}.npz"
    if place.is_file() or inner.is_file():
        file = place if place.is_file() else inner
        arrays = _files.read_npz(file)
    else:
        file, arrays = place, data_set.read_folder(place)
    for key in ("x_train", "x_test"):
        x = arrays[key]
        if x.dtype != np.uint8 or x.ndim < 3 or _arrays.sample_shape(x) != data_set.sample:
            raise DataError(
                f"{file} is not {data_set.name}: {key} is {x.dtype} {x.shape}, expected uint8 images that are "
                f"{data_set.sample} as channels, height, width. For other data: wb.Task.from_arrays(…)."
            )
    names = tuple(str(name) for name in arrays.pop("classes", data_set.classes))
    if names != data_set.classes:
        raise DataError(
            f"{file} is not {data_set.name}: its classes are {', '.join(names)}. Use wb.Task.from_arrays(…)."
        )
    return arrays


def _place(data_set: _DataSet, path: str | Path | None, download: bool, progress: Progress) -> Path:
    """The file or folder to read; downloads into the cache where that is asked for and needed."""
    name, call = data_set.name, f"wb.tasks.{data_set.name}"
    if path is not None:
        place = Path(path).expanduser()
        if not place.exists():
            raise DataError(
                f"{place} does not exist; give an .npz file or a folder, or none to look in the usual places."
            )
        return place
    cache = Path.home() / ".cache" / "inference-workbench"
    configured = os.environ.get("WORKBENCH_DATA")
    roots = ([Path(configured).expanduser()] if configured else []) + [cache]
    places = [place for root in roots for place in (root / f"{name}.npz", root / name)]
    for place in places:
        if place.is_file() or (place / f"{name}.npz").is_file() or data_set.is_complete(place):
            return place
    if not download:
        raise DataError(
            f"{name} is not on this machine; looked for {', '.join(map(str, places))}. {call}(download=True) downloads "
            f"it, or give a file or folder: {call}(path)."
        )
    for i, remote in enumerate(data_set.remotes):
        part = progress.part(i / len(data_set.remotes), (i + 1) / len(data_set.remotes))
        archive = fetch(remote, cache / name, part)
        if archive.name.endswith(".tar.gz"):
            _files.unpack_cifar10(archive, archive.parent)
            archive.unlink()
    return cache / name


def _mnist_remote(name: str, size_bytes: int, sha256: str) -> Remote:
    mirrors = ("https://storage.googleapis.com/cvdf-datasets/mnist", "https://ossci-datasets.s3.amazonaws.com/mnist")
    return Remote(f"{name}.gz", tuple(f"{mirror}/{name}.gz" for mirror in mirrors), size_bytes, sha256)


_MNIST = _DataSet(
    name="mnist",
    sample=(1, 28, 28),
    classes=_DIGITS,
    read_folder=_files.read_mnist,
    is_complete=lambda folder: len(_files.mnist_files(folder)) == len(_files.MNIST_FILES),
    remotes=tuple(
        _mnist_remote(name, size_bytes, sha256)
        for name, size_bytes, sha256 in zip(
            _files.MNIST_FILES,
            (9_912_422, 28_881, 1_648_877, 4_542),
            (
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
            strict=True,
        )
    ),
)

_CIFAR10 = _DataSet(
    name="cifar10",
    sample=(3, 32, 32),
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    read_folder=_files.read_cifar10,
    is_complete=lambda folder: all((_files.cifar10_folder(folder) / name).is_file() for name in _files.CIFAR10_FILES),
    remotes=(
        Remote(
            "cifar-10-binary.tar.gz",
            ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
            170_052_171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
    ),
)
