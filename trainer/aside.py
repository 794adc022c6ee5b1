"""A checkpoint that a run leaves out, because training from it has failed twice.

Ranks note what they went on from; the launcher names that one to the ranks of the next attempts,
until they have got past it. Nothing is renamed, so that this works in every kind of store.
"""

from __future__ import annotations

import os
from pathlib import Path

from shoal.trainer.storage import write_text

JOB_VARIABLE = "SHOAL_JOB"
"""Names a command's job, all its attempts, to its ranks."""
REFUSED_VARIABLE = "SHOAL_REFUSED"
"""In the environment of ranks: the name of the checkpoint that is left out."""
RESUMED = ".resumed"
ELSEWHERE = ".elsewhere"
"""Says where the newest one is, if not here; in a checkpoint: where it was brought from."""


def note_resumed(root: Path, name: str) -> None:
    """Leave word of the checkpoint of this run that this job goes on from; empty: of none."""
    write_text(root / RESUMED, f"{os.environ.get(JOB_VARIABLE, '')} {name}")


def read_resumed(root: Path) -> str:
    """Return the name of the checkpoint that this job last went on from; empty: unknown, or none.

    Another command for the same run may have left its own word, before the lock refuses it.
    """
    note = root / RESUMED
    job, _, name = (note.read_text(encoding="utf-8") if note.is_file() else "").partition(" ")
    return name if job == os.environ.get(JOB_VARIABLE, "") else ""


def forget_resumed(root: Path) -> None:
    """Take back this job's word, before it goes on from another."""
    if read_resumed(root):
        (root / RESUMED).unlink(missing_ok=True)
