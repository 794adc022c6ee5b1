"""Orders and mixtures as pure functions: which row of which stream comes at a position.

Nothing here is drawn one after another, so any position is found in constant time and a resume
needs no state but the position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shoal.configs.errors import ConfigError

BLOCK_ROWS = 1024
"""Rows after which every stream has had exactly its share."""

_ROUNDS = 8


@lru_cache(maxsize=256)
def _round_keys(*parts: int | str) -> tuple[np.uint64, ...]:
    """Return one 64-bit key a Feistel round, from a hash of what the order depends on."""
    seedling = "/".join(str(part) for part in parts).encode()
    digest = hashlib.blake2b(seedling, digest_size=8 * _ROUNDS).digest()
    return tuple(np.frombuffer(digest, dtype="<u8"))


def scramble(values: np.ndarray, key: np.uint64) -> np.ndarray:
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
    keys = _round_keys(*key)
    bits = max(2, (size - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << int(low_bits)) - 1)
    high_mask = np.uint64((1 << (bits - int(low_bits))) - 1)
    result = np.asarray(positions).astype(np.uint64)
    walking = np.arange(result.size)
    while walking.size:
        values = result[walking]
        low, high = values & low_mask, values >> low_bits
        for number, round_key in enumerate(keys):
            if number % 2:
                high = high ^ (scramble(low, round_key) & high_mask)
            else:
                low = low ^ (scramble(high, round_key) & low_mask)
        values = (high << low_bits) | low
        result[walking] = values
        walking = walking[values >= np.uint64(size)]
    return result.astype(np.int64)


def share_block(weights: Sequence[float], block: int = BLOCK_ROWS) -> list[int]:
    """Return how many of `block` rows each stream gets: largest remainders, at least one each.

    Raises:
        ConfigError: more streams than rows in a block, or a share too small for one row.
    """
    if len(weights) > block:
        raise ConfigError(
            f"{len(weights)} streams do not fit into blocks of {block} rows",
            where="data.train",
            fix="join some: one corpus may have many sources",
        )
    total = float(sum(weights))
    exact = [weight / total * block for weight in weights]
    for number, rows in enumerate(exact):
        if rows < 0.5:
            raise ConfigError(
                f"weight {weights[number]:g} is {rows / block:.2g} of the mixture, less than the "
                f"smallest share that can be kept, 1 row in {2 * block}",
                where=f"data.train.{number}.weight",
                fix="raise it, or leave the stream out",
            )
    counts = [max(1, int(rows)) for rows in exact]
    while missing := block - sum(counts):
        step = 1 if missing > 0 else -1
        # Rounding small shares up must not take the one row of another.
        movable = [i for i, count in enumerate(counts) if count + step >= 1]
        counts[max(movable, key=lambda i: (step * (exact[i] - counts[i]), -i))] += step
    return counts


@dataclass(frozen=True)
class Places:
    """Where positions of the mixture fall."""

    streams: np.ndarray  # (n,) int64, number of the stream
    positions: np.ndarray  # (n,) int64, position within the stream's own endless order


class Mixture:
    """Streams interleaved in blocks of BLOCK_ROWS rows that repeat one even pattern.

    Every block holds exactly `share_block` rows of each stream, and every stretch within it holds
    a stream's share to within a row or so, so that the steps of a run differ little in what they
    see.
    """

    def __init__(self, weights: Sequence[float], block: int = BLOCK_ROWS) -> None:
        self.counts = np.asarray(share_block(weights, block), dtype=np.int64)
        self.block = block
        streams = np.repeat(np.arange(len(self.counts)), self.counts)
        turns = np.concatenate([np.arange(count) for count in self.counts])
        ideal = (turns + 0.5) * (block / self.counts[streams])
        order = np.lexsort((streams, ideal))
        self._streams = streams[order].astype(np.int64)
        self._turns = turns[order].astype(np.int64)

    def locate(self, positions: np.ndarray) -> Places:
        """Return stream and position within the stream of positions of the mixture."""
        blocks, offsets = np.divmod(np.asarray(positions, dtype=np.int64), self.block)
        streams = self._streams[offsets]
        return Places(streams, blocks * self.counts[streams] + self._turns[offsets])
