"""Words as numbers, and the sequences of them: counted within a text, hashed to look them up.

Numbers are given in the order in which words first occur, so nothing here depends on the hash seed
of the process.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, repeat
from string import punctuation
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_WORD = re.compile(r"[0-9]+(?:[.,][0-9]+)+|[^\W_]+")
_WORD_OR_BREAK = re.compile(_WORD.pattern + r"|\n")
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
LETTERED = 1
"""Trait of a word: it has a letter."""
SPOKEN = 2
"""Trait of a word: it has a letter or a digit; what has neither is a mark, no word."""
STOP_TRAITS = 0xFF << 8
"""Traits of stop words, in any case: a bit for each."""
_STOP_TRAITS = {word: 1 << 8 + number for number, word in enumerate(STOP_WORDS)}
LEXICON_WORDS = 1 << 18
"""Words after which a lexicon begins anew: some 40 MB."""

_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that a power of it never vanishes modulo 2^64


def find_words(text: str) -> list[str]:
    """Return the words of a text as evaluation texts are compared by.

    Lower case, letters and digits only: what is written with other blanks, quotes, hyphens or
    ligatures is the same. Numbers stay as they are, `0.05` being one word: with every digit made a
    zero, tables of numbers would all be alike.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _WORD.findall(text.lower())


def find_words_of_each(texts: list[str]) -> tuple[list[str], np.ndarray]:
    """Do what `find_words` does for many short texts without blanks, several times as fast.

    Returns:
        The words of all, one after the other, and how many each text has, int64 (texts,).
    """
    import numpy as np

    joined = "".join(text + "\n" for text in texts)
    if not joined.isascii():
        joined = unicodedata.normalize("NFKC", joined)
    found = _WORD_OR_BREAK.findall(joined.lower())
    breaks = np.flatnonzero(np.fromiter(map("\n".__eq__, found), bool, len(found)))
    return [word for word in found if word != "\n"], np.diff(breaks, prepend=-1) - 1


def hash_ngrams(words: np.ndarray, starts: np.ndarray, size: int, values: np.ndarray) -> np.ndarray:
    """Hash sequences of words; equal sequences have equal hashes, others hardly ever.

    Args:
        words: Numbers of the words of a text, int (words,).
        starts: Where the sequences begin, int (n,).
        size: Words of a sequence.
        values: A random number of 64 bits for each word number, uint64 (vocabulary,).

    Returns:
        A polynomial in the values modulo 2^64, stirred, uint64 (n,).
    """
    import numpy as np

    hashes = np.zeros(len(starts), np.uint64)
    for offset in range(size):
        hashes *= np.uint64(_MULTIPLIER)
        hashes += values[words[starts + offset]]
    return stir(hashes)


def stir(numbers: np.ndarray) -> np.ndarray:
    """Spread numbers evenly over 64 bits (the finalizer of SplitMix64, Steele et al. 2014)."""
    import numpy as np

    mixed = numbers.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


@dataclass(frozen=True)
class Repeats:
    """The sequences of `size` words that occur more than once in a text."""

    size: int
    starts: np.ndarray
    """Each place where one begins, rising, int64 (n,)."""
    kinds: np.ndarray
    """Which sequence it is: equal numbers, equal words, int64 (n,)."""
    counts: np.ndarray
    """How often each kind occurs; those that occur once are not in `starts`, int64 (kinds,)."""


class Column:
    """A numpy array that grows at its end."""

    def __init__(self, dtype: type) -> None:
        import numpy as np

        self._data: np.ndarray = np.empty(1024, dtype)
        self._size = 0

    def extend(self, values: np.ndarray) -> None:
        """Put values at the end."""
        import numpy as np

        size = self._size + len(values)
        if size > len(self._data):
            self._data = np.concatenate([self._data, np.empty(size, self._data.dtype)])
        self._data[self._size : size] = values
        self._size = size

    @property
    def values(self) -> np.ndarray:
        """What is in it, (size,)."""
        return self._data[: self._size]


class Lexicon(dict[str, int]):
    """The number of every word met, and what is known of it; bounded, for it begins anew when full.

    Texts repeat words, so what is worked out for a word serves many texts. Numbers depend on what
    was read before: results may use whether they are equal, never which they are.
    """

    def __init__(self, capacity: int = LEXICON_WORDS) -> None:
        super().__init__()
        self.capacity = capacity
        self.generation = 0
        """How often it began anew: numbers of different generations have nothing in common."""
        self._begin()

    def _begin(self) -> None:
        import numpy as np

        self.clear()
        self.words: list[str] = []
        """The words by their numbers."""
        self._lengths, self._traits = Column(np.int64), Column(np.uint16)

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self.words)
        self.words.append(word)
        return number

    def read(self, text: str) -> Words:
        """Return the words of a text, split at blanks."""
        import numpy as np

        words = text.split()
        if len(self) > self.capacity:
            self.generation += 1
            self._begin()
        known = len(self.words)
        ids: np.ndarray = np.fromiter(map(self.__getitem__, words), np.int64, len(words))
        if len(self.words) > known:
            self._describe(self.words[known:])
        lengths, traits = self._lengths.values[ids], self._traits.values[ids]
        return Words(self, self.generation, ids, lengths, traits)

    def _describe(self, words: list[str]) -> None:
        """Enter what is known of new words."""
        import numpy as np

        self._lengths.extend(np.fromiter(map(len, words), np.int64, len(words)))
        bare = map(str.strip, words, repeat(punctuation))  # decides most of them at once
        lettered = np.fromiter(map(str.isalpha, bare), bool, len(words))
        spoken = lettered.copy()
        for number in np.flatnonzero(~lettered).tolist():
            word = words[number]
            lettered[number] = any(map(str.isalpha, word))
            spoken[number] = lettered[number] or any(map(str.isalnum, word))
        stops = np.fromiter(
            map(_STOP_TRAITS.get, map(str.lower, words), repeat(0)), np.uint16, len(words)
        )
        self._traits.extend(lettered * np.uint16(LETTERED) | spoken * np.uint16(SPOKEN) | stops)


@dataclass(frozen=True)
class Words:
    """The words of a text, and what the filters ask of them."""

    lexicon: Lexicon
    generation: int
    """Of the lexicon: later ones give other numbers."""
    ids: np.ndarray
    """Number of each word, int64 (words,)."""
    lengths: np.ndarray
    """Characters of each, int64 (words,)."""
    traits: np.ndarray
    """Bits: LETTERED, SPOKEN, and one of STOP_TRAITS for each stop word, uint16 (words,)."""

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.ids)

    @cached_property
    def offsets(self) -> np.ndarray:
        """Characters before each word and after the last, without blanks, int64 (words + 1,)."""
        import numpy as np

        offsets = np.zeros(self.count + 1, np.int64)
        np.cumsum(self.lengths, out=offsets[1:])
        return offsets

    def find_repeats(self, shortest: int, longest: int) -> Iterator[Repeats]:
        """Yield the repeated sequences of `shortest` to `longest` words, one size after the other.

        A sequence is repeated only if the one without its last word is, so each size looks at
        what the one before left, a small part of most texts. Numbers of sequences come from
        sorting pairs (the sequence without its last word, that word): they are exact, no hashes.
        """
        import numpy as np

        radix = len(self.lexicon.words)
        starts: np.ndarray = np.arange(self.count)
        kinds = self.ids
        for size in range(1, longest + 1):
            if size == 1 < shortest:
                continue  # most words are repeated: to look for the others is of no use
            inside = int(np.searchsorted(starts, self.count - size, side="right"))
            starts, kinds = starts[:inside], kinds[:inside]
            if size > 1:
                kinds = kinds * radix + self.ids[starts + size - 1]
            kinds, counts = _number(kinds)
            repeated = counts[kinds] > 1
            starts, kinds = starts[repeated], kinds[repeated]
            if size >= shortest:
                yield Repeats(size, starts, kinds, counts)


def _number(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each key the rank of its value, and how often each value occurs.

    Like `numpy.unique` with inverse and counts, at a third of its price for short arrays.
    """
    import numpy as np

    if not len(keys):
        return keys, np.zeros(0, np.int64)
    order = np.argsort(keys)
    ordered = keys[order]
    ranks = np.zeros(len(keys), np.int64)
    np.cumsum(ordered[1:] != ordered[:-1], out=ranks[1:])
    kinds = np.empty_like(ranks)
    kinds[order] = ranks
    return kinds, np.bincount(ranks)


def number_words(words: list[str], vocabulary: dict[str, int]) -> np.ndarray:
    """Return the number of each word, 0 for those not in the vocabulary, int32 (words,)."""
    import numpy as np

    return np.fromiter(map(vocabulary.get, words, repeat(0)), np.int32, len(words))


def find_known(words: np.ndarray, size: int) -> np.ndarray:
    """Return where `size` words begin of which none has the number 0, rising, int64 (n,)."""
    import numpy as np

    if len(words) < size:
        return np.zeros(0, np.int64)
    unknown = np.zeros(len(words) + 1, np.int64)
    np.cumsum(words == 0, out=unknown[1:])
    return np.flatnonzero(unknown[size:] == unknown[:-size])


def make_vocabulary(texts: list[list[str]]) -> dict[str, int]:
    """Number the words of several texts from 1 on."""
    words = dict.fromkeys(chain.from_iterable(texts))
    return {word: number for number, word in enumerate(words, 1)}
