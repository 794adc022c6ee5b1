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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_WORD = re.compile(r"[0-9]+(?:[.,][0-9]+)+|[^\W_]+")
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


class Words:
    """The words of a text, split at blanks, and what the filters ask of them."""

    def __init__(self, text: str) -> None:
        import numpy as np

        words = text.split()
        self.count = len(words)
        self.vocabulary: list[str] = list(dict.fromkeys(words))
        numbers = dict(zip(self.vocabulary, range(len(self.vocabulary)), strict=True))
        self.ids: np.ndarray = np.fromiter(
            map(numbers.__getitem__, words), np.int64, len(words)
        )  # (words,)

    @cached_property
    def occurrences(self) -> np.ndarray:
        """How often each word of the vocabulary occurs, int64 (vocabulary,)."""
        import numpy as np

        return np.bincount(self.ids, minlength=len(self.vocabulary))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Characters of each word of the vocabulary, int64 (vocabulary,)."""
        import numpy as np

        return np.fromiter(map(len, self.vocabulary), np.int64, len(self.vocabulary))

    @cached_property
    def offsets(self) -> np.ndarray:
        """Characters before each word and after the last, blanks not counted, int64 (words + 1,)."""
        import numpy as np

        offsets = np.zeros(self.count + 1, np.int64)
        np.cumsum(self.lengths[self.ids], out=offsets[1:])
        return offsets

    def find_repeats(self, longest: int) -> Iterator[Repeats]:
        """Yield the repeated sequences of 2, 3, ... `longest` words.

        A sequence is repeated only if the one without its last word is, so each length looks at
        what the one before left, a small part of most texts. Numbers of sequences come from
        sorting pairs (the sequence without its last word, that word): they are exact, no hashes.
        """
        import numpy as np

        starts = np.flatnonzero(self.occurrences[self.ids] > 1)
        kinds = self.ids[starts]
        for size in range(2, longest + 1):
            inside = int(np.searchsorted(starts, self.count - size, side="right"))
            starts, kinds = starts[:inside], kinds[:inside]
            kinds, counts = _number(kinds * len(self.vocabulary) + self.ids[starts + size - 1])
            repeated = counts[kinds] > 1
            starts, kinds = starts[repeated], kinds[repeated]
            yield Repeats(size, starts, kinds, counts)


def _number(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each key the rank of its value among the different ones, and the counts of those.

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
