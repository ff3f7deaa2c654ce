"""Folders of images become tasks; broken, huge and misplaced files are named."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from workbench.data import Normalize, Scale, tasks
from workbench.errors import Cancelled, DataError
from workbench.jobs import on_progress


def write(path: Path, colour: tuple[int, ...] = (255, 0, 0), size: tuple[int, int] = (6, 4), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour if mode == "RGB" else colour[0]).save(path)
    return path


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for i in range(3):
        write(root / "train" / "dog" / f"{i}.png", (0, 255, i))
        write(root / "train" / "cat" / f"{i}.png", (255, 0, i))
    write(root / "test" / "cat" / "a.PNG", (255, 0, 0), size=(9, 3))
    write(root / "test" / "dog" / "b.jpg", (0, 255, 0))
    return root


def test_classes_are_the_sorted_folders_and_images_have_one_size(pets: Path):
    task = tasks.image_folder(pets, size=(5, 7))
    assert task.classes == ("cat", "dog")
    assert task.name == "pets"
    assert task.labels("train").tolist() == [0, 0, 0, 1, 1, 1]
    assert task.labels("test").tolist() == [0, 1]
    x, _ = task.raw("train")
    assert x.dtype == np.uint8 and x.shape == (6, 5, 7, 3)
    assert [tuple(pixel) for pixel in x[:, 0, 0]] == [
        (255, 0, 0),
        (255, 0, 1),
        (255, 0, 2),
        (0, 255, 0),
        (0, 255, 1),
        (0, 255, 2),
    ]
    (prepared,) = task.inputs("test", 2)
    assert prepared.shape == (2, 3, 5, 7)
    assert np.array_equal(prepared[0, :, 2, 2], [1, 0, 0])


def test_preprocessing_replaces_the_default(pets: Path):
    steps = [Scale(1 / 255), Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))]
    assert tasks.image_folder(str(pets), 4, preprocess=steps).inputs("test", 1)[0][0, :, 0, 0].tolist() == [1, -1, -1]


def test_grey_images_have_one_channel(pets: Path):
    task = tasks.image_folder(pets, 4, channels=1)
    assert task.inputs("test", 1)[0].shape == (1, 1, 4, 4)
    assert task.raw("test")[0][0, 0, 0, 0] == 76  # 0.299 × 255, ITU-R 601


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA"])
def test_every_common_mode_becomes_rgb(pets: Path, mode: str):
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(pets / "train" / "cat" / "0.png")
    assert tasks.image_folder(pets, 4).raw("train")[0][0].min() == 255


def test_other_files_and_hidden_folders_are_passed_over(pets: Path):
    (pets / "train" / "cat" / "Thumbs.db").write_bytes(b"x")
    (pets / "train" / ".ipynb_checkpoints").mkdir()
    assert tasks.image_folder(pets, 4).count("train") == 6


def test_calibration_is_drawn_from_the_training_images(pets: Path):
    assert tasks.image_folder(pets, 4).count("calibration") == 6
    assert tasks.image_folder(pets, 4, calibration=2).labels("calibration").tolist() in ([0, 1], [1, 0])
    with pytest.raises(DataError, match="asks for 7"):
        tasks.image_folder(pets, 4, calibration=7)


def test_reading_can_be_cancelled(pets: Path):
    def stop(fraction: float, message: str) -> None:
        if fraction > 0.5:
            raise Cancelled(message)

    with pytest.raises(Cancelled, match=r"train · reading \d.png"):
        tasks.image_folder(pets, 4, progress=on_progress(stop))


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header announces this size, and whose data are missing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read as PNG or JPEG"),
        (b"GIF89a" + bytes(100), "cannot be read as PNG or JPEG"),
        (png_of(4, 4), "cannot be read as PNG or JPEG"),
        (png_of(9000, 9000), "has 9000 × 9000 pixels"),
        (png_of(2**31 - 1, 2**31 - 1), "pixels|cannot be read"),
    ],
    ids=["empty", "gif", "no data", "too large", "bomb"],
)
def test_broken_images_are_named(pets: Path, content: bytes, said: str):
    (pets / "train" / "dog" / "1.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"dog.1\.png ({said})"):
        tasks.image_folder(pets, 4)


def test_a_truncated_image_is_named(pets: Path):
    path = pets / "train" / "dog" / "1.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"dog.1\.png cannot be read"):
        tasks.image_folder(pets, 4)


def test_sixteen_bit_images_are_refused_not_clipped(pets: Path):
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(pets / "train" / "cat" / "0.png")
    with pytest.raises(DataError, match="16 bits or more"):
        tasks.image_folder(pets, 4)


def no_images(root: Path) -> None:
    for path in (root / "test" / "dog").iterdir():
        path.unlink()


def test_images_that_together_take_too_much_are_refused_first(pets: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("workbench.data._images._LARGEST_BYTES", 6 * 4 * 4 * 3 - 1)
    with pytest.raises(DataError, match="6 images of 4 × 4 × 3 take 288 bytes; at most 287"):
        tasks.image_folder(pets, 4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: (root / "test").rename(root / "val"), "has no folder 'test'"),
        (lambda root: write(root / "test" / "emu" / "0.png"), "emu is a class that training lacks.*cat, dog"),
        (no_images, "dog holds no images"),
        (lambda root: (root / "train").rename(root / "old") and (root / "train").mkdir(), "holds no class folders"),
        (lambda root: root.rename(root.parent / "gone"), "is not a folder"),
    ],
)
def test_another_layout_is_refused_in_words(pets: Path, change, said: str):
    change(pets)
    with pytest.raises(DataError, match=said):
        tasks.image_folder(pets, 4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": 0}, "image size"),
        ({"size": 4, "channels": 4}, "channels is 4"),
        ({"size": 4, "preprocess": [1]}, "step"),
    ],
)
def test_bad_settings_are_refused(pets: Path, settings: dict, said: str):
    with pytest.raises(DataError, match=said):
        tasks.image_folder(pets, **settings)


def test_a_missing_pillow_gives_the_install_line(pets: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match="pip install pillow"):
        tasks.image_folder(pets, 4)
