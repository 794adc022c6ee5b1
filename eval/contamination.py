"""Test items that training has seen: a search for shared n-grams of words.

The rule of Brown et al. 2020 (appendix C): an item is marked when one of its 13-grams of
lower-case words occurs in the training text, n-grams that occur in more than ten training
documents (licences, headings) not counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from shoal.data_pipeline.order import scramble

GRAM = 13
COMMON_DOCUMENTS = 10
_WORDS = re.compile(r"[^\W_]+")
_KEY = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: odd, and no pattern in its bits
_FACTORS = np.array([pow(int(_KEY), i, 2**64) for i in range(1, GRAM + 1)], np.uint64)


@dataclass(frozen=True)
class Overlap:
    """Result of a search."""

    shares: list[float]
    """For each item the share of its n-grams found in training text."""
    documents: int
    """Training documents read."""

    @property
    def contaminated(self) -> list[int]:
        """Numbers of the items with at least one n-gram found."""
        return [number for number, share in enumerate(self.shares) if share > 0]


def find_overlap(items: Sequence[str], training: Iterable[str]) -> Overlap:
    """Search every item's n-grams in the training texts, in one pass over them.

    Words the items do not use cannot be part of a match, so only the items' own words get a
    number; an n-gram is the hash of its 13 numbers.

    Args:
        items: Texts of the test items; those shorter than 13 words cannot match.
        training: Training documents.
    """
    numbers: dict[str, int] = {}
    grams = [_grams(text, numbers, grow=True) for text in items]
    wanted = np.unique(np.concatenate([*grams, np.zeros(0, np.uint64)]))
    seen = np.zeros(len(wanted), dtype=np.int64)
    documents = 0
    for text in training:
        documents += 1
        found = np.unique(_grams(text, numbers, grow=False))
        if len(wanted) and len(found):
            places = np.searchsorted(wanted, found)
            places[places == len(wanted)] = 0
            seen[places[wanted[places] == found]] += 1
    counted = wanted[(seen > 0) & (seen <= COMMON_DOCUMENTS)]
    shares = [float(np.isin(gram, counted).mean()) if len(gram) else 0.0 for gram in grams]
    return Overlap(shares, documents)


def _grams(text: str, numbers: dict[str, int], *, grow: bool) -> np.ndarray:
    """Hashes of a text's n-grams; those with an unnumbered word are left out."""
    words = _WORDS.findall(text.lower())
    if len(words) < GRAM:
        return np.zeros(0, np.uint64)
    if grow:
        ids = [numbers.setdefault(word, len(numbers) + 1) for word in words]
    else:
        ids = [numbers.get(word, 0) for word in words]
    mixed = scramble(np.asarray(ids, dtype=np.uint64), _KEY)
    windows = np.lib.stride_tricks.sliding_window_view(mixed, GRAM)  # (grams, 13)
    hashes = windows @ _FACTORS  # wraps around at 2^64, as meant
    known = np.lib.stride_tricks.sliding_window_view(np.asarray(ids) > 0, GRAM).all(axis=1)
    return hashes[known]
