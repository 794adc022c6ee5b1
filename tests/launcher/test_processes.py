"""launch_ranks: every way in which ranks end, and what is raised for it."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.configs.errors import (
    DataError,
    HangError,
    NotMetError,
    PreflightError,
    ShoalError,
    StoppedOnRequest,
)
from shoal.launcher.endings import Ending, Interrupted, raise_failure
from shoal.launcher.outcomes import Outcome
from shoal.launcher.processes import launch_ranks

WORKER = """
import os, pathlib, signal, sys, time
from shoal.configs.errors import DataError, PreflightError
from shoal.launcher.outcomes import die_with_parent, report_outcome
from shoal.launcher.outcomes import report_hang
from shoal.launcher.watchdog import Watchdog
die_with_parent()
rank = int(os.environ["RANK"])

def work():
    mode = sys.argv[1]
    if mode == "facts":
        names = "RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR OMP_NUM_THREADS CROSS_SIZE NODE_RANK"
        line = " ".join(os.environ.get(name, "-") for name in names.split())
        with open(os.path.join(sys.argv[2], str(rank)), "w") as file:
            file.write(line)
        return
    if mode in ("hang", "frozen"):
        signal.signal(signal.SIGTERM, lambda *_: None)  # as a rank that trains; the agent sends it
        started = pathlib.Path(os.environ["SHOAL_OUTCOMES"])
        while len(list(started.glob("rank-*.pid"))) < 2:  # one may be much later than the other
            time.sleep(0.05)
        watchdog = Watchdog(report_hang)
        watchdog.limit = 1.0
        with watchdog:
            watchdog.touch("reading rows")
            if rank == 1 and mode == "frozen":
                os.kill(os.getpid(), signal.SIGSTOP)
            if rank == 0:
                watchdog.touch("waiting for the others")
            time.sleep(60)
    if rank == 1:
        if mode == "data":
            raise DataError("broken", where="here", fix="mend")
        if mode == "bug":
            raise ZeroDivisionError("by zero")
        if mode == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if mode == "silent":
            os._exit(7)
        if mode == "both":
            raise DataError("first")
    if mode == "both":
        time.sleep(0.3)
        raise PreflightError("lost its peer")
    while True:  # as in a collective that will never come: the handler of a signal is not reached
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        time.sleep(60)

code = report_outcome(work)
sys.stdout.flush()
os._exit(code)
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    return [sys.executable, "-P", str(script)]


def test_ranks_get_their_place_and_not_that_of_another_job(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "9", "CROSS_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    out = tmp_path / "out"
    out.mkdir()
    launch_ranks(3, ["facts", str(out)], threads=4, command=command)
    lines = {file.name: file.read_text() for file in out.iterdir()}
    assert lines == {str(rank): f"{rank} 3 {rank} 127.0.0.1 4 - 0" for rank in range(3)}
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("mode", "kind", "text"),
    [
        ("data", DataError, "here: broken\n  fix: mend"),
        ("bug", ShoalError, "ZeroDivisionError: by zero"),
        ("killed", ShoalError, "rank 1 was killed by SIGKILL"),
        ("segfault", ShoalError, "rank 1 was killed by SIGSEGV"),
        ("silent", ShoalError, "rank 1 ended without a word (exit code 7)"),
        ("both", DataError, "first"),
        ("hang", HangError, "no progress for 1 s while reading rows"),
        ("frozen", HangError, "rank 1 stands still"),
    ],
)
def test_first_failure_is_raised_and_the_others_end_soon(
    mode: str, kind: type[ShoalError], text: str, command: list[str]
) -> None:
    begun = time.monotonic()
    with pytest.raises(ShoalError) as caught:
        launch_ranks(2, [mode], command=command)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(text)
    assert any("failed first: rank 1 on " in note for note in caught.value.__notes__)
    assert time.monotonic() - begun < 20  # torchrun's agent alone would wait 30 s


def test_bug_keeps_its_traceback(command: list[str]) -> None:
    with pytest.raises(ShoalError) as caught:
        launch_ranks(2, ["bug"], command=command)
    assert any("in work" in note for note in caught.value.__notes__)


# The decision alone, on written outcomes.


def outcome(rank: int, kind: str, ended: float = 0.0, trace: str | None = None) -> Outcome:
    return Outcome(kind, rank, "host", ended, cause=kind, trace=trace)


def decide(
    outcomes: list[Outcome], codes: dict[int, int], number: int | None = None
) -> ShoalError | None:
    ending = Ending([0, 1], {item.rank: item for item in outcomes}, codes, set(), number)
    try:
        raise_failure(ending)
    except ShoalError as error:
        return error
    return None


def test_all_done_is_no_error() -> None:
    assert decide([outcome(0, "done"), outcome(1, "done")], {}) is None


def test_crash_in_an_interpreter_that_had_finished_is_no_error() -> None:
    assert decide([outcome(0, "done"), outcome(1, "done")], {1: -11}) is None


def test_earliest_error_wins() -> None:
    error = decide([outcome(0, "DataError", 2), outcome(1, "PreflightError", 1)], {})
    assert type(error) is PreflightError


def test_killed_rank_explains_the_errors_of_its_peers() -> None:
    error = decide([outcome(0, "RuntimeError", 1, trace="Connection closed")], {1: -9})
    assert "rank 1 was killed by SIGKILL" in str(error)
    assert "memory" in str(error)


def test_rank_that_the_agent_ended_is_not_the_cause() -> None:
    error = decide([outcome(0, "DataError", 1)], {1: -15})
    assert type(error) is DataError


def test_rank_that_the_agent_ended_is_not_the_cause_of_a_silent_end() -> None:
    error = decide([], {0: -15, 1: 7})
    assert "rank 1 ended without a word (exit code 7)" in str(error)


def test_ranks_that_wait_alike_are_all_named() -> None:
    hung = [replace(outcome(rank, "HangError"), progress=7) for rank in (0, 1)]
    error = decide(hung, {0: 1, 1: 1})
    assert type(error) is HangError
    assert str(error).startswith("every rank: ")


def test_a_deliberate_error_explains_who_waited() -> None:
    error = decide([outcome(0, "HangError", 1), outcome(1, "DataError", 9)], {})
    assert type(error) is DataError


def test_who_is_silent_while_others_look_for_it_is_named() -> None:
    assert type(decide([outcome(0, "NotMetError", 1)], {1: -9})) is ShoalError, "it was killed"
    error = decide([outcome(0, "NotMetError", 1)], {})
    assert isinstance(error, NotMetError)
    assert any("not a word of rank 1 on " in note for note in error.__notes__)


def test_stop_is_a_stop() -> None:
    both = [outcome(0, "StoppedOnRequest"), outcome(1, "StoppedOnRequest")]
    error = decide(both, {0: 5, 1: 5}, number=15)
    assert type(error) is StoppedOnRequest
    assert not hasattr(error, "__notes__")


def test_stop_after_the_end_keeps_the_caller_from_going_on() -> None:
    error = decide([outcome(0, "done"), outcome(1, "done")], {}, number=15)
    assert type(error) is StoppedOnRequest


def test_a_stop_does_not_hide_what_kept_ranks_from_saving() -> None:
    full = [outcome(0, "PreflightError"), outcome(1, "PreflightError")]
    assert type(decide(full, {0: 4, 1: 4}, number=15)) is PreflightError
    error = decide([replace(outcome(0, "HangError"), progress=7)], {1: -9}, number=15)
    assert type(error) is Interrupted
    assert any("rank 1 stands still" in note for note in error.__notes__)


def test_signal_before_anything_was_saved() -> None:
    error = decide([], {0: 143, 1: 143}, number=15)
    assert type(error) is Interrupted
    assert error.exit_code == 143
