"""What the steps of a run go into the ledger as: one entry between two checkpoints."""

from __future__ import annotations

import time

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
            rows = self.facts.count_rows(self.step + passed_over, step + passed_over)
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
                streams={name: n * self.config.model.context for name, n in rows.items()},
            )
            append_entry(self.path, entry)
        self.begin(step)
