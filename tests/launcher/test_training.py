"""What is checked before a run begins, and the screen that a refusal ends in."""

from __future__ import annotations

import errno
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.configs.errors import PreflightError
from shoal.configs.load import load_config
from shoal.configs.schema import CheckpointConfig, RunConfig
from shoal.launcher import training
from shoal.launcher.outcomes import describe
from shoal.launcher.screen import guard
from shoal.trainer.cost import count_parameters


def test_checkpoints_that_cannot_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(RunConfig, "default.yaml", ["model.vocab_size=4096"])
    # Weights and both moments in fp32, for those kept and the one being written.
    needed = count_parameters(config.model).total * 12 * (config.checkpoint.keep + 1)
    free = needed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert training.find_short_disk(tmp_path, config) is None
    free = needed - 1
    caught = training.find_short_disk(tmp_path, config)
    assert isinstance(caught, PreflightError) and "checkpoints need" in caught.cause
    assert caught.where == str(tmp_path) and socket.gethostname() in caught.cause
    (tmp_path / "checkpoints/step-00000050.bak").mkdir(parents=True)  # a user's copy
    (tmp_path / "checkpoints/step-00000001").mkdir()
    (tmp_path / "checkpoints/step-00000001/rank").write_bytes(bytes(1))
    assert training.find_short_disk(tmp_path, config) is None  # what lies there is part of it
    free = needed // 3
    short = config.model_copy(update={"checkpoint": CheckpointConfig(every_steps=10**6)})
    assert training.find_short_disk(tmp_path / ".." / tmp_path.name, short) is not None
    shutil.rmtree(tmp_path / "checkpoints")
    assert training.find_short_disk(tmp_path, short) is None  # only one will ever be written
    free = 0
    (tmp_path / f"checkpoints/step-{config.steps:08d}").mkdir(parents=True)
    assert training.find_short_disk(tmp_path, config) is None  # nothing is left to write


def test_what_retention_may_keep_is_counted(tmp_path: Path) -> None:
    config = load_config(RunConfig, "default.yaml", ["model.vocab_size=4096"])
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"tokens": 245 * config.step_tokens})}
    )
    one = count_parameters(config.model).total * 12

    def count(is_first: bool = True, **rule: Any) -> float:
        kept = config.model_copy(update={"checkpoint": CheckpointConfig(every_steps=20, **rule)})
        return training.needed_bytes(tmp_path, kept, is_first=is_first) / one

    assert count(keep=1) == 2, "the newest lies beside the one that is kept until it is whole"
    assert count(keep=3) == 4
    assert count(keep=1, keep_best=True) == 3
    assert count(keep=1, milestone_every=60) == 2 + 4
    assert count(keep=1, milestone_every=20) == 13, "no more than are ever written"
    assert count(keep=9, copies="first") == count(False, keep=9, copies="every") == 10
    assert count(False, keep=9, copies="first") == 2, "parts of one, and the one it went on from"


def test_a_full_disk_ends_a_command_and_a_rank_with_one_screen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fill() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a/file")

    assert guard(fill) == 4
    printed = capsys.readouterr().err
    assert "runs/a/file: No space left on device" in printed
    assert "fix: free some space" in printed
    assert "Traceback" not in printed
    told = describe(OSError(errno.ENOSPC, "No space left on device", "runs/a/file"), rank=1)
    assert (told.kind, told.exit_code, told.where) == ("PreflightError", 4, "runs/a/file")
    assert guard(lambda: Path("/nowhere/at/all").read_text() and None) == 1, "that is a bug"
