"""What a run says of itself: `metrics.jsonl`, and a progress bar or plain lines on rank 0."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shoal.configs.errors import DataError

PLAIN_LINE_SECONDS = 10.0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a run; a last line torn by a kill is dropped.

    Raises:
        DataError: any other line is broken; names its number.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(f"line {number} is not a record: {error}", where=path) from None
    return records


class Metrics:
    """Writer of a run's metrics; does nothing on ranks other than 0."""

    def __init__(self, folder: Path, *, name: str, steps: int, start: int, active: bool) -> None:
        self.active = active
        self.name = name
        self.steps = steps
        if not active:
            return
        self.path = folder / "metrics.jsonl"
        self._drop_after(start)
        self._file = self.path.open("a", encoding="utf-8")
        self._terminal = sys.stdout.isatty()
        self._next_line = 0.0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=Console(file=sys.stdout),
            disable=not self._terminal,
        )
        self._task = self._progress.add_task(name, total=steps, completed=start, facts="")
        self._progress.start()

    def _drop_after(self, step: int) -> None:
        """Forget records of steps that are about to be done again, but not of those left out."""
        kept = [r for r in read_metrics(self.path) if r["step"] <= step or r["kind"] == "skipped"]
        aside = self.path.with_suffix(".partial")
        aside.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        aside.replace(self.path)

    def go_back(self, step: int) -> None:
        """Go on after an earlier step."""
        if self.active:
            self._file.close()
            self._drop_after(step)
            self._file = self.path.open("a", encoding="utf-8")
            self._progress.update(self._task, completed=step)

    def write(self, kind: str, step: int, **values: float | int | str | list | dict) -> None:
        """Append one record and show it."""
        if not self.active:
            return
        record = {"kind": kind, "step": step, **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if kind == "train":
            self._show(step, values)
        elif kind == "validation":
            self.say(
                f"{self.name} step {step}/{self.steps}: validation loss "
                f"{values['loss']:.4f}, {values['bits_per_byte']:.4f} bits per byte"
            )

    def _show(self, step: int, values: dict[str, Any]) -> None:
        facts = f"loss {values['loss']:.3f}  {values['tokens_per_second']:,.0f} tok/s"
        if self._terminal:
            self._progress.update(self._task, completed=step, facts=facts)
        elif time.monotonic() >= self._next_line or step == self.steps:
            self._next_line = time.monotonic() + PLAIN_LINE_SECONDS
            print(f"{self.name} step {step}/{self.steps}: {facts}", flush=True)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.active:
            self._progress.console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Stop the bar and close the file."""
        if self.active:
            self._progress.stop()
            self._file.close()
