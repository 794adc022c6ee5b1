"""What is checked before a run begins, and the screen that a refusal ends in."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

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
    training._check_disk(tmp_path, config)
    free = needed - 1
    with pytest.raises(PreflightError, match="checkpoints need") as caught:
        training._check_disk(tmp_path, config)
    assert caught.value.where == str(tmp_path)
    (tmp_path / "checkpoints/step-00000050.bak").mkdir(parents=True)  # a user's copy
    (tmp_path / "checkpoints/step-00000001").mkdir()
    (tmp_path / "checkpoints/step-00000001/rank").write_bytes(bytes(1))
    training._check_disk(tmp_path, config)  # what lies there already is part of it
    free = needed // 3
    short = config.model_copy(update={"checkpoint": CheckpointConfig(every_steps=10**6)})
    training._check_disk(tmp_path / "new", short)  # only one will ever be written
    free = 0
    (tmp_path / f"checkpoints/step-{config.steps:08d}").mkdir()
    training._check_disk(tmp_path, config)  # nothing is left to write


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
