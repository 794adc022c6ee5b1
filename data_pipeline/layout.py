"""The plan of a split: which document goes where in which shard, and the stage that writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from shoal.configs.corpus import PackingConfig, PrepareConfig
from shoal.configs.errors import ConfigError
from shoal.data_pipeline.manifest import PackingFacts
from shoal.data_pipeline.mds import MAX_SHARD_BYTES, row_type, token_type, write_mds
from shoal.data_pipeline.order import permute
from shoal.data_pipeline.packing import Form, Layout, Span
from shoal.data_pipeline.tokenizer import Tokenizer
from shoal.data_pipeline.tokens import Split, chunk_files, save_array

_ARRAYS = ("documents", "starts", "row_starts", "row_lengths")


@dataclass(frozen=True)
class ShardPlan:
    """What a worker needs to write any shard of a split."""

    folder: Path
    """Receives the shards; beside them lie the arrays of the layout."""
    chunks: tuple[Path, ...]
    form: Form
    vocab_size: int
    rows: int
    shard_rows: int
    compression: str | None
    packing: PackingFacts
    lengths: dict[str, int] = field(compare=False)
    """Histogram for the manifest, see `count_lengths`."""

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    @property
    def context(self) -> int:
        """Tokens a row gives to the model."""
        return self.form.context

    def part_file(self, number: int) -> Path:
        """Return the file that says that a shard is written: its index entry."""
        return self.folder / f"{number:05d}.json"


def plan_split(
    config: PrepareConfig, split: Split, tokenizer: Tokenizer, folder: Path
) -> ShardPlan:
    """Decide which document lies where, and leave that in `folder` for the workers.

    Raises:
        ConfigError: the separator is not the text of one token.
    """
    folder.mkdir(exist_ok=True)
    form = choose_form(config.packing, config.context, tokenizer)
    parts = [np.load(chunk_files(chunk)[0]) for chunk in split.chunks]
    lengths = np.concatenate(parts)
    order = permute(np.arange(len(lengths)), len(lengths), "documents", config.seed, split.name)
    layout = Layout.plan(lengths, order, form, config.packing)
    for name in _ARRAYS:
        save_array(folder / f"{name}.npy", getattr(layout, name))
    save_array(folder / "lengths.npy", lengths)
    save_array(folder / "offsets.npy", np.concatenate([np.cumsum(part) - part for part in parts]))
    save_array(folder / "chunks.npy", np.cumsum([0, *(len(part) for part in parts)]))
    row_bytes = row_type(config.context, token_type(tokenizer.vocab_size)).itemsize
    return ShardPlan(
        folder=folder,
        chunks=tuple(split.chunks),
        form=form,
        vocab_size=tokenizer.vocab_size,
        rows=layout.rows,
        shard_rows=max(1, min(config.shard_bytes, MAX_SHARD_BYTES) // (row_bytes + 4)),
        compression=config.compression,
        packing=PackingFacts(
            method=config.packing.method,
            separator=config.packing.separator,
            rows=layout.rows,
            tokens=layout.tokens,
            padding_tokens=layout.padding_tokens,
            cut_documents=layout.cut_documents,
        ),
        lengths=count_lengths(lengths),
    )


def choose_form(packing: PackingConfig, context: int, tokenizer: Tokenizer) -> Form:
    """Return how documents follow each other, with the separator as a token.

    Raises:
        ConfigError: it is not the text of one token.
    """
    separator: int | None = tokenizer.eot_id
    if packing.separator == "none":
        separator = None
    elif packing.separator != "end_of_text":
        (ids,) = tokenizer.encode_batch([packing.separator])
        if len(ids) != 1:
            raise ConfigError(
                f"{packing.separator!r} is {len(ids)} tokens of this tokenizer, not one",
                where="packing.separator",
                fix="take a text that is one token, or end_of_text, or none",
            )
        separator = int(ids[0])
    return Form(
        context=context,
        eot=tokenizer.eot_id,
        separator=separator,
        leads=packing.separator == "end_of_text",
        piece_tokens=packing.piece_tokens,
        overlap=packing.overlap,
    )


def count_lengths(lengths: np.ndarray) -> dict[str, int]:
    """Return how many documents have at least so many tokens, and fewer than twice as many.

    Args:
        lengths: Tokens of every document.  # (documents,)

    Returns:
        By powers of two, as text since JSON knows no other keys; 0 counts empty documents.
    """
    powers = np.frexp(lengths.astype(np.float64))[1]  # 2**(powers - 1) <= length < 2**powers
    counts = np.bincount(powers)
    return {
        str(2 ** (power - 1) if power else 0): int(count)
        for power, count in enumerate(counts)
        if count
    }


@lru_cache(maxsize=1)
def open_layout(plan: ShardPlan) -> Layout:
    """Return the layout that `plan_split` left."""
    arrays = [np.load(plan.folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS]
    return Layout(plan.form, *arrays)


class TokenReader:
    """Tokens of any documents, from the mapped files of their chunks."""

    def __init__(self, plan: ShardPlan) -> None:
        self._chunks = plan.chunks
        self._first = np.load(plan.folder / "chunks.npy")
        self._lengths = np.load(plan.folder / "lengths.npy", mmap_mode="r")
        self._offsets = np.load(plan.folder / "offsets.npy", mmap_mode="r")

    def read(self, documents: np.ndarray, places: np.ndarray) -> Iterator[Span]:
        """Yield the tokens of documents, each with its place; chunk by chunk, not in their order.

        Args:
            documents: Their numbers.  # (n,) int64
            places: Handed on.  # (n,) int64
        """
        chunks = np.searchsorted(self._first, documents, side="right") - 1
        starts = self._offsets[documents]
        ends = starts + self._lengths[documents]
        order = np.argsort(chunks, kind="stable")
        edges = np.searchsorted(chunks[order], np.arange(len(self._chunks) + 1))
        for chunk, (low, high) in enumerate(pairwise(edges.tolist())):
            if low < high:
                here = order[low:high]
                tokens = np.load(chunk_files(self._chunks[chunk])[1], mmap_mode="r")
                plain = tokens.view(np.ndarray)  # slices of a memory map cost ten times as much
                columns = (places[here].tolist(), starts[here].tolist(), ends[here].tolist())
                for place, start, end in zip(*columns, strict=True):
                    yield place, plain[start:end]


@lru_cache(maxsize=1)
def open_tokens(plan: ShardPlan) -> TokenReader:
    """Return the reader of a split, the same one for all its shards."""
    return TokenReader(plan)


@dataclass(frozen=True)
class WriteShards:
    """The stage that writes the shards of a split, one a task."""

    plan: ShardPlan
    name: str = "write shards"

    @property
    def tasks(self) -> int:
        """One for each shard."""
        return self.plan.shards

    def is_done(self, task: int) -> bool:
        """Whether the shard and its index entry are there."""
        return self.plan.part_file(task).is_file()

    def run(self, task: int) -> None:
        """Write a shard, its counts and its index entry, unless they are there."""
        write_shard(self.plan, task)


def write_shard(plan: ShardPlan, number: int) -> None:
    """Write one MDS shard, its index entry and its token counts, unless they are there."""
    part = plan.part_file(number)
    if part.is_file():
        return
    first = number * plan.shard_rows
    last = min(first + plan.shard_rows, plan.rows)
    layout = open_layout(plan)
    here, starts, _, _ = layout.locate(first, last)
    spans = open_tokens(plan).read(np.asarray(layout.documents[here]), np.asarray(starts))
    rows = layout.fill(first, last, spans, token_type(plan.vocab_size))
    save_array(part.with_suffix(".npy"), count_targets(rows, plan.vocab_size))
    save_entry(part, write_mds(plan.folder, number, rows, plan.compression))


def count_targets(rows: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return how often each token is a target.

    Args:
        rows: (rows,) of `mds.row_type`.
        vocab_size: One more than the highest id.

    Returns:
        (vocab,) int64.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    places = np.arange(1, rows["tokens"].shape[1])
    for low in range(0, len(rows), 1024):
        part = rows[low : low + 1024]
        targets = part["tokens"][:, 1:]
        if part["length"].min() < targets.shape[1] + 1:
            targets = targets[places < part["length"][:, None]]
        counts += np.bincount(targets.ravel(), minlength=vocab_size)
    return counts


def save_entry(file: Path, entry: dict[str, Any]) -> None:
    """Write the index entry of a shard, whole or not at all."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(entry))
        stream.flush()
        os.fsync(stream.fileno())
    aside.rename(file)
