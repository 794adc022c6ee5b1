"""Documents to rows of fixed length; pure numpy.

The stream is `eot d1 d2 ... eot e1 e2 ... eot`: every document starts with the end-of-text token,
which is also the target that ends the document before it. A row holds context + 1 tokens and
shares its last one with the next row, so that every token of the corpus is a target exactly once.
The last row is filled up with end-of-text tokens. No document is empty, so end-of-text after
end-of-text occurs in that filling alone and is how it is recognised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

IGNORE = -100
"""Target of a position that is not scored."""


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
