"""A job as a series of attempts: what one comes to is given, and what is made of it is tested."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
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
from shoal.launcher import supervision
from shoal.launcher.check import check_before_start
from shoal.launcher.commands import Way
from shoal.launcher.endings import Interrupted, interrupted
from shoal.launcher.fanout import AttemptEnd, CutOff, HostLostError
from shoal.launcher.greeting import find_guards, find_reachable
from shoal.launcher.hosts import Host
from shoal.trainer.aside import JOB_VARIABLE, REFUSED_VARIABLE, note_resumed, read_resumed
from shoal.trainer.checkpoint import checkpoint_name


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


def test_a_host_that_is_lost_twice_without_progress_is_left_out(
    job: Job, capfd: pytest.CaptureFixture[str]
) -> None:
    job.ends = [(lost("n2.invalid"), {}), (lost("n2.invalid"), {}), (None, {})]
    job.run("n1.invalid", "n2.invalid")
    assert job.hosts == [["n1.invalid", "n2.invalid"]] * 2 + [["n1.invalid"]]
    assert "n2.invalid: left out from now on" in capfd.readouterr().err


def test_no_host_is_left_out_below_the_minimum(job: Job) -> None:
    job.config = job.config.model_copy(update={"world": WorldConfig(max_restarts=2, min_hosts=2)})
    job.ends = [(lost("n2.invalid"), {})] * 2
    with pytest.raises(RetriesExhausted, match="the same failure twice"):
        job.run("n1.invalid", "n2.invalid")


def test_a_host_that_was_left_out_comes_in_again_for_one_that_is_gone(job: Job) -> None:
    job.config = job.config.model_copy(update={"world": WorldConfig(max_restarts=3)})
    job.ends = [(lost("n2.invalid"), {})] * 2 + [(lost("n1.invalid"), {}), (None, {})]
    job.before = lambda: len(job.hosts) == 2 and setattr(job, "answering", {"n2.invalid"})
    job.run("n1.invalid", "n2.invalid")
    assert job.hosts[-1] == ["n2.invalid"]


def test_a_host_that_is_back_with_fewer_devices_does_not_end_the_job(job: Job) -> None:
    few = PreflightError("8 ranks on this machine, but it has 7 GPUs", where="its-own-name")
    job.ends = [(lost("n3.invalid"), {}), (few, {}, ["n3.invalid"]), (None, {})]
    job.run("n1.invalid", "n3.invalid")
    assert job.hosts == [["n1.invalid", "n3.invalid"]] * 2 + [["n1.invalid"]]


@pytest.mark.parametrize("refused", [["n2.invalid"], []])
def test_what_a_machine_refuses_at_first_or_a_rank_later_ends_the_job(
    refused: list[str], job: Job
) -> None:
    job.ends = [] if refused else [(lost("n2.invalid"), {})]
    job.ends.append((PreflightError("so"), {}, refused))
    with pytest.raises(PreflightError, match="so"):
        job.run("n1.invalid", "n2.invalid")


def checkpoints(job: Job) -> list[str]:
    root = Path(job.config.output) / job.config.name / "checkpoints"
    return sorted(path.name for path in root.glob("*step-*"))


def test_who_alone_does_not_reach_the_first_host_is_left_out_and_not_all_others(job: Job) -> None:
    apart = NotMetError("cannot reach n1:2000")
    job.ends = [(apart, {}, ["n3.invalid"])] * 2 + [(None, {})]
    job.run("n1.invalid", "n2.invalid", "n3.invalid")
    assert job.hosts[-1] == ["n1.invalid", "n2.invalid"]
    job.ends = [(apart, {}, ["n2.invalid", "n3.invalid"])] * 2
    with pytest.raises(RetriesExhausted, match="the same failure twice"):
        job.run("n1.invalid", "n2.invalid", "n3.invalid")


def save(job: Job, *steps: int) -> None:
    for step in steps:
        folder = Path(job.config.output) / job.config.name / f"checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")


def watch(job: Job, *resumed: int) -> list[str]:
    """Let attempts go on from these steps, and return what each is told to leave out."""
    told: list[str] = []
    steps = list(resumed)

    def begin() -> None:
        told.append(os.environ.get(REFUSED_VARIABLE, ""))
        root = Path(job.config.output) / job.config.name / "checkpoints"
        assert not read_resumed(root), "that of another attempt"
        note_resumed(root, checkpoint_name(steps.pop(0)))

    job.before = begin
    return told


def test_what_fails_twice_from_a_checkpoint_goes_on_from_the_one_before(
    job: Job, capfd: pytest.CaptureFixture[str]
) -> None:
    save(job, 40, 50)
    told = watch(job, 50, 50, 40)
    job.ends = [(ShoalError("killed"), {}), (ShoalError("killed"), {}), (None, {})]
    job.run("n1.invalid")
    assert told == ["", "", "step-00000050"]
    assert "step-00000050: it is left out, step-00000040 is next" in capfd.readouterr().err
    told = watch(job, 50, 50, 40)
    job.ends = [(ShoalError("killed"), {})] * 3
    with pytest.raises(RetriesExhausted, match="the same failure twice"):
        job.run("n1.invalid")
    assert told == ["", "", "step-00000050"], "the older one is no better: that was not the reason"
    assert checkpoints(job) == ["step-00000040", "step-00000050"]


def test_the_one_that_failed_is_left_out_and_not_the_newest(job: Job) -> None:
    """The newest is damaged: attempts pass it over, and fail from the one before."""
    save(job, 30, 40, 50)
    told = watch(job, 40, 40, 30)
    job.ends = [(ShoalError("killed"), {}), (ShoalError("killed"), {}), (None, {})]
    job.run("n1.invalid")
    assert told == ["", "", "step-00000040"]


def test_the_word_of_another_command_is_neither_taken_nor_removed(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(job, 40, 50)
    root = Path(job.config.output) / job.config.name / "checkpoints"
    monkeypatch.setenv(JOB_VARIABLE, "other")
    note_resumed(root, "step-00000050")
    told: list[str] = []
    job.before = lambda: told.append(os.environ.get(REFUSED_VARIABLE, ""))
    job.ends = [(ShoalError("killed"), {})] * 2
    with pytest.raises(RetriesExhausted):
        job.run("n1.invalid")
    assert told == ["", ""]
    assert read_resumed(root) == "step-00000050"


def test_a_checkpoint_written_since_is_not_left_out(job: Job) -> None:
    job.config = job.config.model_copy(update={"world": WorldConfig(max_restarts=3)})
    save(job, 40, 50)
    told = watch(job, 50, 50, 40, 60)
    begin, attempts = job.before, []

    def before() -> None:
        begin()
        attempts.append(1)
        if len(attempts) == 3:
            save(job, 60)

    job.before = before
    job.ends = [(ShoalError("killed"), {})] * 2 + [(lost("n1.invalid"), {}), (None, {})]
    job.run("n1.invalid")
    assert told == ["", "", "step-00000050", ""]


def test_checkpoints_in_object_storage_are_left_out_as_well(job: Job, tmp_path: Path) -> None:
    kept = job.config.checkpoint.model_copy(update={"folder": f"file://{tmp_path}/bucket"})
    job.config = job.config.model_copy(update={"checkpoint": kept})
    for step in (40, 50):
        folder = tmp_path / "bucket" / job.config.name / checkpoint_name(step)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    save(job, 50)  # as it was fetched
    told = watch(job, 50, 50, 40)
    job.ends = [(ShoalError("killed"), {}), (ShoalError("killed"), {}), (None, {})]
    job.run("n1.invalid")
    assert told == ["", "", "step-00000050"]


@pytest.mark.parametrize("saved", [(), (50,)])
def test_a_run_never_begins_anew_by_itself(saved: tuple[int, ...], job: Job) -> None:
    save(job, *saved)
    if saved:
        watch(job, 50, 50)
    job.ends = [(ShoalError("killed"), {}), (ShoalError("killed"), {})]
    with pytest.raises(RetriesExhausted, match="the same failure twice"):
        job.run("n1.invalid")
    assert checkpoints(job) == [f"step-{step:08d}" for step in saved]


@pytest.mark.parametrize("error", [HostLostError("gone"), NotMetError("apart")])
def test_a_checkpoint_is_not_suspected_for_what_the_network_does(
    error: ShoalError, job: Job
) -> None:
    save(job, 40, 50)
    told = watch(job, 50, 50)
    job.ends = [(error, {}), (error, {})]
    with pytest.raises(RetriesExhausted):
        job.run("n1.invalid", "n2.invalid")
    assert told == ["", ""]


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
