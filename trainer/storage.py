"""Files written aside, made durable and proven: what checkpoints, exports and reports share."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 1 << 24
SYNC_BYTES = 1 << 26
"""As much is forced to disk at once. A disk that needs more than `world.save_seconds` for it (20 s:
less than 3.4 MB/s) cannot be told from one that hangs."""
_PARTIAL = re.compile(r"\.partial-(\d+)-(.+)", re.S)


def digest(path: Path, tick: Callable[[], None] = lambda: None) -> str:
    """Return the SHA-256 of a file; `tick` is called now and then while it is read."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            found.update(chunk)
            tick()
    return found.hexdigest()


def write_pieces(
    file: Path, pieces: Iterable[memoryview], tick: Callable[[], None] = lambda: None
) -> str:
    """Write a file and force it to disk, part by part; return its SHA-256.

    Args:
        file: Where to.
        pieces: Its bytes, in order.
        tick: Called whenever more of it is written, or on disk; not while a disk hangs.
    """
    found, unforced = hashlib.sha256(), 0
    with file.open("wb") as stream:
        for piece in pieces:
            for first in range(0, len(piece), CHUNK_BYTES):
                chunk = piece[first : first + CHUNK_BYTES]
                found.update(chunk)
                unforced += stream.write(chunk)
                if unforced >= SYNC_BYTES:
                    force(stream)
                    unforced = 0
                tick()
        force(stream)
    tick()
    return found.hexdigest()


def force(stream: BinaryIO) -> None:
    """Force what was written to a file so far to disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durable(file: Path, text: str) -> None:
    """Write a text and force it to disk; for a file that is renamed into place after it."""
    file.write_text(text, encoding="utf-8")
    sync(file)


def open_aside(target: Path, *, alone: bool = False) -> Path:
    """Return the path to write `target` under until it is whole, in the same folder.

    What killed processes left of the target is removed; processes that live keep theirs.

    Args:
        target: File or folder that is to appear whole.
        alone: Its folder holds nothing but such targets, so those of the others go as well.
    """
    for leftover in target.parent.glob(".partial-*"):
        found = _PARTIAL.fullmatch(leftover.name)
        if found and (alone or found[2] == target.name) and not _lives(int(found[1])):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
    return target.with_name(f".partial-{os.getpid()}-{target.name}")


def _lives(pid: int) -> bool:
    import psutil

    return bool(psutil.pid_exists(pid))


def write_text(file: Path, text: str) -> None:
    """Write a small file so that readers see the old text or the new, never a part."""
    aside = file.with_name(f".partial-{file.name}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)
