"""The text a tokenizer is trained on: about so many bytes, every document as likely as any other.

The choice, and its order, depend on the documents alone: those whose texts have the lowest hashes
are taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoal.data_pipeline.documents import Document
from shoal.data_pipeline.pieces import TRAIN, Piece, Reading, load_pieces, save_pieces
from shoal.data_pipeline.stages import Run
from shoal.data_pipeline.store import read_columns, read_documents, write_documents
from shoal.data_pipeline.tokens import save_array


@dataclass(frozen=True)
class WeighTexts:
    """Hashes and sizes of the texts of each piece; what is not kept weighs nothing."""

    listing: Path
    folder: Path
    tasks: int
    name: str = "train tokenizer: weigh text"

    def task_bytes(self, task: int) -> int:
        """Bytes of text."""
        return load_pieces(self.listing)[task].bytes

    def weights_file(self, task: int) -> Path:
        """Return the result: hashes and sizes.  # (2, documents) uint64"""
        return self.folder / f"{task:06d}.weights.npy"

    def is_done(self, task: int) -> bool:
        """Whether the result is there."""
        return self.weights_file(task).is_file()

    def run(self, task: int) -> None:
        """Weigh the texts of a piece."""
        piece = load_pieces(self.listing)[task]
        found: list[tuple[int, int]] = []
        for (texts,) in read_columns(piece.file, ("text",)):
            for data in texts.cast("large_binary").to_pylist():
                digest = hashlib.blake2b(data, digest_size=8).digest()
                found.append((int.from_bytes(digest, "big"), len(data)))
        weights = np.asarray(found, dtype=np.uint64).reshape(-1, 2).T
        if piece.keep is not None:
            weights = np.where(np.load(piece.keep), weights, 0).astype(np.uint64)
        save_array(self.weights_file(task), weights)


@dataclass(frozen=True)
class PickTexts:
    """Copies the chosen documents of each piece."""

    listing: Path
    folder: Path
    tasks: int
    highest: int
    """Texts with this hash or a lower one are chosen."""
    name: str = "train tokenizer: read text"

    def task_bytes(self, task: int) -> int:
        """Bytes of text."""
        return load_pieces(self.listing)[task].bytes

    def picked_file(self, task: int) -> Path:
        """Return the result: documents."""
        return self.folder / f"{task:06d}.arrow"

    def is_done(self, task: int) -> bool:
        """Whether the result is there."""
        return self.picked_file(task).is_file()

    def run(self, task: int) -> None:
        """Copy the chosen documents of a piece."""
        weights = np.load(self.folder / f"{task:06d}.weights.npy")
        chosen = (weights[1] > 0) & (weights[0] <= np.uint64(self.highest))
        write_documents(
            self.picked_file(task), _pick(load_pieces(self.listing)[task], chosen, weights[0])
        )


def _pick(piece: Piece, chosen: np.ndarray, hashes: np.ndarray) -> Iterator[Document]:
    """Yield the chosen documents, their hash in place of their id."""
    if not chosen.any():
        return
    for number, document in enumerate(read_documents(piece.file)):
        if chosen[number]:
            yield Document(f"{hashes[number]:016x}", document.text, "", "")


def choose_texts(reading: Reading, max_bytes: int, work: Path, run: Run) -> list[str]:
    """Take about `max_bytes` of the training documents that are left, by tasks of `run`.

    Holds 16 bytes for every document, and in the end the texts.
    """
    pieces = [piece for piece in reading.pieces if piece.split == TRAIN]
    listing, folder = work / "excerpt.json", work / "excerpt"
    save_pieces(listing, pieces)
    folder.mkdir(exist_ok=True)
    weigh = WeighTexts(listing, folder, len(pieces))
    run(weigh)
    weights = np.concatenate([np.load(weigh.weights_file(n)) for n in range(len(pieces))], axis=1)
    weights = weights[:, weights[1] > 0]
    if not weights.size:
        return []
    hashes, sizes = weights[:, np.argsort(weights[0], kind="stable")]
    last = min(int(np.searchsorted(np.cumsum(sizes), max_bytes)), len(hashes) - 1)
    pick = PickTexts(listing, folder, len(pieces), int(hashes[last]))
    run(pick)
    found = [d for task in range(len(pieces)) for d in read_documents(pick.picked_file(task))]
    found.sort(key=lambda document: document.id)
    return [document.text for document in found[: last + 1]]
