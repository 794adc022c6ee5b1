"""Pieces to what cleaning leaves of them, and the list of what it removed, in document order.

Held-out documents come first: of two that are duplicates the earlier stays, and were that the one
for training, validation would lose it and training would hold its twin.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np

from shoal.configs.corpus import CleanConfig
from shoal.configs.errors import DataError
from shoal.data_pipeline.cleaner import load_cleaner
from shoal.data_pipeline.documents import Document
from shoal.data_pipeline.duplicates import find_duplicates
from shoal.data_pipeline.minhash import save_keys, sign_piece
from shoal.data_pipeline.pieces import SPLITS, Piece, Reading, load_pieces, save_pieces
from shoal.data_pipeline.stages import Run
from shoal.data_pipeline.store import read_documents, write_documents, write_whole


@dataclass(frozen=True)
class CleanPieces:
    """Judges and changes the documents of each piece, one task a piece.

    Task n leaves n.arrow, the documents that are left, n.removed.jsonl, those that are not, their
    keys for finding duplicates, and then n.json.
    """

    listing: Path
    folder: Path
    config: CleanConfig
    tasks: int
    name: str = "clean documents"

    def task_bytes(self, task: int) -> int:
        """Bytes of text."""
        return load_pieces(self.listing)[task].bytes

    def file(self, task: int, suffix: str) -> Path:
        """Return a file of a task."""
        return self.folder / f"{task:06d}{suffix}"

    def is_done(self, task: int) -> bool:
        """Whether its facts are there."""
        return self.file(task, ".json").is_file()

    def run(self, task: int) -> None:
        """Clean a piece."""
        piece = load_pieces(self.listing)[task]
        cleaner = load_cleaner(self.config)
        cleaner.take_counts()  # of an attempt that failed
        kept: list[Document] = []
        lines: list[str] = []
        places: list[int] = []
        reasons: Counter[str] = Counter()
        for place, document in enumerate(read_documents(piece.file)):
            result = cleaner.clean(document)
            if isinstance(result, Document):
                kept.append(result)
                continue
            reasons[result.reason] += 1
            places.append(place)
            lines.append(json.dumps(asdict(result), ensure_ascii=False) + "\n")
        write_documents(self.file(task, ".arrow"), kept)
        write_whole(self.file(task, ".removed.jsonl"), "".join(lines))
        if seeks_duplicates(self.config):
            texts = [document.text for document in kept]
            save_keys(self.file(task, ".keys.npy"), sign_piece(texts, self.config.near_duplicates))
        facts = {
            "documents": len(kept),
            "bytes": sum(len(document.text.encode()) for document in kept),
            "places": places,
            "reasons": reasons,
            "changed": cleaner.take_counts(),
        }
        write_whole(self.file(task, ".json"), json.dumps(facts))


def seeks_duplicates(config: CleanConfig) -> bool:
    """Whether documents are compared with each other."""
    return config.exact_duplicates or config.near_duplicates is not None


@dataclass(frozen=True)
class ListRemovals:
    """Puts what was removed from each piece in document order, one task a piece.

    Task n leaves n.jsonl, a line for each removal, and n.json, their reasons.
    """

    clean: CleanPieces
    listing: Path
    """The pieces as cleaned. Beside the file that tells which documents stay lies a .jsonl of those
    that do not."""
    folder: Path
    name: str = "list removals"

    @property
    def tasks(self) -> int:
        """One a piece."""
        return self.clean.tasks

    def file(self, task: int, suffix: str) -> Path:
        """Return a file of a task."""
        return self.folder / f"{task:06d}{suffix}"

    def is_done(self, task: int) -> bool:
        """Whether the reasons are there."""
        return self.file(task, ".json").is_file()

    def run(self, task: int) -> None:
        """Merge two lists by the places of the documents."""
        facts = json.loads(self.clean.file(task, ".json").read_text())
        reasons = Counter(facts["reasons"])
        first = _read_lines(self.clean.file(task, ".removed.jsonl"))
        places = list(facts["places"])
        keep = load_pieces(self.listing)[task].keep
        if keep is not None:
            count = facts["documents"] + len(places)
            left = np.setdiff1d(np.arange(count), np.asarray(places, dtype=np.int64))
            places += left[~np.load(keep)].tolist()
            second = _read_lines(keep.with_suffix(".jsonl"))
            reasons.update(json.loads(line)["reason"] for line in second)
            first += second
        lines = [line for _, line in sorted(zip(places, first, strict=True))]
        write_whole(self.file(task, ".jsonl"), "".join(lines))
        write_whole(self.file(task, ".json"), json.dumps(reasons))


def _read_lines(file: Path) -> list[str]:
    with file.open(encoding="utf-8", newline="\n") as lines:
        return list(lines)


@dataclass
class Removals:
    """What cleaning did to a split."""

    documents_read: int = 0
    bytes_read: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    """Documents by reason."""
    changed: Counter[str] = field(default_factory=Counter)
    files: list[Path] = field(default_factory=list)
    """Lists of removals, in document order."""


def clean_reading(
    reading: Reading, config: CleanConfig, work: Path, run: Run
) -> tuple[Reading, dict[str, Removals]]:
    """Clean what was read, and find duplicates in what is left.

    Returns:
        The reading with its pieces cleaned, and what was removed from each split.

    Raises:
        DataError: an evaluation set is missing or broken, or nothing is left.
    """
    listing, folder = work / "clean.json", work / "clean"
    save_pieces(listing, reading.pieces)
    folder.mkdir(exist_ok=True)
    clean = CleanPieces(listing, folder, config, len(reading.pieces))
    run(clean)
    masks: list[Path] = []
    if seeks_duplicates(config):
        files = [clean.file(task, ".arrow") for task in range(clean.tasks)]
        keys = [clean.file(task, ".keys.npy") for task in range(clean.tasks)]
        (work / "duplicates").mkdir(exist_ok=True)
        masks = find_duplicates(files, keys, config, work / "duplicates", run)
    pieces = list(_list_cleaned(clean, masks, reading.pieces))
    save_pieces(work / "cleaned.json", pieces)
    listed = ListRemovals(clean, work / "cleaned.json", work / "removed")
    listed.folder.mkdir(exist_ok=True)
    run(listed)
    removals = _collect(listed, reading.pieces)
    for split, done in removals.items():
        _check_left(split, done)
    return Reading(reading.sources, pieces), removals


def _list_cleaned(clean: CleanPieces, masks: list[Path], pieces: list[Piece]) -> Iterator[Piece]:
    for task, (piece, mask) in enumerate(zip_longest(pieces, masks)):
        facts = json.loads(clean.file(task, ".json").read_text())
        file = clean.file(task, ".arrow")
        yield Piece(piece.split, file, facts["documents"], facts["bytes"], mask)


def _collect(listed: ListRemovals, pieces: list[Piece]) -> dict[str, Removals]:
    removals = {split: Removals() for split in SPLITS if any(p.split == split for p in pieces)}
    for task, piece in enumerate(pieces):
        done = removals[piece.split]
        done.documents_read += piece.documents
        done.bytes_read += piece.bytes
        done.removed.update(json.loads(listed.file(task, ".json").read_text()))
        done.changed.update(json.loads(listed.clean.file(task, ".json").read_text())["changed"])
        done.files.append(listed.file(task, ".jsonl"))
    return removals


def _check_left(split: str, done: Removals) -> None:
    if done.removed.total() < done.documents_read:
        return
    most = ", ".join(f"{reason} ({count})" for reason, count in done.removed.most_common(5))
    raise DataError(
        f"cleaning removed all {done.documents_read} documents of the {split} split: {most}",
        where="clean",
        fix="loosen clean.filters, or set to null what does not suit these texts",
    )
