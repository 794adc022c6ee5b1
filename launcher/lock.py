"""The lock of a run's folder: one job trains it at a time, and whoever comes second is told who."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from shoal.configs.errors import PreflightError
from shoal.trainer.aside import JOB_VARIABLE
from shoal.trainer.ledger import now

LOCK = ".lock"
LOCK_SECONDS = 10  # ranks of a killed job may take a moment to go
LEASE_SECONDS = 120


def hold_lock(folder: Path, rank: int, tick: Callable[[], None]) -> IO[str] | None:
    """Make the run's folder; hold its lock on rank 0 for as long as the returned file is open.

    A rank of the same job on another host, which its launcher has given up, may seem to hold it
    for as long as that host is gone (NFSv3): that is waited for, and no longer.

    Args:
        folder: Of the run.
        rank: Of this process.
        tick: Called while it waits.

    Raises:
        PreflightError: another process holds it; names that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if rank != 0:
        return None
    file = (folder / LOCK).open("a+")
    begun, job = time.monotonic(), os.environ.get(JOB_VARIABLE, "")
    while not _take(file):
        file.seek(0)
        holder = _read_holder(file.read())
        # A rank of this job whose host was lost: its file server lets go after a while.
        ours = bool(job) and holder.get("job") == job
        if time.monotonic() - begun > (LEASE_SECONDS if ours else LOCK_SECONDS):
            if not ours or _lives_here(holder):
                raise _explain(folder, holder)
            where = f"a rank of this job on {holder.get('host')}, which is lost"
            print(f"going on without the lock {file.name}: {where}, has it", file=sys.stderr)
            break
        tick()
        time.sleep(1)
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": now(), "job": job}
    file.truncate(0)
    file.write(json.dumps(holder))
    file.flush()
    return file


def _take(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lives_here(holder: Mapping[str, Any]) -> bool:
    """Whether what a lock says of its holder is true of a process of this machine."""
    import psutil

    return holder.get("host") == socket.gethostname() and psutil.pid_exists(holder.get("pid", -1))


def _read_holder(text: str) -> dict[str, Any]:
    """Return what a lock says of who holds it; nothing where it says nothing."""
    try:
        return dict(json.loads(text))
    except ValueError:
        return {}


def _explain(folder: Path, holder: Mapping[str, Any]) -> PreflightError:
    """Return the error for a run that another process trains, or has trained on a lost host."""
    who, fix = "another process", "wait for it, stop it, or give this one another name="
    if holder:
        who = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')},"
    if holder.get("host") != socket.gethostname():
        fix += (
            "; if that host is gone, a network file system keeps its lock for some minutes "
            "(NFSv4) or until it is back (NFSv3): once nothing trains there, remove "
            f"{folder / LOCK}"
        )
    return PreflightError(f"{who} is training this run", where=folder, fix=fix)
