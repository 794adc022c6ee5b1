"""What a segment of a run is given: rows, what to validate on, chance, what is only recorded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from shoal.configs.schema import RunConfig
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


def dropout_seed(seed: int, step: int, row: int) -> int:
    """Return the seed of a rank's dropout in one step: of the run, the step and its first row."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {row}".encode()).digest()[:7], "big")


def seed_dropout(config: RunConfig, step: int, batches: Sequence[Batch]) -> None:
    """Make dropout a function of seed, step and rows, so that no random state needs saving."""
    if config.model.dropout:
        row = int(batches[0].row_ids[0]) if batches else 0
        torch.manual_seed(dropout_seed(config.seed, step, row))
