"""Sources to pieces: documents in files of some megabytes of text, the unit of all that follows.

Where a piece ends depends on the documents alone, never on the processes that read them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from shoal.configs.corpus import PrepareConfig, SourceConfig
from shoal.configs.errors import DataError
from shoal.data_pipeline.documents import EXAMPLES, Document, DroppedLog
from shoal.data_pipeline.files import redact
from shoal.data_pipeline.parts import Part, list_parts, read_part
from shoal.data_pipeline.stages import Run
from shoal.data_pipeline.store import write_documents, write_whole

TRAIN, VALIDATION = "train", "validation"
SPLITS = (VALIDATION, TRAIN)
"""In the order of their documents: of two copies the earlier stays, and that must be the one held
out, or training would see it."""

MIN_PIECE_BYTES, MAX_PIECE_BYTES = 1_000_000, 16_000_000
MIN_PART_BYTES, MAX_PART_BYTES = 2_000_000, 64_000_000
_LABEL = 60  # characters of a label that a message shows

SHARES = 64
"""Parts and pieces that a small corpus is cut into, so that every process has some."""


@dataclass(frozen=True)
class Piece:
    """Documents of one split in a file, and which of them are left."""

    split: str
    file: Path
    documents: int
    bytes: int
    """UTF-8 bytes of their text."""
    keep: Path | None = None
    """A .npy file of one bool a document; None: all are kept."""


def save_pieces(file: Path, pieces: Iterable[Piece]) -> None:
    """Write a list that tasks find their piece in; paths are stored relative to it."""
    rows = [
        [p.split, _relative(p.file, file), p.documents, p.bytes, p.keep and _relative(p.keep, file)]
        for p in pieces
    ]
    write_whole(file, json.dumps(rows))


def _relative(path: Path, beside: Path) -> str:
    return str(path.relative_to(beside.parent))


def load_pieces(file: Path) -> tuple[Piece, ...]:
    """Return a list of pieces; a process reads it once for all its tasks."""
    return _load_pieces(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _load_pieces(file: Path, _written_ns: int) -> tuple[Piece, ...]:
    folder = file.parent
    return tuple(
        Piece(split, folder / name, documents, size, None if keep is None else folder / keep)
        for split, name, documents, size, keep in json.loads(file.read_text())
    )


def held_out(document: Document, share: float) -> bool:
    """Whether a training document belongs to the validation split, by a hash of its id."""
    digest = hashlib.blake2b(document.id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


@dataclass(frozen=True)
class Portion:
    """A part of a source, and the split it was named for."""

    split: str
    source: SourceConfig
    number: int
    """Of the source, over both splits."""
    part: Part


@dataclass(frozen=True)
class ReadParts:
    """Reads documents, one task a part: pieces of both splits, and what was left out."""

    folder: Path
    portions: tuple[Portion, ...]
    validation_share: float
    piece_bytes: int
    name: str = "read documents"

    @property
    def tasks(self) -> int:
        """One a part."""
        return len(self.portions)

    def task_bytes(self, task: int) -> int:
        """Bytes of the part on disk."""
        return self.portions[task].part.bytes

    def facts_file(self, task: int) -> Path:
        """Return what says that a part is read: how much of what."""
        return self.folder / f"{task:06d}.json"

    def dropped_file(self, task: int) -> Path:
        """Return the list of its records that were left out."""
        return self.folder / f"{task:06d}.dropped.jsonl"

    def is_done(self, task: int) -> bool:
        """Whether its facts are there."""
        return self.facts_file(task).is_file()

    def run(self, task: int) -> None:
        """Read a part into pieces."""
        portion, dropped = self.portions[task], DroppedLog()
        writer = _PieceWriter(self.folder, f"{task:06d}", self.piece_bytes)
        content = hashlib.sha256()
        for document in read_part(portion.source, portion.part, dropped):
            if portion.source.format == "datasets":
                _hash_document(content, document)
            held = portion.split == TRAIN and held_out(document, self.validation_share)
            writer.add(VALIDATION if held else portion.split, document)
        pieces = writer.finish()
        records = (
            {"source": portion.source.path, "place": place, "reason": reason}
            for place, reason in dropped.places
        )
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_whole(self.dropped_file(task), "".join(lines))
        facts = {
            "pieces": pieces,
            "reasons": dropped.reasons,
            "examples": dropped.places[:EXAMPLES],
            "unwanted": dropped.unwanted,
            "unwanted_labels": dropped.unwanted_labels,
            "content": content.hexdigest(),
        }
        write_whole(self.facts_file(task), json.dumps(facts))


def _hash_document(content: Any, document: Document) -> None:
    name, data = document.id.encode(), document.text.encode()
    content.update(f"{len(name)} {len(data)}\n{document.id}\n".encode())
    content.update(data)


class _PieceWriter:
    """Cuts the documents of a part into pieces."""

    def __init__(self, folder: Path, stem: str, piece_bytes: int) -> None:
        self._folder, self._stem, self._limit = folder, stem, piece_bytes
        self._pending: dict[str, list[Document]] = {split: [] for split in SPLITS}
        self._sizes = dict.fromkeys(SPLITS, 0)
        self._pieces: list[list[Any]] = []

    def add(self, split: str, document: Document) -> None:
        """Take one document."""
        self._pending[split].append(document)
        text = document.text
        self._sizes[split] += len(text) if text.isascii() else len(text.encode())
        if self._sizes[split] >= self._limit:
            self._write(split)

    def finish(self) -> list[list[Any]]:
        """Write what is left; return (split, file name, documents, bytes) of every piece."""
        for split in SPLITS:
            if self._pending[split]:
                self._write(split)
        return self._pieces

    def _write(self, split: str) -> None:
        name = f"{self._stem}-{split}-{len(self._pieces):06d}.arrow"
        write_documents(self._folder / name, self._pending[split])
        self._pieces.append([split, name, len(self._pending[split]), self._sizes[split]])
        self._pending[split], self._sizes[split] = [], 0


@dataclass
class Read:
    """What was taken from one source into one split."""

    source: SourceConfig
    documents: int = 0
    bytes: int = 0
    dropped: DroppedLog = field(default_factory=DroppedLog)
    """All reasons, but only the first places; the rest is in `dropped_files`."""
    dropped_files: list[Path] = field(default_factory=list)
    content: str = ""
    """SHA-256 of the ids and texts read, over both splits."""


@dataclass
class Reading:
    """All that was read, by split."""

    sources: dict[str, list[Read]]
    pieces: list[Piece]
    """Of the held-out documents first."""


def read_sources(
    config: PrepareConfig, corpus_bytes: int | None, folder: Path, run: Run
) -> Reading:
    """Read every document into pieces under `folder`.

    Args:
        config: Sources and splits.
        corpus_bytes: Size of the sources on disk, which decides into how many they are cut;
            None where that is unknown.
        folder: Receives the pieces.
        run: Does the tasks.

    Raises:
        DataError: nothing to read, a source that gives no document, or more broken records than
            `max_dropped_share`.
    """
    share = MAX_PART_BYTES if corpus_bytes is None else corpus_bytes // SHARES
    portions = tuple(_list_portions(config, _clip(share, MIN_PART_BYTES, MAX_PART_BYTES)))
    size = _clip(share, MIN_PIECE_BYTES, MAX_PIECE_BYTES)
    stage = ReadParts(folder, portions, config.validation_share, size)
    folder.mkdir(exist_ok=True)
    run(stage)
    reading = _collect(config, stage)
    _check_dropped(config, [read for reads in reading.sources.values() for read in reads])
    _check_sources(config, reading)
    _check_filled(config, reading)
    return reading


def _clip(size: int, low: int, high: int) -> int:
    return max(low, min(size, high))


def _list_portions(config: PrepareConfig, part_bytes: int) -> Iterator[Portion]:
    named = [(TRAIN, source) for source in config.train]
    named += [(VALIDATION, source) for source in config.validation]
    for number, (split, source) in enumerate(named):
        for part in list_parts(source, number, part_bytes):
            yield Portion(split, source, number, part)


def _collect(config: PrepareConfig, stage: ReadParts) -> Reading:
    """Add up what the tasks of reading left."""
    reads: dict[tuple[str, int], Read] = {}
    contents: dict[int, list[str]] = {}
    pieces: list[Piece] = []
    for task, portion in enumerate(stage.portions):
        facts = json.loads(stage.facts_file(task).read_text())
        splits = [TRAIN, VALIDATION] if config.validation_share else [portion.split]
        for split in splits if portion.split == TRAIN else [VALIDATION]:
            reads.setdefault((split, portion.number), Read(portion.source))
        own = reads[portion.split, portion.number]
        own.dropped.reasons.update(facts["reasons"])
        room = EXAMPLES - len(own.dropped.places)
        own.dropped.places += [(place, reason) for place, reason in facts["examples"][:room]]
        own.dropped.pass_over(facts["unwanted_labels"], facts["unwanted"])
        own.dropped_files.append(stage.dropped_file(task))
        contents.setdefault(portion.number, []).append(facts["content"])
        for split, name, documents, size in facts["pieces"]:
            pieces.append(Piece(split, stage.folder / name, documents, size))
            reads[split, portion.number].documents += documents
            reads[split, portion.number].bytes += size
    for (_, number), read in reads.items():
        hashes = contents[number]
        joined = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
        read.content = hashes[0] if len(hashes) == 1 else joined
    sources = {
        name: [read for (split, _), read in reads.items() if split == name] for name in SPLITS
    }
    return Reading(sources, sorted(pieces, key=lambda piece: SPLITS.index(piece.split)))


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


def _check_sources(config: PrepareConfig, reading: Reading) -> None:
    """Refuse a source that gave no document to any split: its settings miss what it holds."""
    for source in (*config.train, *config.validation):
        reads = [r for of in reading.sources.values() for r in of if r.source is source]
        if any(read.documents for read in reads):
            continue
        unwanted = sum(read.dropped.unwanted for read in reads)
        labels = [label for read in reads for label in read.dropped.unwanted_labels]
        cause = "the source holds no documents"
        if unwanted:
            cause += (
                f" of the domains {_quote(source.domains or ())}: {unwanted} records are of "
                f"others, such as {_quote(labels)}"
            )
        raise DataError(
            cause,
            where=redact(source.path),
            fix="look at its domains, domain_key, text_key and max_bytes and at the files "
            "themselves, or leave it out",
        )


def _quote(labels: Iterable[str]) -> str:
    return ", ".join(repr(label[:_LABEL]) for label in labels)


def _check_filled(config: PrepareConfig, reading: Reading) -> None:
    filled = {piece.split for piece in reading.pieces}
    if TRAIN not in filled:
        raise DataError(
            "the corpus holds no documents",
            where=", ".join(source.path for source in config.train),
            fix="look at text_key, domains and validation_share, and at the files themselves",
        )
    if (config.validation or config.validation_share) and VALIDATION not in filled:
        raise DataError(
            "the validation split holds no documents",
            where=", ".join(s.path for s in config.validation) or "validation_share",
            fix="name validation sources that hold text, or raise validation_share",
        )
