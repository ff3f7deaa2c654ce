"""Cleaning and normalising: fitted on the training split alone, the same on every split and in a package."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from torch import nn

import workbench as wb
from workbench import deployment
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
    Task,
    ZScore,
)
from workbench.errors import DataError

NAN = np.nan


def with_gaps(shape: tuple[int, ...], share: float = 0.1, seed: int = 0) -> np.ndarray:
    """Random float32 values, each missing with this probability."""
    rng = np.random.default_rng(seed)
    x = rng.normal(3, 2, shape).astype(np.float32)
    x[rng.random(shape) < share] = NAN
    return x


def table(columns: int = 4, share: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Training samples, more than are prepared at a time, and test samples."""
    return with_gaps((700, columns), share), with_gaps((90, columns), share, seed=1)


def task(x_train: object, x_test: object, *steps: Preprocess, **settings: object) -> Task:
    first = next(iter(x_train.values())) if isinstance(x_train, dict) else x_train
    other = next(iter(x_test.values())) if isinstance(x_test, dict) else x_test
    y_train, y_test = np.arange(len(first)) % 2, np.arange(len(other)) % 2
    return Task.from_arrays(x_train, y_train, x_test, y_test, preprocess=list(steps), **settings)


def prepared(of: Task, split: str = "test") -> np.ndarray:
    (x,) = of.inputs(split, of.count(split))
    return x


# --- normalisation


@pytest.mark.parametrize(
    ("step", "library"),
    [
        (MinMax(), MinMaxScaler()),
        (MinMax(-1, 3), MinMaxScaler((-1, 3))),
        (ZScore(), StandardScaler()),
    ],
    ids=repr,
)
@pytest.mark.parametrize("share", [0, 0.1], ids=["complete", "with gaps"])
def test_columns_are_normalised_as_sklearn_does_from_the_training_split(step: Preprocess, library, share: float):
    train, test = table(share=share)
    of = task(train, test, step, FillMissing(-9))
    library.fit(train.astype(np.float64))
    for split, raw in (("train", train), ("test", test)):
        wanted = np.nan_to_num(library.transform(raw.astype(np.float64)), nan=-9)
        np.testing.assert_allclose(prepared(of, split), wanted, atol=1e-5)


def test_images_are_normalised_by_channel():
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (n, 5, 6, 3), np.uint8) for n in (300, 20))
    low, high = train.min((0, 1, 2)).astype(float), train.max((0, 1, 2)).astype(float)
    scaled = (test.astype(float) - low) / (high - low)
    np.testing.assert_allclose(prepared(task(train, test, MinMax())), scaled.transpose(0, 3, 1, 2), atol=1e-6)
    z = (test - train.mean((0, 1, 2))) / train.std((0, 1, 2))
    np.testing.assert_allclose(prepared(task(train, test, ZScore())), z.transpose(0, 3, 1, 2), atol=1e-5)


def test_the_training_range_becomes_exactly_the_range_asked_for_and_is_not_cut_off_in_the_test_split():
    of = task(np.array([[1.0], [3.0], [7.0]]), np.array([[-5.0], [13.0]]), MinMax(-1, 1))
    assert prepared(of, "train").ravel().tolist() == pytest.approx([-1, -1 / 3, 1])
    assert prepared(of).ravel().tolist() == [-3, 3]


def test_a_large_mean_does_not_spoil_the_deviation():
    rng = np.random.default_rng(0)
    x = (1e4 + rng.normal(size=(2000, 2))).astype(np.float32)
    (fitted,) = task(x, x, ZScore()).preprocess
    np.testing.assert_allclose(fitted.std, x.astype(np.float64).std(axis=0), rtol=1e-9)


FITTED = [MinMax(), ZScore(), FillMissing("mean"), FillMissing("median")]


@pytest.mark.parametrize("step", FITTED, ids=repr)
def test_the_test_split_does_not_change_the_fitted_numbers(step: Preprocess):
    train, test = table()
    first = task(train, test, step, FillMissing(0)).preprocess
    other = task(train, 1000 + 50 * np.nan_to_num(test), step, FillMissing(0)).preprocess
    assert first == other
    assert first[0] != step and first[0].fitted and not step.fitted


@pytest.mark.parametrize("step", FITTED, ids=repr)
def test_a_step_is_fitted_on_what_the_steps_before_it_give(step: Preprocess):
    train, test = table()
    after = task(train, test, Scale(10), step, FillMissing(0)).preprocess[1]
    assert after == task(np.float32(10) * train, test, step, FillMissing(0)).preprocess[0]


@pytest.mark.parametrize("step", [*FITTED, FillMissing(2.5), MinMax(-1, 1)], ids=repr)
def test_fitted_steps_survive_json_and_stay_as_they_are_in_the_next_task(step: Preprocess):
    train, test = table()
    of = task(train, test, step, FillMissing(0))
    described = json.loads(json.dumps(of.describe(), allow_nan=False))["preprocessing"]
    assert tuple(Preprocess.from_dict(entry) for entry in described) == of.preprocess
    again = task(train, test, *of.preprocess)
    assert again.preprocess == of.preprocess and again.fingerprint == of.fingerprint
    assert task(train[:300], test, *of.preprocess).preprocess == of.preprocess


def test_replacing_the_preprocessing_fits_it():
    train, test = table(share=0)
    of = replace(task(train, test), preprocess=(ZScore(),))
    np.testing.assert_allclose(of.preprocess[0].mean, train.mean(axis=0), rtol=1e-5)


# --- missing values


@pytest.mark.parametrize("with_", ["mean", "median"])
def test_columns_are_filled_as_sklearn_does_from_the_training_split(with_: str):
    train, test = table()
    of = task(train, test, FillMissing(with_))
    library = SimpleImputer(strategy=with_).fit(train.astype(np.float64))
    np.testing.assert_allclose(prepared(of), library.transform(test), rtol=1e-6)
    np.testing.assert_allclose(prepared(of, "train"), library.transform(train), rtol=1e-6)


@pytest.mark.parametrize(("with_", "numpys"), [("mean", np.nanmean), ("median", np.nanmedian)])
def test_images_are_filled_by_channel(with_: str, numpys):
    train, test = with_gaps((300, 2, 5, 4)), with_gaps((10, 2, 5, 4), seed=1)
    wanted = np.where(np.isnan(test), numpys(train, axis=(0, 2, 3)).reshape(1, 2, 1, 1), test)
    np.testing.assert_allclose(prepared(task(train, test, FillMissing(with_))), wanted, rtol=1e-5)


def test_a_number_fills_every_gap_and_nothing_else():
    train, test = table()
    assert np.array_equal(prepared(task(train, test, FillMissing(-1))), np.where(np.isnan(test), np.float32(-1), test))


@pytest.mark.parametrize("shape", [(300, 12), (300, 2, 9), (300, 1, 4, 7)])
def test_gaps_are_interpolated_as_numpy_does_along_the_last_axis(shape: tuple[int, ...]):
    x = with_gaps(shape, 0.4)
    x[..., 0] = np.where(np.isnan(x).all(axis=-1), 1, x[..., 0])  # no row without any value
    place = np.arange(shape[-1])

    def numpys(row: np.ndarray) -> np.ndarray:
        known = ~np.isnan(row)
        return np.interp(place, place[known], row[known])

    wanted = np.apply_along_axis(numpys, -1, x.astype(np.float64))
    np.testing.assert_allclose(prepared(task(x, x, Interpolate())), wanted, rtol=1e-5, atol=1e-6)


def test_a_row_without_any_value_is_left_to_the_next_step():
    x = np.array([[[NAN, NAN], [1, NAN]], [[4, 5], [6, 7]]], np.float32)
    assert np.array_equal(Interpolate().apply(x)[0], [[NAN, NAN], [1, 1]], equal_nan=True)
    assert prepared(task(x, x, Interpolate(), FillMissing(0)))[0].tolist() == [[0, 0], [1, 1]]
    assert task(x, x, Interpolate(), DropMissing()).count("test") == 1


def test_samples_with_missing_values_are_left_out_of_every_split_with_their_labels():
    train, test = table()
    y_train, y_test = np.arange(700) % 3, np.arange(90) % 3
    of = Task.from_arrays(train, y_train, test, y_test, preprocess=[DropMissing()], calibration=300)
    for split, x, y in (("train", train, y_train), ("test", test, y_test)):
        kept = ~np.isnan(x).any(axis=1)
        assert np.array_equal(prepared(of, split), x[kept])
        assert np.array_equal(of.labels(split), y[kept])
    assert of.count("calibration") == 300 and not np.isnan(prepared(of, "calibration")).any()
    gone = [int(np.isnan(x).any(axis=1).sum()) for x in (train, test)]
    assert of.notes == (f"DropMissing left out {gone[0]} of 700 train and {gone[1]} of 90 test samples.",)
    assert of.notes[0] in repr(of) and of.describe()["notes"] == list(of.notes)


def test_what_an_earlier_step_filled_is_not_missing_any_more():
    train, test = table()
    of = task(train, test, Interpolate(), DropMissing())
    assert of.count("train") == int((~np.isnan(train).all(axis=1)).sum()) > int((~np.isnan(train).any(axis=1)).sum())


def test_a_later_step_is_fitted_without_the_samples_left_out():
    x = np.array([[1, 2], [3, NAN], [5, 6]], np.float32)
    (_, fitted) = task(x, x, DropMissing(), ZScore()).preprocess
    assert fitted == Normalize((3, 4), (2, 2))


def test_a_sample_is_left_out_where_any_of_its_inputs_misses_a_value():
    x = {"a": np.array([[1.0], [NAN], [3.0]]), "b": np.array([[NAN], [2.0], [3.0]])}
    of = task(x, x, DropMissing())
    assert [a.ravel().tolist() for a in of.inputs("train", 1)] == [[3], [3]]


def test_complete_data_stay_the_arrays_that_were_given():
    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    for step in (DropMissing(), FillMissing("median"), Interpolate()):
        of = task(x, x, step)
        assert of.raw("train")[0] is x and of.notes == ()
        assert np.array_equal(prepared(of), x)


# --- noise


def windows(x: np.ndarray, size: int) -> np.ndarray:
    wide = np.pad(x, [(0, 0), (0, 0), (size // 2,) * 2, (size // 2,) * 2], mode="edge")
    return np.lib.stride_tricks.sliding_window_view(wide, (size, size), axis=(2, 3))


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize(("method", "numpys"), [("mean", np.mean), ("median", np.median)])
def test_mean_and_median_are_those_of_the_window_round_each_pixel(method: str, numpys, size: int):
    x = np.random.default_rng(0).normal(size=(3, 2, 7, 6)).astype(np.float32)
    wanted = numpys(windows(x, size), axis=(4, 5))
    np.testing.assert_allclose(Denoise(method, size).apply(x), wanted, atol=1e-6)


def non_local_means(image: np.ndarray, size: int, search: int, strength: float) -> np.ndarray:
    """The equation of Buades et al., pixel by pixel: ``Σ w v / Σ w`` with ``w = exp(-d / h²)``."""
    channels, height, width = image.shape
    patches = windows(image[None].astype(np.float64), size)[0]
    h, reach, out = strength * float(np.ptp(image)), search // 2, np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            total, weights = np.zeros(channels), 0.0
            for r in range(max(0, row - reach), min(height, row + reach + 1)):
                for c in range(max(0, column - reach), min(width, column + reach + 1)):
                    d = np.mean((patches[:, row, column] - patches[:, r, c]) ** 2)
                    total += np.exp(-d / h**2) * image[:, r, c]
                    weights += np.exp(-d / h**2)
            out[:, row, column] = total / weights
    return out


@pytest.mark.parametrize(("size", "search", "strength"), [(3, 5, 0.1), (5, 3, 0.3), (3, 9, 1.0)])
def test_non_local_means_follow_the_published_equation(size: int, search: int, strength: float):
    x = np.random.default_rng(0).normal(size=(2, 2, 6, 7)).astype(np.float32)
    x[1] *= 100  # the strength goes with each image's own range
    wanted = np.stack([non_local_means(image, size, search, strength) for image in x])
    np.testing.assert_allclose(Denoise("non-local means", size, search, strength).apply(x), wanted, rtol=2e-4)


METHODS = ["mean", "median", "non-local means"]


@pytest.mark.parametrize("method", METHODS)
def test_noise_on_an_edge_becomes_less(method: str):
    clean = np.zeros((4, 1, 16, 16), np.float32)
    clean[..., 8:] = 1
    noisy = clean + np.random.default_rng(0).normal(0, 0.2, clean.shape).astype(np.float32)
    errors = {m: float(np.square(Denoise(m).apply(noisy) - clean).mean()) for m in METHODS}
    assert errors[method] < 0.9 * float(np.square(noisy - clean).mean())
    assert errors["non-local means"] < errors["mean"]  # the one that smears the edge


@pytest.mark.parametrize("method", METHODS)
def test_an_image_is_denoised_alone_and_an_even_one_stays(method: str):
    x = np.random.default_rng(0).normal(size=(3, 1, 8, 8)).astype(np.float32)
    x[1] = 5
    together = Denoise(method).apply(x)
    np.testing.assert_allclose(together[:1], Denoise(method).apply(x[:1]), rtol=1e-6)
    np.testing.assert_allclose(together[1], 5, rtol=1e-6)


# --- packages


def test_a_package_prepares_a_raw_sample_and_predicts_as_the_study_did(tmp_path: Path):
    train, test = table()
    test[0] = [NAN, 100, NAN, -100]
    torch.manual_seed(0)
    model = wb.load(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), inputs=torch.zeros(2, 4))
    of = task(train, test, FillMissing("median"), MinMax(-1, 1), ZScore())
    with wb.Study(model, of) as study:
        candidate = study.run([], on=wb.OnnxRuntime(threads=1))
        with candidate.engine() as engine:
            wanted = engine(*of.inputs("test", 5))
            engine.save(tmp_path / "package")
    with deployment.open(tmp_path / "package") as engine:
        x = test[:5]
        for step in engine.about["preprocessing"]:
            x = Preprocess.from_dict(step).apply(x)
        assert np.array_equal(engine(x), wanted)


# --- refusals

GAPS = np.array([[1, NAN], [3, 4], [5, 6]], np.float32)
PIXELS = GAPS[:, None, None]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: task(GAPS, GAPS), r"x_train holds 1 value .*DropMissing.*FillMissing.*Interpolate"),
        (lambda: task(GAPS, GAPS, ZScore()), "x_train holds 1 value that are NaN"),
        (lambda: task(GAPS + np.inf, GAPS, FillMissing()), r"x_train holds 5 values that are infinite in float32"),
        (lambda: replace(task(GAPS, GAPS, FillMissing()), preprocess=()), "train still has missing values in 1 of 3"),
        (lambda: task(GAPS, GAPS * NAN, Interpolate()), r"test still has .* 3 of 3 .* index 0.*whole row"),
        (lambda: task(GAPS * NAN, GAPS, DropMissing()), r"leave out all 3 samples of train.*FillMissing"),
        (lambda: task(GAPS, GAPS[:1], DropMissing()), "leave out all 1 samples of test"),
        (lambda: task(GAPS * [1, NAN], GAPS, FillMissing()), r"column 1 holds no value.*FillMissing\(0\)"),
        (lambda: task(GAPS * [1, NAN], GAPS, FillMissing("median")), "column 1 holds no value in the training split"),
        (lambda: task(GAPS * [1, NAN], GAPS, ZScore(), FillMissing()), "ZScore: column 1 holds no value"),
        (lambda: task(GAPS * [1, NAN], GAPS, MinMax(), FillMissing()), "MinMax: column 1 holds no value"),
        (lambda: task(np.ones((3, 2)), GAPS[1:], ZScore()), r"column 0 holds one value only.*and so do 1 more.*Scale"),
        (lambda: task(np.ones((3, 2)), GAPS[1:], MinMax()), "column 0 holds one value only"),
        (lambda: task(np.ones((3, 1, 2, 2)), np.ones((3, 1, 2, 2)), ZScore()), "ZScore: channel 0 holds one value"),
        (
            lambda: task({"a": GAPS, "b": GAPS}, {"a": GAPS, "b": GAPS}, FillMissing()),
            "FillMissing takes its numbers from one input, and preprocess acts on 2",
        ),
        (
            lambda: task({"a": PIXELS, "b": GAPS}, {"a": PIXELS, "b": GAPS}, FillMissing(0)),
            "input 2 of train still has missing values in 1 of 3 .*repair this input first",
        ),
        (lambda: task(np.zeros((3, 2), int), np.zeros((3, 2), int), ZScore()), "only ids or masks"),
        (lambda: task(PIXELS, PIXELS, Denoise(), FillMissing(0)), r"put wb.data.Interpolate\(\)"),
        (lambda: task(GAPS[1:], GAPS[1:], Denoise()), "Denoise takes images"),
        (lambda: task(GAPS[1:], GAPS[1:], MinMax(0, 1, (1, 2, 3), (2, 3, 4))), "MinMax has 3 channels"),
        (lambda: task(GAPS, GAPS, FillMissing("mean", (1, 2, 3))), "FillMissing has 3 channels"),
        (lambda: FillMissing("average"), "cannot fill with 'average'. Accepted: mean, median. Or give a number"),
        (lambda: FillMissing(NAN), "one finite number"),
        (lambda: FillMissing(0, (1.0,)), "leave out values"),
        (lambda: MinMax(1, 1), "a low below the high"),
        (lambda: MinMax(smallest=(1, 2), largest=(3, 2)), "below its largest"),
        (lambda: MinMax(smallest=(1, 2), largest=(3,)), "below its largest"),
        (lambda: Denoise("gaussian"), "no method 'gaussian'. Accepted: mean, median, non-local means"),
        (lambda: Denoise(size=4), "size=4; give an odd number from 3 to 31"),
        (lambda: Denoise(search=True), "search=True; give an odd"),
        (lambda: Denoise(strength=0), "above 0"),
        (lambda: ZScore().apply(GAPS), "ZScore is not fitted: give it to a Task"),
        (lambda: MinMax().apply(GAPS), "MinMax is not fitted"),
        (lambda: FillMissing().apply(GAPS), "FillMissing is not fitted"),
        (lambda: DropMissing().apply(GAPS), r"1 of 3 samples have missing values, the first at 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_cleaned_is_refused_in_words(make, said: str):
    with pytest.raises(DataError, match=said):
        make()


def test_resizing_and_filling_go_together():
    x = np.ones((2, 1, 4, 4), np.float32)
    x[0, 0, 1, 1] = NAN
    of = task(x, x, Interpolate(), Resize(2), DropMissing())
    assert np.array_equal(prepared(of), np.ones((2, 1, 2, 2)))
