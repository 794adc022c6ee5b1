"""Attempts that end as they are told, for tests of what is made of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from shoal.configs.schema import DataConfig, RunConfig, Stream, TrainConfig, WorldConfig
from shoal.launcher import supervision
from shoal.launcher.commands import Way
from shoal.launcher.fanout import AttemptEnd, HostLostError
from shoal.launcher.hosts import Host


class Job:
    """Attempts that end as they are told."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **world: Any) -> None:
        self.config = RunConfig(
            output=str(folder),
            data=DataConfig(train=(Stream(path="x"),)),
            train=TrainConfig(tokens=1),
            world=WorldConfig(**world),
        )
        self.ends: list[tuple[Any, ...]] = []
        self.hosts: list[list[str]] = []
        self.answering: set[str] | None = None
        self.before: Callable[[], object] = lambda: None
        monkeypatch.setattr(supervision, "run_attempt", self._attempt)
        monkeypatch.setattr(supervision, "find_reachable", self._find)
        monkeypatch.setattr(supervision, "check_before_start", lambda *_: None)
        monkeypatch.setattr(supervision, "find_guards", self._find_guards)
        self.lost: list[list[str]] = []
        self.guards: Callable[[float], dict[str, bool]] = lambda seconds: {}
        self.asked: list[dict[str, int]] = []
        self.called_off: list[int] = []

    def run(self, *names: str) -> None:
        supervision.supervise([Host(name, 1) for name in names], self.config)

    def _attempt(self, hosts: Sequence[Host], *_: object) -> AttemptEnd:
        self.before()
        self.hosts.append([host.name for host in hosts])
        return AttemptEnd(*self.ends.pop(0))

    def _find_guards(
        self, pids: dict[str, int], way: Way, seconds: float, called_off: Callable[[], bool]
    ) -> dict[str, bool]:
        self.asked.append(pids)
        return self.guards(seconds)

    def _find(self, hosts: Sequence[Host], *given: Any) -> list[Host]:
        self.lost.append(sorted(given[-2]))
        return [h for h in hosts if self.answering is None or h.name in self.answering]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(tmp_path, monkeypatch, max_restarts=2)


def lost(name: str) -> HostLostError:
    return HostLostError("ssh ended (exit code 255)", where=name)


def save(job: Job, *steps: int) -> None:
    for step in steps:
        folder = Path(job.config.output) / job.config.name / f"checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
