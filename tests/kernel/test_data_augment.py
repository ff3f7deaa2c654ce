"""Augmentation: what it does to an image, and that it reaches training batches and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from _tiny import Memory, fails, stop_at
from scipy import ndimage
from torch import nn

import workbench as wb
from workbench.data import Crop, Flip, Normalize, Rotate, Scale, Task, tasks
from workbench.errors import Cancelled, DataError

ALL = [Crop(2), Rotate(10), Flip(vertical=True)]


def images(count: int = 6, shape: tuple[int, ...] = (2, 7, 9)) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, *shape)).astype(np.float32)


def bars(count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Bytes with a bright bar at the top or at the bottom."""
    labels = np.arange(count) % 2
    x = np.random.default_rng(count).integers(0, 60, (count, 12, 12), np.uint8)
    x[labels == 0, 1:4] += 150
    x[labels == 1, 8:11] += 150
    return x, labels


def task(*augment: wb.data.Augment) -> Task:
    return Task.from_arrays(
        *bars(), *bars(20), calibration=10, preprocess=[Scale(1 / 255), Normalize(0.3, 0.2)], augment=augment
    )


def network() -> wb.Model:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 2)
    return wb.load(nn.Sequential(*layers), inputs=torch.zeros(2, 1, 12, 12))


# --- what happens to an image


def test_a_crop_is_a_window_of_the_image_with_its_border_repeated():
    x, step = images(), Crop(3)
    drawn = np.array([[0, 0], [3, -3], [-3, 3], [1, 2], [-2, -1], [3, 3]])
    wide = np.pad(x, [(0, 0), (0, 0), (3, 3), (3, 3)], mode="edge")
    wanted = [w[:, 3 + down : 10 + down, 3 + right : 12 + right] for w, (down, right) in zip(wide, drawn, strict=True)]
    assert np.array_equal(step.apply(x, drawn), wanted)


def test_every_place_within_the_padding_is_drawn():
    drawn = Crop(2).draw(2000, np.random.default_rng(0))
    places, counts = np.unique(drawn, axis=0, return_counts=True)
    assert places.tolist() == [[down, right] for down in range(-2, 3) for right in range(-2, 3)]
    assert counts.min() > 0.5 * 2000 / 25


@pytest.mark.parametrize("angle", [0, 3, -17, 45, 120])
@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 7, 12)])
def test_a_rotation_is_scipys_bilinear_one(angle: float, shape: tuple[int, ...]):
    x = images(3, shape)
    wanted = ndimage.rotate(x, angle, axes=(3, 2), order=1, reshape=False, mode="nearest")
    np.testing.assert_allclose(Rotate(180).apply(x, np.full(3, float(angle))), wanted, atol=2e-5)


def test_a_quarter_turn_goes_counterclockwise():
    x = images(2, (1, 6, 6))
    np.testing.assert_allclose(Rotate(180).apply(x, np.array([90.0, 180.0]))[0], np.rot90(x[0], 1, (1, 2)), atol=1e-5)
    np.testing.assert_allclose(Rotate(180).apply(x, np.array([90.0, 180.0]))[1], np.rot90(x[1], 2, (1, 2)), atol=1e-5)


def test_angles_fill_the_range_and_stay_in_it():
    drawn = Rotate(15).draw(2000, np.random.default_rng(0))
    assert -15 <= drawn.min() < -14 and 14 < drawn.max() <= 15 and abs(drawn.mean()) < 1


def test_a_flip_mirrors_the_chosen_images_only():
    x = images(4)
    drawn = np.array([[False, False], [True, False], [False, True], [True, True]])
    flipped = Flip(vertical=True).apply(x, drawn)
    for one, now, (across, down) in zip(x, flipped, drawn, strict=True):
        assert np.array_equal(now, one[:, :: -1 if down else 1, :: -1 if across else 1])


@pytest.mark.parametrize(("step", "ways"), [(Flip(), [1, 0]), (Flip(False, True), [0, 1]), (Flip(True, True), [1, 1])])
def test_half_of_the_images_are_flipped_along_each_chosen_way(step: Flip, ways: list[int]):
    share = step.draw(4000, np.random.default_rng(0)).mean(axis=0)
    assert np.abs(share - np.array(ways) / 2).max() < 0.03


@pytest.mark.parametrize("step", ALL, ids=repr)
def test_no_value_appears_that_the_image_does_not_span(step: wb.data.Augment):
    x = images(50)
    changed = step.apply(x, step.draw(50, np.random.default_rng(0)))
    for one, now in zip(x, changed, strict=True):
        assert now.min() >= one.min() - 1e-6 and now.max() <= one.max() + 1e-6


# --- a task's batch


def test_a_batch_keeps_its_shape_and_is_left_alone_and_each_sample_draws_its_own():
    of = task(*ALL)
    x = np.repeat(images(1, (1, 12, 12)), 32, axis=0)
    before = x.copy()
    (changed,) = of.augmented((x,), np.random.default_rng(0))
    assert np.array_equal(x, before)
    assert changed.shape == x.shape and changed.dtype == np.float32 and changed.flags.c_contiguous
    assert len(np.unique(changed.reshape(32, -1), axis=0)) > 25


def test_the_same_generator_gives_the_same_batch():
    of, x = task(*ALL), images(16, (1, 12, 12))
    one, two, other = (of.augmented((x,), np.random.default_rng(seed))[0] for seed in (0, 0, 1))
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_steps_are_applied_in_order():
    of, x, rng = task(Crop(2), Flip()), images(16, (1, 12, 12)), np.random.default_rng(5)
    moved = Crop(2).apply(x, Crop(2).draw(16, rng))
    wanted = Flip().apply(moved, Flip().draw(16, rng))
    assert np.array_equal(of.augmented((x,), np.random.default_rng(5))[0], wanted)


def test_inputs_that_are_no_images_pass_and_images_of_one_sample_move_alike():
    x = {
        "left": np.zeros((4, 9, 9), np.uint8),
        "right": np.zeros((4, 3, 9, 9), np.float32),
        "age": np.ones((4, 1)),
        "ids": np.ones((4, 5), np.int64),
    }
    of = Task.from_arrays(x, [0, 1, 0, 1], x, [0, 1, 0, 1], augment=[Crop(3), Flip()])
    picture = images(4, (1, 9, 9))
    given = picture, np.repeat(picture, 3, axis=1), np.ones((4, 1), np.float32), np.ones((4, 5), np.int64)
    left, right, age, ids = of.augmented(given, np.random.default_rng(0))
    assert not np.array_equal(left, picture)
    assert np.array_equal(right, np.repeat(left, 3, axis=1))
    assert age is given[2] and ids is given[3]


@pytest.mark.parametrize("split", ["train", "calibration", "test"])
def test_what_a_task_gives_for_a_split_is_never_augmented(split: str):
    plain, augmented = task(), task(*ALL)
    assert np.array_equal(augmented.inputs(split, 10)[0], plain.inputs(split, 10)[0])
    for (a, _), (b, _) in zip(augmented.batches(split, 7), plain.batches(split, 7), strict=True):
        assert np.array_equal(a[0], b[0])


def test_augmentation_is_part_of_a_tasks_identity_and_description():
    plain, one, two = task(), task(Crop(2)), task(Crop(3))
    assert len({plain.fingerprint, one.fingerprint, two.fingerprint}) == 3
    assert task(Crop(2)).fingerprint == one.fingerprint
    described = task(*ALL).describe()["augmentation"]
    assert json.loads(json.dumps(described)) == [
        {"augment": "Crop", "padding": 2},
        {"augment": "Rotate", "degrees": 10.0},
        {"augment": "Flip", "horizontal": True, "vertical": True},
    ]
    assert "Crop(padding=2) → Rotate" in repr(task(*ALL)) and plain.describe()["augmentation"] == []


# --- training


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples were augmented, batch by batch."""
    counts: list[int] = []
    augmented = Task.augmented

    def counting(self, inputs, rng):
        counts.append(len(inputs[0]))
        return augmented(self, inputs, rng)

    monkeypatch.setattr(Task, "augmented", counting)
    return counts


def test_training_sees_augmented_batches_and_validation_does_not(counted: list[int]):
    step = wb.Finetune(epochs=2, batch_size=12, validation=0.25)
    changed = step.apply(network(), task(*ALL))
    assert counted == [12, 12, 6] * 2  # 30 of 40 samples are trained on
    assert changed.fingerprint != step.apply(network(), task()).fingerprint


def test_training_on_a_task_without_augmentation_does_not_ask_for_any(counted: list[int]):
    wb.Finetune(epochs=1).apply(network(), task())
    assert counted == []


def test_the_same_seed_augments_alike_and_another_does_not():
    step = wb.Finetune(epochs=2)
    prints = [step.apply(network(), task(*ALL), seed=seed).fingerprint for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_a_training_that_was_broken_off_goes_on_with_the_same_augmentation():
    step, memory = wb.Finetune(epochs=3, validation=0), Memory()
    whole = step.apply(network(), task(*ALL))
    fails(lambda: step.apply(network(), task(*ALL), progress=stop_at("epoch 3"), checkpoint=memory), Cancelled)
    assert step.apply(network(), task(*ALL), checkpoint=memory).fingerprint == whole.fingerprint


# --- data sets


def test_ready_data_sets_take_augmentation(tmp_path: Path):
    assert tasks.digits(augment=[Crop(2)]).augment == (Crop(2),)
    for name, make, shape in (("mnist", tasks.mnist, (28, 28)), ("cifar10", tasks.cifar10, (32, 32, 3))):
        x, y = np.zeros((10, *shape), np.uint8), np.arange(10)
        np.savez(tmp_path / f"{name}.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        assert make(tmp_path / f"{name}.npz", augment=ALL).augment == tuple(ALL)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Crop(0), "padding=0; give a whole number from 1 to 512"),
        (lambda: Crop(1.5), "padding=1.5"),
        (lambda: Crop(True), "padding=True"),
        (lambda: Rotate(0), "above 0 and at most 180"),
        (lambda: Rotate(181), "at most 180"),
        (lambda: Rotate("far"), "one finite number"),
        (lambda: Flip(False), "mirrors nothing"),
        (lambda: Flip("left"), "give True or False"),
        (lambda: task(Crop(12)), r"move images of 12 × 12 pixels out of sight; give a padding below 12"),
        (lambda: task(Crop), r"not an augmentation step. Accepted: wb.data.Crop\(…\), wb.data.Flip"),
        (lambda: task(Scale(2)), "augment holds Scale"),
        (lambda: Task.from_arrays(*bars(), *bars(), augment=Crop(2)), r"augment is Crop.*give a list.*data.Crop\(2\)"),
        (lambda: Task.from_arrays(*bars(), *bars(), preprocess=[Crop(2)]), "preprocess holds Crop"),
        (
            lambda: Task.from_arrays(np.zeros((2, 5)), [0, 1], np.zeros((2, 5)), [0, 1], augment=[Flip()]),
            "augment changes images, and x holds none",
        ),
    ],
)
def test_augmentation_that_cannot_be_is_refused_in_words(make, said: str):
    with pytest.raises(DataError, match=said):
        make()
