"""Who trains a run, and who is told so."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from shoal.configs.errors import PreflightError
from shoal.launcher import lock


def test_a_run_that_another_trains_names_who_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hold(rank: int = 0) -> Any:
        return lock.hold_lock(tmp_path / "run", rank, lambda: None)

    monkeypatch.setattr(lock, "LOCK_SECONDS", 0)
    monkeypatch.setenv("SHOAL_JOB", "one")
    assert hold(rank=1) is None, "asks for nothing"
    assert list((tmp_path / "run").iterdir()) == [], "but that its folder is there"
    held = hold()
    monkeypatch.setenv("SHOAL_JOB", "two")
    here = f"process {os.getpid()} on {socket.gethostname()}, since 2"
    with pytest.raises(PreflightError, match=here) as caught:
        hold()
    assert "network file system" not in (caught.value.fix or "")
    held.truncate(0)
    held.write('{"host": "n7", "pid": 5, "since": "noon", "job": "three"}')
    held.flush()
    with pytest.raises(PreflightError, match="process 5 on n7, since noon") as caught:
        hold()
    assert f"once nothing trains there, remove {tmp_path}/run/.lock" in (caught.value.fix or "")
    held.close()
    hold().close()


@pytest.mark.parametrize("holder", ["of another host", "gone", "alive"])
def test_a_lock_of_the_same_job_on_a_lost_host_is_waited_for_and_then_passed_over(
    holder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SHOAL_JOB", "one")
    monkeypatch.setattr(lock, "LOCK_SECONDS", 0)
    monkeypatch.setattr(lock, "LEASE_SECONDS", 2)
    host = "n7" if holder == "of another host" else socket.gethostname()
    pid = 2**22 + 1 if holder == "gone" else os.getpid()  # larger than there can be
    ticks: list[float] = []

    def hold() -> Any:
        return lock.hold_lock(tmp_path, 0, lambda: ticks.append(time.monotonic()))

    held = hold()
    held.truncate(0)
    held.write(json.dumps({"host": host, "pid": pid, "job": "one"}))
    held.flush()
    begun = time.monotonic()
    if holder != "alive":
        hold().close()
        assert "going on without the lock" in capsys.readouterr().err
        assert f'"pid": {os.getpid()}' in (tmp_path / ".lock").read_text(), "it says who trains"
    else:
        with pytest.raises(PreflightError, match="is training this run"):
            hold()
    assert time.monotonic() - begun > 2, "its file server may let go meanwhile"
    assert len(ticks) >= 2, "or its watchdog would end it"
    held.close()
