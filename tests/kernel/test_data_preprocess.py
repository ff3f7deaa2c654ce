"""Preprocessing steps: their arithmetic, their settings, their JSON form."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.data import (
    Denoise,
    DropMissing,
    FillMissing,
    Interpolate,
    MinMax,
    Normalize,
    Preprocess,
    Resize,
    Scale,
    Shift,
    ZScore,
)
from workbench.data.preprocess import PREPROCESSING
from workbench.errors import DataError

STEPS = [
    Scale(1 / 255),
    Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    Resize((8, 5)),
    MinMax(0, 2, (0, 0, 1), (255, 254, 253)),
    DropMissing(),
    FillMissing(0.5),
    FillMissing("mean", (1, 2, 3)),
    Interpolate(),
    Shift(2.0, -0.5),
    Denoise("mean"),
    Denoise("median", 5),
    Denoise("non-local means", search=5),
]


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 3, 6, 7)).astype(np.float32)


def test_scale_multiplies_in_float32(images):
    assert np.array_equal(Scale(1 / 255).apply(images), images * np.float32(1 / 255))


def test_normalize_subtracts_then_divides_per_channel_in_float32(images):
    changed = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).apply(images)
    for c, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        assert np.array_equal(changed[:, c], (images[:, c] - np.float32(mean)) / np.float32(std))


def test_normalize_of_a_table_works_on_its_columns():
    table = np.array([[1.0, 10.0], [3.0, 30.0]], np.float32)
    assert np.array_equal(Normalize((2, 20), (1, 10)).apply(table), [[-1, -1], [1, 1]])


def test_resize_is_bilinear_between_pixel_centres():
    ramp = np.array([[[[0.0, 1.0]]]], np.float32)
    # centres of four pixels over two lie at -0.25, 0.25, 0.75 and 1.25 of the old ones, clamped at the border
    assert np.array_equal(Resize((1, 4)).apply(ramp), [[[[0.0, 0.25, 0.75, 1.0]]]])


def test_resize_to_the_same_size_changes_nothing(images):
    assert np.array_equal(Resize((6, 7)).apply(images), images)


@pytest.mark.parametrize("step", STEPS, ids=repr)
def test_steps_leave_their_input_alone_and_stay_float32(step: Preprocess, images):
    before = images.copy()
    after = step.apply(images)
    assert np.array_equal(images, before)
    assert after.dtype == np.float32 and after.flags.c_contiguous
    assert after.shape[1:] == step.shape_after(images.shape[1:])
    assert not np.shares_memory(after, images)


@pytest.mark.parametrize("step", STEPS, ids=repr)
def test_steps_survive_json(step: Preprocess):
    assert Preprocess.from_dict(json.loads(json.dumps(step.to_dict()))) == step


def test_every_step_is_registered_and_public():
    assert {type(step) for step in [*STEPS, ZScore()]} == set(PREPROCESSING.values())
    assert all(getattr(wb.data, name) is step for name, step in PREPROCESSING.items())


@pytest.mark.parametrize("values", [[0.5, 0.25], np.array([0.5, 0.25]), torch.tensor([0.5, 0.25]), (0.5, 0.25)])
def test_normalize_accepts_any_sequence_and_stays_hashable(values):
    assert hash(Normalize(values, values)) == hash(Normalize((0.5, 0.25), (0.5, 0.25)))


def test_one_number_stands_for_one_channel_and_both_sides():
    assert Normalize(0.5, 2).mean == (0.5,)
    assert Resize(28) == Resize((28, 28)) == Resize([28, 28])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Scale(0), "make every input zero"),
        (lambda: Scale(float("nan")), "one finite number"),
        (lambda: Scale("fast"), "one finite number"),
        (lambda: Scale((1, 2)), "one finite number"),
        (lambda: Normalize((0, 0), (1,)), "2 means and 1 standard deviations"),
        (lambda: Normalize((0,), (0,)), "must be above 0"),
        (lambda: Normalize((0,), (float("inf"),)), "finite number per channel"),
        (lambda: Normalize((), ()), "finite number per channel"),
        (lambda: Resize(0), "from 1 to 4096"),
        (lambda: Resize(5000), "from 1 to 4096"),
        (lambda: Resize((3, 4, 5)), "from 1 to 4096"),
        (lambda: Resize(2.5), "from 1 to 4096"),
        (lambda: Resize(True), "from 1 to 4096"),
        (lambda: Resize(8).shape_after((784,)), "takes images"),
        (lambda: Normalize((0, 0, 0), (1, 1, 1)).shape_after((1, 28, 28)), "Normalize has 3 channels"),
        (lambda: Normalize((0, 0, 0), (1, 1, 1)).shape_after((32, 32, 3)), "transpose"),
        (lambda: Preprocess.from_dict({"preprocess": "Normalise", "mean": 0}), "Did you mean 'Normalize'"),
        (lambda: Preprocess.from_dict({"preprocess": "Scale", "faktor": 2}), "Did you mean 'factor'"),
        (lambda: Preprocess.from_dict({"preprocess": "Normalize", "mean": 0}), "needs the setting 'std'"),
        (lambda: Preprocess.from_dict({}), "Accepted: Denoise, DropMissing, .*, Resize, Scale"),
    ],
)
def test_bad_settings_are_refused_in_words(make, said):
    with pytest.raises(DataError, match=said):
        make()
