"""A checkpoint that a run leaves out, because training from it has failed twice.

Ranks note what they went on from; the launcher names that one to the ranks of the next attempts,
until they have got past it. Nothing is renamed, so that this works in every kind of store.
"""

from __future__ import annotations

from pathlib import Path

from shoal.trainer.storage import write_text

REFUSED_VARIABLE = "SHOAL_REFUSED"
"""In the environment of ranks: the name of the checkpoint that is left out."""
RESUMED = ".resumed"
ELSEWHERE = ".elsewhere"
"""Says where the newest one is, if not here; in a checkpoint: where it was brought from."""


def note_resumed(root: Path, name: str) -> None:
    """Leave word of the checkpoint of this run that it goes on from; an empty name: of none."""
    write_text(root / RESUMED, name)


def read_resumed(root: Path) -> str:
    """Return the name of the checkpoint that the run last went on from; empty: unknown, or none."""
    note = root / RESUMED
    return note.read_text(encoding="utf-8") if note.is_file() else ""
