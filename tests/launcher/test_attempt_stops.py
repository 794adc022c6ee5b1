"""Attempts that are cut off, stopped, or must not begin."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from attempt_jobs import Job, job, lost, save

from shoal.configs.errors import (
    ConfigError,
    PreflightError,
    StoppedOnRequest,
)
from shoal.configs.schema import WorldConfig
from shoal.launcher import supervision
from shoal.launcher.check import check_before_start
from shoal.launcher.endings import Interrupted, interrupted
from shoal.launcher.fanout import CutOff
from shoal.launcher.greeting import find_guards, find_reachable
from shoal.launcher.hosts import Host

__all__ = ["job"]


def cut(pid: int | None = 77, ago: float = 0) -> CutOff:
    return CutOff(pid, time.monotonic() - ago)


def test_what_is_cut_off_is_asked_for_before_the_next_attempt(job: Job) -> None:
    answers = [{"n2.invalid": True, "n3.invalid": False}, {}, {"n2.invalid": False}]
    job.guards = lambda seconds: answers.pop(0)
    names = {name: cut() for name in ("n2.invalid", "n3.invalid")}
    job.ends = [(lost("n2.invalid"), names), (None, {})]
    job.run("n1.invalid", "n2.invalid", "n3.invalid")
    assert job.asked == [{"n2.invalid": 77, "n3.invalid": 77}, *[{"n2.invalid": 77}] * 2]
    assert job.lost == [[]]


def test_who_is_cut_off_is_waited_for_from_its_last_word_on(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "ASK_SECONDS", 0.5)
    limits: list[float] = []

    def hang(seconds: float) -> dict[str, bool]:
        limits.append(seconds)
        time.sleep(seconds)
        return {"n3.invalid": False}

    job.guards = hang
    promised = supervision.SILENCE_SECONDS + job.config.world.save_seconds
    promised += supervision.AGENT_SECONDS
    ends = {"n2.invalid": cut(ago=promised), "n3.invalid": cut()}
    job.ends = [(lost("n2.invalid"), ends), (None, {})]
    begun = time.monotonic()
    job.run("n1.invalid", "n2.invalid", "n3.invalid")
    waited = time.monotonic() - begun
    assert 1 < waited < 10, "so long ago that its ranks are gone, but for a margin"
    assert max(limits) <= 0.5
    assert job.lost == [["n2.invalid"]], "not to be waited for again"
    # Who has never said a word may begin late: it is asked for nothing.
    job.ends = [(lost("n2.invalid"), {"n2.invalid": cut(None, ago=promised + 1)}), (None, {})]
    job.asked.clear()
    job.run("n1.invalid", "n2.invalid", "n3.invalid")
    assert (job.asked, job.lost[-1]) == ([], [])


def test_a_request_between_attempts_is_heeded(job: Job) -> None:
    job.ends = [(lost("n2.invalid"), {"n2.invalid": cut()})]
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Interrupted) as caught:
        job.run("n1.invalid", "n2.invalid")
    assert caught.value.exit_code == 128 + signal.SIGTERM


def test_a_request_is_heeded_while_hosts_are_asked(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ssh").write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/asked; exec sleep 60\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(supervision, "check_before_start", check_before_start)

    def stop_once_asked() -> None:
        while not (tmp_path / "asked").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_once_asked).start()
    begun = time.monotonic()
    with pytest.raises(Interrupted):
        job.run("n1.invalid", "n2.invalid")
    assert time.monotonic() - begun < 15, "it would have been 60"
    for pid in (tmp_path / "asked").read_text().split():
        assert not psutil.pid_exists(int(pid))
    threads = [threading.Timer(1.0, job.called_off.append, [signal.SIGTERM])]
    threads[0].start()
    begun = time.monotonic()
    assert find_guards({"n1.invalid": 7}, "ssh", 60, lambda: bool(job.called_off)) == {}
    with pytest.raises(PreflightError, match="0 of 1 hosts answer"):
        find_reachable([Host("n1.invalid", 1)], "ssh", 1, None, (), lambda: bool(job.called_off))
    assert time.monotonic() - begun < 15


def test_a_stop_that_saves_nothing_is_a_stop_where_there_is_a_checkpoint(job: Job) -> None:
    job.ends = [(interrupted(signal.SIGUSR1), {})]
    with pytest.raises(Interrupted) as caught:
        job.run("n1.invalid")
    assert caught.value.exit_code == 128 + signal.SIGUSR1
    save(job, 40)
    job.ends = [(interrupted(signal.SIGUSR1), {})]
    with pytest.raises(StoppedOnRequest, match=r"SIGUSR1 .*; .*step-00000040 is the newest") as end:
        job.run("n1.invalid")
    assert end.value.exit_code == 5
    hung = interrupted(signal.SIGUSR1)
    hung.add_note("rank 1 stands still")
    job.ends = [(hung, {})]
    with pytest.raises(StoppedOnRequest) as end:
        job.run("n1.invalid")
    assert end.value.__notes__[0] == "rank 1 stands still"


def test_guards_that_call_back_need_a_shared_folder(job: Job) -> None:
    kept = job.config.checkpoint.model_copy(update={"copies": "every"})
    job.config = job.config.model_copy(
        update={"checkpoint": kept, "world": WorldConfig(launcher="pdsh")}
    )
    with pytest.raises(ConfigError, match="pdsh needs a run folder that all hosts share"):
        job.run("n1.invalid", "n2.invalid")


@pytest.mark.parametrize("copies", ["every", "first"])
def test_where_disks_are_not_shared_the_command_is_given_on_one_that_keeps(
    copies: str, job: Job
) -> None:
    kept = job.config.checkpoint.model_copy(update={"copies": copies})
    job.config = job.config.model_copy(update={"checkpoint": kept})
    with pytest.raises(ConfigError, match="this machine keeps none") as caught:
        job.run("n1.invalid", "n2.invalid")
    assert "give the command on n1.invalid" in (caught.value.fix or "")
    if copies == "every":
        job.ends = [(None, {})]
        job.run("n1.invalid", "localhost")


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
