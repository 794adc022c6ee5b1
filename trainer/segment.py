"""What a segment of a run is given: rows, what to validate on, and what is only recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from shoal.data_pipeline.batch import Batch


class BatchSource(Protocol):
    """What the loop needs of a loader: the rows of any step, from nothing but its number."""

    def microbatches(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches of a step, equally many on every rank."""
        ...


@dataclass(frozen=True)
class Validation:
    """Batches of this rank, and what turns nats per token into bits per byte."""

    batches: Sequence[Batch]
    text_bytes: int
    """UTF-8 bytes that the scored targets stand for, over all ranks."""


@dataclass(frozen=True)
class RunFacts:
    """What the loop records but does not decide."""

    folder: Path
    rank: int
    ranks: int
    device: str
    training_flops_per_token: float
    chosen: dict[str, str | int] = field(default_factory=dict)
    """What `auto` came to: kernels, ZeRO stage; written to the metrics at every start."""
