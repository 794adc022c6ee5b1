"""Rows as models take them: the tokens of packed rows, which document each is of, what it predicts.

The form of a stored row is `mds.row_type`; which document lies where in which row is `layout`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shoal.data_pipeline.mds import row_type

IGNORE = -100
"""Target of a position that is not scored."""

_LANES = np.uint64(0x0101010101010101)
"""One in each byte: a word times this holds in byte i the sum of the word's bytes 0 to i."""


@dataclass(frozen=True)
class RowBatch:
    """Rows by number.

    `targets` may share memory with `tokens`: change neither in place.
    """

    tokens: np.ndarray  # (n, context + 1) int64; the last is a target only
    segments: np.ndarray  # (n, context) int32, document of each input, counted within the row
    targets: np.ndarray  # (n, context) int64, IGNORE where nothing is to be predicted


def decode_rows(raw: np.ndarray, context: int, dtype: np.dtype) -> RowBatch:
    """Take stored rows apart.

    Input i has a target where token i + 1 is text, not padding. Padding is a segment of its own.

    Args:
        raw: Rows as `mds.row_type` lays them out.  # (n, bytes of a row) uint8
        context: Tokens a row gives to the model.
        dtype: Stored type of a token.
    """
    row = row_type(context, dtype)
    fields = np.ascontiguousarray(raw).view(row)[:, 0]
    tokens = fields["tokens"].astype(np.int64)
    targets = tokens[:, 1:]
    lengths = fields["length"]
    padded = np.flatnonzero(lengths <= context)
    if padded.size:
        targets = targets.copy()
        places = np.arange(1, context + 1, dtype=np.uint32)
        ignored = places >= lengths[padded, None]
        targets[padded] = np.where(ignored, IGNORE, targets[padded])
    return RowBatch(tokens, count_segments(fields["ends"], context), targets)


def count_segments(ends: np.ndarray, context: int) -> np.ndarray:
    """Return how many documents of its row ended before each input token.

    Args:
        ends: A bit for each token, set at the last one of a document.  # (n, bytes) uint8, packed
        context: Inputs of a row.

    Returns:
        (n, context) int32.
    """
    rows, width = len(ends), ends.shape[1]
    words = -(-width // 8)
    packed = np.zeros((rows, 8 * words), dtype=np.uint8)
    packed[:, :width] = ends
    bits = np.unpackbits(packed).reshape(rows, -1)
    segments = np.empty((rows, context), dtype=np.int32)
    segments[:, 0] = 0
    counts = np.bitwise_count(packed)
    many = counts.sum(axis=1, dtype=np.int64) > np.iinfo(np.uint8).max
    # Sums of eight bytes at a time: numpy's cumsum alone would take longer than reading the rows.
    sums = counts.view(np.uint64) * _LANES
    whole = (sums >> np.uint64(56)).cumsum(axis=1, dtype=np.uint64)
    sums[:, 1:] += (whole[:, :-1] & np.uint64(255)) * _LANES
    before = (sums.view(np.uint8) - counts).reshape(rows, -1)
    lanes = bits.view(np.uint64)
    lanes *= _LANES
    lanes += before * _LANES
    segments[:, 1:] = bits[:, : context - 1]
    if many.any():
        exact = np.unpackbits(packed[many], axis=1)[:, : context - 1]
        segments[many, 1:] = np.cumsum(exact, axis=1, dtype=np.int32)
    return segments


@dataclass(frozen=True)
class Layout:
    """Which document lies where in the stream.

    Documents are kept in packing order; a document of n tokens takes n + 1 places.
    """

    documents: np.ndarray  # (documents,) int64, document number at each place of the order
    starts: np.ndarray  # (documents + 1,) int64, first place in the stream; the end is last
    context: int

    @classmethod
    def plan(cls, lengths: np.ndarray, order: np.ndarray, context: int) -> Layout:
        """Lay documents out in `order`.

        Args:
            lengths: Tokens of every document, without the end-of-text token.  # (documents,)
            order: A permutation of the document numbers.  # (documents,)
            context: Tokens a row gives to the model.
        """
        starts = np.zeros(len(order) + 1, dtype=np.int64)
        np.cumsum(lengths[order] + 1, out=starts[1:])
        return cls(np.asarray(order, dtype=np.int64), starts, context)

    @property
    def tokens(self) -> int:
        """Targets in all rows: tokens of all documents, and one end of text for each."""
        return int(self.starts[-1])

    @property
    def rows(self) -> int:
        """Rows that hold them."""
        return -(-self.tokens // self.context)

    def fill(
        self, first: int, last: int, eot: int, read: Callable[[int], np.ndarray], dtype: np.dtype
    ) -> np.ndarray:
        """Return rows first..last-1.

        Args:
            first: Number of the first row.
            last: One past the last row.
            eot: Id of the end-of-text token.
            read: Returns the tokens of a document, given its number.
            dtype: Type of the result.

        Returns:
            (last - first, context + 1).
        """
        begin, end = first * self.context, last * self.context + 1
        stream = np.full(end - begin, eot, dtype=dtype)
        place = int(np.searchsorted(self.starts, begin, side="right")) - 1
        while place < len(self.documents) and self.starts[place] < end:
            start = int(self.starts[place]) + 1 - begin  # after the document's end-of-text token
            tokens = read(int(self.documents[place]))
            cut = max(0, -start)
            stop = min(start + len(tokens), len(stream))
            if start + cut < stop:
                stream[start + cut : stop] = tokens[cut : stop - start]
            place += 1
        windows = np.lib.stride_tricks.sliding_window_view(stream, self.context + 1)
        return windows[:: self.context]


def find_segments(tokens: np.ndarray, eot: int) -> np.ndarray:
    """Return the document of every input token, counted from 0 within its row.

    Args:
        tokens: (rows, context + 1).
        eot: Id of the end-of-text token.

    Returns:
        (rows, context) int32.
    """
    segments = np.cumsum(tokens[:, :-1] == eot, axis=1, dtype=np.int32)
    segments -= segments[:, :1].copy()
    return segments


def find_targets(tokens: np.ndarray, eot: int) -> np.ndarray:
    """Return what each input token is to predict, with the filling of the last row ignored.

    Args:
        tokens: (rows, context + 1) int64.
        eot: Id of the end-of-text token.

    Returns:
        (rows, context) int64.
    """
    targets = tokens[:, 1:].copy()
    targets[(tokens[:, :-1] == eot) & (targets == eot)] = IGNORE
    return targets
