"""Removing what killed and finished jobs left behind, and old checkpoints where that is asked for.

A run that is in training is not touched: its lock is held while anything of it is removed. What a
job that is just starting may be about to use is left alone by its age.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shoal.configs.errors import ConfigError, DataError, ShoalError
from shoal.launcher.history import (
    count_bytes,
    find_damage,
    hold_run,
    list_runs,
    read_history,
)
from shoal.launcher.outcomes import find_leftovers
from shoal.launcher.runs import read_run

HOUR, DAY = 3600.0, 86400.0
LOG_DAYS = 14
CONTROL_FILES = (".check-*", ".greeting-*", ".probe-*", "logs/*/.call-key", ".partial-*")
"""Of launchers, in the folder of a run; removed once they are an hour old."""


@dataclass(frozen=True)
class Removal:
    """One file or folder that goes, and why."""

    path: Path
    bytes: int
    why: str


@dataclass(frozen=True)
class Cleaning:
    """What was removed, and the runs that were left alone."""

    removed: list[Removal]
    busy: list[Path]


def clean_runs(folder: Path, *, keep: int | None = None, dry_run: bool = False) -> Cleaning:
    """Remove what is left over under a folder of runs, and scratch folders of killed jobs here.

    Args:
        folder: Holds runs.
        keep: Leave so many of each run's newest whole checkpoints, and its best one and its
            milestones; None: all.
        dry_run: Only say what would be removed.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError("no such folder", where=folder, fix="shoal runs FOLDER --clean")
    removed, busy = [], []
    for run in list_runs(folder):
        try:
            read_run(run)
        except ShoalError:  # other programs keep a config.yaml, too
            continue
        with hold_run(run) as is_held:
            if not is_held:
                busy.append(run)
                continue
            for path, why in _find_in_run(run, keep):
                removed.append(_remove(path, why, dry_run))
    for path in folder.glob(".qualify-*"):
        if _is_older(path, DAY):
            removed.append(_remove(path, "left by a check", dry_run))
    for path in find_leftovers():
        removed.append(_remove(path, "left by a job that was killed", dry_run))
    return Cleaning(removed, busy)


def _find_in_run(run: Path, keep: int | None) -> Iterator[tuple[Path, str]]:
    """Yield what may go of a run that nobody trains."""
    root = run / "checkpoints"
    for path in sorted(root.glob(".partial-*")):
        yield path, "a checkpoint that was not finished"
    for pattern in CONTROL_FILES:
        for path in sorted(run.glob(pattern)):
            if _is_older(path, HOUR):
                yield path, "left by a launcher"
    for path in sorted((run / "logs").glob("attempt-" + 5 * "[0-9]")):
        if _is_older(path, LOG_DAYS * DAY):
            yield path, f"a log older than {LOG_DAYS} days"
    if keep is not None:
        for path in find_old_checkpoints(run, keep):
            yield path, f"older than the newest {keep}"


def find_old_checkpoints(run: Path, keep: int) -> list[Path]:
    """Return the checkpoints before the newest `keep` whole ones, less the best and milestones.

    Damaged ones among the newest do not count: they are none to go on from.
    """
    try:
        facts = read_history(run)
    except ShoalError:  # what cannot be understood is not thinned out
        return []
    kept, old = 0, []
    for step, path in sorted(facts.checkpoints.items(), reverse=True):
        if kept >= keep:
            if step != facts.best and step not in facts.milestones:
                old.append(path)
            continue
        with suppress(DataError):
            kept += not find_damage(path, verify=True)
    return old


def _is_older(path: Path, seconds: float) -> bool:
    with suppress(OSError):
        return time.time() - path.lstat().st_mtime > seconds
    return False


def _remove(path: Path, why: str, dry_run: bool) -> Removal:
    """Remove a file or folder; what is a checkpoint loses its name first."""
    removal = Removal(path, count_bytes(path), why)
    if dry_run:
        return removal
    if path.is_dir() and not path.is_symlink():
        if path.name.startswith("step-"):
            path = path.rename(path.with_name(f".partial-old-{path.name}"))
        shutil.rmtree(path)
    else:
        path.unlink()
    return removal
