"""Files written aside, made durable and proven: what checkpoints, exports and reports share."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

CHUNK_BYTES = 1 << 24
_PARTIAL = re.compile(r"\.partial-(\d+)-(.+)", re.S)


def digest(path: Path, tick: Callable[[], None] = lambda: None) -> str:
    """Return the SHA-256 of a file; `tick` is called now and then while it is read."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            found.update(chunk)
            tick()
    return found.hexdigest()


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
