"""The ledger: an append-only record of what every segment of work cost.

One JSON line a segment. `scope` says who pays: `generic` work is done once for all domains,
`specialization` once for each domain.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from shoal.configs.errors import DataError

Scope = Literal["generic", "specialization"]


class LedgerEntry(BaseModel):
    """Cost of one segment: wall seconds, and device-seconds over all devices."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["prepare", "cluster", "tune", "train", "export"]
    stage: str
    scope: Scope = "specialization"
    started: str
    seconds: float
    devices: int = 1
    device: str = "cpu"
    tokens: int = 0
    flops: float = 0.0
    note: str = ""
    streams: dict[str, int] = {}
    """Targets of each stream that were trained on, without padding; work that was done again after
    a kill or from an older checkpoint counts again, so the sum over entries is a cost."""
    streams_total: dict[str, int] = {}
    """Rows of each stream from the run's first batch to the last one of this entry, each once: the
    last entry has the realised shares. Batches passed over by going back are among them."""

    @property
    def device_seconds(self) -> float:
        """Seconds times devices."""
        return self.seconds * self.devices


def now() -> str:
    """Return the present time in UTC as ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def append_entry(path: Path, entry: LedgerEntry) -> None:
    """Append one line; a single write, so that a kill leaves whole lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(entry.model_dump() | {"device_seconds": entry.device_seconds})
    _end_last_line(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _end_last_line(path: Path) -> None:
    """Cut a line that a kill tore: appended to, it would spoil the next entry and the file."""
    data = path.read_bytes() if path.exists() else b""
    whole, tail = data[: data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1 :]
    if not tail:
        return
    try:
        json.loads(tail)
    except ValueError:
        os.truncate(path, len(whole))
    else:  # only its newline is missing
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")


def read_ledger(path: Path) -> list[LedgerEntry]:
    """Read all entries; a last line torn by a kill is dropped, any other bad line is an error."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            tree = json.loads(line)
            tree.pop("device_seconds", None)
            entries.append(LedgerEntry.model_validate(tree))
        except (ValueError, TypeError, AttributeError) as error:
            if number == len(lines):
                break
            raise DataError(f"line {number} is not a ledger entry: {error}", where=path) from None
    return entries
