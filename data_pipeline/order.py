"""The order in which the rows of one stream are read: a pure function of seed and position.

Nothing here is drawn one after another, so any position is found in constant time and a resume
needs no state but the position.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

PARTITIONS = 64
"""Canonical partitions of every stream: contiguous rows, whatever the number of ranks or hosts."""

SMALL_ROWS = 16 * PARTITIONS
"""Streams of fewer rows are shuffled as a whole: in partitions of one row each, all epochs would be
alike, and there are no shards to tell apart."""

ORDER_VERSION = 2
"""Changes when the same seed and position come to mean another row."""

_ROUNDS = 8
_ORDER_ROUNDS = 4
"""Within partitions, as many as make a pseudo-random permutation (Luby and Rackoff 1988): these are
computed for every row that is read, and each has a key of its own partition."""
_PARTITION_BITS = PARTITIONS.bit_length() - 1
_REVERSED = np.asarray(
    [int(f"{number:0{_PARTITION_BITS}b}"[::-1], 2) for number in range(PARTITIONS)], dtype=np.int64
)
"""Numbers below PARTITIONS with their bits in reverse: the sequence of van der Corput (1935)."""


@lru_cache(maxsize=256)
def make_keys(count: int, *parts: int | str) -> tuple[np.uint64, ...]:
    """Return 64-bit keys, at most 8, from a hash of what an order depends on."""
    seedling = "/".join(str(part) for part in parts).encode()
    digest = hashlib.blake2b(seedling, digest_size=8 * count).digest()
    return tuple(np.frombuffer(digest, dtype="<u8"))


def scramble(values: np.ndarray, key: np.uint64 | np.ndarray) -> np.ndarray:
    """Mix 64-bit words under a key (the finaliser of SplitMix64, Steele et al. 2014)."""
    mixed = values + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def permute(positions: np.ndarray, size: int, *key: int | str) -> np.ndarray:
    """Return where each position goes in a permutation of `range(size)` chosen by `key`.

    A Feistel network over the smallest power of two that holds `size` (Luby and Rackoff 1988);
    results outside the range are sent through again until they fall inside (cycle walking, Black
    and Rogaway 2002, section 4), which keeps it a permutation. Costs the same at any position.

    Args:
        positions: Numbers below `size`, any order, repeats allowed.  # (n,) int64
        size: Length of the permuted range.
        *key: Whatever the permutation depends on: a seed, a stream, an epoch.

    Returns:
        (n,) int64.
    """
    keys = np.asarray(make_keys(_ROUNDS, *key), dtype=np.uint64)[:, None]
    whole = np.asarray(positions).astype(np.uint64)
    return _walk(whole, np.uint64(size), max(2, (size - 1).bit_length()), keys)


def _walk(
    values: np.ndarray, sizes: np.ndarray | np.uint64, bits: int, keys: np.ndarray
) -> np.ndarray:
    """Send values through the Feistel network of `bits` bits until each is below its size.

    Args:
        values: (n,) uint64, changed in place.
        sizes: One size, or one for each value, all of at most `bits` bits.
        bits: Of the numbers that the network permutes.
        keys: (rounds, 1) for all, or (rounds, n): every value may have a permutation of its own.
    """
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << int(low_bits)) - 1)
    high_mask = np.uint64((1 << (bits - int(low_bits))) - 1)
    shared = keys.shape[1] == 1
    walking = np.arange(values.size)
    while walking.size:
        inside = values[walking]
        own = keys if shared else keys[:, walking]
        low, high = inside & low_mask, inside >> low_bits
        for number, round_key in enumerate(own):
            if number % 2:
                high = high ^ (scramble(low, round_key) & high_mask)
            else:
                low = low ^ (scramble(high, round_key) & low_mask)
        inside = (high << low_bits) | low
        values[walking] = inside
        limit = sizes[walking] if isinstance(sizes, np.ndarray) else sizes
        walking = walking[inside >= limit]
    return values.astype(np.int64)


@dataclass(frozen=True)
class RowOrder:
    """The endless order of one stream: epoch after epoch, each row once in every one.

    A stream's rows are 64 contiguous partitions (one below SMALL_ROWS is shuffled as a whole).
    Position w of an epoch belongs to the partition whose number is w mod 64 with its bits reversed,
    and is the (w div 64)th that is read of it. A partition therefore holds as many rows as there
    are such w below the stream's size, which makes epochs exact for streams of any size; and any
    2^m positions in a row fall one each into the 2^m equal stretches of partitions, so that a rank
    that takes the same stretch of every batch, sorted by partition, reads the same shards all
    along. Within a partition rows are permuted, anew in each epoch.

    With `block_rows` a partition is read block by block, the blocks in an order of their own and
    shuffled within themselves: of each partition one block at a time is in use. The last block also
    takes what is left over, and is read last.

    Args:
        size: Rows of the stream.
        key: Seed and stream, on which the order depends.
        block_rows: Rows of a block, or None for whole partitions.
    """

    size: int
    key: tuple[int | str, ...]
    block_rows: int | None = None

    @property
    def first_rows(self) -> np.ndarray:
        """First row of every partition, and the size of the stream.  # (65,) int64"""
        sizes = (self.size - _REVERSED + PARTITIONS - 1) // PARTITIONS
        return np.concatenate([[0], np.cumsum(np.maximum(sizes, 0))])

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the row and the partition of positions of the endless order.

        Args:
            positions: (n,) int64, at least 0.

        Returns:
            Row numbers, (n,) int64; numbers of partitions, (n,) int64.
        """
        epochs, within = np.divmod(positions, self.size)
        partitions = _REVERSED[within % PARTITIONS]
        places = within // PARTITIONS
        edges = _first_rows(self)
        if self.size < SMALL_ROWS:
            sizes = np.full_like(within, self.size)
            rows = _permute_each(within, sizes, self.size, (*self.key, "small"), epochs)
            return rows, np.searchsorted(edges, rows, side="right") - 1
        sizes = edges[partitions + 1] - edges[partitions]
        rows = np.empty_like(places)
        if not len(epochs):
            return rows, partitions
        first, last = int(epochs.min()), int(epochs.max())
        if first == last:
            return self._shuffle(places, sizes, partitions, first) + edges[partitions], partitions
        # As a rule positions are close together, and sorting them would take longer than the rest.
        for epoch in range(first, last + 1) if last - first < 16 else np.unique(epochs):
            here = np.flatnonzero(epochs == epoch)
            rows[here] = self._shuffle(places[here], sizes[here], partitions[here], int(epoch))
        return rows + edges[partitions], partitions

    def _shuffle(
        self, places: np.ndarray, sizes: np.ndarray, partitions: np.ndarray, epoch: int
    ) -> np.ndarray:
        largest = -(-self.size // PARTITIONS)
        if self.block_rows is None or largest < 2 * self.block_rows:
            return _permute_each(places, sizes, largest, (*self.key, epoch), partitions)
        blocks = np.maximum(1, sizes // self.block_rows)
        turns = np.minimum(places // self.block_rows, blocks - 1)
        inside = places - turns * self.block_rows
        moved = turns.copy()
        early = np.flatnonzero(turns < blocks - 1)
        moved[early] = _permute_each(
            turns[early],
            blocks[early] - 1,
            largest // self.block_rows,
            (*self.key, epoch, "blocks"),
            partitions[early],
        )
        starts = moved * self.block_rows
        lengths = np.where(moved == blocks - 1, sizes - starts, self.block_rows)
        streams = moved * PARTITIONS + partitions
        key = (*self.key, epoch, "within")
        return starts + _permute_each(inside, lengths, 2 * self.block_rows, key, streams)


@lru_cache(maxsize=1024)
def _first_rows(order: RowOrder) -> np.ndarray:
    return order.first_rows


def _permute_each(
    positions: np.ndarray,
    sizes: np.ndarray,
    largest: int,
    key: tuple[int | str, ...],
    labels: np.ndarray,
) -> np.ndarray:
    """Permute every position within a range of its own: one permutation a key and label.

    Args:
        positions: (n,) int64, each below its size.
        sizes: (n,) int64.
        largest: No size is larger; decides the width of the network.
        key: What all of them depend on.
        labels: (n,) int64, what each of them depends on besides.
    """
    base = np.asarray(make_keys(_ROUNDS, *key)[:_ORDER_ROUNDS], dtype=np.uint64)[:, None]
    own = labels.astype(np.uint64)[None, :] * np.uint64(0x9E3779B97F4A7C15)
    keys = scramble(own, base)  # (rounds, n)
    bits = max(2, (max(largest, 1) - 1).bit_length())
    return _walk(positions.astype(np.uint64), sizes.astype(np.uint64), bits, keys)
