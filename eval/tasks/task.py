"""What a task is: items, the requests they become, and what the answers are worth.

Every metric is a ratio of two sums over items (bits over bytes, right answers over questions), so
one set of paired statistics serves all tasks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shoal.eval.candidate import Candidate
from shoal.eval.scoring import Request


@dataclass(frozen=True)
class ItemScores:
    """Scores of one model on one task, item by item."""

    numerator: list[float]
    denominator: list[float]
    extra: dict[str, float] = field(default_factory=dict)
    """Further summary values, for example perplexity."""
    detail: dict[str, list[float]] = field(default_factory=dict)
    """Further values by item, for example confidence."""

    @property
    def value(self) -> float:
        """The metric over all items."""
        return math.fsum(self.numerator) / math.fsum(self.denominator)

    def value_without(self, left_out: set[int]) -> float | None:
        """The metric over the other items; None where nothing is left."""
        kept = [i for i in range(len(self.numerator)) if i not in left_out]
        if not kept:
            return None
        return math.fsum(self.numerator[i] for i in kept) / math.fsum(
            self.denominator[i] for i in kept
        )

    def as_tree(self) -> dict[str, Any]:
        """Return a tree for JSON."""
        return asdict(self)


class Task(Protocol):
    """The seam between models and benchmarks."""

    name: str
    kind: str
    version: int
    metric: str
    higher_is_better: bool
    file_hash: str

    def item_ids(self) -> list[str]:
        """Name every item, for reports."""

    def texts(self) -> list[str]:
        """Return the text of every item that training must not have seen."""

    def requests(self, candidate: Candidate) -> list[Request]:
        """Turn all items into requests in the candidate's tokens."""

    def scores(self, requests: Sequence[Request], nats: Sequence[float]) -> ItemScores:
        """Turn the requests' negative log-likelihoods into scores by item."""


def hash_files(paths: Sequence[Path], *settings: object) -> str:
    """Return a SHA-256 over files and the settings that change what is read from them."""
    digest = hashlib.sha256(repr(settings).encode())
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def document_request(start_id: int, ids: list[int]) -> Request:
    """Score a whole document from the token that starts documents."""
    return Request([start_id], ids)


def accuracy_scores(correct: Sequence[bool], **detail: Sequence[float]) -> ItemScores:
    """Scores of right and wrong answers."""
    return ItemScores(
        [float(right) for right in correct],
        [1.0] * len(correct),
        detail={name: np.asarray(values, dtype=float).tolist() for name, values in detail.items()},
    )
