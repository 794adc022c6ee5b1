"""What a segment of a run is given: rows, what to validate on, chance, what is only recorded."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

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
    name: str = "validation"
    more: tuple[Validation, ...] = ()
    """Other splits, each scored by itself; the loss is that of all their tokens."""

    @property
    def parts(self) -> tuple[Validation, ...]:
        """This split and the others."""
        return (self, *self.more)

    def describe(self, sums: Sequence[tuple[float, int]]) -> dict[str, Any]:
        """Return the loss of all parts, and of each by name where there are several.

        Args:
            sums: Nats and tokens of every part.
        """
        nats, tokens = (sum(column) for column in zip(*sums, strict=True))
        text_bytes = sum(part.text_bytes for part in self.parts)
        found = {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / text_bytes}
        if self.more:
            names = [part.name for part in self.parts]
            losses = [nats / tokens for nats, tokens in sums]
            return found | {"streams": dict(zip(names, losses, strict=True))}
        return found


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
    streams: tuple[str, ...] = ()
    """Names of what is read."""
    count_rows: Callable[[int], dict[str, int]] = lambda batches: {}
    """Rows of each stream in so many batches from the first one on."""


def dropout_seed(seed: int, step: int, row: int) -> int:
    """Return the seed of a rank's dropout in one step: of the run, the step and its first row."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {row}".encode()).digest()[:7], "big")


def seed_dropout(config: RunConfig, step: int, batches: Sequence[Batch]) -> None:
    """Make dropout a function of seed, step and rows, so that no random state needs saving."""
    if config.model.dropout:
        row = int(batches[0].row_ids[0]) if batches else 0
        torch.manual_seed(dropout_seed(config.seed, step, row))
