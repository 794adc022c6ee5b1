"""What the steps of a run go into the ledger as: one entry between two checkpoints."""

from __future__ import annotations

import time
from pathlib import Path

from shoal.configs.schema import RunConfig
from shoal.trainer.ledger import LedgerEntry, append_entry, now, read_ledger


class Booking:
    """Books what was done since the last time."""

    def __init__(
        self, path: Path, config: RunConfig, *, devices: int, device: str, flops_per_token: float
    ) -> None:
        """Name the ledger and what is the same in every entry."""
        self.path, self.config = path, config
        self.devices, self.device, self.flops_per_token = devices, device, flops_per_token
        self.begin(0)

    def begin(self, step: int) -> None:
        """Count from here, at `step`."""
        self.step, self.begun, self.started = step, time.monotonic(), now()

    @property
    def position(self) -> int:
        """Entries there are."""
        return len(read_ledger(self.path))

    def book(self, step: int) -> None:
        """Append what it took to come to `step`, if that was anything."""
        steps = step - self.step
        if steps:
            tokens = steps * self.config.step_tokens
            entry = LedgerEntry(
                kind=self.config.ledger.kind,
                stage=self.config.name,
                scope=self.config.ledger.scope,
                started=self.started,
                seconds=time.monotonic() - self.begun,
                devices=self.devices,
                device=self.device,
                tokens=tokens,
                flops=tokens * self.flops_per_token,
                note=f"steps {self.step} to {step}",
            )
            append_entry(self.path, entry)
        self.begin(step)
