"""Arrays that cannot be a `Task`: each gives one clear `DataError` before work starts."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.data import Normalize, Resize, Scale, Task, _arrays
from workbench.errors import DataError

GOOD = {
    "x_train": np.zeros((6, 4, 4, 3), np.uint8),
    "y_train": np.array([0, 1, 2, 0, 1, 2]),
    "x_test": np.zeros((3, 4, 4, 3), np.uint8),
    "y_test": np.array([0, 1, 2]),
}


def broken(value: float, *index: int) -> np.ndarray:
    x = np.zeros((6, 2, 5), np.float64)
    x[index] = value
    return x


def table(**changes: object) -> dict[str, object]:
    return {"x_train": np.zeros((6, 2)), "x_test": np.zeros((3, 2)), **changes}


CASES = [
    ("fewer labels", {"y_train": [0, 1]}, "x_train has 6 samples but y_train has 2 labels"),
    ("fewer test labels", {"y_test": [0, 1]}, "x_test has 3 samples but y_test has 2 labels"),
    ("nan", {"x_train": broken(np.nan, 3, 1, 4)}, r"x_train holds 1 value that .* first at index \(3, 1, 4\)"),
    ("inf", {"x_test": broken(-np.inf, 5, 0, 0)}, r"x_test holds 1 value .* \(5, 0, 0\)"),
    ("many nan", {"x_train": np.full((6, 2), np.nan)}, r"12 values that .* first at index \(0, 0\)"),
    ("beyond float32", {"x_train": broken(1e300, 0, 1, 2)}, "infinite in float32"),
    ("negative label", {"y_train": [0, 1, -1, 0, 1, 2]}, "label -1 at index 2"),
    ("label beyond int64", {"y_train": np.full(6, 2**63, np.uint64)}, "label -"),
    ("float labels", {"y_train": np.zeros(6)}, "float64 values.*astype"),
    ("bool labels", {"y_train": np.zeros(6, bool)}, "bool values"),
    ("text labels", {"y_train": list("abcabc")}, "numpy.unique"),
    ("object labels", {"y_train": np.array([None] * 6)}, "object values"),
    ("one-hot labels", {"y_train": np.eye(6, dtype=int)}, r"one-hot rows: y_train.argmax\(axis=1\)"),
    ("column of labels", {"y_train": np.zeros((6, 1), int)}, r"y_train.ravel\(\)"),
    ("label above classes", {"classes": ["a", "b"]}, "y_train holds the label 2 at index 2, but classes names 2"),
    ("test label above classes", {"y_test": [0, 1, 9], "classes": list("abc")}, "y_test holds the label 9 at index 2"),
    ("unseen test label", {"y_test": [0, 1, 3]}, "y_test holds the label 3 at index 2, which y_train never has"),
    ("ids as labels", {"y_train": [0, 1, 10**9] * 2, "y_test": [0, 1, 1]}, "only 3 different ones"),
    ("class named twice", {"classes": ["a", "b", "a"]}, "classes names 'a' twice"),
    ("classes as one word", {"classes": "abc"}, "list of class names"),
    ("classes as a number", {"classes": 3}, "list of class names"),
    ("empty train", {"x_train": np.zeros((0, 4, 4, 3), np.uint8), "y_train": []}, "x_train is empty"),
    ("empty test", {"x_test": np.zeros((0, 4, 4, 3), np.uint8), "y_test": np.zeros(0, int)}, "x_test is empty"),
    ("no labels", {"y_test": np.zeros(0, int)}, "y_test is empty"),
    ("samples without values", {"x_train": np.zeros((6, 0))}, "hold no values"),
    ("no axis after the batch", {"x_train": np.zeros(6)}, "batch axis first and at least one axis after it"),
    ("scalar", {"x_train": 3.0}, "batch axis first"),
    ("no inputs", {"x_train": {}}, "holds no array"),
    ("object array", {"x_train": np.array([None] * 6)}, "object values.*numpy.stack"),
    ("text", {"x_train": np.array(list("abcdef"))}, "accepted: float16, float32"),
    ("complex", {"x_train": np.zeros((6, 2), complex)}, "complex128"),
    ("dates", {"x_train": np.zeros((6, 2), "M8[s]")}, "datetime64"),
    ("ragged list", {"x_train": [[1.0], [1.0, 2.0]]}, "samples of equal shape"),
    ("sizes differ", {"x_test": np.zeros((3, 5, 4, 3), np.uint8)}, r"\(4, 4, 3\).*\(5, 4, 3\)"),
    ("dtypes differ", {"x_test": np.zeros((3, 3, 4, 4), np.float32)}, "uint8.*float32"),
    ("layouts differ", {"x_test": np.zeros((3, 3, 4, 5), np.uint8)}, "one shape, layout and dtype"),
    ("inputs differ in number", {"x_test": (np.zeros((3, 2)), np.zeros((3, 2)))}, "give both the same inputs"),
    (
        "inputs differ in order",
        {
            "x_train": {"a": np.zeros((6, 2)), "b": np.zeros((6, 2))},
            "x_test": {"b": np.zeros((3, 2)), "a": np.zeros((3, 2))},
        },
        "in the same order",
    ),
    (
        "inputs of one split differ in length",
        {"x_train": {"a": np.zeros((6, 2)), "b": np.zeros((5, 2))}},
        r"x_train\['a'\] has 6 samples but x_train\['b'\] has 5",
    ),
    ("nan in a named input", {"x_train": {"a": np.full((6, 2), np.nan)}}, r"x_train\['a'\] holds 12"),
    ("calibration too large", {"calibration": 7}, "asks for 7 samples, but the training split has 6"),
    ("calibration zero", {"calibration": 0}, "calibration is 0"),
    ("calibration a share", {"calibration": 0.5}, "calibration is 0.5"),
    ("calibration true", {"calibration": True}, "calibration is True"),
    ("seed negative", {"seed": -1}, "seed is -1"),
    ("seed text", {"seed": "x"}, "seed is 'x'"),
    ("preprocess a function", {"preprocess": [np.sqrt]}, r"not a preprocessing step. Accepted: wb.data.Scale"),
    ("preprocess a class", {"preprocess": [Scale]}, "not a preprocessing step"),
    ("preprocess one step", {"preprocess": Scale(2)}, "give a list of steps"),
    ("preprocess text", {"preprocess": "scale"}, "give a list of steps"),
    ("channels", {"preprocess": [Normalize(0.5, 0.5)]}, r"Normalize has 1 channels.*\(3, 4, 4\)"),
    ("resize a table", table(preprocess=[Resize(3)]), "Resize takes images"),
    (
        "scale ids",
        table(x_train=np.zeros((6, 2), int), x_test=np.zeros((3, 2), int), preprocess=[Scale(2)]),
        "only ids",
    ),
    ("metric text", {"metric": "accuracy"}, "give a metric"),
]


@pytest.mark.parametrize(("changes", "said"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_is_refused_in_words(changes: dict[str, object], said: str):
    with pytest.raises(DataError, match=said):
        Task.from_arrays(**{**GOOD, **changes})


def test_the_untouched_case_is_accepted():
    assert Task.from_arrays(**GOOD).count("train") == 6


def test_nan_late_in_a_large_array_is_found_at_its_index(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_arrays, "_CHUNK_BYTES", 100)
    x = np.zeros((50, 7), np.float32)
    x[33, 6] = x[44, 1] = np.nan
    with pytest.raises(DataError, match=r"holds 2 values .* first at index \(33, 6\)"):
        Task.from_arrays(x, np.arange(50) % 2, x, np.arange(50) % 2)
