"""The document, and what could not be made into one."""

from __future__ import annotations

from collections import Counter
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
    """Records that were left out: how many for which reason, and the place of each."""

    reasons: Counter[str] = field(default_factory=Counter)
    places: list[tuple[str, str]] = field(default_factory=list)
    """(file:line, reason) of each, in the order met."""

    def add(self, place: str, reason: str) -> None:
        """Note one record."""
        self.reasons[reason] += 1
        self.places.append((place, reason))

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
