"""What killed writers left is cleared away; what live ones write is not touched."""

import os
import subprocess
import sys

import pytest

from shoal.trainer.storage import open_aside


@pytest.fixture(scope="module")
def gone():
    """The pid of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_only_leftovers_of_the_dead_and_of_the_same_target_are_removed(tmp_path, gone):
    target = tmp_path / "demo"
    kept = {f".partial-{os.getppid()}-demo", f".partial-{gone}-other", ".partial-x-demo"}
    for name in (*kept, f".partial-{gone}-demo"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.md").touch()
    assert open_aside(target) == tmp_path / f".partial-{os.getpid()}-demo"
    assert {file.name for file in tmp_path.iterdir()} == kept
