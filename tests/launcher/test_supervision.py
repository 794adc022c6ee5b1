"""One attempt over guards; `ssh` is a script that stays on this machine."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import AuthenticationError
from pathlib import Path

import psutil
import pytest

from shoal.configs.errors import (
    DataError,
    NotMetError,
    PreflightError,
    StoppedOnRequest,
)
from shoal.configs.schema import WorldConfig
from shoal.launcher import calls, fanout
from shoal.launcher.calls import Call, Switchboard
from shoal.launcher.commands import Way
from shoal.launcher.endings import Interrupted
from shoal.launcher.fanout import AttemptEnd, HostLostError, make_tasks, run_attempt
from shoal.launcher.greeting import find_guards
from shoal.launcher.hosts import Host
from shoal.launcher.output import next_log_folder
from shoal.launcher.world import caught_signals

HERE, THERE = Host("127.0.0.1", 1), Host("far-away.invalid", 2)


def attempt(
    stage: Path,
    caught: list[int],
    hosts: Sequence[Host] = (HERE, THERE),
    way: Way = "ssh",
) -> AttemptEnd:
    file, world = str(stage / "run.yaml"), WorldConfig(launcher=way)
    return run_attempt(hosts, [file], world, next_log_folder(stage), caught, lambda: False)


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
    assert (stage / f"logs/attempt-00001/{log}.log").read_text().startswith("--- ")
    assert not list(guards())
    assert not list(stage.rglob(".call-key"))


def test_hosts_that_share_no_folder_are_sent_what_their_ranks_read(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, text = stage / "disk" / "launch.yaml", (stage / "run.yaml").read_text()
    world, hosts = WorldConfig(), [HERE, THERE]
    logs, files = next_log_folder(stage), {str(file): text}
    run_attempt(hosts, [str(file)], world, logs, [], lambda: False, files)
    assert file.read_text() == text
    assert set(records(stage)) == {"0", "1", "2"}


def test_a_guard_may_be_started_by_hand(stage: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = ""

    def type_it() -> None:
        nonlocal shown
        deadline = time.monotonic() + 60
        while "cd " not in shown and time.monotonic() < deadline:
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
    assert not list(stage.rglob(".call-key"))
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


def test_callers_that_prove_nothing_keep_a_guard_waiting_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "PROOF_SECONDS", 1.0)
    monkeypatch.setattr(calls, "STRANGERS", 2)
    board = Switchboard(["a"], tmp_path / "key")
    address, before = ("127.0.0.1", board.port), threading.active_count()
    try:
        strangers = [socket.create_connection(address) for _ in range(9)]
        time.sleep(0.3)
        assert threading.active_count() - before <= 2 * 3, "one that reads, one that counts"
        board.lines["a"].send(b"task\n")
        assert next(iter(Call(f"127.0.0.1:{board.port}", tmp_path / "key", "a"))) == "task\n"
        for stranger in strangers:
            stranger.settimeout(10)
            while stranger.recv(1000):  # the challenge, then the end
                pass
            stranger.close()
    finally:
        board.close()


def test_a_rank_elsewhere_ends_all_with_its_own_error(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE", "data")
    end = attempt(stage, [])
    error = end.error
    assert type(error) is DataError
    assert str(error.where) == "shard.00001.mds"
    assert not end.refused
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
    pids = {name: one.pid for name, one in end.cut_off.items() if one.pid}
    assert not pids or find_guards(pids, "ssh", 60) == dict.fromkeys(pids, False)
    assert bool(end.cut_off) is elsewhere, "gone by a signal is what a killed ssh looks like, too"


def test_a_guard_that_stands_still_is_given_up(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE", "wait")
    seconds = {"SILENCE_SECONDS": 2.0, "BEAT_SECONDS": 0.5, "CLOSE_SECONDS": 1.0}
    for name, value in seconds.items():
        monkeypatch.setattr(fanout, name, value)

    suspended: list[float] = []

    def suspend() -> None:
        next(guard for guard in guards() if not guard.cmdline()[-1].isdigit()).suspend()
        suspended.append(time.monotonic())

    thread = meanwhile(stage, 3, suspend)
    end = attempt(stage, [])
    thread.join()
    assert type(end.error) is HostLostError
    assert end.error.where == THERE.name
    assert end.error.cause == "its guard stands still: no word for 2 s"
    assert list(end.cut_off) == [THERE.name]
    assert end.cut_off[THERE.name].since < suspended[0] + 1, "it has heard nothing since"
    assert not list(guards())


def test_hosts_whose_ranks_do_not_find_the_others_are_named(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE", "apart")
    world = WorldConfig(start_seconds=2)
    hosts = (HERE, THERE, Host("farther.invalid", 1))
    logs = next_log_folder(stage)
    end = run_attempt(hosts, [str(stage / "run.yaml")], world, logs, [], lambda: False)
    assert type(end.error) is NotMetError
    assert end.error.where == THERE.name
    assert "did not find all others within 2 s" in end.error.cause
    assert "firewall" in (end.error.fix or "")


def test_an_error_of_a_guard_comes_with_its_machine(
    stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    hosts = [Host("no-such-host.invalid", 1), HERE]
    end = attempt(stage, [], hosts)
    assert type(end.error) is PreflightError
    assert "cannot reach no-such-host.invalid, the first machine" in end.error.cause
    assert HERE.name in end.refused, "its guard, and no rank of it"


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


def test_signals_are_counted_and_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with caught_signals() as caught:
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before
