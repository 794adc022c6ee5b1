"""The stages that find pairs of documents which may be near duplicates, and verify each.

Texts are read by piece, once, and only of documents that stand in a pair.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.data_pipeline.matching import (
    Profile,
    is_renamed,
    measure_similarity,
    merge_pairs,
    pair_band,
    split_pairs,
    start_pairs,
)
from shoal.data_pipeline.minhash import NO_KEY, Shingler, load_keys, save_array
from shoal.data_pipeline.store import read_documents

if TYPE_CHECKING:
    import numpy as np

    from shoal.configs.corpus import CleanConfig, NearDuplicatesConfig

_TASK_PAIRS = 50_000
_OPEN_FILES = 64


@dataclass(frozen=True)
class DuplicatePlan:
    """What the stages of duplicates share: pieces, and the files that one leaves for the next."""

    pieces: tuple[Path, ...]
    keys: tuple[tuple[Path, int], ...]
    """Each key file and the number of its first document; last, the number of documents."""
    config: CleanConfig
    folder: Path

    @property
    def documents(self) -> int:
        """How many there are."""
        return self.keys[-1][1]

    @property
    def near(self) -> NearDuplicatesConfig:
        """What near means; no stage of near duplicates runs without."""
        near = self.config.near_duplicates
        assert near is not None
        return near

    @property
    def twins(self) -> Path:
        """For each document the first of the same text."""
        return self.folder / "twins.npy"

    @property
    def candidates(self) -> Path:
        """Pairs that share a band."""
        return self.folder / "candidates.npy"

    @property
    def removed(self) -> Path:
        """Documents that go."""
        return self.folder / "removed.npy"

    def band(self, number: int) -> Path:
        """Pairs of a band."""
        return self.folder / f"band-{number:04d}.npy"

    def profiles(self, number: int) -> Path:
        """What the candidates of a piece are compared by."""
        return self.folder / f"profiles-{number:06d}.npy"

    def profile_index(self, number: int) -> Path:
        """Where each of them begins."""
        return self.folder / f"profiles-{number:06d}.index.npy"

    def similarities(self, number: int) -> Path:
        """True similarities of the pairs of a task."""
        return self.folder / f"similar-{number:06d}.npy"

    def mask(self, number: int) -> Path:
        """Which documents of a piece stay."""
        return self.folder / f"keep-{number:06d}.npy"

    def removals(self, number: int) -> Path:
        """Those that do not, a line each."""
        return self.mask(number).with_suffix(".jsonl")

    def span(self, number: int) -> tuple[int, int]:
        """First document of a piece and of the next."""
        return self.keys[number][1], self.keys[number + 1][1]

    def find_piece(self, document: int) -> int:
        """Return the piece of a document."""
        return bisect.bisect_right(self.keys, document, key=lambda key: key[1]) - 1


@dataclass(frozen=True)
class PairBands:
    """One task a band: the documents that share its key, exact copies left out."""

    plan: DuplicatePlan
    name = "pair near duplicates"

    @property
    def tasks(self) -> int:
        """One a band."""
        return self.plan.near.bands

    def is_done(self, task: int) -> bool:
        """Whether its file is there."""
        return self.plan.band(task).exists()

    def run(self, task: int) -> None:
        """Write the pairs of a band and their weights, (2, pairs) uint64."""
        import numpy as np

        keys = np.empty(self.plan.documents, np.uint64)
        for number, (file, first) in enumerate(self.plan.keys[:-1]):
            keys[first : self.plan.span(number)[1]] = load_keys(file).bands[:, task]
        twins = np.load(self.plan.twins, mmap_mode="r")
        documents = np.flatnonzero((twins < 0) & (keys != NO_KEY))
        save_array(self.plan.band(task), pair_band(keys[documents], documents))


@dataclass(frozen=True)
class MergeBands:
    """One task: the pairs of all bands."""

    plan: DuplicatePlan
    name = "merge candidates"
    tasks = 1

    def is_done(self, task: int) -> bool:
        """Whether its file is there."""
        return self.plan.candidates.exists()

    def run(self, task: int) -> None:
        """Write candidates.npy, (pairs,) uint64."""
        import numpy as np

        bands = (np.load(self.plan.band(number)) for number in range(self.plan.near.bands))
        save_array(self.plan.candidates, merge_pairs(bands))


@dataclass(frozen=True)
class ProfileCandidates:
    """One task a piece: what the candidates among its documents are compared by."""

    plan: DuplicatePlan
    name = "read candidates"

    @property
    def tasks(self) -> int:
        """One a piece."""
        return len(self.plan.pieces)

    def is_done(self, task: int) -> bool:
        """Whether both files are there."""
        return self.plan.profile_index(task).exists()

    def run(self, task: int) -> None:
        """Write the profiles one after the other, and the index of where each begins.

        The index has a line a document: its number, and where in the profiles its shingles, its
        words, their counts and the next document begin.  # (candidates, 5) int64
        """
        import numpy as np

        first, end = self.plan.span(task)
        wanted = _list_members(np.load(self.plan.candidates, mmap_mode="r"), first, end)
        values, lines, place = [np.empty(0, np.uint64)], [], 0
        for number, profile in self._profile(task, first, wanted):
            parts = [profile.shingles, profile.words, profile.counts.astype(np.uint64)]
            ends = place + np.cumsum([len(part) for part in parts])
            lines.append([number, place, *ends.tolist()])
            place = int(ends[-1])
            values += parts
        save_array(self.plan.profiles(task), np.concatenate(values))
        save_array(self.plan.profile_index(task), np.array(lines, np.int64).reshape(-1, 5))

    def _profile(self, task: int, first: int, wanted: set[int]) -> Iterator[tuple[int, Profile]]:
        import numpy as np

        if not wanted:
            return
        shingler = Shingler(self.plan.near.ngram)
        for number, document in enumerate(read_documents(self.plan.pieces[task]), start=first):
            if number in wanted:
                words = shingler.hash_words(document.text)
                shingles = np.unique(shingler.join_words(words))
                yield number, Profile(shingles, *np.unique(words, return_counts=True))


def _list_members(pairs: np.ndarray[Any, Any], first: int, end: int) -> set[int]:
    """Return the documents of a span that stand in a pair; a million pairs are looked at a time."""
    import numpy as np

    found: set[int] = set()
    for start in range(0, len(pairs), 1_000_000):
        for documents in split_pairs(pairs[start : start + 1_000_000]):
            here = documents[(documents >= first) & (documents < end)]
            found.update(np.unique(here).tolist())
    return found


def cut_pairs(pairs: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """Cut sorted pairs into tasks so that those of a later document stay together."""
    import numpy as np

    cuts = [0]
    while cuts[-1] < len(pairs):
        last = pairs[min(cuts[-1] + _TASK_PAIRS, len(pairs)) - 1]
        later, _ = split_pairs(np.asarray([last]))
        cuts.append(int(np.searchsorted(pairs, start_pairs(later + 1))[0]))
    return list(itertools.pairwise(cuts))


class _Profiles:
    """Maps the profiles of all pieces, a few files open at a time."""

    def __init__(self, plan: DuplicatePlan) -> None:
        self._plan = plan
        self._open = lru_cache(_OPEN_FILES)(self._map)

    def _map(self, piece: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        import numpy as np

        index = np.load(self._plan.profile_index(piece))
        return index, np.load(self._plan.profiles(piece), mmap_mode="r")

    def find(self, document: int) -> Profile:
        """Return the profile of a candidate."""
        import numpy as np

        index, values = self._open(self._plan.find_piece(document))
        line = index[np.searchsorted(index[:, 0], document)]
        parts = zip(line[1:-1].tolist(), line[2:].tolist(), strict=True)
        return Profile(*(np.asarray(values[first:end]) for first, end in parts))


@dataclass(frozen=True)
class VerifyPairs:
    """One task for some fifty thousand pairs: their true similarity."""

    plan: DuplicatePlan
    tasks: int
    name = "verify candidates"

    def is_done(self, task: int) -> bool:
        """Whether its file is there."""
        return self.plan.similarities(task).exists()

    def run(self, task: int) -> None:
        """Write the similarities of its pairs, NaN where no duplicate is.  # (pairs,) float64

        Once a document is found similar to one that stays for sure, since that one has no pair with
        an earlier document, the pairs with later ones cannot change what it matches.
        """
        import numpy as np

        pairs = np.load(self.plan.candidates, mmap_mode="r")
        first, end = cut_pairs(pairs)[task]
        later, earlier = split_pairs(pairs[first:end])
        bounds = [np.searchsorted(pairs, start_pairs(earlier + more)) for more in (0, 1)]
        stays = bounds[0] == bounds[1]
        similarities = np.full(end - first, np.nan)
        profiles, decided, mine = _Profiles(self.plan), -1, None
        for place, (number, other) in enumerate(zip(later.tolist(), earlier.tolist(), strict=True)):
            if number == decided:
                continue
            if place == 0 or number != later[place - 1]:
                mine = profiles.find(number)
            assert mine is not None  # the first place has found one
            similarities[place] = self._compare(mine, profiles.find(other))
            if stays[place] and similarities[place] >= self.plan.near.similarity:
                decided = number
        save_array(self.plan.similarities(task), similarities)

    def _compare(self, mine: Profile, other: Profile) -> float:
        similarity = measure_similarity(mine, other)
        renamed = self.plan.near.keep_renamed and similarity >= self.plan.near.similarity
        return float("nan") if renamed and is_renamed(mine, other) else similarity
