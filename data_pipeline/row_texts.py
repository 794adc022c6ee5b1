"""The text of rows, through the tokenizer they were written with."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from shoal.configs.errors import ConfigError
from shoal.data_pipeline.order import permute
from shoal.data_pipeline.packing import IGNORE
from shoal.data_pipeline.rows import Rows
from shoal.data_pipeline.tokenizer import Tokenizer


@lru_cache(maxsize=8)
def open_rows(path: str) -> Rows:
    """Open shards once a process."""
    return Rows.open(path)


@lru_cache(maxsize=8)
def _open_tokenizer(path: str) -> Tokenizer:
    return Tokenizer.load(open_rows(path).tokenizer_folder)


def read_row_texts(path: str, numbers: np.ndarray) -> list[str]:
    """Return the texts of rows, documents apart by a line break, padding left out.

    Args:
        path: Folder or URL of one split.
        numbers: (n,) int64.

    Raises:
        DataError: a shard is missing or corrupt; names it.
    """
    rows, tokenizer = open_rows(path), _open_tokenizer(path)
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


def sample_rows(path: str, count: int, seed: int) -> np.ndarray:
    """Return a fixed sample of rows, ascending; a larger one holds all of it.  # (n,) int64

    Raises:
        ConfigError: there are no rows.
    """
    rows = len(open_rows(path))
    if rows == 0:
        raise ConfigError("holds no rows", where=path)
    chosen = permute(np.arange(min(count, rows), dtype=np.int64), rows, seed, "sample")
    return np.sort(chosen)
