"""The data sets that come ready: found, read, downloaded and refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from workbench.data import Normalize, Resize, Scale, Task, tasks
from workbench.data._download import Remote
from workbench.errors import DataError

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
BATCHES = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without data sets, so that no test finds or touches the user's."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.delenv("WORKBENCH_DATA", raising=False)
    return tmp_path / "home"


def mnist_arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "x_train": random.integers(0, 256, (20, 28, 28), np.uint8), "y_train": np.arange(20, dtype=np.uint8) % 10,
        "x_test": random.integers(0, 256, (10, 28, 28), np.uint8), "y_test": np.arange(10, dtype=np.uint8),
    }  # fmt: skip


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_mnist(folder: Path, *, packed: bool) -> Path:
    folder.mkdir(parents=True)
    for name, array in zip(IDX, mnist_arrays().values(), strict=True):
        content = idx(array)
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return folder


def cifar10_batches() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    return {
        name: np.c_[np.arange(10, dtype=np.uint8), random.integers(0, 256, (10, 3072), np.uint8)].tobytes()
        for name in BATCHES
    }


def write_cifar10(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in cifar10_batches().items():
        (folder / name).write_bytes(content)
    return folder


def cifar10_archive(**added: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in {**cifar10_batches(), **added}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def served(name: str, content: bytes, folder: Path) -> Remote:
    """A remote whose address is a file of this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return Remote(name, ((folder / name).as_uri(),), len(content), hashlib.sha256(content).hexdigest())


def same_data(task: Task, arrays: dict[str, np.ndarray]) -> bool:
    found = [*task.raw("train"), *task.raw("test")]
    return all(
        np.array_equal(a, arrays[k]) for a, k in zip(found, ("x_train", "y_train", "x_test", "y_test"), strict=True)
    )


def test_digits_are_the_embedded_images_at_28_pixels(digits: Task):
    assert (digits.count("train"), digits.count("calibration"), digits.count("test")) == (1297, 256, 500)
    assert digits.preprocess == (Scale(1 / 16), Resize((28, 28)))
    (x,) = digits.inputs("test", 500)
    assert x.shape == (500, 1, 28, 28) and x.dtype == np.float32
    assert x.min() == 0 and 0.99 < x.max() <= 1


def test_digits_split_keeps_the_shares_and_separates_the_samples(digits: Task):
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    (train, train_labels), (test, test_labels) = digits.raw("train"), digits.raw("test")
    split = np.c_[np.r_[train, test].reshape(-1, 64), np.r_[train_labels, test_labels]]
    assert sorted(split.tolist()) == sorted(np.c_[x, y].astype(int).tolist())
    assert np.abs(np.bincount(test_labels) - np.bincount(y) * 500 / 1797).max() < 1


def test_digits_split_never_changes(digits: Task):
    # the weights that come with the package were trained on this very training split
    test, labels = digits.raw("test")
    assert labels[:10].tolist() == [4, 8, 8, 3, 9, 0, 6, 3, 9, 8]
    assert (
        hashlib.sha256(test.tobytes()).hexdigest() == "6b259e4b4d2cd1064bfe6e2e55e1f83583ad6cbf3213461cc64c6e145073736e"
    )


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_reads_the_original_files(tmp_path: Path, packed: bool):
    task = tasks.mnist(write_mnist(tmp_path / "raw", packed=packed))
    assert same_data(task, mnist_arrays())
    assert task.preprocess == (Scale(1 / 255), Normalize((0.1307,), (0.3081,)))
    assert task.classes == tuple("0123456789")
    (x,) = task.inputs("test", 10)
    raw = mnist_arrays()["x_test"].astype(np.float64)
    assert np.abs(x[:, 0] - (raw / 255 - 0.1307) / 0.3081).max() < 1e-5


def test_mnist_reads_npz_as_a_file_and_in_a_folder(tmp_path: Path):
    np.savez_compressed(tmp_path / "mnist.npz", **mnist_arrays())
    assert tasks.mnist(tmp_path / "mnist.npz").fingerprint == tasks.mnist(str(tmp_path)).fingerprint


def test_cifar10_reads_the_binary_version_and_its_unpacked_archive(tmp_path: Path):
    inner = write_cifar10(tmp_path / "cifar-10-batches-bin")
    task = tasks.cifar10(inner)
    assert (task.count("train"), task.count("test")) == (50, 10)
    red, green, blue = np.frombuffer(cifar10_batches()["data_batch_2.bin"][1:3073], np.uint8).reshape(3, 32, 32)
    assert np.array_equal(task.raw("train")[0][10], [red, green, blue])
    assert task.labels("test").tolist() == list(range(10))
    assert tasks.cifar10(tmp_path).fingerprint == task.fingerprint
    assert task.classes[6] == "frog"


def test_real_data_sets_load(shared_data: Path):
    mnist, cifar10 = tasks.mnist(shared_data / "mnist"), tasks.cifar10(shared_data / "cifar10" / "cifar10.npz")
    assert (mnist.count("train"), mnist.count("test"), mnist.count("calibration")) == (60000, 10000, 512)
    assert cifar10.inputs("calibration", 512)[0].shape == (512, 3, 32, 32)
    assert np.bincount(cifar10.labels("calibration")).tolist() == [52, 52] + [51] * 8


@pytest.mark.parametrize("place", ["mnist.npz", "mnist/mnist.npz"])
@pytest.mark.parametrize("root", ["configured", "cache"])
def test_data_sets_are_found_in_the_usual_places(tmp_path, home, monkeypatch, place: str, root: str):
    if root == "configured":
        monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path / "data"))
    file = (tmp_path / "data" if root == "configured" else home / ".cache" / "inference-workbench") / place
    file.parent.mkdir(parents=True)
    np.savez(file, **mnist_arrays())
    assert same_data(tasks.mnist(), mnist_arrays())


def test_the_configured_folder_comes_before_the_cache(tmp_path, home, monkeypatch):
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path / "data"))
    write_mnist(tmp_path / "data" / "mnist", packed=True)
    write_mnist(home / ".cache" / "inference-workbench" / "mnist", packed=False)
    (home / ".cache" / "inference-workbench" / "mnist" / IDX[0]).write_bytes(b"broken")
    assert tasks.mnist().count("train") == 20


def test_an_incomplete_folder_is_passed_over(tmp_path, home, monkeypatch):
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    (write_cifar10(tmp_path / "cifar10") / BATCHES[0]).unlink()
    write_cifar10(home / ".cache" / "inference-workbench" / "cifar10")
    assert tasks.cifar10().count("train") == 50


def test_nothing_is_downloaded_unasked_and_the_error_says_how_to_ask(home: Path):
    with pytest.raises(
        DataError, match=r"(?s)mnist is not on this machine.*mnist\.npz.*wb\.tasks\.mnist\(download=True\)"
    ):
        tasks.mnist()
    assert not home.exists()


def test_mnist_downloads_into_the_cache_once(tmp_path, home, monkeypatch):
    remotes = tuple(
        served(f"{name}.gz", gzip.compress(idx(array)), tmp_path / "web")
        for name, array in zip(IDX, mnist_arrays().values(), strict=True)
    )
    monkeypatch.setattr(tasks, "_MNIST", replace(tasks._MNIST, remotes=remotes))
    assert same_data(tasks.mnist(download=True), mnist_arrays())
    for file in (tmp_path / "web").iterdir():
        file.unlink()
    assert same_data(tasks.mnist(download=True), mnist_arrays())
    assert sorted(p.name for p in (home / ".cache" / "inference-workbench" / "mnist").iterdir()) == sorted(
        f"{name}.gz" for name in IDX
    )


def test_cifar10_download_unpacks_the_six_batches_and_nothing_else(tmp_path, home, monkeypatch):
    archive = cifar10_archive(**{"../../../evil.sh": b"x", "readme.html": b"x"})
    remote = served("cifar-10-binary.tar.gz", archive, tmp_path / "web")
    monkeypatch.setattr(tasks, "_CIFAR10", replace(tasks._CIFAR10, remotes=(remote,)))
    assert tasks.cifar10(download=True).count("train") == 50
    files = sorted(p.name for p in (home / ".cache").rglob("*") if p.is_file())
    assert files == sorted(BATCHES)


def test_an_archive_without_its_batches_is_refused(tmp_path, monkeypatch):
    remote = served("cifar-10-binary.tar.gz", gzip.compress(b"no tar"), tmp_path / "web")
    monkeypatch.setattr(tasks, "_CIFAR10", replace(tasks._CIFAR10, remotes=(remote,)))
    with pytest.raises(DataError, match="cannot be unpacked"):
        tasks.cifar10(download=True)


@pytest.mark.parametrize("data_set", [tasks._MNIST, tasks._CIFAR10], ids=lambda d: d.name)
def test_every_download_is_pinned_by_sha256_and_encrypted(data_set):
    assert data_set.remotes
    for remote in data_set.remotes:
        assert len(bytes.fromhex(remote.sha256)) == 32
        assert remote.size_bytes > 0
        assert all(url.startswith("https://") and url.endswith(remote.name) for url in remote.urls)


def test_the_python_version_of_cifar10_is_refused_unread(tmp_path: Path):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}").write_bytes(pickle.dumps(Code()))
    with pytest.raises(DataError, match=r"pickles can run code.*cifar-10-binary\.tar\.gz"):
        tasks.cifar10(tmp_path)
    assert not (tmp_path / "ran").exists()


def savez(path: Path, **changes: object) -> Path:
    arrays = {**mnist_arrays(), **changes}
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def truncated(path: Path) -> Path:
    savez(path)
    path.write_bytes(path.read_bytes()[:5000])
    return path


def damaged(path: Path) -> Path:
    savez(path)
    content = bytearray(path.read_bytes())
    content[300:400] = bytes(100)
    path.write_bytes(content)
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p / "none.npz", "does not exist"),
        (lambda p: truncated(p / "a.npz"), "cannot be read as .npz"),
        (lambda p: damaged(p / "a.npz"), "cannot be read as .npz"),
        (lambda p: written(p / "a.npz", b""), "cannot be read as .npz"),
        (lambda p: written(p / "a.npz", pickle.dumps({"x_train": 1})), "cannot be read as .npz"),
        (lambda p: savez(p / "a.npz", y_test=None), "lacks y_test; it holds x_train, y_train, x_test"),
        (lambda p: savez(p / "a.npz", y_test=np.array([{}] * 10)), "without Python objects"),
        (lambda p: savez(p / "a.npz", x_test=np.zeros((10, 32, 32, 3), np.uint8)), r"is not mnist: x_test is"),
        (lambda p: savez(p / "a.npz", x_train=np.zeros((20, 28, 28))), "is not mnist: x_train is float64"),
        (lambda p: savez(p / "a.npz", x_train=np.zeros(20, np.uint8)), "is not mnist"),
        (lambda p: savez(p / "a.npz", y_train=np.full(20, 11)), "label 11"),
        (lambda p: savez(p / "a.npz", classes=["cat"]), "its classes are cat"),
        (lambda p: p, "lacks train-images-idx3-ubyte, train-labels-idx1-ubyte"),
    ],
)  # fmt: skip
def test_files_that_are_not_mnist_are_refused_in_words(tmp_path: Path, make, said: str):
    with pytest.raises(DataError, match=said):
        tasks.mnist(make(tmp_path))


def test_an_npz_that_unpacks_beyond_the_bound_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.data._files._LARGEST_BYTES", 1000)
    with pytest.raises(DataError, match="at most 1000 are accepted"):
        tasks.mnist(savez(tmp_path / "a.npz"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not an idx file"),
        (b"\0\0\x08\x01" + bytes(12), "starts with 00000801"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "announces .* at most"),
        (
            b"\0\0\x08\x03" + np.array([20, 28, 28], ">u4").tobytes() + bytes(100),
            "announces 15680 bytes of data but holds 100",
        ),
        (b"\0\0\x08\x03" + np.array([1, 1, 1], ">u4").tobytes() + bytes(2), "but holds more"),
    ],
)
def test_broken_idx_files_are_named(tmp_path: Path, content: bytes, said: str):
    folder = write_mnist(tmp_path / "raw", packed=False)
    (folder / IDX[0]).write_bytes(content)
    with pytest.raises(DataError, match=rf"{IDX[0]}.*{said}"):
        tasks.mnist(folder)


def test_a_truncated_packed_idx_file_is_named(tmp_path: Path):
    folder = write_mnist(tmp_path / "raw", packed=True)
    file = folder / f"{IDX[0]}.gz"
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(DataError, match=rf"{IDX[0]}\.gz cannot be read"):
        tasks.mnist(folder)


@pytest.mark.parametrize("content", [b"", bytes(3072), bytes(3074), bytes(3073 * 10_001)])
def test_broken_cifar10_batches_are_named(tmp_path: Path, content: bytes):
    folder = write_cifar10(tmp_path / "bin")
    (folder / BATCHES[2]).write_bytes(content)
    with pytest.raises(DataError, match=rf"{BATCHES[2]} has {len(content)} bytes"):
        tasks.cifar10(folder)


def test_missing_cifar10_batches_are_named(tmp_path: Path):
    folder = write_cifar10(tmp_path / "bin")
    (folder / BATCHES[5]).unlink()
    with pytest.raises(DataError, match=r"lacks test_batch\.bin"):
        tasks.cifar10(folder)
