"""What the steps of a run go into the ledger as: one entry between two checkpoints."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from shoal.configs.schema import RunConfig
from shoal.trainer.ledger import LedgerEntry, append_entry, now, read_ledger
from shoal.trainer.segment import RunFacts


class Booking:
    """Books what was done since the last time."""

    def __init__(self, config: RunConfig, facts: RunFacts, step: int) -> None:
        """Count from `step`, into the ledger in the folder of a run."""
        self.path, self.config, self.facts = facts.folder / "ledger.jsonl", config, facts
        self.begin(step)

    def begin(self, step: int) -> None:
        """Count from here, at `step`."""
        self.step, self.begun, self.started = step, time.monotonic(), now()
        self.targets: Counter[str] = Counter()

    def count(self, targets: int, of_streams: Sequence[tuple[float, float]]) -> None:
        """Count the targets of a step, over all ranks.

        Args:
            targets: Of all streams.
            of_streams: Cross-entropy and targets of each, where they are told apart.
        """
        found = [round(each) for _, each in of_streams] or [targets]
        self.targets.update(dict(zip(self.facts.streams, found, strict=False)))

    @property
    def position(self) -> int:
        """Entries there are."""
        return len(read_ledger(self.path))

    def book(self, step: int, passed_over: int = 0) -> None:
        """Append what it took to come to `step`, if that was anything.

        `passed_over`: batches that were left out by going back, before these.
        """
        steps = step - self.step
        if steps:
            tokens = steps * self.config.step_tokens
            entry = LedgerEntry(
                kind=self.config.ledger.kind,
                stage=self.config.name,
                scope=self.config.ledger.scope,
                started=self.started,
                seconds=time.monotonic() - self.begun,
                devices=self.facts.ranks,
                device=self.facts.device,
                tokens=tokens,
                flops=tokens * self.facts.training_flops_per_token,
                note=f"steps {self.step} to {step}",
                streams=dict(self.targets),
                streams_total=self.facts.count_rows(step + passed_over),
            )
            append_entry(self.path, entry)
        self.begin(step)
