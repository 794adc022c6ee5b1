"""Rows read from mapped shards, each shard checked before its first row is given out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shoal.configs.data import is_url
from shoal.configs.errors import DataError
from shoal.data_pipeline.cache import FileKey, RemoteShards, ShardCache, Tick, go_on
from shoal.data_pipeline.manifest import (
    Manifest,
    ShardFacts,
    check_shard,
    check_tokenizer,
    read_manifest,
    tokenizer_beside,
)
from shoal.data_pipeline.mapped import MappedShards
from shoal.data_pipeline.mds import open_mds, row_type
from shoal.data_pipeline.packing import RowBatch, decode_rows

_FEW_ROWS = 8
"""With fewer rows of each shard it is quicker to copy them one by one."""

_TRIES = 5


class LocalShards:
    """Shards that lie in a folder."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._checked: dict[int, FileKey] = {}
        """What was checked, by shard: one that is mapped again is not hashed again."""

    def need(self, numbers: Sequence[int]) -> int:
        """Return the bytes of shards that must be in a cache at once: none."""
        return 0

    def bring(self, numbers: Sequence[int], beside: int = 0, tick: Tick = go_on) -> None:
        """Nothing to do: they are there, or opening them says so."""

    def path(self, number: int) -> Path:
        """Return the file of a shard, checked."""
        shard = self.manifest.shards[number]
        file = self.folder / shard.file
        try:
            before = FileKey.of(os.lstat(file))
        except FileNotFoundError:
            before = None  # said below
        if before is None or self._checked.get(number) != before:
            check_shard(self.folder, shard)
            if before is not None:
                self._checked[number] = before
        return file

    def let_go(self, numbers: Sequence[int]) -> list[int]:
        """Return none: files that stay take up no more space when mapped."""
        return []


class Rows:
    """The rows of one split, by number.

    An MDS shard is a count, an offset for every row, a description, and the rows: of fixed size
    here, so that a mapped shard is a matrix. Errors are raised by the call that meets them.
    """

    def __init__(self, folder: Path, manifest: Manifest, files: RemoteShards | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self._files: LocalShards | RemoteShards = files or LocalShards(folder, manifest)
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._row_bytes = row_type(manifest.context, self._dtype).itemsize
        counts = [shard.rows for shard in manifest.shards]
        self._ends = np.cumsum(np.asarray(counts, dtype=np.int64))
        self._first_rows = self._ends - counts
        self._mapped = MappedShards()

    @classmethod
    def open(cls, folder: str | Path, cache: ShardCache | None = None) -> Rows:
        """Open a folder of shards; reads its manifest and the tokenizer's files, no shard.

        Args:
            folder: Of one split, or its URL, such as s3://bucket/corpus/train.
            cache: Where shards of a URL are kept; None: the user's, without limit.

        Raises:
            DataError: no shards there, the manifest was altered, or the tokenizer beside the
                shards is not theirs.
        """
        if is_url(folder):
            cache = cache or ShardCache.choose(None, None, 60)
            files = cache.open_split(str(folder))
            check_tokenizer(files.folder, files.manifest)
            return cls(files.folder, files.manifest, files)
        manifest = read_manifest(folder)
        check_tokenizer(Path(folder), manifest)
        return cls(Path(folder), manifest)

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def is_remote(self) -> bool:
        """Whether its shards are downloaded."""
        return isinstance(self._files, RemoteShards)

    @property
    def where(self) -> Path | str:
        """The folder, or the URL it stands for."""
        return self.folder if isinstance(self._files, LocalShards) else self._files.remote.url

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer the rows were written with."""
        return tokenizer_beside(self.folder)

    def gather(self, row_numbers: np.ndarray, tick: Tick = go_on) -> RowBatch:
        """Return rows by number, in the order asked for.

        Args:
            row_numbers: (n,) int64.
            tick: Called between shards; what it raises ends the reading.

        Raises:
            DataError: a shard is missing, cut or corrupt, or cannot be opened; names it.
            IndexError: there is no such row.
        """
        numbers = np.asarray(row_numbers, dtype=np.int64)
        # Negative ones are very large ones to an unsigned type.
        if numbers.size and numbers.view(np.uint64).max() >= len(self):
            raise IndexError(f"rows are numbered from 0 to {len(self) - 1}")
        return decode_rows(self._gather_raw(numbers, tick), self.manifest.context, self._dtype)

    def bring(self, row_numbers: np.ndarray, beside: int = 0, tick: Tick = go_on) -> int:
        """Have the shards of rows ready; return the bytes of a cache that takes.

        Args:
            row_numbers: (n,) int64.
            beside: Bytes of that cache that are needed at the same time for something else.
            tick: Called between shards; what it raises ends the reading.

        Raises:
            DataError: a shard does not come, or not as it should be; names it.
            ConfigError: the cache cannot hold all at once.
        """
        used = np.unique(np.searchsorted(self._ends, row_numbers, side="right")).tolist()
        self._files.bring(used, beside, tick)
        return self._files.need(used)

    def _gather_raw(self, numbers: np.ndarray, tick: Tick) -> np.ndarray:
        """Return rows as they are stored.  # (n, bytes of a row) uint8"""
        if len(self._ends) == 1:
            self._files.bring([0], tick=tick)
            return self._map(0, tick)[numbers]
        shards = np.searchsorted(self._ends, numbers, side="right")
        within = numbers - self._first_rows[shards]
        needed = set(shards.tolist())
        used = sorted(needed)
        self._files.bring(used, tick=tick)
        self._mapped.touch(used)
        raw = np.empty((numbers.size, self._row_bytes), dtype=np.uint8)
        if numbers.size >= _FEW_ROWS * len(used):
            for shard in used:
                here = np.flatnonzero(shards == shard)
                raw[here] = self._map(shard, tick)[within[here]]
            return raw
        places: Sequence[int] = range(numbers.size)
        if not needed <= self._mapped.arrays.keys():
            # Shard by shard: where not all can stay mapped, each is mapped once.
            order = np.argsort(shards, kind="stable")
            places, shards, within = order.tolist(), shards[order], within[order]
        for place, shard, row in zip(places, shards.tolist(), within.tolist(), strict=True):
            raw[place] = self._map(shard, tick)[row]
        return raw

    def _map(self, number: int, tick: Tick) -> np.ndarray:
        """Return a shard as a matrix of bytes, (rows, bytes of a row), checked."""
        mapped = self._mapped.arrays.get(number)
        if mapped is not None:
            return mapped
        tick()
        self._mapped.drop(self._files.let_go(self._mapped.numbers))
        shard = self.manifest.shards[number]
        file = self._files.folder / shard.file
        for _ in range(_TRIES):
            try:
                mapped = self._open(self._files.path(number), shard)
            except FileNotFoundError:  # evicted by another job since it was checked
                continue
            except OSError as error:
                raise DataError(
                    f"shard cannot be read: {error.strerror or error}",
                    where=file,
                    fix="see to the disk, to the limit of open files (ulimit -n) and, of packed "
                    "shards, to the space in the folder for temporary files (TMPDIR)",
                ) from error
            self._mapped.put(number, mapped, shard.raw_bytes if self.manifest.compression else 0)
            return mapped
        raise DataError(
            "shard is removed again and again before it is read",
            where=file,
            fix="other jobs share the cache: raise data.cache_bytes, or set another data.cache",
        )

    def _open(self, file: Path, shard: ShardFacts) -> np.ndarray:
        return open_mds(
            file,
            shard.rows,
            shard.raw_bytes,
            self.manifest.context,
            self._dtype,
            self.manifest.compression,
        )


def bring_together(
    streams: Sequence[Rows], numbers: Sequence[np.ndarray], tick: Tick = go_on
) -> None:
    """Have the shards of rows of several streams ready, all at once.

    Streams of the same rows need their shards once.

    Raises:
        DataError: a shard does not come, or not as it should be; names it.
        ConfigError: the cache cannot hold all at once.
    """
    wanted: dict[Rows, list[np.ndarray]] = {}
    for rows, of_stream in zip(streams, numbers, strict=True):
        wanted.setdefault(rows, []).append(of_stream)
    needed = 0
    for rows, parts in wanted.items():
        if rows.is_remote:
            needed += rows.bring(np.concatenate(parts), needed, tick)


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
                where=rows.where,
                fix="prepare both with one tokenizer (tokenizer.path=FOLDER)",
            )
        if rows.manifest.context != first.context:
            raise DataError(
                f"has rows of {rows.manifest.context} tokens, the first stream of {first.context}",
                where=rows.where,
                fix="prepare both with one context",
            )
