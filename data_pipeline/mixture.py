"""Mixtures as pure functions of the position: which stream comes there, and its how-manyth row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shoal.configs.errors import ConfigError
from shoal.configs.schema import DataConfig

BLOCK_ROWS = 1024
"""Rows after which streams mixed by weight have had exactly their shares."""

_TABLE_ROWS = 1 << 16
"""Patterns up to this length are laid out once as a table."""


def share_block(
    weights: Sequence[float], block: int = BLOCK_ROWS, where: str = "data.train"
) -> list[int]:
    """Return how many of `block` rows each stream gets: largest remainders, at least one each.

    A weight of 0 gets none.

    Raises:
        ConfigError: more streams than rows in a block, or a share too small for one row.
    """
    if len(weights) > block:
        raise ConfigError(
            f"{len(weights)} streams do not fit into blocks of {block} rows",
            where=where,
            fix="join some: one corpus may have many sources",
        )
    total = float(sum(weights))
    exact = [weight / total * block for weight in weights]
    for number, rows in enumerate(exact):
        if 0 < rows < 0.5:
            raise ConfigError(
                f"weight {weights[number]:g} is {rows / block:.2g} of the mixture, less than the "
                f"smallest share that can be kept, 1 row in {2 * block}",
                where=f"{where}.{number}.weight",
                fix="raise it, or leave the stream out",
            )
    counts = [max(1, int(rows)) if rows else 0 for rows in exact]
    while missing := block - sum(counts):
        step = 1 if missing > 0 else -1
        # Rounding small shares up must not take the one row of another.
        movable = [i for i, count in enumerate(counts) if count and count + step >= 1]
        counts[max(movable, key=lambda i: (step * (exact[i] - counts[i]), -i))] += step
    return counts


@dataclass(frozen=True)
class Places:
    """Where positions of the mixture fall."""

    streams: np.ndarray  # (n,) int64, number of the stream
    positions: np.ndarray  # (n,) int64, position within the stream's own endless order


class Pattern:
    """`counts[s]` rows of every stream s, spread evenly over their sum; then the same again.

    Row i of a stream has its ideal place at the share (2 i + 1) / (2 count) of the pattern, and the
    pattern is all rows by ideal place, streams of lower number first. Every stretch holds a
    stream's share to within a row or so, so that steps differ little in what they see. Any stretch
    is found without those before it: ideal places tell to within half a row a stream how much of
    each stream came before.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.length = int(self.counts.sum())
        self._table = self._lay_out(0, self.length) if self.length <= _TABLE_ROWS else None

    def locate(self, positions: np.ndarray) -> Places:
        """Return stream and position within the stream; positions in any order.  # (n,) int64"""
        periods, within = np.divmod(positions, self.length)
        if self._table:
            streams, turns = self._table.streams[within], self._table.positions[within]
        else:
            streams, turns = np.empty_like(within), np.empty_like(within)
            for period in np.unique(periods):
                here = np.flatnonzero(periods == period)
                first, last = int(within[here].min()), int(within[here].max()) + 1
                part = self._lay_out(first, last)
                streams[here] = part.streams[within[here] - first]
                turns[here] = part.positions[within[here] - first]
        return Places(streams, periods * self.counts[streams] + turns)

    def count_rows(self, position: int) -> np.ndarray:
        """Return how many rows of each stream come before a position.  # (streams,) int64"""
        periods, rest = divmod(position, self.length)
        streams, _, low = self._list_near(rest, rest)
        early = np.bincount(streams[: rest - int(low.sum())], minlength=len(self.counts))
        return periods * self.counts + low + early

    def _lay_out(self, first: int, last: int) -> Places:
        """Return the places first..last-1 of one period."""
        streams, turns, low = self._list_near(first, last)
        chosen = slice(first - int(low.sum()), last - int(low.sum()))
        return Places(streams[chosen], turns[chosen])

    def _list_near(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return streams and turns of the rows around a stretch in order, and those before them.

        The first x places hold x times a stream's share of its rows, to within half a row for each
        of the streams together and one for rounding.
        """
        share = self.counts / self.length
        slack = share * (len(self.counts) / 2 + 1) + 2
        low = np.clip(np.floor(first * share - slack), 0, self.counts).astype(np.int64)
        high = np.clip(np.ceil(last * share + slack), 0, self.counts).astype(np.int64)
        near = high - low
        streams = np.repeat(np.arange(len(near)), near)
        turns = np.arange(near.sum()) - np.repeat(np.cumsum(near) - near, near) + low[streams]
        # Rounded the same way wherever a stretch begins: the order is one and the same.
        order = np.lexsort((streams, (2 * turns + 1) / self.counts[streams]))
        return streams[order], turns[order], low


class Mixture:
    """Streams interleaved by one pattern, or by several that follow each other at given rows.

    Args:
        weights: Of the streams; their shares hold exactly in every block of BLOCK_ROWS rows.
        patterns: Instead of weights: patterns and the row each begins at, the first at 0; the last
            goes on for ever.
    """

    def __init__(
        self,
        weights: Sequence[float] = (),
        block: int = BLOCK_ROWS,
        *,
        patterns: Sequence[tuple[int, Pattern]] = (),
    ) -> None:
        patterns = patterns or [(0, Pattern(share_block(weights, block)))]
        self.starts = np.asarray([start for start, _ in patterns], dtype=np.int64)
        self.patterns = [pattern for _, pattern in patterns]
        before = [np.zeros_like(self.patterns[0].counts)]
        for pattern, length in zip(self.patterns, np.diff(self.starts), strict=False):
            before.append(before[-1] + length // pattern.length * pattern.counts)
        self._before = before
        """Rows of every stream that earlier patterns have given."""

    def locate(self, positions: np.ndarray) -> Places:
        """Return stream and position within the stream of positions of the mixture."""
        positions = np.asarray(positions, dtype=np.int64)
        phases = np.searchsorted(self.starts, positions, side="right") - 1
        if not len(positions) or phases.min() == phases.max():
            return self._locate_in(int(phases[0]) if len(phases) else 0, positions)
        streams, turns = np.empty_like(positions), np.empty_like(positions)
        for phase in np.unique(phases):
            here = np.flatnonzero(phases == phase)
            part = self._locate_in(int(phase), positions[here])
            streams[here], turns[here] = part.streams, part.positions
        return Places(streams, turns)

    def _locate_in(self, phase: int, positions: np.ndarray) -> Places:
        places = self.patterns[phase].locate(positions - self.starts[phase])
        return Places(places.streams, places.positions + self._before[phase][places.streams])

    def count_rows(self, position: int) -> np.ndarray:
        """Return how many rows of each stream come before a position.  # (streams,) int64"""
        phase = int(np.searchsorted(self.starts, position, side="right")) - 1
        inside = self.patterns[phase].count_rows(position - int(self.starts[phase]))
        return self._before[phase] + inside


def plan_mixture(
    data: DataConfig,
    sizes: Sequence[int],
    context: int,
    run_rows: int,
    step_rows: int = 1,
    *,
    is_trial: bool = False,
) -> Mixture:
    """Return the mixture of a run.

    Streams with `repeat` or `choose` give exactly that many rows over the run, spread evenly; the
    rest of the run is shared by weight. Without such streams, shares hold in every block of
    BLOCK_ROWS rows whatever the length of the run, and a schedule may change the weights.

    Args:
        data: What the run reads.
        sizes: Rows of every stream.
        context: Tokens of a row.
        run_rows: Rows of the whole run.
        step_rows: Rows of a step; where streams give too few for the last one by less than that, it
            is filled by beginning again.
        is_trial: Whether this is the beginning of a longer run, which need not come to everything.

    Raises:
        ConfigError: the streams give more, or fewer, rows than the run takes, a share is too small,
            or a stream or an entry of the schedule would never come.
    """
    if any(stream.is_counted for stream in data.train):
        mixture = _count_out(data, sizes, context, run_rows, step_rows)
    else:
        mixture = _schedule(data, context)
    if not is_trial:
        _check_all_come(data, mixture, context, run_rows)
    return mixture


def _check_all_come(data: DataConfig, mixture: Mixture, context: int, run_rows: int) -> None:
    """Refuse what a config names and the run would pass over in silence.

    Raises:
        ConfigError: names the first entry of the schedule, or stream, that never comes.
    """
    starts = mixture.starts[len(mixture.starts) - len(data.schedule) :].tolist()
    for number, start in enumerate(starts):
        if start >= run_rows:
            raise ConfigError(
                f"comes at row {start:,} (blocks are of {BLOCK_ROWS}), and the run ends after "
                f"{run_rows:,}",
                where=f"data.schedule.{number}.from_tokens",
                fix=f"set it to {(run_rows - 1) // BLOCK_ROWS * BLOCK_ROWS * context} or less, "
                f"raise train.tokens over {start * context}, or leave the entry out",
            )
    for number, rows in enumerate(mixture.count_rows(run_rows).tolist()):
        if not rows:
            stream = data.train[number]
            raise ConfigError(
                f"{stream.label} would never be read: not one of the run's {run_rows:,} rows is "
                f"its ({_describe_part(data, number)})",
                where=f"data.train.{number}",
                fix="give it more, or leave the stream out",
            )


def _describe_part(data: DataConfig, number: int) -> str:
    """Say what a stream asks for, in the words of the config."""
    stream = data.train[number]
    if data.schedule:
        return "by the schedule"
    return stream.measure if isinstance(stream.measure, str) else f"weight {stream.share:g}"


def _count_out(
    data: DataConfig, sizes: Sequence[int], context: int, run_rows: int, step_rows: int
) -> Mixture:
    """Return the mixture of streams of which some give a number of rows; see `plan_mixture`."""
    counted = [_count(stream.repeat, stream.choose, size)
               for stream, size in zip(data.train, sizes, strict=True)]  # fmt: skip
    left = run_rows - sum(counted)
    weights = [0.0 if stream.is_counted else stream.share for stream in data.train]
    if left < 0 or (left >= step_rows and not any(weights)):
        raise ConfigError(
            f"the streams give {sum(counted):,} rows by repeat and choose, and the run takes "
            f"{run_rows:,}",
            where="data.train",
            fix=f"set train.tokens={sum(counted) * context}, or let one stream have a weight: it "
            "takes what is left",
        )
    shared = _divide(weights, left) if any(weights) else [0] * len(weights)
    return Mixture(patterns=[(0, Pattern([a + b for a, b in zip(counted, shared, strict=True)]))])


def _count(repeat: float | None, choose: int | None, size: int) -> int:
    return round(repeat * size) if repeat else choose or 0


def _divide(weights: Sequence[float], rows: int) -> list[int]:
    """Divide rows by weight, by largest remainders."""
    exact = [weight / sum(weights) * rows for weight in weights]
    counts = [int(share) for share in exact]
    late = sorted(range(len(counts)), key=lambda i: (counts[i] - exact[i], i))
    for number in late[: rows - sum(counts)]:
        counts[number] += 1
    return counts


def _schedule(data: DataConfig, context: int) -> Mixture:
    """Return the patterns of a schedule; they change at the next whole block of rows."""
    names = [stream.label for stream in data.train]
    patterns = []
    if not data.schedule or data.schedule[0].from_tokens:
        weights = [stream.share for stream in data.train]
        patterns.append((0, Pattern(share_block(weights))))
    for number, change in enumerate(data.schedule):
        rows = -(-change.from_tokens // context)
        start = -(-rows // BLOCK_ROWS) * BLOCK_ROWS
        weights = [change.weights.get(name, 0.0) for name in names]
        if patterns and start == patterns[-1][0]:
            raise ConfigError(
                f"changes at the same row as the entry before: rows come in blocks of {BLOCK_ROWS}",
                where=f"data.schedule.{number}.from_tokens",
                fix=f"leave {BLOCK_ROWS * context} tokens or more between two changes",
            )
        counts = share_block(weights, where=f"data.schedule.{number}")
        patterns.append((start, Pattern(counts)))
    return Mixture(patterns=patterns)
