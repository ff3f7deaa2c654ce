"""Files of labelled sentences, and the words that become ids."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import DataError

PADDING, UNKNOWN = 0, 1
LONGEST = 4096  # words of a sentence
LARGEST_VOCABULARY = 2**20

_RESERVED = 2
_LARGEST_BYTES = 256 * 2**20
_LABEL = re.compile(r"[0-9]{1,9}")
_HEADER = "label"
# a word with its apostrophes, as in "isn't" and "'s", or a single mark
_WORD = r"[\w']+|[^\w\s']"


@dataclass(frozen=True)
class WordTokenizer:
    """Sentences as word ids: lower-cased, cut or padded to one length.

    Attributes
    ----------
    words
        Those that have an id of their own, the first one 2; 0 is padding and 1 any other word.
    length
        Ids per sentence.
    """

    words: tuple[str, ...]
    length: int

    @classmethod
    def fitted(cls, sentences: Iterable[str], length: int, vocabulary: int) -> WordTokenizer:
        """One whose words are the most frequent of `sentences`; of equals the alphabetically first.

        Parameters
        ----------
        vocabulary
            Ids in all, padding and the unknown word included; fewer where there are not so many words.
        """
        counts = Counter(word for sentence in sentences for word in split(sentence)[:length])
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(tuple(ranked[: vocabulary - _RESERVED]), length)

    def ids(self, sentences: Sequence[str]) -> np.ndarray:
        """``(N, length)`` int64 ids of N sentences."""
        known = {word: number for number, word in enumerate(self.words, start=_RESERVED)}
        ids = np.full((len(sentences), self.length), PADDING, np.int64)
        for row, sentence in zip(ids, sentences, strict=True):
            found = [known.get(word, UNKNOWN) for word in split(sentence)[: self.length]]
            row[: len(found)] = found
        return ids

    def to_dict(self) -> dict[str, Any]:
        """What another program needs to do the same, as JSON values; `pattern` is what counts as a word."""
        return {
            "lower_case": True,
            "pattern": _WORD,
            "length": self.length,
            "padding": PADDING,
            "unknown": UNKNOWN,
            "first": _RESERVED,
            "words": list(self.words),
        }

    def __repr__(self) -> str:
        return f"<WordTokenizer of {len(self.words):,} words, {self.length} ids per sentence>"


def split(sentence: str) -> list[str]:
    """The words and marks of a sentence, lower-cased."""
    return re.findall(_WORD, sentence.lower())


def read(path: Path) -> tuple[list[str], np.ndarray]:
    """Sentences and ``(N,)`` int64 labels of a file of ``sentence<TAB>label`` lines; a header line is left out.

    Raises
    ------
    DataError
        If the file cannot be read, is over 256 MiB, is not UTF-8, holds no line, or a line is none of these: file and
        line are named.
    """
    sentences, labels = [], []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line:
            continue
        columns = line.split("\t")
        if len(columns) != 2:
            raise DataError(f"{path}, line {number} has {len(columns)} columns; write sentence<TAB>label.")
        sentence, label = columns[0], columns[1].strip()
        if number == 1 and label == _HEADER:
            continue
        if not _LABEL.fullmatch(label):
            raise DataError(f"{path}, line {number}: the label is {label[:40]!r}; give a whole number from 0 on.")
        if not split(sentence):
            raise DataError(f"{path}, line {number} has no word before its label {label}; leave the line out.")
        sentences.append(sentence)
        labels.append(int(label))
    if not sentences:
        raise DataError(f"{path} holds no sentence; write sentence<TAB>label, one to a line.")
    return sentences, np.array(labels, np.int64)


def _text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > _LARGEST_BYTES:
            raise DataError(f"{path} has {size} bytes; at most {_LARGEST_BYTES} are accepted.")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); the folder is to hold train.tsv and test.tsv, with "
            "sentence<TAB>label lines."
        ) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line} is not UTF-8; save the file as UTF-8.") from None
