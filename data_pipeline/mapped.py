"""Mapped shards of this process: those used last stay, within a number of files and of bytes.

A mapping holds a file descriptor for as long as it lives, and an unpacked shard its whole size in
the folder for temporary files, so neither may grow with the corpus.
"""

from __future__ import annotations

import resource
import threading
import weakref
from collections.abc import Iterable, Sequence
from itertools import count

import numpy as np

UNPACKED_BYTES = 4 * 10**9
"""Most bytes of unpacked shards that a process keeps."""

_MOST_FILES = 1024
_KEPT = 7 / 8
"""Where a limit is passed, so much of it is left: sorting at every new shard would cost more."""


def choose_files(open_files: int) -> int:
    """Return how many shards stay mapped where a process may have so many files open."""
    return max(1, min(_MOST_FILES, open_files // 4))


class Room:
    """The limits that all `MappedShards` of a process share.

    Args:
        files: Most shards that stay mapped.
        unpacked: Most bytes of unpacked ones; the one mapped last stays, whatever its size.
    """

    def __init__(self, files: int, unpacked: int) -> None:
        self.files, self.unpacked = files, unpacked
        self._lock = threading.RLock()
        self._ticks = count()
        self._holders: weakref.WeakSet[MappedShards] = weakref.WeakSet()

    def tick(self) -> int:
        """Return a number larger than all before: when a shard was used."""
        return next(self._ticks)

    def enter(self, holder: MappedShards, number: int, mapped: np.ndarray, unpacked: int) -> None:
        """Note a shard of a holder; others, used longest ago, are let go if it takes that."""
        with self._lock:
            self._holders.add(holder)
            holder.arrays[number], holder.unpacked[number] = mapped, unpacked
            holder.used[number] = self.tick()
            self._make_room()

    def leave(self, holder: MappedShards, numbers: Iterable[int]) -> None:
        """Let go of shards of a holder."""
        with self._lock:
            for number in numbers:
                for facts in (holder.arrays, holder.unpacked, holder.used):
                    facts.pop(number, None)

    def _make_room(self) -> None:
        holders = list(self._holders)
        files = sum(len(holder.arrays) for holder in holders)
        unpacked = sum(sum(holder.unpacked.values()) for holder in holders)
        if files <= self.files and unpacked <= self.unpacked:
            return
        found = [(holder.used.get(n, 0), holder, n) for holder in holders for n in holder.arrays]
        found.sort(key=lambda entry: entry[0])
        for _, holder, number in found[:-1]:
            if files <= max(1, _KEPT * self.files) and unpacked <= _KEPT * self.unpacked:
                return
            files -= 1
            unpacked -= holder.unpacked.get(number, 0)
            self.leave(holder, [number])


def _choose_room() -> Room:
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = most == resource.RLIM_INFINITY
    return Room(choose_files(4 * _MOST_FILES if unlimited else most), UNPACKED_BYTES)


ROOM = _choose_room()


class MappedShards:
    """Shards of one split that are mapped, by number; any of them may be let go between two calls.

    An array that a caller still has stays valid. Threads may share it.
    """

    def __init__(self, room: Room | None = None) -> None:
        self.room = room or ROOM
        self.arrays: dict[int, np.ndarray] = {}
        self.unpacked: dict[int, int] = {}
        self.used: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.arrays)

    @property
    def numbers(self) -> list[int]:
        """Of the shards that are mapped."""
        return list(self.arrays)

    def touch(self, numbers: Sequence[int]) -> None:
        """Note that shards are used now; those that are not mapped count for nothing."""
        self.used.update(dict.fromkeys(numbers, self.room.tick()))

    def put(self, number: int, mapped: np.ndarray, unpacked: int = 0) -> None:
        """Keep a shard; `unpacked`: bytes it takes up beside its file."""
        self.room.enter(self, number, mapped, unpacked)

    def drop(self, numbers: Sequence[int]) -> None:
        """Let go of shards."""
        self.room.leave(self, numbers)
