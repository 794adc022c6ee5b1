"""What the folder of a run tells of it: how far it came, what it keeps, how it ended."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from shoal.configs.errors import DataError
from shoal.configs.schema import RunConfig
from shoal.launcher.lock import LOCK
from shoal.launcher.runs import CONFIG_FILE, has_diverged, read_run

UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class RunFacts:
    """A run, as its folder tells."""

    folder: Path
    config: RunConfig
    records: list[dict[str, Any]]
    """Of metrics.jsonl."""
    checkpoints: dict[int, Path]
    """By step, in order; judged by their names."""
    bytes: int
    state: str
    written: datetime

    @property
    def last(self) -> dict[str, Any] | None:
        """The newest training record."""
        return next((r for r in reversed(self.records) if r["kind"] == "train"), None)

    @property
    def scores(self) -> dict[int, float]:
        """Validation loss by step, nats a token."""
        return {r["step"]: r["loss"] for r in self.records if r["kind"] == "validation"}

    @property
    def best(self) -> int | None:
        """The step of the checkpoint with the lowest validation loss, where that was measured."""
        measured = {step: loss for step, loss in self.scores.items() if step in self.checkpoints}
        return min(measured, key=lambda step: (measured[step], -step)) if measured else None

    @property
    def milestones(self) -> list[int]:
        """Steps of checkpoints that are kept for good."""
        every = self.config.checkpoint.milestone_every
        return [step for step in self.checkpoints if every and step % every == 0]


def list_runs(folder: Path) -> list[Path]:
    """Return the folders of runs under `folder`."""
    return sorted(file.parent for file in folder.glob(f"**/{CONFIG_FILE}"))


def read_history(folder: Path) -> RunFacts:
    """Read what a run's folder tells.

    Raises:
        ConfigError, DataError: it is no run, or its records are broken.
    """
    from shoal.trainer.checkpoint import list_checkpoints
    from shoal.trainer.metrics import read_metrics

    config, records = read_run(folder), read_metrics(folder / "metrics.jsonl")
    found = list_checkpoints(folder / "checkpoints")
    checkpoints = {int(path.name.removeprefix("step-")): path for path in found}
    return RunFacts(
        folder,
        config,
        records,
        checkpoints,
        count_bytes(folder),
        _describe_end(folder, config, records, checkpoints),
        datetime.fromtimestamp(folder.stat().st_mtime),
    )


def _describe_end(
    folder: Path, config: RunConfig, records: Sequence[dict[str, Any]], checkpoints: dict[int, Path]
) -> str:
    """Return whether a run is in training now, or else how it came to its end."""
    step = max((r["step"] for r in records if r["kind"] in ("train", "skipped")), default=0)
    newest = max(checkpoints, default=0)
    if is_training(folder):
        return "in training"
    if has_diverged(folder):
        return "diverged"
    if newest >= config.steps:
        return "done"
    if newest and newest >= step:
        return f"stopped at step {newest}, saved"
    if newest:
        return f"broken off after step {step}; goes on after {newest}"
    return f"broken off after step {step}, nothing saved" if step else "not begun"


def is_training(folder: Path) -> bool:
    """Return whether somebody trains the run right now, on any machine that shares its folder."""
    with hold_run(folder) as is_held:
        return not is_held


@contextlib.contextmanager
def hold_run(folder: Path) -> Iterator[bool]:
    """Keep others from training a run for a while; gives False where somebody does already."""
    try:
        file = (folder / LOCK).open("r+")
    except FileNotFoundError:  # never trained
        yield True
        return
    except OSError:  # not ours to write: who has it may train it
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def count_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder; what vanishes meanwhile is none."""
    total = 0
    for file in [path, *path.rglob("*")]:
        with contextlib.suppress(OSError):
            facts = file.lstat()
            total += 0 if file.is_dir() else facts.st_size
    return total


def format_bytes(size: float) -> str:
    """Return a size for people: 1.2 GB."""
    power = min(int(math.log(size, 1000)), len(UNITS) - 1) if size >= 1 else 0
    return f"{size / 1000**power:.{1 if power else 0}f} {UNITS[power]}"


def describe_checkpoint(folder: Path, *, verify: bool) -> tuple[dict[str, object], list[DataError]]:
    """Return what a checkpoint says of itself, and what is broken in it.

    Without `verify` names and sizes are compared, with it every byte.

    Raises:
        DataError: its manifest cannot be used.
    """
    from shoal.trainer.checkpoint import MANIFEST, read_manifest

    manifest = read_manifest(folder)
    stated = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["schema_version"]
    problems = find_damage(folder, verify=verify)
    states = sorted({state for tensor in manifest.tensors.values() for state in tensor})
    numbers = [math.prod(tensor["weight"].shape) for tensor in manifest.tensors.values()]
    stored = sum(fact.bytes for fact in manifest.files.values())
    facts: dict[str, object] = {
        "run": manifest.run.get("name"),
        "step": manifest.step,
        "format version": stated,
        "written by": _find_writer(folder, manifest.step),
        "ranks": f"{len(manifest.files)} wrote a file each",
        "parameters": f"{sum(numbers):,} in {len(numbers)} tensors",
        "states": ", ".join(states),
        "bytes": stored,
        "hashes": "verified" if verify else "not read; --verify reads every byte",
    }
    facts |= _describe_position(manifest.step, manifest.position, manifest.run)
    if manifest.loss is not None:
        facts["validation loss"] = f"{manifest.loss:.4f}"
    if problems:
        facts["hashes"] = f"BROKEN: {problems[0]}" + (f" and {len(problems) - 1} more files"
                                                      if problems[1:] else "")  # fmt: skip
    return facts, problems


def _describe_position(
    step: int, position: dict[str, Any], run: dict[str, Any]
) -> dict[str, object]:
    """Return where the data stands, as a checkpoint remembers it."""
    facts: dict[str, object] = {}
    batch = (run.get("train") or {}).get("batch_rows")
    if batch:
        facts["rows read"] = f"{(step + position.get('passed_over', 0)) * batch:,}, {batch} a step"
    for number, (identity, weight) in enumerate(position.get("streams", ()), 1):
        facts[f"shards {number}"] = f"{identity[:16]}, weight {weight}"
    if position.get("skipped"):
        facts["steps left out"] = position["skipped"]
    if "ledger" in position:
        facts["cost until then"] = f"the first {position['ledger']} entries of ledger.jsonl"
    return facts


def find_damage(folder: Path, *, verify: bool) -> list[DataError]:
    """Return what is missing, cut or, with `verify`, altered in a checkpoint: every file of it."""
    from shoal.trainer.checkpoint import read_manifest
    from shoal.trainer.storage import digest

    found = []
    for name, fact in read_manifest(folder).files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != fact.bytes:
                found.append(DataError(f"{size} bytes, expected {fact.bytes}", where=path))
            elif verify and digest(path) != fact.sha256:
                found.append(DataError("was altered: its SHA-256 does not match", where=path))
        except OSError as error:
            found.append(DataError(f"cannot be read: {error.strerror}", where=path))
    return found


def _find_writer(folder: Path, step: int) -> str:
    """Return what the run's records say of the start that led to a step."""
    from shoal.trainer.metrics import read_metrics

    with contextlib.suppress(DataError):
        records = read_metrics(folder.parents[1] / "metrics.jsonl")
        starts = [r for r in records if r["kind"] == "start" and r["step"] < step]
        if starts:
            start = starts[-1]
            parts = [f"{start['ranks']} ranks on {start['device']}"]
            parts += [f"ZeRO {start['zero_stage']}"] if "zero_stage" in start else []
            parts += [f"{name} {start[name]}" for name in ("torch", "deepspeed") if name in start]
            return ", ".join(parts)
    return "unknown: it does not lie in its run"
