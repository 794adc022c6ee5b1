"""Checkpoints set aside: their names go and come, and training past them removes them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from shoal.configs.errors import PreflightError
from shoal.trainer.aside import hold_folder, put_back, remove_suspects, set_newest_aside
from shoal.trainer.checkpoint import list_checkpoints


def make(root: Path, *steps: int) -> Path:
    for step in steps:
        (root / f"step-{step:08d}").mkdir(parents=True)
    return root


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def test_the_newest_goes_aside_and_comes_back(tmp_path: Path) -> None:
    root = make(tmp_path, 40, 50)
    assert set_newest_aside(root) == (root / "step-00000050", root / "step-00000040")
    assert list_checkpoints(root) == [root / "step-00000040"]
    assert set_newest_aside(make(root, 30)) is None, "one at a time"
    put_back(root)
    assert names(root) == ["step-00000030", "step-00000040", "step-00000050"]


@pytest.mark.parametrize("steps", [(), (50,)])
def test_the_last_one_stays(steps: tuple[int, ...], tmp_path: Path) -> None:
    root = make(tmp_path, *steps)
    assert set_newest_aside(root) is None
    assert set_newest_aside(tmp_path / "absent") is None
    assert len(names(root)) == len(steps)


def test_training_past_a_suspect_removes_it(tmp_path: Path) -> None:
    root = make(tmp_path, 40, 50)
    set_newest_aside(root)
    remove_suspects(root, 45)
    assert ".suspect-step-00000050" in names(root)
    remove_suspects(root, 50)
    assert names(root) == ["step-00000040"]


def test_a_name_that_is_taken_again_is_kept(tmp_path: Path) -> None:
    root = make(tmp_path, 40, 50)
    set_newest_aside(root)
    (make(root, 50) / "step-00000050/new").touch()
    put_back(root)
    assert names(root) == ["step-00000040", "step-00000050"]
    assert (root / "step-00000050/new").exists()


def test_one_at_a_time_may_change_a_folder(tmp_path: Path) -> None:
    make(tmp_path, 40, 50)
    begun = time.monotonic()
    with hold_folder(tmp_path):
        thread = threading.Thread(target=set_newest_aside, args=(tmp_path,))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        with pytest.raises(PreflightError, match="for too long"), hold_folder(tmp_path, 0.1):
            pass
    thread.join(10)
    assert names(tmp_path) == [".suspect-step-00000050", "step-00000040"]
    assert time.monotonic() - begun < 10
