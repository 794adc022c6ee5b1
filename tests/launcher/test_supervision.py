"""Several attempts, and one attempt over guards; `ssh` is a script that stays on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from shoal.configs.errors import (
    ConfigError,
    DataError,
    NonFiniteLossError,
    PreflightError,
    RetriesExhausted,
    ShoalError,
    StoppedOnRequest,
)
from shoal.configs.schema import DataConfig, RunConfig, Stream, TrainConfig, WorldConfig
from shoal.launcher import fanout, supervision
from shoal.launcher.endings import Interrupted
from shoal.launcher.fanout import AttemptEnd, HostLostError, caught_signals, make_tasks, run_attempt
from shoal.launcher.greeting import is_guard_gone
from shoal.launcher.guard import is_guard
from shoal.launcher.hosts import Host

TRAINING = """
import os, sys, time, types
from pathlib import Path
from shoal.configs.errors import DataError, StoppedOnRequest

def train(configs, world):
    file = Path(os.environ["RECORDS"], str(world.rank))
    file.write_text(f"{world.num_ranks} {os.environ['LOCAL_RANK']} {os.getpid()}")
    mode = os.environ["FAKE"]
    if mode == "data" and world.rank == 1:
        raise DataError("shard is corrupt", where="shard.00001.mds")
    while mode in ("wait", "data"):
        if world.stop.requested:
            raise StoppedOnRequest("step 7 of 9 is saved")
        time.sleep(0.05)

module = types.ModuleType("shoal.launcher.training")
module.train = train
sys.modules["shoal.launcher.training"] = module
"""
# ssh ... -- NAME COMMAND; a real one would not hand the signals it ignores to the other machine.
SSH = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
exec env --default-signal=TERM,INT,HUP sh -c "$3"
"""
HERE, THERE = Host("127.0.0.1", 1), Host("far-away.invalid", 2)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an ssh of its own, where training is a file that each rank writes."""
    (tmp_path / "sitecustomize.py").write_text(TRAINING)
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "run.yaml").write_text("data: {train: [{path: x}]}\ntrain: {tokens: 1}\n")
    (tmp_path / "records").mkdir()
    for name, value in {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path),
        "RECORDS": str(tmp_path / "records"),
        "FAKE": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def attempt(stage: Path, caught: list[int], hosts: Sequence[Host] = (HERE, THERE)) -> AttemptEnd:
    file, logs = str(stage / "run.yaml"), stage / "logs"
    return run_attempt(hosts, [file], WorldConfig(), logs, caught, lambda: False)


def records(stage: Path) -> dict[str, list[int]]:
    files = sorted((stage / "records").iterdir())
    return {file.name: [int(word) for word in file.read_text().split()] for file in files}


def meanwhile(stage: Path, count: int, work: Callable[[], object]) -> threading.Thread:
    """Do `work` once so many ranks train."""

    def wait() -> None:
        deadline = time.monotonic() + 90
        while sum(map(len, records(stage).values())) < 3 * count and time.monotonic() < deadline:
            time.sleep(0.05)
        work()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def guards() -> Iterator[psutil.Process]:
    for process in psutil.Process().children(recursive=True):
        if "shoal.launcher.guard" in process.cmdline():
            yield process


def test_each_rank_of_each_host_is_started_once(stage: Path) -> None:
    end = attempt(stage, [])
    assert end.error is None, str(end.error)
    places = {rank: words[:2] for rank, words in records(stage).items()}
    assert places == {"0": [3, 0], "1": [3, 0], "2": [3, 1]}
    assert (stage / "logs" / "far-away.invalid.log").read_text().startswith("--- ")
    assert not list(guards())


def test_a_rank_elsewhere_ends_all_with_its_own_error(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE", "data")
    error = attempt(stage, []).error
    assert type(error) is DataError
    assert str(error.where) == "shard.00001.mds"
    assert any("failed first: rank 1" in note for note in error.__notes__)
    assert not any(psutil.pid_exists(words[2]) for words in records(stage).values())


def test_a_signal_reaches_the_ranks_of_all_hosts(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE", "wait")
    caught: list[int] = []
    thread = meanwhile(stage, 3, lambda: caught.append(signal.SIGTERM))
    error = attempt(stage, caught).error
    thread.join()
    assert type(error) is StoppedOnRequest
    assert error.cause == "step 7 of 9 is saved"


def test_a_second_interrupt_kills(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "wait")
    caught: list[int] = []
    stopped: list[psutil.Process] = []

    def interrupt_twice() -> None:
        for words in records(stage).values():  # ranks that cannot save any more
            stopped.append(psutil.Process(words[2]))
            stopped[-1].suspend()
        caught.extend([signal.SIGINT, signal.SIGINT])

    thread = meanwhile(stage, 3, interrupt_twice)
    error = attempt(stage, caught).error
    thread.join()
    assert type(error) is Interrupted
    assert error.exit_code == 130
    assert not any(process.is_running() for process in stopped)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_guard_that_is_killed_leaves_nothing_to_wait_for(
    elsewhere: bool, stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE", "wait")

    def kill() -> None:
        found = sorted(guards(), key=lambda guard: guard.cmdline()[-1].isdigit())
        found[0 if elsewhere else -1].kill()

    thread = meanwhile(stage, 3, kill)
    end = attempt(stage, [])
    thread.join()
    assert type(end.error) is HostLostError
    assert end.error.where == (THERE if elsewhere else HERE).name
    assert "its guard ended" in str(end.error) or "ssh ended (exit code -9)" in str(end.error)
    assert all(is_guard_gone(name, pid) for name, pid in end.cut_off.items() if pid)
    assert bool(end.cut_off) is elsewhere, "gone by a signal is what a killed ssh looks like, too"


def test_an_error_of_a_guard_comes_with_its_machine(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    hosts = [Host("no-such-host.invalid", 1), HERE]
    error = attempt(stage, [], hosts).error
    assert type(error) is PreflightError
    assert "cannot reach no-such-host.invalid, the first machine" in error.cause


def test_a_guard_lives_until_it_is_gone() -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    guard = subprocess.Popen(fanout.guard_command("1"), stdin=subprocess.PIPE)
    try:
        assert not is_guard(other.pid)
        deadline = time.monotonic() + 60
        while not is_guard(guard.pid) and time.monotonic() < deadline:  # forked, and not yet itself
            time.sleep(0.05)
        assert is_guard(guard.pid)
    finally:
        for process in (other, guard):
            process.kill()
            process.communicate()
    assert not is_guard(guard.pid)


def test_others_get_what_steers_libraries_and_nothing_else() -> None:
    environment = {
        "NCCL_DEBUG": "INFO",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "AWS_SECRET_ACCESS_KEY": "x",
        "CUDA_VISIBLE_DEVICES": "",
        "RANK": "3",
    }
    here, there = make_tasks([HERE, THERE], ["a.yaml"], WorldConfig(threads=3), environment)
    kept = ("NCCL_DEBUG", "CUBLAS_WORKSPACE_CONFIG", "CUDA_VISIBLE_DEVICES")
    assert there.environment == {name: environment[name] for name in kept}
    assert here.environment == {}
    assert (here.global_ranks, there.global_ranks) == ([0], [1, 2])
    assert (there.address, there.threads, there.num_hosts) == (HERE.name, 3, 2)
    environment["CUDA_VISIBLE_DEVICES"] = "1,2"  # other machines number theirs
    (there,) = make_tasks([THERE], [], WorldConfig(), environment)
    assert "CUDA_VISIBLE_DEVICES" not in there.environment


# Attempts alone: what one comes to is given.


class Job:
    """Attempts that end as they are told."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **world: Any) -> None:
        self.config = RunConfig(
            output=str(folder),
            data=DataConfig(train=(Stream(path="x"),)),
            train=TrainConfig(tokens=1),
            world=WorldConfig(**world),
        )
        self.ends: list[tuple[ShoalError | None, dict[str, int | None]]] = []
        self.hosts: list[list[str]] = []
        self.answering: set[str] | None = None
        monkeypatch.setattr(supervision, "run_attempt", self._attempt)
        monkeypatch.setattr(supervision, "find_reachable", self._find)
        monkeypatch.setattr(supervision, "check_all_answer", lambda *_: None)
        monkeypatch.setattr(supervision, "is_guard_gone", lambda name, pid: True)

    def run(self, *names: str) -> None:
        supervision.supervise([Host(name, 1) for name in names], self.config)

    def _attempt(self, hosts: Sequence[Host], *_: object) -> AttemptEnd:
        self.hosts.append([host.name for host in hosts])
        return AttemptEnd(*self.ends.pop(0))

    def _find(self, hosts: Sequence[Host], least: int, folder: Path) -> list[Host]:
        return [h for h in hosts if self.answering is None or h.name in self.answering]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(tmp_path, monkeypatch, max_restarts=2)


def lost(name: str) -> HostLostError:
    return HostLostError("ssh ended (exit code 255)", where=name)


def test_hosts_lost_one_after_the_other_are_progress(job: Job) -> None:
    job.ends = [(lost("n3.invalid"), {}), (None, {})]
    job.answering = {"n1.invalid", "n2.invalid"}
    job.run("n1.invalid", "n2.invalid", "n3.invalid")
    assert job.hosts == [
        ["n1.invalid", "n2.invalid", "n3.invalid"],
        ["n1.invalid", "n2.invalid"],
    ]


def test_the_same_failure_twice_ends_the_job(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    job.ends = [(ShoalError(f"rank {n} was killed"), {}) for n in (1, 0)]
    with pytest.raises(RetriesExhausted, match="the same failure twice") as caught:
        job.run("n1.invalid", "n2.invalid")
    assert caught.value.exit_code == 6
    assert "rank 0 was killed" in capfd.readouterr().err


def test_every_attempt_may_fail_otherwise(job: Job) -> None:
    job.ends = [(lost(name), {}) for name in ("a", "b", "c")]
    with pytest.raises(RetriesExhausted, match="3 attempts failed"):
        job.run("n1.invalid", "n2.invalid")


@pytest.mark.parametrize(
    "kind", [ConfigError, DataError, PreflightError, NonFiniteLossError, StoppedOnRequest]
)
def test_what_no_attempt_would_change_ends_the_job(kind: type[ShoalError], job: Job) -> None:
    job.ends = [(kind("so"), {})]
    with pytest.raises(kind, match="so"):
        job.run("n1.invalid", "n2.invalid")


def test_what_is_cut_off_is_asked_for_before_the_next_attempt(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def is_gone(name: str, pid: int) -> bool:
        asked.append((name, pid))
        return len(asked) > 1

    monkeypatch.setattr(supervision, "is_guard_gone", is_gone)
    job.ends = [(lost("n2.invalid"), {"n2.invalid": 77}), (None, {})]
    job.run("n1.invalid", "n2.invalid")
    assert asked == [("n2.invalid", 77)] * 2


def test_a_request_between_attempts_is_heeded(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.ends = [(lost("n2.invalid"), {"n2.invalid": 77})]
    monkeypatch.setattr(supervision, "is_guard_gone", lambda name, pid: False)
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Interrupted) as caught:
        job.run("n1.invalid", "n2.invalid")
    assert caught.value.exit_code == 128 + signal.SIGTERM


def test_a_signal_before_ranks_are_watched_reaches_them(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(*_: object, gone: Callable[[], bool], **__: object) -> None:
        assert not gone()
        os.kill(os.getpid(), signal.SIGTERM)
        assert gone()
        raise StoppedOnRequest("saved")

    monkeypatch.setattr(supervision, "launch_ranks", launch)
    with pytest.raises(StoppedOnRequest, match="saved"):
        job.run("localhost")


def test_signals_are_counted_and_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with caught_signals() as caught:
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before
