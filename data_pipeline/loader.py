"""Batches of any step, from nothing but its number: what a run reads, in what order, on which rank.

No state is kept and none is saved: position p of the run is the row that the mixture and the order
of its stream put there, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from shoal.configs.errors import ConfigError
from shoal.data_pipeline.ahead import ReadAhead
from shoal.data_pipeline.batch import IGNORE, PADDING_ROW, Batch
from shoal.data_pipeline.cache import Tick, go_on
from shoal.data_pipeline.mixture import Mixture
from shoal.data_pipeline.order import RowOrder
from shoal.data_pipeline.packing import RowBatch
from shoal.data_pipeline.rows import Rows, bring_together, check_alike
from shoal.data_pipeline.sampling import SampledOrder

_PLAN_ROWS = 4096
"""Rows whose order is worked out at one time: alone, a batch would take several times as long."""


class Loader:
    """Training batches of one rank.

    Every stream is read in its own endless order, keyed by seed and stream. A batch is a stretch of
    the mixture, sorted by partition and cut into equal contiguous parts for the ranks, so that each
    reads the same stretch of shards all along; where they do not divide it, the last ones are
    filled with padded rows.

    Args:
        streams: Rows and the weight of each in the mixture; their tokenizer and row length agree.
        seed: Of the order.
        batch_rows: Rows of one step, over all ranks.
        micro_batch_rows: Most rows of one forward pass.
        rank: This process.
        num_ranks: All processes.
        document_mask: Whether tokens see their own document only; without, a row is one segment.
        mixture: Instead of the weights.
        block_rows: Rows of a partition that are shuffled with each other; None: all.
        read_ahead: Steps that a thread prepares beyond the one asked for.
        end_step: The run's last one + 1, beyond which nothing is read ahead; None: endless.
        orders: By number, streams that are resampled instead of read in epochs.
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
        mixture: Mixture | None = None,
        block_rows: int | None = None,
        read_ahead: int = 0,
        end_step: int | None = None,
        orders: Mapping[int, SampledOrder] | None = None,
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
        self.mixture = mixture or Mixture([weight for _, weight in streams])
        sizes = np.asarray([len(rows) for rows in self.streams], dtype=np.int64)
        self._offsets = np.cumsum(sizes) - sizes
        sampled = orders or {}
        self._orders: list[RowOrder | SampledOrder] = [
            sampled.get(number) or RowOrder(len(rows), (seed, number), block_rows)
            for number, rows in enumerate(self.streams)
        ]
        self._plan_steps = max(1, _PLAN_ROWS // batch_rows)
        self._plan: tuple[int, np.ndarray] = (-1, np.empty((0, batch_rows), dtype=np.int64))
        self._ahead = ReadAhead(self.read, read_ahead, end_step) if read_ahead else None

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step, the same on every rank."""
        return len(self.micro_batches)

    def row_ids(self, step: int) -> np.ndarray:
        """Return the global batch of a step, steps counted from 0.  # (batch_rows,) int64

        A global row number is the stream's offset (the rows of the streams before it) + its row.
        """
        part, within = divmod(step, self._plan_steps)
        planned, order = self._plan
        if planned != part:
            order = self._order(part * self._plan_steps)
            self._plan = part, order
        rows: np.ndarray = order[within]
        return rows

    def _order(self, step: int) -> np.ndarray:
        """Return the global batches from a step on.  # (plan_steps, batch_rows) int64"""
        shape = (self._plan_steps, self.batch_rows)
        first = step * self.batch_rows
        places = self.mixture.locate(np.arange(first, first + shape[0] * shape[1]))
        rows = np.empty_like(places.streams)
        partitions = np.empty_like(places.streams)
        for stream in np.flatnonzero(np.bincount(places.streams)):
            here = np.flatnonzero(places.streams == stream)
            found, partitions[here] = self._orders[stream].locate(places.positions[here])
            rows[here] = found + self._offsets[stream]
        by_partition = np.argsort(partitions.reshape(shape), axis=1, kind="stable")
        return np.take_along_axis(rows.reshape(shape), by_partition, axis=1)

    def microbatches(self, step: int) -> list[Batch]:
        """Return this rank's part of a step, in as many micro-batches as on every other rank.

        Raises:
            DataError: a shard of it is missing or corrupt, or does not come; names it.
            ConfigError: the cache of downloaded shards is too small for it.
        """
        return self._ahead.get(step) if self._ahead else self.read(step)

    def read(self, step: int, tick: Tick = go_on) -> list[Batch]:
        """Read what `microbatches` returns, now and in this thread.

        `tick` is called between shards; what it raises ends the reading.
        """
        part = self.row_ids(step)[self.rank * self.rank_rows : (self.rank + 1) * self.rank_rows]
        if len(self.streams) == 1 and len(part) == self.rank_rows:
            rows, streams = self.streams[0].gather(part, tick), None
        else:
            real = len(part)
            part = np.append(part, np.full(self.rank_rows - real, PADDING_ROW))
            rows, streams = self._gather(part, real, tick)
        return split_batch(rows, part, streams, self.micro_batches, self.document_mask)

    def count_rows(self, step: int) -> np.ndarray:
        """Return how many rows of each stream come before a step.  # (streams,) int64"""
        return self.mixture.count_rows(step * self.batch_rows)

    def close(self) -> None:
        """Stop reading ahead."""
        if self._ahead:
            self._ahead.close()

    def _gather(self, numbers: np.ndarray, real: int, tick: Tick) -> tuple[RowBatch, np.ndarray]:
        """Return rows by global number, of which the first `real` are not padding."""
        streams = np.full(len(numbers), PADDING_ROW, dtype=np.int64)
        streams[:real] = np.searchsorted(self._offsets, numbers[:real], side="right") - 1
        used = np.unique(streams[:real]).tolist()
        batch = empty_rows(self.streams[0], len(numbers))
        places = [np.flatnonzero(streams == stream) for stream in used]
        wanted = [numbers[here] - self._offsets[s] for s, here in zip(used, places, strict=True)]
        rows = [self.streams[stream] for stream in used]
        if len(rows) > 1:
            bring_together(rows, wanted, tick)
        for of_stream, here, within in zip(rows, places, wanted, strict=True):
            put_rows(batch, here, of_stream.gather(within, tick))
        return batch, streams


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


def put_rows(batch: RowBatch, places: np.ndarray, rows: RowBatch) -> None:
    """Put rows in the places of padded ones."""
    batch.tokens[places] = rows.tokens
    batch.segments[places] = rows.segments
    batch.targets[places] = rows.targets


def split_batch(
    rows: RowBatch,
    numbers: np.ndarray,
    streams: np.ndarray | None,
    sizes: tuple[int, ...],
    document_mask: bool,
) -> list[Batch]:
    """Turn rows into batches of `sizes` rows, whose tensors are views of one gather."""
    segments = rows.segments if document_mask else np.zeros_like(rows.segments)
    inputs, share, first, batches = rows.tokens[:, :-1], torch.from_numpy, 0, []
    for size in sizes:
        part = slice(first, first + size)  # of numpy's arrays: views of tensors cost more
        batches.append(
            Batch(
                share(inputs[part]),
                share(rows.targets[part]),
                share(segments[part]),
                share(numbers[part]),
                None if streams is None else share(streams[part]),
            )
        )
        first += size
    return batches


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
        put_rows(batch, real, self._rows.gather(numbers[real]))
        return split_batch(batch, numbers.copy(), None, (len(numbers),), self._document_mask)[0]
