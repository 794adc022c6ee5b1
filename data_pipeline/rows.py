"""Rows read from mapped shards, each shard checked before its first row is given out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shoal.configs.errors import DataError
from shoal.data_pipeline.manifest import (
    Manifest,
    check_shard,
    check_tokenizer,
    read_manifest,
    tokenizer_beside,
)
from shoal.data_pipeline.mds import open_mds, row_type
from shoal.data_pipeline.packing import RowBatch, decode_rows


class Rows:
    """The rows of one split, by number.

    An MDS shard is a count, an offset for every row, a description, and the rows: of fixed size
    here, so that a mapped shard is a matrix. Errors are raised by the call that meets them.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._row_bytes = row_type(manifest.context, self._dtype).itemsize
        counts = [shard.rows for shard in manifest.shards]
        self._ends = np.cumsum(np.asarray(counts, dtype=np.int64))
        self._mapped: dict[int, np.ndarray] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Rows:
        """Open a folder of shards; reads its manifest and the tokenizer's files, no shard.

        Raises:
            DataError: no shards there, the manifest was altered, or the tokenizer beside the
                shards is not theirs.
        """
        manifest = read_manifest(folder)
        check_tokenizer(Path(folder), manifest)
        return cls(Path(folder), manifest)

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer the rows were written with."""
        return tokenizer_beside(self.folder)

    def gather(self, row_numbers: np.ndarray) -> RowBatch:
        """Return rows by number, in the order asked for.

        Args:
            row_numbers: (n,) int64.

        Raises:
            DataError: a shard is missing, cut or corrupt; names it.
            IndexError: there is no such row.
        """
        numbers = np.asarray(row_numbers, dtype=np.int64)
        if numbers.size and (numbers.min() < 0 or numbers.max() >= len(self)):
            raise IndexError(f"rows are numbered from 0 to {len(self) - 1}")
        shards = np.searchsorted(self._ends, numbers, side="right")
        raw = np.empty((numbers.size, self._row_bytes), dtype=np.uint8)
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            first = self._ends[shard] - self.manifest.shards[shard].rows
            raw[here] = self._map(int(shard))[numbers[here] - first]
        return decode_rows(raw, self.manifest.context, self._dtype)

    def _map(self, number: int) -> np.ndarray:
        """Return a shard as a matrix of bytes, (rows, bytes of a row), checked once."""
        if number not in self._mapped:
            shard = self.manifest.shards[number]
            check_shard(self.folder, shard)
            self._mapped[number] = open_mds(
                self.folder / shard.file,
                shard.rows,
                shard.raw_bytes,
                self.manifest.context,
                self._dtype,
                self.manifest.compression,
            )
        return self._mapped[number]


def check_alike(streams: Sequence[Rows]) -> None:
    """Check that rows can be read by one model: the same ids, the same length.

    Raises:
        DataError: they cannot; names the first split that differs from the first one.
    """
    first = streams[0].manifest
    for rows in streams[1:]:
        if rows.manifest.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise DataError(
                "was written with another tokenizer than the first stream",
                where=rows.folder,
                fix="prepare both with one tokenizer (tokenizer.path=FOLDER)",
            )
        if rows.manifest.context != first.context:
            raise DataError(
                f"has rows of {rows.manifest.context} tokens, the first stream of {first.context}",
                where=rows.folder,
                fix="prepare both with one context",
            )
