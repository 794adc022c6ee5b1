"""Words that are encoded once: text is cut where no token can cross, and known pieces looked up.

In GPT-2's pattern a blank between two characters that are no white space can only be the first
character of a match: ` ?\\p{L}+` and its like take it along, and the patterns for white space need
more of it. So a text may be cut before every such blank, each piece encoded alone, and a piece that
was seen before need not be encoded again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import compress

import numpy as np

_ODD = re.compile(r" \s|[^\S ] ")  # a blank beside other white space
_ODD_PAIRS = ("  ", " \n", "\n ")
# White space that is neither blank nor line feed.
_RARE = [c for c in map(chr, range(0x3001)) if c.isspace() and c not in " \n"]
_MAX_PIECES, _MAX_IDS = 1 << 19, 1 << 23
"""Kept at most; with more, all are forgotten: what is frequent is soon known again."""


class WordEncoder:
    """Encodes texts by their pieces.

    Args:
        encode: Gives the ids of any text, by GPT-2's pattern.
        token_bytes: Bytes of each id.  # (vocab,)
    """

    def __init__(self, encode: Callable[[str], np.ndarray], token_bytes: np.ndarray) -> None:
        self._encode = encode
        self._token_bytes = token_bytes
        self._forget()

    def _forget(self) -> None:
        self._fresh: list[str] = []  # pieces with a number whose ids are not known yet
        self._heads = _Numbers("", self)  # of pieces that a text begins with
        self._others = _Numbers(" ", self)  # of those after a blank, which the keys leave out
        self.count = 0
        self._starts = np.zeros(1024, np.int64)  # of a piece's ids among all
        self._sizes = np.zeros(1024, np.int64)
        self._ids = np.zeros(4096, np.uint32)
        self._used = 0

    def number(self, piece: str) -> int:
        """Give a piece that is new the next number."""
        self._fresh.append(piece)
        return self.count + len(self._fresh) - 1

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text.  # each (tokens,) uint32"""
        if self.count > _MAX_PIECES or self._used > _MAX_IDS:
            self._forget()
        numbers: list[int] = []
        lasts = np.empty(len(texts), np.int64)
        for place, text in enumerate(texts):
            pieces = cut_text(text)
            numbers.append(self._heads[pieces[0]])
            numbers.extend(map(self._others.__getitem__, pieces[1:]))
            lasts[place] = len(numbers) - 1
        self._learn()
        chosen = np.asarray(numbers, np.int64)
        sizes = self._sizes[chosen]
        ends = np.cumsum(sizes)
        shifts = np.repeat(self._starts[chosen] - (ends - sizes), sizes)
        ids = self._ids[shifts + np.arange(len(shifts))]
        return np.split(ids, ends[lasts[:-1]]) if texts else []

    def _learn(self) -> None:
        """Encode the pieces that are new.

        Those that begin with a blank and end with something else are encoded as one text, which may
        be cut where it was joined.
        """
        fresh, self._fresh = self._fresh, []
        whole = [piece.startswith(" ") and not piece[-1].isspace() for piece in fresh]
        joined = np.flatnonzero(whole)
        if len(joined):
            text = "".join(compress(fresh, whole))
            ids = self._encode(text)
            sizes = [len(piece.encode()) for piece in compress(fresh, whole)]
            ends = np.searchsorted(np.cumsum(self._token_bytes[ids]), np.cumsum(sizes)) + 1
            self._keep(self.count + joined, np.diff(ends, prepend=0), ids)
        for number in np.flatnonzero(np.logical_not(whole)):
            ids = self._encode(fresh[number])
            self._keep(self.count + np.asarray([number]), np.asarray([len(ids)]), ids)
        self.count += len(fresh)

    def _keep(self, numbers: np.ndarray, sizes: np.ndarray, ids: np.ndarray) -> None:
        """Note the ids of some pieces, one after the other."""
        self._starts = _make_room(self._starts, int(numbers[-1]) + 1)
        self._sizes = _make_room(self._sizes, int(numbers[-1]) + 1)
        self._ids = _make_room(self._ids, self._used + len(ids))
        self._starts[numbers] = self._used + np.cumsum(sizes) - sizes
        self._sizes[numbers] = sizes
        self._ids[self._used : self._used + len(ids)] = ids
        self._used += len(ids)


class _Numbers(dict[str, int]):
    """The number of each piece, given when it is first looked up."""

    def __init__(self, before: str, encoder: WordEncoder) -> None:
        super().__init__()
        self._before = before
        self._encoder = encoder

    def __missing__(self, piece: str) -> int:
        self[piece] = number = self._encoder.number(self._before + piece)
        return number


def _make_room(array: np.ndarray, size: int) -> np.ndarray:
    if size <= len(array):
        return array
    larger = np.zeros(max(size, 2 * len(array)), array.dtype)
    larger[: len(array)] = array
    return larger


def cut_text(text: str) -> list[str]:
    """Cut a text at blanks between characters that are no white space; the blanks are left out.

    `str.isspace` and `\\s` know at least the white space that the pattern knows: a piece that is
    longer than it need be does no harm.
    """
    parts = text.split(" ")
    if parts[0] and parts[-1] and not _has_odd_blanks(text):
        return parts
    pieces: list[str] = []
    run = [parts[0]]
    for part in parts[1:]:
        last = run[-1]
        if not part or not last or part[0].isspace() or last[-1].isspace():
            run.append(part)
        else:
            pieces.append(" ".join(run))
            run = [part]
    pieces.append(" ".join(run))
    return pieces


def _has_odd_blanks(text: str) -> bool:
    """Whether a blank stands beside other white space; quickly, where the text is plain."""
    if any(character in text for character in _RARE):
        return _ODD.search(text) is not None
    return any(pair in text for pair in _ODD_PAIRS)
