"""The text of rows, through the tokenizer they were written with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline.cache import ShardCache
from shoal.data_pipeline.manifest import hash_tree
from shoal.data_pipeline.order import permute
from shoal.data_pipeline.packing import IGNORE
from shoal.data_pipeline.rows import Rows
from shoal.data_pipeline.tokenizer import Tokenizer


@dataclass(frozen=True)
class Split:
    """Shards as they were when they were first opened: what tasks are given, in any process.

    Args:
        path: Folder, or URL.
        cache: Where shards of a URL are kept; None: the user's, without limit.
        manifest_hash: Of all that the manifest says.
    """

    path: str
    cache: ShardCache | None
    manifest_hash: str


def open_split(path: str, cache: ShardCache | None = None) -> Split:
    """Look at shards as they are now.

    Raises:
        DataError: they cannot be read.
    """
    return Split(path, cache, _hash_manifest(Rows.open(path, cache)))


def _hash_manifest(rows: Rows) -> str:
    return hash_tree(rows.manifest.model_dump(mode="json"))


@lru_cache(maxsize=8)
def open_rows(split: Split) -> Rows:
    """Open shards once a process.

    Raises:
        DataError: they cannot be read, or are others than at first.
    """
    rows = Rows.open(split.path, split.cache)
    if _hash_manifest(rows) != split.manifest_hash:
        raise DataError("was prepared anew while it was read", where=split.path, fix="start again")
    return rows


@lru_cache(maxsize=8)
def _open_tokenizer(split: Split) -> Tokenizer:
    return Tokenizer.load(open_rows(split).tokenizer_folder)


def read_row_texts(split: Split, numbers: np.ndarray) -> list[str]:
    """Return the texts of rows, documents apart by a line break, padding left out.

    Args:
        split: The shards.
        numbers: (n,) int64.

    Raises:
        DataError: a shard is missing or corrupt; names it.
    """
    rows, tokenizer = open_rows(split), _open_tokenizer(split)
    batch = rows.gather(numbers)
    lengths = (batch.targets != IGNORE).sum(axis=1) + 1
    texts = []
    for tokens, length in zip(batch.tokens, lengths, strict=True):
        ids = tokens[:length]
        cuts = np.flatnonzero(ids == rows.manifest.eot_id)
        eot = rows.manifest.eot_id
        parts = (tokenizer.decode(part[part != eot]) for part in np.split(ids, cuts))
        texts.append("\n".join(part for part in parts if part))
    return texts


def sample_rows(split: Split, count: int, seed: int) -> np.ndarray:
    """Return a fixed sample of rows, ascending; a larger one holds all of it.  # (n,) int64

    Raises:
        ConfigError: there are no rows.
    """
    rows = len(open_rows(split))
    if rows == 0:
        raise ConfigError("holds no rows", where=split.path)
    chosen = permute(np.arange(min(count, rows), dtype=np.int64), rows, seed, "sample")
    return np.sort(chosen)
