"""Best-fit decreasing: items into as few bins of one capacity as that rule finds."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def fit_items(sizes: np.ndarray, room: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Put each item, the largest first, into the bin that has least room left for it.

    Best-fit decreasing (Johnson 1973; for documents Ding et al. 2024, arXiv:2404.10830). Items of
    one size go together: the fullest bin that takes one takes as many as it holds, since it stays
    the fullest that takes one. So work grows with distinct sizes rather than with items.

    Args:
        sizes: 1 to capacity, any order.  # (items,) int64
        room: What is left in bins that are there already.  # (bins,) int64
        capacity: Room of a new bin.

    Returns:
        The bin of each item, (items,) int64, those already there having the first numbers; and how
        many bins there are in all.
    """
    bins = np.empty(len(sizes), dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    groups, firsts = np.unique(-sizes[order], return_index=True)
    ends = np.append(firsts, len(sizes))[1:]
    levels = _Levels(room)
    for size, first, end in zip(-groups, firsts, ends, strict=True):
        while first < end:
            taken = levels.take(int(size), int(end - first), capacity)
            bins[order[first : first + len(taken)]] = taken
            first += len(taken)
    return bins, levels.bins


class _Levels:
    """Bins by the room they have left."""

    def __init__(self, room: np.ndarray) -> None:
        self.bins = len(room)
        self._at: dict[int, list[np.ndarray]] = {}
        self._rooms: list[int] = []  # those that some bin has, in order
        order = np.argsort(room, kind="stable")
        rooms, firsts = np.unique(room[order], return_index=True)
        for value, numbers in zip(rooms, np.split(order, firsts[1:]), strict=bool(len(rooms))):
            self._put(int(value), numbers)

    def take(self, size: int, count: int, capacity: int) -> np.ndarray:
        """Place up to `count` items of a size, all into bins of one room; return their bins."""
        place = bisect_left(self._rooms, size)
        if place == len(self._rooms):
            needed = -(-count // (capacity // size))
            self._put(capacity, np.arange(self.bins, self.bins + needed))
            self.bins += needed
        room = self._rooms[place]
        numbers = self._at[room].pop()
        if not self._at[room]:
            del self._at[room], self._rooms[place]
        each = room // size
        full, rest = divmod(count, each)
        used, left = numbers[:full], numbers[full:]
        self._put(room - each * size, used)
        if rest and len(left):
            self._put(room - rest * size, left[:1])
            used, left = numbers[: full + 1], left[1:]
        self._put(room, left)
        return np.repeat(used, each)[:count]

    def _put(self, room: int, numbers: np.ndarray) -> None:
        if not len(numbers):
            return
        if room not in self._at:
            self._at[room] = []
            insort(self._rooms, room)
        self._at[room].append(numbers)
