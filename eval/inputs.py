"""What a comparison is given: arms, reference rows, and what training saw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shoal.configs.schema import ModelConfig

Progress = Callable[[str, int, int | None], None]
"""Told (label, done, total); a total of None is not known."""


@dataclass(frozen=True)
class ExportInput:
    """One export of an arm: one training with one seed."""

    folder: Path
    seed: int | None = None
    metrics: Sequence[Mapping[str, Any]] = ()
    """Records of the run's metrics.jsonl."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """config_hash, shards_hash, checkpoint, seed, command: whatever is known."""


@dataclass(frozen=True)
class ArmInput:
    """One contestant."""

    name: str
    kind: str
    """`dense`, `moe`, `distilled`."""
    exports: Sequence[ExportInput]
    match: str | None = None
    """Name of the budget it was built to; None: to none, and every budget is a limit."""
    model: ModelConfig | None = None
    """Its configuration, for formulas beside measurements; vocab_size known."""
    equal_on: str | None = None
    """What was made equal in training: tokens or flops."""
    ledger: Sequence[Mapping[str, Any]] = ()
    """Ledger lines of all its stages, those it shares with others included."""
    teacher: str | None = None
    """Of a distilled arm: the name of its teacher's reference row."""


@dataclass(frozen=True)
class TrainingTexts:
    """The training corpus, for the search of test items in it."""

    read: Callable[[], Iterable[str]]
    key: str
    """Identity of the corpus (shards hash): a search is done once for each."""


@dataclass(frozen=True)
class References:
    """Rows that are no contestants: what a model must at least beat."""

    unigram_counts: np.ndarray | None = None
    """Occurrences of each token in the training shards.  # (vocab,)"""
    untrained: Path | None = None
    """Export of a freshly initialised model."""
    others: Mapping[str, Path] = field(default_factory=dict)
    """Further exports by the name of their row, for example the teacher's."""
