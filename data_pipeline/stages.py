"""A stage: one step of preparing a corpus, cut into tasks that any process on any host may run."""

from __future__ import annotations

from typing import Protocol


class Stage(Protocol):
    """Tasks that do not depend on each other. Implementations are frozen dataclasses of plain
    values and paths, which every process can rebuild.

    A task writes each of its files aside and renames it, the one that `is_done` looks for last, so
    that a task that was killed is run again and one that is done is not.
    """

    @property
    def name(self) -> str:
        """What progress calls it, as in `clean documents`."""

    @property
    def tasks(self) -> int:
        """How many there are; they are numbered from 0."""

    def is_done(self, task: int) -> bool:
        """Whether a task has left all its files."""

    def run(self, task: int) -> None:
        """Do one task, whatever an earlier attempt left."""
