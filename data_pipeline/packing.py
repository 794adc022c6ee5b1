"""Documents to rows of fixed length, and stored rows back to what models take; pure numpy.

Whatever the method, documents stand in one stream, in an order of its own, and every row is a
stretch of that stream, filled up with padding where the stretch is shorter than a row:

- separator end_of_text: `eot d1 d2 ... eot e1 e2 ... eot`; a document of n tokens takes n + 1
  places, of which its end-of-text token is the first. The token after a document is thus the
  end-of-text token that ends it, whoever that one belongs to.
- a separator of the user's: `d1 d2 ... sep e1 e2 ... sep`, after each piece of a document.
- none: `d1 d2 ... e1 e2 ...`.

Rows share a token, the last of one being the first of the next, so that every token of a stretch
that goes on is a target exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from shoal.configs.corpus import PackingConfig
from shoal.data_pipeline.bins import fit_items
from shoal.data_pipeline.mds import row_type

IGNORE = -100
"""Target of a position that is not scored."""

_LANES = np.uint64(0x0101010101010101)
"""One in each byte: a word times this holds in byte i the sum of the word's bytes 0 to i."""

_BLOCK_ROWS = 1024
"""Rows filled at a time, which bounds the memory that takes."""
_SMALL = 2**15
"""Tokens up to which numpy's cumsum, slow for one, is the fastest for having one call alone."""
_BLOCK_TOKENS = 2**18
"""Tokens summed at a time, which keeps what lies between in the cache."""

Span = tuple[int, np.ndarray]
"""A place relative to the first one asked for, and the tokens that stand there."""


@dataclass(frozen=True)
class Form:
    """How documents follow each other in the stream."""

    context: int
    eot: int
    separator: int | None
    """Id of the token between documents; None: there is none."""
    leads: bool = True
    """Whether the separator stands before a document and once more at the end of the stream."""
    piece_tokens: int | None = None
    """Documents are cut into pieces of so many tokens, each with a separator."""
    overlap: bool = True
    """Whether rows share a token."""

    def count_places(self, lengths: np.ndarray) -> np.ndarray:
        """Return how many places of the stream documents of these many tokens take."""
        if self.separator is None:
            return lengths
        if self.piece_tokens is None:
            return lengths + 1
        return lengths + np.maximum(1, -(-lengths // self.piece_tokens))


@dataclass(frozen=True)
class Layout:
    """Documents in the order of the stream, and the stretch of it that each row holds."""

    form: Form
    documents: np.ndarray  # (documents,) int64, document number at each place of the order
    starts: np.ndarray  # (documents + 1,) int64, first place of each in the stream; the end is last
    row_starts: np.ndarray  # (rows,) int64, place of the first token of each row
    row_lengths: np.ndarray  # (rows,) int32, tokens of each row that are text, at most context + 1

    @classmethod
    def plan(
        cls, lengths: np.ndarray, order: np.ndarray, form: Form, packing: PackingConfig
    ) -> Layout:
        """Lay documents out.

        Args:
            lengths: Tokens of every document, without any separator.  # (documents,)
            order: A permutation of the document numbers; best_fit begins from it.  # (documents,)
            form: How they follow each other.
            packing: The method.
        """
        order = np.asarray(order, dtype=np.int64)
        places = form.count_places(lengths[order].astype(np.int64))
        if packing.method == "best_fit":
            chosen, firsts = _fit_documents(places, form.context)
            order, places = order[chosen], places[chosen]
        elif packing.method == "window":
            firsts = np.arange(len(order))
        else:
            firsts = np.arange(0, len(order), packing.batch_documents or max(1, len(order)))
        starts = np.zeros(len(order) + 1, dtype=np.int64)
        np.cumsum(places, out=starts[1:])
        row_starts, row_lengths = _cut_blocks(starts[firsts], int(starts[-1]), form)
        return cls(form, order, starts, row_starts, row_lengths)

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self.row_starts)

    @property
    def tokens(self) -> int:
        """Targets in all rows."""
        return int(np.maximum(self.row_lengths.astype(np.int64) - 1, 0).sum())

    @property
    def padding_tokens(self) -> int:
        """Inputs of all rows that are filling."""
        inputs = self.row_lengths.astype(np.int64) - self.form.overlap
        return int((self.form.context - inputs).sum())

    @property
    def cut_documents(self) -> int:
        """Documents that lie in more than one row."""
        first = np.searchsorted(self.row_starts, self.starts[:-1], side="right")
        last = np.searchsorted(self.row_starts, self.starts[1:] - 1, side="right")
        return int(np.count_nonzero(first != last))

    def locate(self, first: int, last: int) -> tuple[slice, np.ndarray, int, int]:
        """Return what rows first..last-1 hold: documents of the order, where they start, the range.

        Returns:
            The stretch of `documents`, their starts relative to the first place of these rows,
            that place, and how many places there are.
        """
        begin = int(self.row_starts[first])
        end = int(self.row_starts[last - 1]) + int(self.row_lengths[last - 1])
        low = int(np.searchsorted(self.starts, begin, side="right")) - 1
        high = int(np.searchsorted(self.starts[:-1], end, side="left"))
        return slice(low, high), self.starts[low : high + 1] - begin, begin, end - begin

    def fill(self, first: int, last: int, spans: Iterable[Span], dtype: np.dtype) -> np.ndarray:
        """Return rows first..last-1 as they are stored.

        Args:
            first: Number of the first row.
            last: One past the last row.
            spans: The documents that `locate` names, each at its start.
            dtype: Type of a token.

        Returns:
            (last - first,) of `mds.row_type`.
        """
        _, starts, begin, size = self.locate(first, last)
        filler = self.form.eot if self.form.separator is None else self.form.separator
        stream = np.full(size, filler, dtype=dtype)
        for place, tokens in self._cut_spans(spans):
            low, high = max(0, -place), min(len(tokens), size - place)
            if low < high:
                stream[place + low : place + high] = tokens[low:high]
        ends = np.zeros(size, dtype=bool)
        last_places = starts[1:] - 1
        ends[last_places[(last_places >= 0) & (last_places < size)]] = True
        rows = np.empty(last - first, dtype=row_type(self.form.context, dtype))
        offsets = self.row_starts[first:last] - begin
        lengths = self.row_lengths[first:last]
        for low in range(0, len(rows), _BLOCK_ROWS):
            part = slice(low, low + _BLOCK_ROWS)
            self._fill_rows(rows[part], stream, ends, offsets[part], lengths[part])
        return rows

    def _cut_spans(self, spans: Iterable[Span]) -> Iterable[Span]:
        """Yield where the tokens of documents go, pieces apart."""
        step = self.form.piece_tokens
        for place, tokens in spans:
            start = place + self.form.leads
            if step is None or len(tokens) <= step:
                yield start, tokens
                continue
            for number, low in enumerate(range(0, len(tokens), step)):
                yield start + low + number, tokens[low : low + step]

    def _fill_rows(
        self,
        rows: np.ndarray,
        stream: np.ndarray,
        ends: np.ndarray,
        offsets: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        """Copy stretches of the stream into rows, and pad them."""
        width = self.form.context + 1
        rows["length"] = lengths
        if lengths.min() == width and len(stream) >= width:
            windows = np.lib.stride_tricks.sliding_window_view
            rows["tokens"] = windows(stream, width)[offsets]
            rows["ends"] = np.packbits(windows(ends, width)[offsets], axis=1)
            return
        columns = np.arange(width)
        places = np.minimum(offsets[:, None] + columns, len(stream) - 1)
        text = columns < lengths[:, None]
        rows["tokens"] = np.where(text, stream[places], stream.dtype.type(self.form.eot))
        # Padding that is an input begins a segment of its own, wherever the text before it stops.
        padded = lengths < self.form.context
        stops = (columns == lengths[:, None] - 1) & padded[:, None]
        rows["ends"] = np.packbits((text & ends[places]) | stops, axis=1)


def _cut_blocks(firsts: np.ndarray, end: int, form: Form) -> tuple[np.ndarray, np.ndarray]:
    """Cut each block, a stretch of the stream, into rows from its first place on.

    The token after a block ends it where separators lead, and stands in its last row as well.

    Args:
        firsts: First place of each block.  # (blocks,)
        end: Places of the stream.
        form: Says how long rows are.

    Returns:
        Start and length of each row.
    """
    tokens = np.diff(firsts, append=end) + form.leads
    # A token that would be alone in a row, and no target there, gets none.
    rows = np.maximum(1, -(-(tokens - (form.overlap or form.leads)) // form.context))
    numbers = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
    done = numbers * form.context
    lengths = np.minimum(np.repeat(tokens, rows) - done, form.context + form.overlap)
    return np.repeat(firsts, rows) + done, lengths.astype(np.int32)


def _fit_documents(places: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Put documents into rows by best-fit decreasing; only those longer than a row are cut.

    A long document gives whole rows, and its rest begins a row that others may fill up: it cannot
    stand later in one, since the token before it would get it for a target.

    Args:
        places: What each document takes.  # (documents,)
        context: What a row holds.

    Returns:
        An order of the documents, (documents,), and where in it each block begins: a long document
        and what fills up its last row, or the documents of one row. Blocks are in the order of
        their first documents.
    """
    rest = places % context
    is_long = places >= context
    opens = np.flatnonzero(is_long & (rest > 0))
    exact = np.flatnonzero(is_long & (rest == 0))
    short = np.flatnonzero(~is_long)
    block = np.empty(len(places), dtype=np.int64)
    block[opens] = np.arange(len(opens))
    block[short], bins = fit_items(places[short], context - rest[opens], context)
    block[exact] = bins + np.arange(len(exact))
    numbers = np.arange(len(places))
    earliest = np.full(bins + len(exact), len(places), dtype=np.int64)
    np.minimum.at(earliest, block, numbers)
    order = np.lexsort((numbers, ~is_long, earliest[block]))
    changes = np.flatnonzero(np.diff(block[order], prepend=-1))
    return order, changes


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
    segments = np.empty((len(ends), context), dtype=np.int32)
    segments[:, 0] = 0
    if segments.size <= _SMALL:
        bits = np.unpackbits(ends, axis=1)[:, : context - 1]
        np.cumsum(bits, axis=1, dtype=np.int32, out=segments[:, 1:])
        return segments
    block = max(1, _BLOCK_TOKENS // context)
    for low in range(0, len(ends), block):
        _sum_lanes(ends[low : low + block], segments[low : low + block])
    return segments


def _sum_lanes(ends: np.ndarray, segments: np.ndarray) -> None:
    """Write running sums of bits, eight bytes at a time.

    Numpy's cumsum over all tokens would take longer than reading the rows does.

    Args:
        ends: (n, bytes) uint8.
        segments: Receives the sums from its second column on.  # (n, context) int32
    """
    rows, width = ends.shape
    words = -(-width // 8)
    packed = np.zeros((rows, 8 * words), dtype=np.uint8)
    packed[:, :width] = ends
    counts = np.bitwise_count(packed)
    # Of each byte, how many bits were set up to it within its word; of each word, before it.
    sums = counts.view(np.uint64) * _LANES
    of_word = sums >> np.uint64(56)
    before = of_word.ravel().cumsum(dtype=np.uint64).reshape(rows, words) - of_word
    before -= before[:, :1].copy()
    sums += before * _LANES
    of_byte = sums.view(np.uint8)
    of_byte -= counts
    lanes = np.unpackbits(packed).view(np.uint64).reshape(rows, 8 * words)
    lanes *= _LANES
    lanes += of_byte.astype(np.uint64) * _LANES
    last = segments.shape[1] - 1
    segments[:, 1:] = lanes.view(np.uint8)[:, :last]
    many = before[:, -1] + of_word[:, -1] > np.iinfo(np.uint8).max
    if many.any():  # more than a byte can count
        exact = np.unpackbits(packed[many], axis=1)[:, :last]
        segments[many, 1:] = np.cumsum(exact, axis=1, dtype=np.int32)
