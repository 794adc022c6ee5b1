"""The stages that find the exact and the near duplicates of a corpus, and say which documents stay.

Texts are read by piece, once, and only of documents that may be duplicates. What is held of all
documents at once does not depend on their length. Measured, in bytes a document: exact copies 66,
pairing a band 40 where no key repeats and 240 where ten share each, merging the bands 2,200 where
they group by ten and each differently; choosing takes 60 to 85 a removed document (`tracemalloc`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.configs.errors import DataError
from shoal.data_pipeline.candidates import (
    DuplicatePlan,
    MergeBands,
    PairBands,
    ProfileCandidates,
    VerifyPairs,
    cut_pairs,
)
from shoal.data_pipeline.documents import Removal
from shoal.data_pipeline.matching import (
    DOCUMENTS,
    choose_removed,
    find_places,
    find_twins,
    split_pairs,
)
from shoal.data_pipeline.minhash import load_keys, save_array
from shoal.data_pipeline.store import read_labels

if TYPE_CHECKING:
    import numpy as np

    from shoal.configs.corpus import CleanConfig
    from shoal.data_pipeline.stages import Stage

EXACT = "exact_duplicate"
NEAR = "near_duplicate"

_REMOVED = [("document", "<i8"), ("twin", "<i8"), ("similarity", "<f8"), ("exact", "?")]


def find_duplicates(
    pieces: list[Path],
    keys: list[Path],
    config: CleanConfig,
    folder: Path,
    run: Callable[[Stage], None],
) -> list[Path]:
    """Find the duplicates among the documents of some pieces; of equal ones the earliest stays.

    A near duplicate is removed if a document before it that itself stays is similar enough, and
    then names the first such. Copies of a document that goes as a near duplicate go with it.

    Args:
        pieces: Documents, as `store.write_documents` leaves them, in the order of the corpus.
        keys: Their keys, as `minhash.save_keys` leaves them, with the bands of `config`.
        config: Whether exact and near duplicates are removed, and what near means.
        folder: Receives what the stages write; what an earlier attempt left is used.
        run: Runs all tasks of a stage that are not done, and raises if one fails.

    Returns:
        For each piece the file that tells which documents stay, (documents,) bool as .npy, beside a
        .jsonl file of the removals.

    Raises:
        DataError: Keys do not belong to `config`, or there are 2^32 documents or more.
    """
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    plan = DuplicatePlan(tuple(pieces), _index_keys(keys, config, folder), config, folder)
    run(MatchDigests(plan))
    near = config.near_duplicates
    if near is not None:
        run(PairBands(plan))
        run(MergeBands(plan))
        run(ProfileCandidates(plan))
        tasks = len(cut_pairs(np.load(plan.candidates, mmap_mode="r")))
        run(VerifyPairs(plan, tasks))
    run(ChooseRemoved(plan))
    run(WriteMasks(plan))
    return [plan.mask(number) for number in range(len(pieces))]


def _index_keys(
    keys: list[Path], config: CleanConfig, folder: Path
) -> tuple[tuple[Path, int], ...]:
    """Return the key files, each with the number of its first document, and the end.

    Raises:
        DataError: See `find_duplicates`.
    """
    bands = 0 if config.near_duplicates is None else config.near_duplicates.bands
    first, index = 0, []
    for file in keys:
        found = load_keys(file)
        if found.bands.shape[1] < bands:
            raise DataError(
                f"keys of {found.bands.shape[1]} bands where the corpus has {bands}",
                where=file,
                fix=f"delete {folder.parent} and prepare again",
            )
        index.append((file, first))
        first += len(found.digests)
    if first >= DOCUMENTS:
        raise DataError(
            f"{first} documents are more than duplicates can be looked for in",
            where=folder,
            fix=f"prepare the corpus in parts of fewer than {DOCUMENTS} documents",
        )
    return (*index, (Path(), first))


@dataclass(frozen=True)
class MatchDigests:
    """One task: for each document the first one of the same text, or -1."""

    plan: DuplicatePlan
    name = "find exact duplicates"
    tasks = 1

    def is_done(self, task: int) -> bool:
        """Whether its file is there."""
        return self.plan.twins.exists()

    def run(self, task: int) -> None:
        """Write twins.npy, (documents,) int64."""
        import numpy as np

        digests = np.empty((self.plan.documents, 2), np.uint64)
        for number, (file, first) in enumerate(self.plan.keys[:-1]):
            digests[first : self.plan.span(number)[1]] = load_keys(file).digests
        save_array(self.plan.twins, find_twins(digests))


@dataclass(frozen=True)
class ChooseRemoved:
    """One task: which documents go, and in favour of which."""

    plan: DuplicatePlan
    name = "choose duplicates"
    tasks = 1

    def is_done(self, task: int) -> bool:
        """Whether its file is there."""
        return self.plan.removed.exists()

    def run(self, task: int) -> None:
        """Write removed.npy: a line a removed document, rising.  # (removed,) _REMOVED"""
        import numpy as np

        near = np.empty(0, _REMOVED)
        if self.plan.config.near_duplicates is not None:
            near = np.concatenate([near, *self._choose_near()])
        lines = np.concatenate([near, self._follow_copies(near)])
        save_array(self.plan.removed, lines[np.argsort(lines["document"])])

    def _choose_near(self) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the near duplicates that go, by task that verified them; rising altogether."""
        import numpy as np

        pairs = np.load(self.plan.candidates, mmap_mode="r")
        gone = bytearray(self.plan.documents)
        for task, (first, end) in enumerate(cut_pairs(pairs)):
            similarities = np.load(self.plan.similarities(task))
            here = pairs[first:end]
            places = choose_removed(here, similarities, self.plan.near.similarity, gone)
            lines = np.zeros(len(places), _REMOVED)
            lines["document"], lines["twin"] = split_pairs(here[places])
            lines["similarity"] = similarities[places]
            yield lines

    def _follow_copies(self, near: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the copies of other documents, each with what stays in its place, rising.

        Args:
            near: The near duplicates, rising.  # (near,) _REMOVED
        """
        import numpy as np

        config = self.plan.config
        if not config.exact_duplicates and config.near_duplicates is None:
            return np.empty(0, _REMOVED)
        twins = np.load(self.plan.twins, mmap_mode="r")
        documents = np.flatnonzero(twins >= 0)
        lines = np.empty(len(documents), _REMOVED)
        lines["document"], lines["twin"] = documents, twins[documents]
        lines["similarity"], lines["exact"] = 1.0, config.exact_duplicates
        places = find_places(lines["twin"], near["document"])
        gone = places >= 0  # the twin is itself removed
        for name in ("twin", "similarity", "exact"):
            lines[name][gone] = near[name][places[gone]]
        return lines


@dataclass(frozen=True)
class WriteMasks:
    """One task a piece: which of its documents stay, and a line for each that does not."""

    plan: DuplicatePlan
    name = "mark duplicates"

    @property
    def tasks(self) -> int:
        """One a piece."""
        return len(self.plan.pieces)

    def is_done(self, task: int) -> bool:
        """Whether both files are there."""
        return self.plan.mask(task).exists()

    def run(self, task: int) -> None:
        """Write the removals, then the mask."""
        import numpy as np

        first, end = self.plan.span(task)
        removed = np.load(self.plan.removed, mmap_mode="r")
        low, high = np.searchsorted(removed["document"], [first, end])
        here = np.asarray(removed[low:high])
        lines = [json.dumps(asdict(line), ensure_ascii=False) for line in self._tell(task, here)]
        _write_text(self.plan.removals(task), "".join(f"{line}\n" for line in lines))
        keep = np.ones(end - first, bool)
        keep[here["document"] - first] = False
        save_array(self.plan.mask(task), keep)

    def _tell(self, task: int, removed: np.ndarray[Any, Any]) -> Iterator[Removal]:
        first, _ = self.plan.span(task)
        rows = (removed["document"] - first).tolist()
        labels = read_labels(self.plan.pieces[task], rows) if rows else []
        names = self._name(removed["twin"].tolist())
        for (name, domain, source), line in zip(labels, removed, strict=True):
            reason = EXACT if line["exact"] else NEAR
            similarity = None if line["exact"] else float(line["similarity"])
            yield Removal(name, source, domain, reason, names[int(line["twin"])], similarity)

    def _name(self, documents: list[int]) -> dict[int, str]:
        """Return the ids of documents of any pieces."""
        by_piece: dict[int, list[int]] = {}
        for document in sorted(set(documents)):
            by_piece.setdefault(self.plan.find_piece(document), []).append(document)
        names: dict[int, str] = {}
        for piece, members in by_piece.items():
            first, _ = self.plan.span(piece)
            labels = read_labels(self.plan.pieces[piece], [member - first for member in members])
            names.update(zip(members, (label[0] for label in labels), strict=True))
        return names


def _write_text(file: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as raw:
        raw.write(text)
        raw.flush()
        os.fsync(raw.fileno())
    aside.rename(file)
