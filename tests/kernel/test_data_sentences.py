"""Sentences become ids by the words of the training split alone, and files that are wrong are named with the line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import workbench as wb
from workbench.data import _sentences
from workbench.errors import DataError

TRAIN = "the film is good\t1\nThe film is bad\t0\nit is n't the film , is it ?\t1\n"
TEST = "the plot is bad\t0\ngood\t1\n"


def folder(path: Path, **files: str | bytes) -> Path:
    for name, content in {"train": TRAIN, "test": TEST, **files}.items():
        target = path / f"{name}.tsv"
        target.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_ids_are_by_frequency_with_0_for_padding_and_1_for_unseen_words(tmp_path):
    task = wb.tasks.sentences(folder(tmp_path), length=5)
    # by hand: is 4; film, the 3; it 2 (of which one is past the fifth word); bad, good, n't 1
    assert task.tokenizer.words == ("film", "is", "the", "bad", "good", "it", "n't")
    x, y = task.raw("train")
    assert x.dtype == np.int64 and x.tolist() == [[4, 2, 3, 6, 0], [4, 2, 3, 5, 0], [7, 3, 8, 4, 2]]
    assert y.tolist() == [1, 0, 1]
    assert task.raw("test")[0].tolist() == [[4, 1, 3, 5, 0], [6, 0, 0, 0, 0]]


def test_the_vocabulary_comes_from_the_training_split_only_and_is_as_large_as_asked(tmp_path):
    task = wb.tasks.sentences(folder(tmp_path, test="plot plot plot\t0\n"), length=5, vocabulary=4)
    assert task.tokenizer.words == ("film", "is")
    assert task.raw("test")[0].tolist() == [[1, 1, 1, 0, 0]]
    assert int(task.raw("train")[0].max()) == 3


def test_marks_are_words_of_their_own_and_apostrophes_belong_to_the_word():
    assert _sentences.split("It isn't GOOD, is it?!") == ["it", "isn't", "good", ",", "is", "it", "?", "!"]


def test_the_dev_file_judges_where_it_is_asked_for_and_a_header_is_no_sentence(tmp_path):
    path = folder(tmp_path, dev="sentence\tlabel\r\nbad\t0\r\n")
    task = wb.tasks.sentences(path, judged_by="dev", classes=["negative", "positive"])
    assert task.count("test") == 1 and task.classes == ("negative", "positive")
    assert task.name == tmp_path.name and task.inputs("test", 1)[0].shape == (1, 32)


def test_the_tokenizer_travels_with_the_description_and_is_enough_to_make_ids(tmp_path):
    task = wb.tasks.sentences(folder(tmp_path), length=6)
    told = json.loads(json.dumps(task.describe()))["tokenizer"]
    words = re.findall(told["pattern"], "Good film, awful!".lower())
    known = {word: number for number, word in enumerate(told["words"], start=told["first"])}
    ids = [known.get(word, told["unknown"]) for word in words[: told["length"]]]
    ids += [told["padding"]] * (told["length"] - len(ids))
    assert task.tokenizer.ids(["Good film, awful!"]).tolist() == [ids]
    assert "tokenizer" not in wb.tasks.digits().describe()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("good\t1\nbad\n", r"train\.tsv, line 2 has 1 columns"),
        ("good\t1\nbad\t0\tagain\n", r"train\.tsv, line 2 has 3 columns"),
        ("good\tyes\n", r"train\.tsv, line 1: the label is 'yes'"),
        ("good\t1\nbad\t-1\n", r"train\.tsv, line 2: the label is '-1'"),
        ("good\t1\nbad\t" + "9" * 50 + "\n", r"line 2: the label is '9{40}'"),
        ("good\t1\n  \t0\n", r"train\.tsv, line 2 has no word"),
        ("", r"train\.tsv holds no sentence"),
        ("\n\r\n", r"train\.tsv holds no sentence"),
        ("sentence\tlabel\n", r"train\.tsv holds no sentence"),
        (b"good\t1\nb\xff\xfed\t0\n", r"train\.tsv, line 2 is not UTF-8"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path, content, said):
    with pytest.raises(DataError, match=said):
        wb.tasks.sentences(folder(tmp_path, train=content))


def test_a_folder_without_the_files_says_what_it_is_to_hold(tmp_path):
    with pytest.raises(DataError, match=r"train\.tsv cannot be read.*train\.tsv and test\.tsv"):
        wb.tasks.sentences(tmp_path)
    with pytest.raises(DataError, match=r"dev\.tsv cannot be read"):
        wb.tasks.sentences(folder(tmp_path), judged_by="dev")


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(_sentences, "_LARGEST_BYTES", 10)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("it was read"))
    with pytest.raises(DataError, match=r"train\.tsv has \d+ bytes; at most 10"):
        wb.tasks.sentences(folder(tmp_path))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"length": 0}, "length is 0; give a whole number from 1 to 4096"),
        ({"length": True}, "length is True"),
        ({"vocabulary": 2}, "vocabulary is 2; give a whole number from 3"),
        ({"vocabulary": 10**9}, "vocabulary is 1000000000"),
        ({"judged_by": "train"}, "judged_by is 'train'; give 'test' or 'dev'"),
        ({"classes": ["only one"]}, "classes names 1"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, settings, said):
    with pytest.raises(DataError, match=said):
        wb.tasks.sentences(folder(tmp_path), **settings)


def test_the_real_data_have_their_published_size(shared_data):
    task = wb.tasks.sentences(shared_data / "sst2")
    assert (task.count("train"), task.count("test"), task.count("calibration")) == (6920, 1821, 512)
    assert len(task.tokenizer.words) == 8190
    assert task.classes == ("0", "1")
