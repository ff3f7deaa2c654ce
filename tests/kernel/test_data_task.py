"""`Task`: splits, batches, the calibration sample, the fingerprint, the check against a model."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from workbench.data import Normalize, Resize, Scale, Task, _prepared
from workbench.errors import DataError
from workbench.models.model import Model

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photographs(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, 8, 8, 3), np.uint8), np.arange(count) % 3


@pytest.fixture
def task() -> Task:
    return Task.from_arrays(
        *photographs(300), *photographs(70, seed=1), calibration=30, preprocess=[Scale(1 / 255), Normalize(MEAN, STD)],
        classes=["cat", "dog", "<b>"], name="pets",
    )  # fmt: skip


def model(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, names: tuple[str, ...] = ()) -> Model:
    names = names or tuple(f"x{i}" for i in range(len(shapes)))
    example = {name: torch.zeros((2, *shape), dtype=dtype) for name, shape in zip(names, shapes, strict=True)}
    return Model("net", example=example, module=nn.Flatten())


def tiny(x: object, **settings: object) -> Task:
    return Task.from_arrays(x, [0, 1], x, [0, 1], **settings)


def test_bytes_become_channels_first_float32_by_the_plain_formula(task: Task):
    raw, _ = task.raw("test")
    (x,), _ = next(task.batches("test", 70))
    expected = (raw.transpose(0, 3, 1, 2).astype(np.float32) * np.float32(1 / 255)) - np.float32(MEAN).reshape(3, 1, 1)
    assert np.array_equal(x, expected / np.float32(STD).reshape(3, 1, 1))


def test_cifar10_is_preprocessed_as_the_published_network_expects(shared_data):
    with np.load(shared_data / "cifar10" / "cifar10.npz") as data:
        x_train, y_train, x_test, y_test = (data[k] for k in ("x_train", "y_train", "x_test", "y_test"))
    task = Task.from_arrays(x_train, y_train, x_test, y_test, preprocess=[Scale(1 / 255), Normalize(MEAN, STD)])
    (x,) = task.inputs("test", 1000)
    expected = (
        torch.from_numpy(x_test[:1000]).permute(0, 3, 1, 2).float() / 255 - torch.tensor(MEAN).view(3, 1, 1)
    ) / (torch.tensor(STD).view(3, 1, 1))
    assert np.abs(x - expected.numpy()).max() < 1e-6
    assert (task.count("train"), task.count("calibration"), task.count("test")) == (8000, 512, 10000)


@pytest.mark.parametrize("size", [1, 7, 70, 1000])
def test_batches_cover_the_split_once_and_in_order(task: Task, size: int):
    batches = list(task.batches("test", size))
    assert [len(labels) for _, labels in batches[:-1]] == [size] * (len(batches) - 1)
    x = np.concatenate([inputs[0] for inputs, _ in batches])
    assert np.array_equal(x, task.inputs("test", 70)[0])
    assert np.array_equal(np.concatenate([labels for _, labels in batches]), task.labels("test"))
    for (inputs,), labels in batches:
        assert inputs.dtype == np.float32 and inputs.flags.c_contiguous
        assert labels.dtype == np.int64


@pytest.mark.parametrize("limit", [1, 64, 69])
def test_a_limit_gives_the_same_first_samples_as_the_whole(task: Task, limit: int):
    part = np.concatenate([x for (x,), _ in task.batches("test", 16, limit)])
    whole = np.concatenate([x for (x,), _ in task.batches("test", 16)])
    assert np.array_equal(part, whole[:limit])
    assert np.array_equal(np.concatenate([y for _, y in task.batches("test", 16, limit)]), task.labels("test", limit))


def test_a_limit_beyond_the_split_means_the_whole_split(task: Task):
    assert sum(len(y) for _, y in task.batches("test", 16, 10_000)) == 70


def test_a_batch_changed_by_its_user_does_not_change_the_next(task: Task):
    (first,), labels = next(task.batches("test", 70))
    first_again = first.copy()
    first[:], labels[:] = 0, 2
    assert np.array_equal(task.inputs("test", 70)[0], first_again)
    assert np.array_equal(task.labels("test"), np.arange(70) % 3)


def test_remembered_splits_stay_within_the_limit(task: Task, monkeypatch: pytest.MonkeyPatch):
    applied = []
    apply = Scale.apply
    monkeypatch.setattr(Scale, "apply", lambda self, x: applied.append(len(x)) or apply(self, x))
    sample_bytes = 3 * 8 * 8 * 4
    monkeypatch.setattr(_prepared, "_CACHE_BYTES", 300 * sample_bytes)

    def samples_computed(split: str) -> int:
        applied.clear()
        list(task.batches(split, 10))
        return sum(applied)

    assert [samples_computed("test"), samples_computed("test")] == [70, 0]
    assert samples_computed("calibration") == 30
    assert [samples_computed("test"), samples_computed("calibration")] == [0, 0]  # both fit
    assert samples_computed("train") == 300  # fits alone, so the others go
    assert [samples_computed("train"), samples_computed("test")] == [0, 70]
    monkeypatch.setattr(_prepared, "_CACHE_BYTES", 10)
    fresh = replace(task)
    assert [sum(1 for _ in fresh.batches("test", 10)), sum(1 for _ in fresh.batches("test", 10))] == [7, 7]


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        (np.zeros((2, 28, 28), np.uint8), (1, 28, 28)),
        (np.zeros((2, 32, 30, 3), np.uint8), (3, 32, 30)),
        (np.zeros((2, 28, 28, 1), np.uint8), (1, 28, 28)),
        (np.zeros((2, 3, 32, 30), np.uint8), (3, 32, 30)),
        (np.zeros((2, 3, 5, 4), np.uint8), (4, 3, 5)),  # ambiguous: bytes whose last axis is 1, 3 or 4 are NHWC
        (np.zeros((2, 3, 32, 32), np.float64), (3, 32, 32)),
        (np.zeros((2, 32, 32, 3), np.float32), (32, 32, 3)),
        (np.zeros((2, 7), np.float16), (7,)),
        (np.zeros((2, 80), np.int16), (80,)),
        (np.zeros((2, 5, 6), np.float32), (5, 6)),
        (np.zeros((2, 5), ">f4"), (5,)),
        ([[1.5, 2.5], [3.5, 4.5]], (2,)),
        (torch.zeros(2, 3, 4, 4), (3, 4, 4)),
        (torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16), (3, 4, 4)),
        (torch.zeros(2, 3, requires_grad=True), (3,)),
        (np.zeros((4, 6), np.float32)[::2, ::2], (3,)),
    ],
    ids=lambda v: (
        str(getattr(v, "dtype", "")) + str(tuple(getattr(v, "shape", ()))) if not isinstance(v, tuple) else None
    ),
)
def test_inputs_become_float32_of_this_shape(given, shape):
    (x,) = tiny(given).inputs("test", 2)
    assert x.dtype == np.float32 and x.flags.c_contiguous
    assert x.shape == (2, *shape)


def test_channels_last_bytes_land_where_they_belong():
    x = np.arange(2 * 2 * 3 * 3, dtype=np.uint8).reshape(2, 2, 3, 3)
    assert np.array_equal(tiny(x).inputs("test", 2)[0][1, 2], x[1, :, :, 2])


@pytest.mark.parametrize("dtype", ["int64", "int32", "bool"])
def test_ids_and_masks_keep_their_dtype(dtype: str):
    ids = np.array([[1, 0, 1], [0, 1, 1]]).astype(dtype)
    (x,) = tiny(ids).inputs("test", 2)
    assert x.dtype == dtype
    assert np.array_equal(x, ids)
    assert not np.shares_memory(x, ids)


def test_several_inputs_by_name_keep_their_order_and_only_images_are_preprocessed():
    x = {"image": np.full((2, 4, 4, 3), 255, np.uint8), "age": np.array([[30.0], [40.0]]), "ids": np.array([[1], [2]])}
    task = tiny(x, preprocess=[Scale(1 / 255), Resize(2)])
    (image, age, ids), labels = next(task.batches("test", 2))
    assert image.shape == (2, 3, 2, 2) and np.allclose(image, 1)
    assert age.dtype == np.float32 and age.tolist() == [[30], [40]]
    assert ids.dtype == np.int64 and ids.tolist() == [[1], [2]]
    raw, _ = task.raw("test")
    assert list(raw) == ["image", "age", "ids"]
    assert labels.tolist() == [0, 1]


def test_raw_splits_make_the_same_task_again(task: Task):
    names = tiny({"a": np.zeros((2, 3)), "b": np.ones((2, 4))})
    places = tiny((np.zeros((2, 3)), np.ones((2, 4))))
    for one in (task, names, places):
        again = Task.from_arrays(
            *one.raw("train"), *one.raw("test"), calibration=one.count("calibration"), preprocess=one.preprocess,
            classes=one.classes,
        )  # fmt: skip
        assert again.fingerprint == one.fingerprint


def test_bytes_are_kept_as_bytes(task: Task):
    x, y = photographs(300)
    kept = Task.from_arrays(x, y, x, y)
    assert kept.raw("train")[0] is x
    assert kept.train.inputs[0].dtype == np.uint8


def test_calibration_is_part_of_train_without_repeats_and_keeps_the_shares():
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    x = np.arange(1000, dtype=np.float32)[:, None]
    task = Task.from_arrays(x, labels, x, labels, calibration=50)
    picked, picked_labels = task.raw("calibration")
    assert len(np.unique(picked)) == 50
    assert np.array_equal(labels[picked[:, 0].astype(int)], picked_labels)
    assert np.bincount(picked_labels).tolist() == [30, 15, 5]
    assert not np.array_equal(
        np.sort(picked_labels), picked_labels
    )  # shuffled, so that a first batch holds every class


@pytest.mark.parametrize("count", range(1, 12))
def test_calibration_has_exactly_the_size_asked_for(count: int):
    labels = np.array([0] * 7 + [1] * 3 + [2])
    x = np.zeros((11, 2))
    assert Task.from_arrays(x, labels, x, labels, calibration=count).count("calibration") == count


def test_calibration_rounds_towards_the_classes_that_miss_most():
    labels = np.array([0] * 7 + [1] * 3 + [2])
    task = Task.from_arrays(np.zeros((11, 2)), labels, np.zeros((1, 2)), [0], calibration=5)
    # exact shares are 3.18, 1.36 and 0.45
    assert np.bincount(task.labels("calibration"), minlength=3).tolist() == [3, 1, 1]


def test_calibration_depends_on_the_seed_and_on_nothing_else():
    x, y = photographs(300)
    drawn = [Task.from_arrays(x, y, x, y, calibration=40, seed=seed).raw("calibration")[0] for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_the_drawn_sample_is_pinned():
    y = np.arange(30) % 3
    task = Task.from_arrays(np.arange(30.0)[:, None], y, np.zeros((1, 1)), [0], calibration=6)
    assert task.raw("calibration")[0][:, 0].astype(int).tolist() == [10, 11, 24, 6, 16, 8]


def test_default_calibration_is_all_of_a_small_training_split():
    x, y = photographs(20)
    assert Task.from_arrays(x, y, x, y).count("calibration") == 20


def test_classes_are_the_labels_numbers_unless_named():
    assert tiny(np.zeros((2, 3))).classes == ("0", "1")
    assert tiny(np.zeros((2, 3)), classes=np.array(["cat", "dog", "emu"])).classes == ("cat", "dog", "emu")


def test_named_classes_allow_test_labels_that_training_lacks():
    x = np.zeros((2, 3))
    assert Task.from_arrays(x, [0, 0], x, [1, 2], classes="a b c".split()).labels("test").tolist() == [1, 2]


def test_fingerprint_depends_on_every_value_and_setting_that_changes_a_result(task: Task):
    x, y = photographs(300)
    test = photographs(70, seed=1)
    settings = {"calibration": 30, "preprocess": [Scale(1 / 255), Normalize(MEAN, STD)], "classes": task.classes}
    other_x, other_y = x.copy(), y.copy()
    other_x[299, 7, 7, 2] ^= 1
    other_y[299] = (other_y[299] + 1) % 3
    variants = [
        Task.from_arrays(other_x, y, *test, **settings),
        Task.from_arrays(x, other_y, *test, **settings),
        Task.from_arrays(x, y, test[0], test[1][::-1], **settings),
        Task.from_arrays(x, y, *test, **settings, seed=1),
        Task.from_arrays(x, y, *test, **{**settings, "calibration": 31}),
        Task.from_arrays(x, y, *test, **{**settings, "preprocess": [Scale(1 / 256), Normalize(MEAN, STD)]}),
        Task.from_arrays(
            x.transpose(0, 3, 1, 2).copy(), y, *[test[0].transpose(0, 3, 1, 2).copy(), test[1]], **settings
        ),
    ]
    assert len({task.fingerprint, *(t.fingerprint for t in variants)}) == 1 + len(variants)


def test_fingerprint_ignores_names_and_memory_layout(task: Task):
    x, y = photographs(300)
    test = photographs(70, seed=1)
    again = Task.from_arrays(
        np.asfortranarray(x), y.astype(np.uint8), torch.from_numpy(test[0]), list(test[1]), calibration=30,
        preprocess=[Scale(1 / 255), Normalize(MEAN, STD)], name="other", classes=["a", "b", "c"],
    )  # fmt: skip
    assert again.fingerprint == task.fingerprint


def test_fingerprint_is_the_same_in_every_process():
    pinned = "0817156a4b38f56dbe6d8a07954bb5a3f9b4b9e35c4dd9628e8a0888c1e4f8bd"
    assert tiny(np.arange(6, dtype=np.float32).reshape(2, 3), preprocess=[Scale(0.5)]).fingerprint == pinned


def test_a_task_survives_pickling_and_copying(task: Task):
    list(task.batches("test", 70))
    for other in (pickle.loads(pickle.dumps(task)), copy.deepcopy(task)):  # noqa: S301 - pickled in this line
        assert other.fingerprint == task.fingerprint
        assert np.array_equal(other.inputs("test", 5)[0], task.inputs("test", 5)[0])


def test_replacing_the_preprocessing_forgets_what_was_prepared(task: Task):
    (before,) = task.inputs("test", 70)
    (after,) = replace(task, preprocess=(Scale(1.0),)).inputs("test", 70)
    assert before.max() < 3 < after.max()


def test_describe_is_json_and_says_how_raw_data_become_inputs(task: Task):
    described = task.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["preprocessing"] == [
        {"preprocess": "Scale", "factor": 1 / 255},
        {"preprocess": "Normalize", "mean": list(MEAN), "std": list(STD)},
    ]
    assert described["counts"] == {"train": 300, "calibration": 30, "test": 70}
    assert described["classes"] == ["cat", "dog", "<b>"]
    assert described["inputs"] == [
        {
            "name": "input", "shape": [None, 3, 8, 8], "dtype": "float32", "raw_shape": [None, 8, 8, 3],
            "raw_dtype": "uint8", "raw_layout": "NHWC", "preprocessed": True,
        }
    ]  # fmt: skip
    assert (described["name"], described["metric"], described["seed"]) == ("pets", "accuracy", 0)


def test_repr_names_splits_classes_preprocessing_and_metric(task: Task):
    for words in (
        "pets",
        "300 train, 30 calibration, 70 test",
        "3 classes",
        "float32 (N, 3, 8, 8)",
        "Scale",
        "accuracy",
    ):
        assert words in repr(task)
    assert "300" in repr(task.train)


def test_html_escapes_what_the_user_named(task: Task):
    html = replace(task, name="<script>")._repr_html_()
    assert "<script>" not in html and "<b>" not in html
    assert "&lt;script&gt;" in html and "&lt;b&gt;" in html


def test_a_model_that_fits_passes(task: Task):
    task.check(model((3, 8, 8)))
    tiny({"a": np.zeros((2, 3)), "b": np.zeros((2, 4))}).check(model((3,), (4,), names=("a", "b")))
    tiny(np.zeros((2, 5), np.int64)).check(model((5,), dtype=torch.int64))


@pytest.mark.parametrize(
    ("given", "wanted", "said"),
    [
        (np.zeros((2, 3, 8, 8)), model((3, 32, 32)), r"\(N, 3, 8, 8\).*\(N, 3, 32, 32\).*Resize\(\(32, 32\)\)"),
        (np.zeros((2, 32, 32, 3)), model((3, 32, 32)), r"transpose\(0, 3, 1, 2\)"),
        (np.zeros((2, 28, 28)), model((1, 28, 28)), r"x\[:, None\]"),
        (np.zeros((2, 784)), model((1, 28, 28)), r"x.reshape\(-1, 1, 28, 28\)"),
        (np.zeros((2, 1, 28, 28)), model((784,)), r"x.reshape\(-1, 784\)"),
        (np.zeros((2, 1, 32, 32)), model((3, 32, 32)), "takes 3 channel"),
        (np.zeros((2, 7)), model((5,)), r"Bring the samples to the shape \(5\)"),
        (np.zeros((2, 5)), model((5,), (5,)), "one array per input"),
        ({"b": np.zeros((2, 5)), "a": np.zeros((2, 5))}, model((5,), (5,), names=("a", "b")), "in the same order"),
        (np.zeros((2, 5)), model((5,), dtype=torch.int64), r"astype\('int64'\)"),
        (np.zeros((2, 5), int), model((5,)), "cast x to float32"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_what_to_do(given, wanted, said):
    with pytest.raises(DataError, match=said):
        tiny(given, name="data").check(wanted)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda t: t.count("valid"), "no split 'valid'.*Accepted: calibration, test, train"),
        (lambda t: t.batches("tset", 10), "Did you mean 'test'"),
        (lambda t: t.batches("test", 0), "size is 0"),
        (lambda t: t.batches("test", 2.5), "size is 2.5"),
        (lambda t: t.batches("test", 10, 0), "limit is 0"),
        (lambda t: t.labels("test", -1), "limit is -1"),
        (lambda t: t.inputs("test", 71), "71 samples of test.*has 70"),
        (lambda t: t.inputs("test", True), "count is True"),
    ],
)
def test_questions_a_task_cannot_answer_are_refused_at_once(task: Task, call, said):
    with pytest.raises(DataError, match=said):
        call(task)
