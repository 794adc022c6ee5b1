"""Documents to files of token ids: the first half of preparing a corpus.

Documents are cut into chunks of some megabytes of text, each encoded into one file named after its
content: whatever is there after a kill need not be done again, by however many processes.
"""

from __future__ import annotations

import hashlib
import heapq
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from shoal.configs.corpus import PrepareConfig, SourceConfig
from shoal.configs.errors import DataError
from shoal.data_pipeline.mds import token_type
from shoal.data_pipeline.sources import Document, DroppedLog, read_documents
from shoal.data_pipeline.tokenizer import Tokenizer
from shoal.data_pipeline.workers import Pool

CHUNK_BYTES = 2_000_000
"""Text in one chunk; part of what determines the names of token files, never of the rows."""

Progress = Callable[[str, int, int | None], None]


@dataclass
class Read:
    """What was taken from one source into one split."""

    source: SourceConfig
    documents: int = 0
    bytes: int = 0
    domains: Counter[str] = field(default_factory=Counter)
    dropped: DroppedLog = field(default_factory=DroppedLog)
    content: str = ""
    """SHA-256 of the ids and texts read, over both splits."""


@dataclass
class Split:
    """One split on its way: what it was read from, and where its tokens are."""

    name: str
    sources: list[Read] = field(default_factory=list)
    chunks: list[Path] = field(default_factory=list)

    @property
    def documents(self) -> int:
        """Documents of all sources."""
        return sum(read.documents for read in self.sources)

    @property
    def identity(self) -> str:
        """Of the documents and their order: a hash of the chunks' names."""
        names = "\n".join(chunk.name for chunk in self.chunks)
        return hashlib.sha256(names.encode()).hexdigest()[:16]


def held_out(document: Document, share: float) -> bool:
    """Whether a training document belongs to the validation split, by a hash of its id."""
    digest = hashlib.blake2b(document.id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def training_texts(config: PrepareConfig, dropped: DroppedLog | None = None) -> Iterator[str]:
    """Yield the training documents of a corpus, those held out left aside."""
    for source in config.train:
        for document in read_documents(source, DroppedLog() if dropped is None else dropped):
            if not held_out(document, config.validation_share):
                yield document.text


def choose_texts(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Take about `max_bytes` of text, every document as likely as any other.

    The choice, and its order, depend on the texts alone: those with the lowest hashes are taken.
    """
    heap: list[tuple[int, int, str]] = []
    size = 0
    for number, text in enumerate(texts):
        data = text.encode()
        digest = hashlib.blake2b(data, digest_size=8).digest()
        heapq.heappush(heap, (-int.from_bytes(digest, "big"), -number, text))
        size += len(data)
        while len(heap) > 1 and size - len(heap[0][2].encode()) >= max_bytes:
            size -= len(heapq.heappop(heap)[2].encode())
    return [text for _, _, text in sorted(heap, reverse=True)]


def encode_corpus(
    config: PrepareConfig, tokenizer_folder: Path, work: Path, pool: Pool, progress: Progress
) -> list[Split]:
    """Read every document, and write the tokens of each split under `work`.

    Raises:
        DataError: nothing to read, or more broken records than `max_dropped_share`.
    """
    splits = {"train": Split("train"), "validation": Split("validation")}
    work.mkdir(parents=True, exist_ok=True)
    done = 0
    tasks = _cut_chunks(config, splits, tokenizer_folder, work)
    for size in pool.map(encode_chunk, tasks):
        done += size
        progress("tokenise documents (bytes)", done, None)
    train, validation = splits["train"], splits["validation"]
    _check_dropped(config, [*train.sources, *validation.sources])
    _check_filled(config, train, validation)
    return [train, validation] if validation.documents else [train]


def _cut_chunks(
    config: PrepareConfig, splits: dict[str, Split], tokenizer_folder: Path, work: Path
) -> Iterator[tuple[Path, list[str], Path]]:
    """Yield the arguments of `encode_chunk`, noting in `splits` what each split receives."""
    pending = {name: _Pending(split, work) for name, split in splits.items()}
    for name, source in _all_sources(config):
        share = config.validation_share if name == "train" else 0.0
        for document in _account(splits, name, source, share):
            into = "validation" if share and held_out(document, share) else name
            full = pending[into].add(document.text)
            if full:
                yield tokenizer_folder, *full
    for rest in pending.values():
        if rest.texts:
            yield tokenizer_folder, *rest.take()


def _all_sources(config: PrepareConfig) -> list[tuple[str, SourceConfig]]:
    train = [("train", source) for source in config.train]
    return train + [("validation", source) for source in config.validation]


def _account(
    splits: dict[str, Split], name: str, source: SourceConfig, share: float
) -> Iterator[Document]:
    """Yield the documents of a source, counting each for the split it goes to."""
    reads = {name: Read(source)}
    if share:
        reads["validation"] = Read(source)
    for into, read in reads.items():
        splits[into].sources.append(read)
    content = hashlib.sha256()
    for document in read_documents(source, reads[name].dropped):
        data = document.text.encode()
        read = reads["validation" if share and held_out(document, share) else name]
        read.documents += 1
        read.bytes += len(data)
        read.domains[document.domain] += 1
        if source.format == "datasets":
            content.update(f"{len(document.id.encode())} {len(data)}\n{document.id}\n".encode())
            content.update(data)
        yield document
    for read in reads.values():
        read.content = content.hexdigest()


class _Pending:
    """Texts of one split that do not fill a chunk yet."""

    def __init__(self, split: Split, work: Path) -> None:
        self.split = split
        self.work = work
        self.texts: list[str] = []
        self._size = 0
        self._hash = hashlib.blake2b(digest_size=8)

    def add(self, text: str) -> tuple[list[str], Path] | None:
        """Take a text; return the chunk's texts and file when it is full."""
        data = text.encode()
        self.texts.append(text)
        self._size += len(data)
        self._hash.update(f"{len(data)}\n".encode())
        self._hash.update(data)
        return self.take() if self._size >= CHUNK_BYTES else None

    def take(self) -> tuple[list[str], Path]:
        """Close the chunk."""
        number = len(self.split.chunks)
        file = self.work / f"{self.split.name}-{number:06d}-{self._hash.hexdigest()}"
        self.split.chunks.append(file)
        texts = self.texts
        self.texts, self._size = [], 0
        self._hash = hashlib.blake2b(digest_size=8)
        return texts, file


def encode_chunk(tokenizer_folder: Path, texts: list[str], file: Path) -> int:
    """Write the tokens of texts beside `file`, unless they are there; return the bytes of text.

    Two arrays: FILE.lengths.npy, tokens of each text, and then FILE.tokens.npy, all of them.
    """
    lengths_file, tokens_file = chunk_files(file)
    if not tokens_file.is_file():
        tokenizer = _open_tokenizer(tokenizer_folder)
        encoded = tokenizer.encode_batch(texts)
        lengths = np.asarray([len(ids) for ids in encoded], dtype=np.int64)
        save_array(lengths_file, lengths)
        save_array(tokens_file, np.concatenate(encoded).astype(token_type(tokenizer.vocab_size)))
    return sum(len(text.encode()) for text in texts)


def chunk_files(file: Path) -> tuple[Path, Path]:
    """Return the two files of a chunk; the second is written last."""
    return file.with_name(file.name + ".lengths.npy"), file.with_name(file.name + ".tokens.npy")


def save_array(file: Path, array: np.ndarray) -> None:
    """Write an array so that the file is either absent or whole."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    with aside.open("wb") as stream:
        # Not np.save: on a full disk its error has no number that tells so.
        np.lib.format.write_array_header_1_0(
            stream, np.lib.format.header_data_from_array_1_0(array)
        )
        stream.write(np.ascontiguousarray(array).data)
        stream.flush()
        os.fsync(stream.fileno())
    aside.rename(file)


@lru_cache(maxsize=1)
def _open_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def _check_dropped(config: PrepareConfig, reads: list[Read]) -> None:
    dropped = sum(read.dropped.total for read in reads)
    records = dropped + sum(read.documents for read in reads)
    if dropped > config.max_dropped_share * records:
        examples = [example for read in reads for example in read.dropped.examples]
        raise DataError(
            f"{dropped} of {records} records are broken, more than the share of "
            f"{config.max_dropped_share:g} that is allowed:\n  " + "\n  ".join(examples[:10]),
            where=", ".join(read.source.path for read in reads if read.dropped.total),
            fix="repair them, or raise max_dropped_share",
        )


def _check_filled(config: PrepareConfig, train: Split, validation: Split) -> None:
    if not train.documents:
        raise DataError(
            "the corpus holds no documents",
            where=", ".join(source.path for source in config.train),
            fix="look at text_key, domains and validation_share, and at the files themselves",
        )
    if (config.validation or config.validation_share) and not validation.documents:
        raise DataError(
            "the validation split holds no documents",
            where=", ".join(s.path for s in config.validation) or "validation_share",
            fix="name validation sources that hold text, or raise validation_share",
        )
