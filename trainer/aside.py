"""Who may change which checkpoints a run has; and those set aside because training from them fails.

A suspect is a checkpoint under another name. Its name comes back if an older one is no better, and
it goes for good when training has got past it.
"""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.configs.errors import PreflightError
from shoal.trainer.checkpoint import checkpoint_name, list_checkpoints
from shoal.trainer.storage import sync

LOCK = ".lock"
LOOK_SECONDS = 0.05
SUSPECT = ".suspect-"


@contextmanager
def hold_folder(root: Path, timeout: float = 600) -> Iterator[None]:
    """Let one process at a time change which checkpoints there are.

    Raises:
        PreflightError: another has been at it for `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    with (root / LOCK).open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise PreflightError(
                        "another process has been changing it for too long", where=root
                    ) from None
                time.sleep(LOOK_SECONDS)
        yield


def set_newest_aside(root: Path) -> tuple[Path, Path] | None:
    """Take the newest checkpoint's name away; return it and the one before it.

    None where there is no older one to go on from, or one has been set aside that training has not
    got past: nothing is changed then.
    """
    if not root.is_dir():
        return None
    with hold_folder(root):
        *older, newest = list_checkpoints(root) or [root]
        if not older or any(root.glob(f"{SUSPECT}*")):
            return None
        newest.rename(root / f"{SUSPECT}{newest.name}")
        sync(root)
        return newest, older[-1]


def put_back(root: Path) -> None:
    """Give suspects their names again, where those are free."""
    if not any(root.glob(f"{SUSPECT}*")):
        return
    with hold_folder(root):
        for suspect in root.glob(f"{SUSPECT}*"):
            name = root / suspect.name.removeprefix(SUSPECT)
            shutil.rmtree(suspect) if name.exists() else suspect.rename(name)
        sync(root)


def remove_suspects(root: Path, step: int) -> None:
    """Remove those that a checkpoint of `step` has replaced; the caller holds the folder."""
    for suspect in root.glob(f"{SUSPECT}*"):
        if suspect.name <= f"{SUSPECT}{checkpoint_name(step)}":
            shutil.rmtree(suspect, ignore_errors=True)
