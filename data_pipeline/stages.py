"""A stage: one step of preparing a corpus, cut into tasks that any process on any host may run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

Progress = Callable[[str, int, int | None], None]
"""Told (what, done, total) now and then; total None where it is unknown."""


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


@runtime_checkable
class WeighedStage(Stage, Protocol):
    """A stage whose tasks differ in size, so that progress is told in bytes."""

    def task_bytes(self, task: int) -> int:
        """Size of what a task works on."""


Run = Callable[[Stage], None]
"""Does the tasks of a stage that are not done yet, and returns when all are."""
