"""The plan of a split: which document goes where in which shard, as workers need to know it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from shoal.configs.corpus import PrepareConfig
from shoal.data_pipeline.mds import token_type
from shoal.data_pipeline.mixture import permute
from shoal.data_pipeline.packing import Layout
from shoal.data_pipeline.tokenizer import Tokenizer
from shoal.data_pipeline.tokens import Split, chunk_files, save_array


@dataclass(frozen=True)
class ShardPlan:
    """What a worker needs to write any shard of a split."""

    folder: Path
    """Receives the shards; beside them lie the arrays of the layout."""
    chunks: tuple[Path, ...]
    context: int
    eot: int
    vocab_size: int
    rows: int
    shard_rows: int
    compression: str | None

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    def part_file(self, number: int) -> Path:
        """Return the file that says that a shard is written: its index entry."""
        return self.folder / f"{number:05d}.json"


def plan_split(
    config: PrepareConfig, split: Split, tokenizer: Tokenizer, folder: Path
) -> ShardPlan:
    """Decide which document lies where, and leave that in `folder` for the workers."""
    folder.mkdir(exist_ok=True)
    lengths = np.concatenate([np.load(chunk_files(c)[0]) for c in split.chunks])
    order = permute(np.arange(len(lengths)), len(lengths), "documents", config.seed, split.name)
    layout = Layout.plan(lengths, order, config.context)
    save_array(folder / "documents.npy", layout.documents)
    save_array(folder / "starts.npy", layout.starts)
    row_bytes = (config.context + 1) * token_type(tokenizer.vocab_size).itemsize
    return ShardPlan(
        folder=folder,
        chunks=tuple(split.chunks),
        context=config.context,
        eot=tokenizer.eot_id,
        vocab_size=tokenizer.vocab_size,
        rows=layout.rows,
        shard_rows=max(1, config.shard_bytes // (row_bytes + 4)),
        compression=config.compression,
    )


@lru_cache(maxsize=1)
def open_layout(plan: ShardPlan) -> Layout:
    """Return the layout that `plan_split` left."""
    documents = np.load(plan.folder / "documents.npy", mmap_mode="r")
    starts = np.load(plan.folder / "starts.npy", mmap_mode="r")
    return Layout(documents, starts, plan.context)


class TokenReader:
    """Tokens of any document, from the mapped files of its chunk."""

    def __init__(self, plan: ShardPlan) -> None:
        self._chunks = plan.chunks
        lengths = [np.load(chunk_files(chunk)[0]) for chunk in plan.chunks]
        self._first = np.cumsum([0, *(len(part) for part in lengths)])
        self._starts = [np.concatenate([[0], np.cumsum(part)]) for part in lengths]
        self._open_tokens = lru_cache(maxsize=1024)(self._map_tokens)

    def read(self, document: int) -> np.ndarray:
        """Return the tokens of a document."""
        chunk = int(np.searchsorted(self._first, document, side="right")) - 1
        place = document - self._first[chunk]
        start, end = self._starts[chunk][place : place + 2]
        return self._open_tokens(chunk)[start:end]

    def _map_tokens(self, chunk: int) -> np.ndarray:
        array: np.ndarray = np.load(chunk_files(self._chunks[chunk])[1], mmap_mode="r")
        return array


@lru_cache(maxsize=1)
def open_tokens(plan: ShardPlan) -> TokenReader:
    """Return the reader of a split, the same one for all its shards."""
    return TokenReader(plan)
