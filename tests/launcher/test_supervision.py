"""Several attempts, and one attempt over guards; `ssh` is a script that stays on this machine."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import AuthenticationError
from pathlib import Path
from typing import Any

import psutil
import pytest

from shoal.configs.errors import (
    ConfigError,
    DataError,
    NonFiniteLossError,
    NotMetError,
    PreflightError,
    RetriesExhausted,
    ShoalError,
    StoppedOnRequest,
)
from shoal.configs.schema import DataConfig, RunConfig, Stream, TrainConfig, WorldConfig
from shoal.launcher import fanout, supervision
from shoal.launcher import guard as guard_module
from shoal.launcher.calls import Call, Switchboard
from shoal.launcher.commands import Way, guard_command
from shoal.launcher.endings import Interrupted
from shoal.launcher.fanout import AttemptEnd, HostLostError, make_tasks, run_attempt
from shoal.launcher.greeting import is_guard_gone
from shoal.launcher.guard import is_guard
from shoal.launcher.hosts import Host
from shoal.launcher.world import caught_signals

HERE, THERE = Host("127.0.0.1", 1), Host("far-away.invalid", 2)


def attempt(
    stage: Path,
    caught: list[int],
    hosts: Sequence[Host] = (HERE, THERE),
    way: Way = "ssh",
) -> AttemptEnd:
    file, world = str(stage / "run.yaml"), WorldConfig(launcher=way)
    return run_attempt(hosts, [file], world, stage, caught, lambda: False)


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


@pytest.mark.parametrize(
    ("way", "log"), [("ssh", "far-away.invalid"), ("pdsh", "pdsh"), ("slurm", "slurm")]
)
def test_each_rank_of_each_host_is_started_once(way: Way, log: str, stage: Path) -> None:
    hosts = (HERE, THERE, Host("farther.invalid", 1))
    end = attempt(stage, [], hosts, way)
    assert end.error is None, str(end.error)
    places = {rank: words[:2] for rank, words in records(stage).items()}
    assert places == {"0": [4, 0], "1": [4, 0], "2": [4, 1], "3": [4, 0]}
    assert (stage / "logs" / f"{log}.log").read_text().startswith("--- ")
    assert not list(guards())
    assert not (stage / ".call-key").exists()


def test_a_guard_may_be_started_by_hand(stage: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = ""

    def type_it() -> None:
        nonlocal shown
        while "cd " not in shown:
            time.sleep(0.1)
            shown += capfd.readouterr().err
        command = shown[shown.index("cd ") :].splitlines()[0]
        subprocess.run(["sh", "-c", command], check=True, timeout=60)

    thread = threading.Thread(target=type_it)
    thread.start()
    end = attempt(stage, [], way="none")
    thread.join()
    assert end.error is None, str(end.error)
    assert "type on far-away.invalid:" in shown
    assert set(records(stage)) == {"0", "1", "2"}


def test_a_guard_that_cannot_be_started_is_an_error_at_once(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stage / "pdsh").write_text("#!/bin/sh\necho no such host; exit 1\n")
    begun = time.monotonic()
    error = attempt(stage, [], way="pdsh").error
    assert type(error) is HostLostError
    assert "its guard did not call: no such host" in str(error)
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(PreflightError, match="pdsh: is not installed here"):
        attempt(stage, [], way="pdsh")
    assert not (stage / ".call-key").exists()
    assert time.monotonic() - begun < 60


def test_only_who_holds_the_key_is_heard(tmp_path: Path) -> None:
    board = Switchboard(["a"], tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "other").write_text("0" * 64)
    endpoint, line = f"127.0.0.1:{board.port}", board.lines["a"]
    try:
        stranger = socket.create_connection(("127.0.0.1", board.port))  # says nothing, holds on
        with pytest.raises(AuthenticationError):
            Call(endpoint, tmp_path / "other", "a")
        Call(endpoint, tmp_path / "key", "unknown")
        line.send(b"task\n")  # before the call
        call = Call(endpoint, tmp_path / "key", "a")
        assert next(iter(call)) == "task\n"
        call.send(b"started\n")
        assert select.select([line.control], [], [], 10)[0]
        assert os.read(line.control, 100) == b"started\n"
        line.hang_up()
        assert list(call) == []
        stranger.close()
    finally:
        board.close()
    assert not (tmp_path / "key").exists()


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


def test_a_signal_to_a_guard_stops_all(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Slurm's warning does, where it goes to every process of a job."""
    monkeypatch.setenv("FAKE", "wait")
    caught: list[int] = []
    thread = meanwhile(stage, 3, lambda: [g.send_signal(signal.SIGUSR1) for g in guards()])
    error = attempt(stage, caught).error
    thread.join()
    assert (type(error), caught) == (StoppedOnRequest, [])


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
    assert all(is_guard_gone(name, "ssh", pid) for name, pid in end.cut_off.items() if pid)
    assert bool(end.cut_off) is elsewhere, "gone by a signal is what a killed ssh looks like, too"


def test_a_guard_that_stands_still_is_given_up(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE", "wait")
    seconds = {"SILENCE_SECONDS": 2.0, "BEAT_SECONDS": 0.5, "CLOSE_SECONDS": 1.0}
    for name, value in seconds.items():
        monkeypatch.setattr(fanout, name, value)

    def suspend() -> None:
        next(guard for guard in guards() if not guard.cmdline()[-1].isdigit()).suspend()

    thread = meanwhile(stage, 3, suspend)
    end = attempt(stage, [])
    thread.join()
    assert type(end.error) is HostLostError
    assert end.error.where == THERE.name
    assert end.error.cause == "its guard stands still: no word for 2 s"
    assert list(end.cut_off) == [THERE.name]
    assert not list(guards())


def test_hosts_whose_ranks_do_not_find_the_others_are_named(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE", "apart")
    world = WorldConfig(start_seconds=2)
    hosts = (HERE, THERE, Host("farther.invalid", 1))
    end = run_attempt(hosts, [str(stage / "run.yaml")], world, stage, [], lambda: False)
    assert type(end.error) is NotMetError
    assert end.error.where == THERE.name
    assert "did not find all others within 2 s" in end.error.cause
    assert "firewall" in (end.error.fix or "")


def test_the_port_where_hosts_meet_is_held_before_it_is_told() -> None:
    store = guard_module._open_store(2, 10)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", store.port))
    guard_module._check_way("127.0.0.1", store.port)
    from torch.distributed import TCPStore

    agent = TCPStore("127.0.0.1", store.port, 1, is_master=True, multi_tenant=True)
    agent.set("key", "value")
    assert store.get("key") == b"value", "torchrun's agent finds the same one"


def test_a_first_machine_that_cannot_be_reached_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and nobody listens
        with pytest.raises(NotMetError, match=r"cannot reach 127\.0\.0\.1:.*refused") as caught:
            guard_module._check_way("127.0.0.1", free.getsockname()[1])
    assert caught.value.where == socket.gethostname()


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
    guard = subprocess.Popen(guard_command("1"), stdin=subprocess.PIPE)
    try:
        assert not is_guard(other.pid)
        deadline = time.monotonic() + 60
        while not is_guard(guard.pid) and time.monotonic() < deadline:  # forked, and not yet itself
            time.sleep(0.05)
        assert is_guard(guard.pid)
        guard.send_signal(signal.SIGSTOP)
        while psutil.Process(guard.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.05)
        assert not is_guard(guard.pid)
        assert guard.wait(60) == -signal.SIGKILL, "who hears nothing is ended"
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
        self.before: Callable[[], object] = lambda: None
        monkeypatch.setattr(supervision, "run_attempt", self._attempt)
        monkeypatch.setattr(supervision, "find_reachable", self._find)
        monkeypatch.setattr(supervision, "check_before_start", lambda *_: None)
        monkeypatch.setattr(supervision, "is_guard_gone", lambda name, way, pid: True)

    def run(self, *names: str) -> None:
        supervision.supervise([Host(name, 1) for name in names], self.config)

    def _attempt(self, hosts: Sequence[Host], *_: object) -> AttemptEnd:
        self.before()
        self.hosts.append([host.name for host in hosts])
        return AttemptEnd(*self.ends.pop(0))

    def _find(self, hosts: Sequence[Host], *_: object) -> list[Host]:
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


def test_a_host_that_is_back_is_taken_back_in_its_place(job: Job) -> None:
    job.config = job.config.model_copy(update={"world": WorldConfig(max_restarts=3)})
    job.ends = [(lost("n1.invalid"), {}), (lost("x"), {}), (None, {})]
    answers = [{"n2.invalid", "n3.invalid"}, {"n1.invalid", "n2.invalid", "n3.invalid"}]
    job.before = lambda: setattr(job, "answering", answers.pop(0) if answers else None)
    job.run("n1.invalid", "n2.invalid", "n3.invalid")
    assert job.hosts == [
        ["n1.invalid", "n2.invalid", "n3.invalid"],
        ["n2.invalid", "n3.invalid"],
        ["n1.invalid", "n2.invalid", "n3.invalid"],
    ]


def checkpoints(job: Job) -> list[str]:
    root = Path(job.config.output) / job.config.name / "checkpoints"
    return sorted(path.name for path in root.glob("*step-*"))


def save(job: Job, *steps: int) -> None:
    for step in steps:
        folder = Path(job.config.output) / job.config.name / f"checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")


def test_what_fails_twice_from_a_checkpoint_goes_on_from_the_one_before(
    job: Job, capfd: pytest.CaptureFixture[str]
) -> None:
    save(job, 40, 50)
    seen: list[list[str]] = []
    job.before = lambda: seen.append(checkpoints(job))
    job.ends = [(ShoalError("killed"), {}), (ShoalError("killed"), {}), (None, {})]
    job.run("n1.invalid")
    assert seen[1:] == [["step-00000040", "step-00000050"], [".suspect-step-00000050", seen[0][0]]]
    assert "step-00000050: it is set aside, step-00000040 is next" in capfd.readouterr().err
    job.ends = [(ShoalError("killed"), {}), (ShoalError("killed"), {})]
    with pytest.raises(RetriesExhausted, match="the same failure twice"):
        job.run("n1.invalid")
    assert checkpoints(job) == ["step-00000040", "step-00000050"], "that was not the reason"


@pytest.mark.parametrize("saved", [(), (50,)])
def test_a_run_never_begins_anew_by_itself(saved: tuple[int, ...], job: Job) -> None:
    save(job, *saved)
    job.ends = [(ShoalError("killed"), {}), (ShoalError("killed"), {})]
    with pytest.raises(RetriesExhausted, match="the same failure twice"):
        job.run("n1.invalid")
    assert checkpoints(job) == [f"step-{step:08d}" for step in saved]


@pytest.mark.parametrize("error", [HostLostError("gone", where="n2"), NotMetError("apart")])
def test_a_checkpoint_is_not_suspected_for_what_the_network_does(
    error: ShoalError, job: Job
) -> None:
    save(job, 40, 50)
    job.ends = [(error, {}), (error, {})]
    with pytest.raises(RetriesExhausted):
        job.run("n1.invalid", "n2.invalid")
    assert checkpoints(job) == ["step-00000040", "step-00000050"]


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

    def is_gone(name: str, way: Way, pid: int) -> bool:
        asked.append((name, pid))
        return len(asked) > 1

    monkeypatch.setattr(supervision, "is_guard_gone", is_gone)
    job.ends = [(lost("n2.invalid"), {"n2.invalid": 77}), (None, {})]
    job.run("n1.invalid", "n2.invalid")
    assert asked == [("n2.invalid", 77)] * 2


def test_a_request_between_attempts_is_heeded(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.ends = [(lost("n2.invalid"), {"n2.invalid": 77})]
    monkeypatch.setattr(supervision, "is_guard_gone", lambda name, way, pid: False)
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Interrupted) as caught:
        job.run("n1.invalid", "n2.invalid")
    assert caught.value.exit_code == 128 + signal.SIGTERM


def test_a_signal_before_ranks_are_watched_reaches_them(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(*_: object, caught: list[int], **__: object) -> None:
        assert caught == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM]
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
