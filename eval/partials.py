"""Partial results: written aside under the writer's pid, and cleared away once it is gone."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

_PARTIAL = re.compile(r"\.partial-(\d+)-(.+)", re.S)


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
