"""The document, and the account of a reading: what was taken, and what could not be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

EXAMPLES = 20
"""Broken records that messages and manifests show; the whole list is in dropped.jsonl."""


@dataclass(frozen=True)
class Document:
    """One text of a corpus."""

    id: str
    text: str
    domain: str
    source: str
    """The `path` of its source, as configured."""


@dataclass
class DroppedLog:
    """Records that were left out: how many for which reason, and the place of each.

    It also counts what was not broken, so that every record of a source is accounted for.
    """

    reasons: Counter[str] = field(default_factory=Counter)
    places: list[tuple[str, str]] = field(default_factory=list)
    """(file:line, reason) of each, in the order met."""
    taken: Counter[str] = field(default_factory=Counter)
    """Documents by file; files that are one document each (plain text) are counted as ''."""
    unwanted: int = 0
    """Records of other domains than the source's `domains`."""
    unwanted_labels: list[str] = field(default_factory=list)
    """The first few different labels of those."""

    def add(self, place: str, reason: str) -> None:
        """Note one record."""
        self.reasons[reason] += 1
        self.places.append((place, reason))

    def pass_over(self, labels: Iterable[str], records: int = 1) -> None:
        """Note records that are not wanted, and the different labels among them."""
        self.unwanted += records
        for label in labels:
            if len(self.unwanted_labels) < EXAMPLES and label not in self.unwanted_labels:
                self.unwanted_labels.append(label)

    @property
    def total(self) -> int:
        """Records left out."""
        return self.reasons.total()

    @property
    def examples(self) -> list[str]:
        """The first few, one line each."""
        return [f"{place}: {reason}" for place, reason in self.places[:EXAMPLES]]


@dataclass(frozen=True)
class Removal:
    """A document that cleaning took out, and why."""

    id: str
    source: str
    domain: str
    reason: str
    """The filter and its rule, `gopher_quality: too few words`, or `decontamination`,
    `exact_duplicate`, `near_duplicate`."""
    match: str
    """What exactly: the value and the threshold, the words and the evaluation set, the twin."""
    similarity: float | None = None
    """True Jaccard similarity to the twin, of near duplicates."""
