"""What killed writers of reports and scores left is cleared away."""

import subprocess
import sys

import pytest

from shoal.eval.cache import ResultCache
from shoal.eval.report import write_report


@pytest.fixture(scope="module")
def gone():
    """The pid of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_killed_report_and_cache_entry_leave_nothing(report, tmp_path, gone):
    (tmp_path / f".partial-{gone}-small").mkdir()
    write_report(report, tmp_path / "small")
    assert [file.name for file in tmp_path.iterdir()] == ["small"]
    cache = ResultCache(tmp_path / "cache")
    cache.get("kind", {"a": 1}, lambda: 1)
    (entry,) = cache.folder.iterdir()
    entry.rename(entry.with_name(f".partial-{gone}-{entry.name}"))
    assert cache.get("kind", {"a": 2}, lambda: 2) == 2  # another entry clears it as well
    (other,) = cache.folder.iterdir()
    assert other.name.startswith("kind-")
