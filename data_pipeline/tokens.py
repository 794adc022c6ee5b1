"""Pieces of documents to files of token ids: the middle of preparing a corpus."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from shoal.configs.corpus import PrepareConfig
from shoal.data_pipeline.cleaned import Removals
from shoal.data_pipeline.cleaner import load_cleaner
from shoal.data_pipeline.documents import Document, DroppedLog
from shoal.data_pipeline.mds import token_type
from shoal.data_pipeline.pieces import (
    SPLITS,
    Piece,
    Read,
    Reading,
    held_out,
    load_pieces,
    save_pieces,
)
from shoal.data_pipeline.sources import read_documents
from shoal.data_pipeline.stages import Run
from shoal.data_pipeline.store import name_aside, read_columns, write_whole
from shoal.data_pipeline.tokenizer import Tokenizer


@dataclass
class Split:
    """One split on its way: what it was read from, what is left of that, and its tokens."""

    name: str
    sources: list[Read] = field(default_factory=list)
    documents: int = 0
    """That are left."""
    bytes: int = 0
    """UTF-8 bytes of their text."""
    domains: Counter[str] = field(default_factory=Counter)
    chunks: list[Path] = field(default_factory=list)
    """Of the tokens, in order; see `chunk_files`."""
    removals: Removals | None = None
    """What cleaning did; None: documents were taken as they are."""


@dataclass(frozen=True)
class EncodePieces:
    """Tokenises what is left of each piece, one task a piece.

    Task n leaves n.lengths.npy, the tokens of each document, n.json, what the documents are, and
    then n.tokens.npy, all the tokens.
    """

    listing: Path
    tokenizer: Path
    folder: Path
    tasks: int
    name: str = "tokenise documents"

    def chunk(self, task: int) -> Path:
        """Return the stem of a task's files."""
        return self.folder / f"{task:06d}"

    def task_bytes(self, task: int) -> int:
        """Bytes of text."""
        return load_pieces(self.listing)[task].bytes

    def is_done(self, task: int) -> bool:
        """Whether its tokens are there."""
        return chunk_files(self.chunk(task))[1].is_file()

    def run(self, task: int) -> None:
        """Tokenise a piece."""
        tokenizer = _open_tokenizer(self.tokenizer)
        piece = load_pieces(self.listing)[task]
        lengths: list[int] = []
        tokens: list[np.ndarray] = []
        facts = _KeptFacts()
        for texts in _read_kept(piece, facts):
            encoded = tokenizer.encode_batch(texts)
            lengths += [len(ids) for ids in encoded]
            tokens.append(np.concatenate(encoded).astype(token_type(tokenizer.vocab_size)))
        lengths_file, tokens_file = chunk_files(self.chunk(task))
        save_array(lengths_file, np.asarray(lengths, dtype=np.int64))
        write_whole(self.chunk(task).with_suffix(".json"), json.dumps(facts.__dict__))
        empty = np.zeros(0, token_type(tokenizer.vocab_size))
        save_array(tokens_file, np.concatenate([empty, *tokens]))


class _KeptFacts:
    """Counts of the documents that are tokenised."""

    def __init__(self) -> None:
        self.documents = 0
        self.bytes = 0
        self.domains: Counter[str] = Counter()


def _read_kept(piece: Piece, facts: _KeptFacts) -> Iterator[list[str]]:
    """Yield the texts of a piece that are kept, in batches, and count them."""
    import pyarrow.compute

    keep = None if piece.keep is None else np.load(piece.keep)
    first = 0
    for texts, domains in read_columns(piece.file, ("text", "domain")):
        count = len(texts)
        if keep is not None:
            mask = pyarrow.array(keep[first : first + count])
            texts, domains = texts.filter(mask), domains.filter(mask)
        first += count
        if not len(texts):
            continue
        facts.documents += len(texts)
        facts.bytes += pyarrow.compute.sum(pyarrow.compute.binary_length(texts)).as_py()
        for entry in pyarrow.compute.value_counts(domains).to_pylist():
            facts.domains[entry["values"]] += entry["counts"]
        yield texts.to_pylist()


def encode_pieces(reading: Reading, tokenizer: Path, work: Path, run: Run) -> dict[str, Split]:
    """Tokenise every piece; return the splits that were read, those with documents or not."""
    listing, folder = work / "tokens.json", work / "tokens"
    save_pieces(listing, reading.pieces)
    folder.mkdir(exist_ok=True)
    stage = EncodePieces(listing, tokenizer, folder, len(reading.pieces))
    run(stage)
    splits = {name: Split(name, reading.sources[name]) for name in SPLITS if reading.sources[name]}
    for task, piece in enumerate(reading.pieces):
        split = splits[piece.split]
        facts = json.loads(stage.chunk(task).with_suffix(".json").read_text())
        split.documents += facts["documents"]
        split.bytes += facts["bytes"]
        split.domains.update(facts["domains"])
        split.chunks.append(stage.chunk(task))
    return splits


def training_texts(config: PrepareConfig, dropped: DroppedLog | None = None) -> Iterator[str]:
    """Yield the training documents of a corpus as they are cleaned, those held out left aside.

    Duplicates are among them: what is searched in these texts is found in their twins as well.
    """
    cleaner = None if config.clean is None else load_cleaner(config.clean)
    for source in config.train:
        for document in read_documents(source, DroppedLog() if dropped is None else dropped):
            if held_out(document, config.validation_share):
                continue
            result = document if cleaner is None else cleaner.clean(document)
            if isinstance(result, Document):
                yield result.text


def chunk_files(file: Path) -> tuple[Path, Path]:
    """Return the two files of a chunk, lengths and tokens; the second is written last."""
    return file.with_name(file.name + ".lengths.npy"), file.with_name(file.name + ".tokens.npy")


def save_array(file: Path, array: np.ndarray) -> None:
    """Write an array so that the file is either absent or whole."""
    array = np.ascontiguousarray(array)  # the header tells the order of what is written
    aside = name_aside(file)
    with aside.open("wb") as stream:
        # Not np.save: on a full disk its error has no number that tells so.
        np.lib.format.write_array_header_1_0(
            stream, np.lib.format.header_data_from_array_1_0(array)
        )
        stream.write(array.data)
        stream.flush()
        os.fsync(stream.fileno())
    aside.rename(file)


@lru_cache(maxsize=1)
def _open_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)
