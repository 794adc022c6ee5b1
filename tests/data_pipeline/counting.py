"""A stage that writes numbers; in a file of its own, which tasks on a cluster can import."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from shoal.configs.errors import DataError


@dataclass(frozen=True)
class Count:
    """Each task writes how many threads it may use; some fail."""

    folder: Path
    tasks: int
    fails: tuple[int, ...] = ()
    name: str = "count: up"

    def is_done(self, task):
        return (self.folder / str(task)).is_file()

    def run(self, task):
        if task in self.fails:
            raise DataError("does not count", where=f"number {task}", fix="learn it")
        (self.folder / str(task)).write_text(str(os.environ["RAYON_NUM_THREADS"]))
