"""Batches of any step, from nothing but its number: what a run reads, in what order, on which rank.

No state is kept and none is saved: position p of the run is row `permute(...)` of the stream that
the mixture puts there, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from shoal.configs.errors import ConfigError
from shoal.data_pipeline.batch import IGNORE, PADDING_ROW, Batch
from shoal.data_pipeline.mixture import Mixture, permute
from shoal.data_pipeline.packing import RowBatch
from shoal.data_pipeline.rows import Rows, check_alike


class Loader:
    """Training batches of one rank.

    Every stream is read in its own endless order: each epoch is a permutation of its rows, keyed
    by seed, stream and epoch. A batch is a stretch of the mixture, cut into equal contiguous parts
    for the ranks; where they do not divide it, the last ones are filled with padded rows.

    Args:
        streams: Rows and the weight of each in the mixture; their tokenizer and row length agree.
        seed: Of the order.
        batch_rows: Rows of one step, over all ranks.
        micro_batch_rows: Most rows of one forward pass.
        rank: This process.
        num_ranks: All processes.
        document_mask: Whether tokens see their own document only; without, a row is one segment.
    """

    def __init__(
        self,
        streams: Sequence[tuple[Rows, float]],
        *,
        seed: int,
        batch_rows: int,
        micro_batch_rows: int,
        rank: int = 0,
        num_ranks: int = 1,
        document_mask: bool = True,
    ) -> None:
        if not streams:
            raise ConfigError("there is nothing to read", where="data.train")
        check_alike([rows for rows, _ in streams])
        self.streams = [rows for rows, _ in streams]
        self.seed = seed
        self.batch_rows = batch_rows
        self.rank = rank
        self.num_ranks = num_ranks
        self.document_mask = document_mask
        self.micro_batches = deal_rows(batch_rows, micro_batch_rows, num_ranks)
        self.rank_rows = sum(self.micro_batches)
        self.mixture = Mixture([weight for _, weight in streams])
        sizes = np.asarray([len(rows) for rows in self.streams], dtype=np.int64)
        self._sizes = sizes
        self._offsets = np.cumsum(sizes) - sizes

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step, the same on every rank."""
        return len(self.micro_batches)

    def row_ids(self, step: int) -> np.ndarray:
        """Return the global batch of a step, steps counted from 0.  # (batch_rows,) int64

        A global row number is the stream's offset (the rows of the streams before it) + its row.
        """
        positions = np.arange(step * self.batch_rows, (step + 1) * self.batch_rows)
        places = self.mixture.locate(positions)
        epochs, within = np.divmod(places.positions, self._sizes[places.streams])
        result = np.empty(self.batch_rows, dtype=np.int64)
        for stream in np.unique(places.streams):
            of_stream = places.streams == stream
            for epoch in np.unique(epochs[of_stream]):
                here = np.flatnonzero(of_stream & (epochs == epoch))
                size = int(self._sizes[stream])
                order = permute(within[here], size, self.seed, int(stream), int(epoch))
                result[here] = order + self._offsets[stream]
        return result

    def microbatches(self, step: int) -> list[Batch]:
        """Return this rank's part of a step, in as many micro-batches as on every other rank.

        Raises:
            DataError: a shard is missing or corrupt; names it.
        """
        mine = np.full(self.rank_rows, PADDING_ROW, dtype=np.int64)
        part = self.row_ids(step)[self.rank * self.rank_rows : (self.rank + 1) * self.rank_rows]
        mine[: len(part)] = part
        cuts = np.cumsum(self.micro_batches)[:-1]
        return [self._read(numbers) for numbers in np.split(mine, cuts)]

    def _read(self, numbers: np.ndarray) -> Batch:
        batch = empty_rows(self.streams[0], len(numbers))
        of_row = np.searchsorted(self._offsets, numbers, side="right") - 1
        for stream in np.unique(of_row[numbers >= 0]):
            here = np.flatnonzero((of_row == stream) & (numbers >= 0))
            rows = self.streams[stream]
            fill_rows(batch, here, rows.gather(numbers[here] - self._offsets[stream]))
        return make_batch(batch, numbers, self.document_mask)


def deal_rows(batch_rows: int, micro_batch_rows: int, num_ranks: int) -> tuple[int, ...]:
    """Return the rows of each forward pass of one step, alike on every rank.

    Every rank takes equally many rows, what is missing is padding; its last pass may be smaller.
    """
    full, rest = divmod(-(-batch_rows // num_ranks), micro_batch_rows)
    return (micro_batch_rows,) * full + (rest,) * (rest > 0)


def empty_rows(rows: Rows, count: int) -> RowBatch:
    """Return padded rows: end-of-text tokens throughout, which count for nothing."""
    context = rows.manifest.context
    return RowBatch(
        tokens=np.full((count, context + 1), rows.manifest.eot_id, dtype=np.int64),
        segments=np.zeros((count, context), dtype=np.int32),
        targets=np.full((count, context), IGNORE, dtype=np.int64),
    )


def fill_rows(batch: RowBatch, places: np.ndarray, rows: RowBatch) -> None:
    """Put rows into the places of a batch."""
    batch.tokens[places] = rows.tokens
    batch.segments[places] = rows.segments
    batch.targets[places] = rows.targets


def make_batch(rows: RowBatch, numbers: np.ndarray, document_mask: bool) -> Batch:
    """Turn rows into the tensors of a batch."""
    segments = rows.segments if document_mask else np.zeros_like(rows.segments)
    return Batch(
        inputs=torch.from_numpy(rows.tokens[:, :-1].copy()),
        targets=torch.from_numpy(rows.targets.copy()),
        segments=torch.from_numpy(segments),
        row_ids=torch.from_numpy(numbers.copy()),
    )


def validation_batches(
    rows: Rows,
    max_rows: int,
    micro_batch_rows: int,
    rank: int = 0,
    num_ranks: int = 1,
    *,
    token_bytes: np.ndarray,
    document_mask: bool = True,
) -> tuple[Sequence[Batch], int]:
    """Return this rank's validation batches, and the bytes of text that all ranks' targets hold.

    Rows are taken evenly over the split, the same ones at every call, and as many on every rank.

    Args:
        rows: The split.
        max_rows: Most rows taken.
        micro_batch_rows: Most rows of one batch.
        rank: This process.
        num_ranks: All processes.
        token_bytes: UTF-8 bytes of every id, `Tokenizer.token_bytes`.  # (vocab,)
        document_mask: As in training.
    """
    count = min(max_rows, len(rows))
    numbers = (2 * np.arange(count, dtype=np.int64) + 1) * len(rows) // (2 * count)
    per_rank = -(-count // num_ranks)
    text_bytes = 0
    for first in range(0, count, micro_batch_rows):
        targets = rows.gather(numbers[first : first + micro_batch_rows]).targets
        text_bytes += int(token_bytes[targets[targets != IGNORE]].sum())
    padded = np.full(per_rank * num_ranks, PADDING_ROW, dtype=np.int64)
    padded[:count] = numbers
    mine = padded[rank * per_rank : (rank + 1) * per_rank]
    return _ValidationBatches(rows, mine, micro_batch_rows, document_mask), text_bytes


class _ValidationBatches(Sequence[Batch]):
    """Batches read when they are asked for, so that a large split need not fit in memory."""

    def __init__(
        self, rows: Rows, numbers: np.ndarray, micro_batch_rows: int, document_mask: bool
    ) -> None:
        self._rows = rows
        self._document_mask = document_mask
        cuts = range(micro_batch_rows, len(numbers), micro_batch_rows)
        self._parts = np.split(numbers, list(cuts))

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        numbers = self._parts[index]
        batch = empty_rows(self._rows, len(numbers))
        real = np.flatnonzero(numbers >= 0)
        fill_rows(batch, real, self._rows.gather(numbers[real]))
        return make_batch(batch, numbers, self._document_mask)
