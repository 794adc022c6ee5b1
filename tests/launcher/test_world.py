"""Who am I: environments of three launchers, and stop requests."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from shoal.configs.errors import ConfigError, HangError
from shoal.configs.schema import WorldConfig
from shoal.launcher.watchdog import Watchdog
from shoal.launcher.world import (
    RANK_VARIABLES,
    StopRequest,
    World,
    command_age,
    resolve_threads,
    seconds_to_train,
    under_foreign_launcher,
    usable_cores,
)


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "")  # detect() sets it: give it back afterwards


def test_alone_without_a_launcher() -> None:
    world = World.detect()
    assert (world.rank, world.num_ranks, world.local_rank, world.local_ranks) == (0, 1, 0, 1)
    assert str(world.device) == "cpu"
    assert not under_foreign_launcher()


def test_who_hangs_when_it_is_to_stop_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    told: list[HangError] = []
    world = World.detect(watchdog=Watchdog(lambda error, count: told.append(error)))
    world.setup(WorldConfig(save_seconds=1, threads=psutil.cpu_count() or 1))
    with world.watchdog:
        time.sleep(2)
        world.watchdog.touch("a long step")
        world.stop.request()
        assert not ended.wait(2), "another such step may follow"
        world.watchdog.touch("saving")
        assert not ended.wait(2)
        assert ended.wait(5)
    assert told[0].cause.endswith("while saving") and "raise world.save_seconds" in told[0].fix


def test_a_stop_never_makes_a_rank_wait_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, told = threading.Event(), list[HangError]()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    watchdog = Watchdog(lambda error, count: told.append(error))
    watchdog.limit = 0.5
    watchdog.hurry(20)
    with watchdog:
        assert ended.wait(5)
    assert "raise world.timeout_seconds" in told[0].fix


def test_deepspeed_says_local_size(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    world = World.detect()
    assert (world.rank, world.num_ranks, world.local_rank, world.local_ranks) == (3, 4, 1, 2)
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"
    assert under_foreign_launcher()


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "one", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "2"},
    ],
)
def test_contradictions_are_refused(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError):
        World.detect()


def test_threads_are_shared_out() -> None:
    assert resolve_threads("auto", 1) == usable_cores()
    assert resolve_threads("auto", 10_000) == 1
    assert resolve_threads(3, 10_000) == 3


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from shoal.configs.errors import PreflightError
    from shoal.launcher import world

    monkeypatch.setattr(world, "count_gpus", lambda: 1)
    assert world.check_devices(1) == "cuda"
    with pytest.raises(PreflightError, match="2 ranks on this machine, but it has 1 GPU"):
        world.check_devices(2)


def test_a_polled_stop_is_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequest()
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stop.install((signal.SIGHUP,))
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stop_nobody_polls_ends_the_process() -> None:
    stop = StopRequest()
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stop.install((signal.SIGHUP,))
        with pytest.raises(SystemExit) as caught:
            os.kill(os.getpid(), signal.SIGHUP)
        assert caught.value.code == 128 + signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        StopRequest().install((signal.SIGHUP,))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_end_of_a_watched_process_is_a_stop() -> None:
    stop = StopRequest()
    watched = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stop.request_when_gone([watched.pid])
    assert not stop.requested
    watched.kill()
    deadline = time.monotonic() + 10
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.02)
    assert stop.requested
    watched.wait()


def test_a_time_limit_leaves_room_for_a_save() -> None:
    assert seconds_to_train(WorldConfig()) == math.inf
    assert seconds_to_train(WorldConfig(time_limit_minutes=2, save_seconds=30)) == 90
    stop = StopRequest()
    stop.request_in(math.inf)
    assert not stop.requested
    stop.request_in(-1)
    deadline = time.monotonic() + 10
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.02)
    assert stop.requested


def test_a_command_is_as_old_as_the_torchrun_that_starts_its_ranks_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = command_age()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    parent = psutil.Process().parent()
    assert parent is not None
    assert command_age() == pytest.approx(time.time() - parent.create_time(), abs=1)
    assert own == pytest.approx(time.time() - psutil.Process().create_time(), abs=1)
