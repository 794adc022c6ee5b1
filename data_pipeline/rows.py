"""Rows read from mapped shards, each shard checked before its first row is given out."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from shoal.configs.errors import DataError
from shoal.data_pipeline.manifest import (
    Manifest,
    ShardFacts,
    check_shard,
    check_tokenizer,
    read_manifest,
    tokenizer_beside,
)
from shoal.data_pipeline.packing import find_segments


class Rows:
    """The rows of one split, by number.

    An MDS shard is a count, an offset for every row, a description, and the rows: of fixed size
    here, so that a mapped shard is a matrix. Errors are raised by the call that meets them.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._row_bytes = (manifest.context + 1) * self._dtype.itemsize
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

    def gather(self, row_numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return rows by number, in the order asked for.

        Args:
            row_numbers: (n,) int64.

        Returns:
            Tokens, (n, context + 1) int64; segments, (n, context) int32: the document of each
            input token, counted within its row.

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
        tokens = raw.view(self._dtype).astype(np.int64)
        return tokens, find_segments(tokens, self.manifest.eot_id)

    def _map(self, number: int) -> np.ndarray:
        """Return a shard as a matrix of bytes, (rows, bytes of a row), checked once."""
        if number not in self._mapped:
            shard = self.manifest.shards[number]
            check_shard(self.folder, shard)
            self._mapped[number] = self._lay_out(shard, self._open_raw(shard))
        return self._mapped[number]

    def _open_raw(self, shard: ShardFacts) -> mmap.mmap:
        """Map the content of a shard; a compressed one is unpacked into a nameless file."""
        with (self.folder / shard.file).open("rb") as file:
            if self.manifest.compression is None:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            with tempfile.TemporaryFile(prefix="shoal-") as unpacked:
                self._unpack(shard, file, unpacked)
                return mmap.mmap(unpacked.fileno(), 0, access=mmap.ACCESS_READ)

    def _unpack(self, shard: ShardFacts, packed: IO[bytes], unpacked: IO[bytes]) -> None:
        import zstandard

        try:
            zstandard.ZstdDecompressor().copy_stream(packed, unpacked)
        except zstandard.ZstdError as error:
            raise DataError(f"shard does not unpack: {error}", where=packed.name) from None
        unpacked.flush()
        if unpacked.tell() != shard.raw_bytes:
            raise DataError("shard unpacks to another size than stated", where=packed.name)

    def _lay_out(self, shard: ShardFacts, data: mmap.mmap) -> np.ndarray:
        """Find the rows in an MDS shard: a count, then offsets, the last of which is the end."""
        where = self.folder / shard.file
        count = int(np.frombuffer(data, "<u4", 1)[0])
        if count != shard.rows:
            raise DataError(f"shard holds {count} rows, not {shard.rows}", where=where)
        offsets = np.frombuffer(data, "<u4", count + 1, 4).astype(np.int64)
        if offsets[-1] != len(data) or np.any(np.diff(offsets) != self._row_bytes):
            raise DataError("shard has rows of another size than its manifest says", where=where)
        rows = np.frombuffer(data, np.uint8, count * self._row_bytes, int(offsets[0]))
        return rows.reshape(count, self._row_bytes)


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
