"""Which documents may be duplicates, how similar they truly are, and which of them stay.

Documents are numbers in the order of the corpus. A pair is one 64-bit number, the later document in
the upper half, so that sorted pairs are grouped by the later document, its earlier ones rising.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

GROUP_PAIRS = 16
"""Earlier members that each of a group is paired with; larger groups are thinned out."""

LARGE_GROUP_PAIRS = 4
"""The same in larger groups: half of them the group's first, half those just before a member. A
hundred thousand pages of one template then give 400,000 pairs a band, not 5e9."""

DOCUMENT_PAIRS = 16
"""Pairs that a document keeps over all bands, those of the greatest weight."""

DOCUMENTS = 2**32
"""What the halves of a pair can number."""

_HALF = 32
_WEIGHT = 2**32  # of a pair, divided by the members of its group
_REPEATED = 3
_RENAMED_SHARE = 0.02
_RARER = 4


def find_twins(digests: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return for each document the first one of the same digest, -1 for the first ones themselves.

    Args:
        digests: # (documents, 2) uint64

    Returns:
        # (documents,) int64; it takes about 50 bytes a document on the way.
    """
    import numpy as np

    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: within a group as in the corpus
    same = np.zeros(len(order), bool)
    for column in range(digests.shape[1]):
        values = digests[order, column]
        different = values[1:] != values[:-1]
        same[1:] = ~different if column == 0 else same[1:] & ~different
    twins = np.full(len(order), -1, np.int64)
    starts = _spread_starts(same)
    twins[order[same]] = order[starts[same]]
    return twins


def _spread_starts(same: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return where the group of each place begins; `same` tells that a place goes on with one."""
    import numpy as np

    places = np.arange(len(same))
    return np.maximum.accumulate(np.where(same, 0, places)) if len(same) else places


def pair_band(keys: np.ndarray[Any, Any], documents: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the pairs of documents that share a key, at most GROUP_PAIRS a later one.

    Args:
        keys: # (n,) uint64
        documents: Their numbers, rising.  # (n,) int64

    Returns:
        The pairs, sorted, and the weight of each: what few documents share tells two copies from
        two pages of one template.  # (2, pairs) uint64
    """
    import numpy as np

    order = np.argsort(keys, kind="stable")
    values = keys[order]
    same = np.zeros(len(order), bool)
    same[1:] = values[1:] == values[:-1]
    member = same.copy()
    member[:-1] |= same[1:]  # in a group of two or more
    order, same = order[member], same[member]
    numbers, starts = documents[order], _spread_starts(same)
    places = np.arange(len(numbers))
    ranks = places - starts
    sizes = np.bincount(starts, minlength=1)[starts]
    weights = np.uint64(_WEIGHT) // sizes.astype(np.uint64)
    halves = np.where(sizes <= GROUP_PAIRS + 1, GROUP_PAIRS, LARGE_GROUP_PAIRS) // 2
    del sizes
    counts = np.minimum(ranks, 2 * halves)
    # Written straight to where they belong: sorting would hold all pairs several times.
    sequence = np.argsort(numbers)
    ends = np.empty_like(counts)
    ends[sequence] = np.cumsum(counts[sequence])
    del sequence
    both = np.empty((2, int(counts.sum())), np.uint64)
    for step in range(GROUP_PAIRS // 2):
        for others, targets, here in (
            (starts + step, ends - counts + step, (ranks > step) & (step < halves)),
            # those just before it, unless they are among the group's first
            (places - step - 1, ends - step - 1, (ranks > step + halves) & (step < halves)),
        ):
            both[0, targets[here]] = _join(numbers[here], numbers[others[here]])
            both[1, targets[here]] = weights[here]
    return both


def _join(later: np.ndarray[Any, Any], earlier: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import numpy as np

    return (later.astype(np.uint64) << np.uint64(_HALF)) | earlier.astype(np.uint64)


def split_pairs(
    pairs: np.ndarray[Any, Any],
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the later and the earlier documents of pairs.  # (pairs,) int64 each"""
    import numpy as np

    later = (pairs >> np.uint64(_HALF)).astype(np.int64)
    return later, (pairs & np.uint64(DOCUMENTS - 1)).astype(np.int64)


def start_pairs(later: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the least pair that each later document can have.  # (n,) uint64"""
    import numpy as np

    return later.astype(np.uint64) << np.uint64(_HALF)


def merge_pairs(bands: Iterable[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Return the pairs of all bands, sorted, at most DOCUMENT_PAIRS for a later document.

    Args:
        bands: As `pair_band` returns them.
    """
    import numpy as np

    pairs, weights = np.empty(0, np.uint64), np.empty(0, np.uint64)
    for band in bands:
        both = np.concatenate([pairs, band[0]])
        order = np.argsort(both, kind="stable")
        both, summands = both[order], np.concatenate([weights, band[1]])[order]
        new = np.ones(len(both), bool)
        new[1:] = both[1:] != both[:-1]
        starts = np.flatnonzero(new)
        pairs = both[starts]
        weights = np.add.reduceat(summands, starts) if len(starts) else summands
        pairs, weights = _trim(pairs, weights)
    return pairs


def _trim(
    pairs: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Keep, of each later document, the pairs of the greatest weight, of equal ones the first."""
    import numpy as np

    later, earlier = split_pairs(pairs)
    same = np.zeros(len(pairs), bool)
    same[1:] = later[1:] == later[:-1]
    starts = _spread_starts(same)
    many = np.bincount(starts, minlength=1)[starts] > DOCUMENT_PAIRS
    of_many = np.flatnonzero(many)
    if len(of_many) == 0:
        return pairs, weights
    order = np.lexsort((earlier[of_many], -weights[of_many].astype(np.int64), later[of_many]))
    # sorted by the later document first, so that groups stand where they stood
    ranks = np.arange(len(order)) - _spread_starts(same[of_many])
    kept = np.concatenate([np.flatnonzero(~many), of_many[order[ranks < DOCUMENT_PAIRS]]])
    kept.sort()
    return pairs[kept], weights[kept]


@dataclass(frozen=True)
class Profile:
    """What two documents are compared by."""

    shingles: np.ndarray[Any, Any]
    """Different ones, rising.  # (shingles,) uint64"""
    words: np.ndarray[Any, Any]
    """Different ones, rising.  # (words,) uint64"""
    counts: np.ndarray[Any, Any]
    """How often each word stands there.  # (words,) uint64"""


def measure_similarity(one: Profile, other: Profile) -> float:
    """Return the Jaccard similarity of two sets of shingles, 0 for two empty ones."""
    shared = _count_shared(one.shingles, other.shingles)
    union = len(one.shingles) + len(other.shingles) - shared
    return shared / union if union else 0.0


def _count_shared(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> int:
    """Count what two rising arrays share; one of each value in either."""
    import numpy as np

    if len(one) > len(other):
        one, other = other, one
    return int(np.count_nonzero(find_places(one, other) >= 0))


def find_places(values: np.ndarray[Any, Any], among: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return where each value stands in a rising array, -1 where it does not.  # (values,) int64"""
    import numpy as np

    if len(among) == 0:
        return np.full(len(values), -1)
    places = np.searchsorted(among, values)
    places[places == len(among)] = 0  # greater than all: equal to none, so not to the first
    return np.where(among[places] == values, places, -1)


def is_renamed(one: Profile, other: Profile) -> bool:
    """Tell whether two similar documents are one template filled in about two things.

    Of the words that stand in a document three times or more, at least 2 % are missing from the
    other or at most a quarter as often in it, and that in *both* documents: each repeats the name
    of what it is about. Edits here and there do not do that, since nearly every occurrence of a
    word would have to be hit: of a tenth of the words changed, four repeated words in a thousand.
    """
    for mine, theirs in ((one, other), (other, one)):
        often = mine.counts >= _REPEATED
        places = find_places(mine.words[often], theirs.words)
        there = theirs.counts[places] if len(theirs.counts) else 0
        rare = int(((places < 0) | (there * _RARER <= mine.counts[often])).sum())
        if rare == 0 or rare < _RENAMED_SHARE * len(places):
            return False
    return True


def choose_removed(
    pairs: np.ndarray[Any, Any],
    similarities: np.ndarray[Any, Any],
    threshold: float,
    gone: bytearray,
) -> np.ndarray[Any, Any]:
    """Return the places of the pairs by which documents go: each the first whose earlier one stays.

    Args:
        pairs: Sorted, with all those of a later document.  # (pairs,) uint64
        similarities: True ones, NaN where there was no need or no right to compare.  # (pairs,)
        threshold: Least similarity of a duplicate.
        gone: A byte a document, 1 for those that pairs before these removed; these are added.

    Returns:
        # (removed,) int64, rising
    """
    import numpy as np

    similar = np.flatnonzero(similarities >= threshold)  # NaN is not
    later, earlier = split_pairs(pairs[similar])
    chosen = np.zeros(len(similar), bool)
    for place, (number, twin) in enumerate(zip(later.tolist(), earlier.tolist(), strict=True)):
        if not gone[number] and not gone[twin]:
            gone[number] = 1
            chosen[place] = True
    return similar[chosen]
