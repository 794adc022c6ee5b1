"""A job as a series of attempts: what one comes to is given, and what is made of it is tested."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from attempt_jobs import Job, job, lost, save

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
from shoal.configs.schema import WorldConfig
from shoal.launcher.fanout import HostLostError
from shoal.trainer.aside import JOB_VARIABLE, REFUSED_VARIABLE, note_resumed, read_resumed
from shoal.trainer.checkpoint import checkpoint_name

__all__ = ["job"]


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
