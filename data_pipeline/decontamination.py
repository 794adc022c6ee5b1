"""The word sequences of evaluation sets, and documents that share one (Brown et al. 2020, app. C).

A sequence is looked up by hash, and every hit is compared word by word: none is found that is not
there, and none that is there is missed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.configs.corpus import DecontaminationConfig
from shoal.configs.errors import DataError
from shoal.data_pipeline.ngrams import (
    Column,
    Lexicon,
    Words,
    find_known,
    find_words,
    find_words_of_each,
    hash_ngrams,
    make_vocabulary,
    number_words,
    stir,
)
from shoal.data_pipeline.sources import read_lines, resolve_path

if TYPE_CHECKING:
    import numpy as np

_BUCKETS_PER_SEQUENCE = 8  # a sequence that is not there passes the table once in so many times


@dataclass(frozen=True)
class Hit:
    """A sequence of words that a document shares with an evaluation set."""

    place: str
    """file:line, the file as configured."""
    words: str

    def __str__(self) -> str:
        return f"{self.place}: {self.words}"


@dataclass(frozen=True)
class Index:
    """The sequences of all evaluation texts: about 20 bytes a word, and the different words."""

    size: int
    """Words of a sequence."""
    too_short: dict[str, int]
    """Records of each file in which no text has so many words: they cannot be found."""
    sequences: int
    """How many there are, equal ones counted as often as they occur."""
    _places: list[str]
    """file:line of each text."""
    _vocabulary: dict[str, int]
    """Number of each word, from 1 on."""
    _words: np.ndarray
    """Numbers of the words of all texts, a 0 after each text, int32."""
    _borders: np.ndarray
    """Where in `_words` each text ends, int64 (texts,)."""
    _values: np.ndarray
    """What the hash makes of each word number, uint64 (vocabulary + 1,)."""
    _hashes: np.ndarray
    """Of the sequences, rising, uint64 (sequences,)."""
    _starts: np.ndarray
    """Where in `_words` the sequence of each hash begins, int64 (sequences,)."""
    _table: np.ndarray
    """Which upper bits of a hash occur, bool (a power of two,)."""

    @classmethod
    def build(cls, config: DecontaminationConfig) -> Index:
        """Read the evaluation sets.

        Raises:
            DataError: a file is missing or damaged, holds something else than JSON lines, or no
                text long enough.
        """
        places: list[str] = []
        texts: list[list[str]] = []
        too_short: dict[str, int] = {}
        for path in config.against:
            before = len(texts)
            too_short[path] = 0
            for place, record in _read_records(path):
                found = [words for text in _list_texts(record) if (words := find_words(text))]
                long = [words for words in found if len(words) >= config.ngram]
                too_short[path] += not long
                places += [place] * len(long)
                texts += long
            if len(texts) == before:
                raise DataError(
                    f"no text of {config.ngram} words or more: nothing could be found by it",
                    where=path,
                    fix="leave it out of decontaminate.against, or lower decontaminate.ngram",
                )
        return cls._build(config.ngram, too_short, places, texts)

    @classmethod
    def _build(
        cls, size: int, too_short: dict[str, int], places: list[str], texts: list[list[str]]
    ) -> Index:
        import numpy as np

        vocabulary = make_vocabulary(texts)
        words = np.zeros(sum(map(len, texts)) + len(texts), np.int32)
        borders = np.cumsum([len(text) + 1 for text in texts]) - 1
        for end, text in zip(borders.tolist(), texts, strict=True):
            words[end - len(text) : end] = number_words(text, vocabulary)
        values = stir(np.arange(len(vocabulary) + 1, dtype=np.uint64))
        starts = find_known(words, size)
        hashes = hash_ngrams(words, starts, size, values)
        order = np.argsort(hashes, kind="stable")
        bits = max(10, (len(hashes) * _BUCKETS_PER_SEQUENCE - 1).bit_length())
        table = np.zeros(1 << bits, bool)
        table[hashes >> np.uint64(64 - bits)] = True
        return cls(
            size, too_short, len(starts), places, vocabulary, words, borders, values,
            hashes[order], starts[order], table,
        )  # fmt: skip

    def find(self, text: str) -> Hit | None:
        """Return the first sequence of a text that occurs in an evaluation text, or None."""
        return self.find_numbers(self.number(find_words(text)))

    def number(self, words: list[str]) -> np.ndarray:
        """Return the number of each word, 0 for those of no evaluation text, int32 (words,)."""
        return number_words(words, self._vocabulary)

    def find_numbers(self, words: np.ndarray) -> Hit | None:
        """Do what `find` does for a text whose words are numbered."""
        import numpy as np

        starts = find_known(words, self.size)
        hashes = hash_ngrams(words, starts, self.size, self._values)
        shift = np.uint64(64 - (len(self._table) - 1).bit_length())
        likely = self._table[hashes >> shift]
        starts, hashes = starts[likely], hashes[likely]
        left = np.searchsorted(self._hashes, hashes, side="left")
        right = np.searchsorted(self._hashes, hashes, side="right")
        for number in np.flatnonzero(left < right).tolist():
            start = int(starts[number])
            sequence = words[start : start + self.size]
            for there in self._starts[left[number] : right[number]].tolist():
                if np.array_equal(self._words[there : there + self.size], sequence):
                    return self._describe(there)
        return None

    def _describe(self, start: int) -> Hit:
        import numpy as np

        names = list(self._vocabulary)
        words = self._words[start : start + self.size].tolist()
        place = self._places[int(np.searchsorted(self._borders, start))]
        return Hit(place, " ".join(names[word - 1] for word in words))


class Matcher:
    """Finds what `Index.find` finds, in texts read by a lexicon, several times as fast.

    A word between blanks is taken apart once for all texts that hold it.
    """

    def __init__(self, index: Index, lexicon: Lexicon) -> None:
        self.index = index
        self._lexicon = lexicon
        self._begin()

    def _begin(self) -> None:
        import numpy as np

        self._generation = self._lexicon.generation
        self._known = 0
        self._numbers = Column(np.int32)
        """Numbers in the index of what the words of the lexicon consist of, one after the other."""
        self._firsts, self._counts = Column(np.int64), Column(np.int64)
        """Where those of a word begin, and how many there are."""

    def find(self, words: Words) -> Hit | None:
        """Return the first sequence that occurs in an evaluation text, or None."""
        import numpy as np

        self._keep_up()
        counts = self._counts.values[words.ids]
        ends = np.cumsum(counts)
        shifts = np.repeat(self._firsts.values[words.ids] - ends + counts, counts)
        return self.index.find_numbers(self._numbers.values[shifts + np.arange(len(shifts))])

    def _keep_up(self) -> None:
        """Take apart the words that are new in the lexicon."""
        import numpy as np

        if self._generation != self._lexicon.generation:
            self._begin()
        new = self._lexicon.words[self._known :]
        if not new:
            return
        words, counts = find_words_of_each(new)
        self._firsts.extend(np.cumsum(counts) - counts + len(self._numbers.values))
        self._counts.extend(counts)
        self._numbers.extend(self.index.number(words))
        self._known += len(new)


def _read_records(path: str) -> Iterator[tuple[str, Any]]:
    """Yield the records of a file of JSON lines, each with its place."""
    for number, line in enumerate(read_lines(Path(resolve_path(path)).expanduser()), 1):
        place = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            yield place, json.loads(line.removeprefix(b"\xef\xbb\xbf"))
        except (ValueError, RecursionError):
            raise DataError(
                "an evaluation set must be JSON lines, each a record", where=place
            ) from None


def _list_texts(value: Any) -> Iterator[str]:
    """Yield every string in a record, whatever its field, lists and inner records included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _list_texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _list_texts(inner)
