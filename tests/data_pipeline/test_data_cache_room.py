"""What downloads of one cache owe each other: locks, tries of their own, room."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline import remote as remote_module
from shoal.data_pipeline.cache import ShardCache, hold
from shoal.data_pipeline.remote import Remote


def test_a_lock_whose_holder_gets_no_further_is_an_error(tmp_path):
    with (
        hold(tmp_path / "lock", lambda: 0, 5),
        pytest.raises(DataError, match="another process holds it"),
        hold(tmp_path / "lock", lambda: 0, 0.2),
    ):
        pass


class Downloader:
    """Stands in for the library's: what is there already it does not download."""

    def __init__(self, at_first: Callable[[Path], None]) -> None:
        self.at_first, self.tries = at_first, 0

    def download(self, source: str, file: str, seconds: float) -> None:
        self.tries += 1
        if self.tries == 1:
            self.at_first(Path(file))
            raise ConnectionError("broken")
        if not Path(file).exists():
            Path(file).write_bytes(b"whole")


def test_what_a_broken_try_left_is_not_taken_for_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_module, "_FIRST_PAUSE", 0.001)
    remote = Remote("s3://b/c", 20)
    remote._downloader = Downloader(lambda file: file.write_bytes(b"wh"))
    assert remote.fetch("x", tmp_path).read_bytes() == b"whole"


def test_a_try_goes_on_when_another_thread_gives_the_connection_up(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_module, "_FIRST_PAUSE", 0.001)
    remote = Remote("file:///c", 20)

    def give_up(file):
        remote._downloader = None  # as a stall of a sibling does

    remote._downloader = Downloader(give_up)
    (tmp_path / "x").write_bytes(b"stored")
    (tmp_path / "aside").mkdir()
    remote.url = f"file://{tmp_path}"
    assert remote.fetch("x", tmp_path / "aside").read_bytes() == b"stored"


def on_the_way(cache, size):
    """A download of another process that holds its lock."""
    folder = cache.root / "other" / "partial" / f"shard.9@{size}@777@0"
    folder.mkdir(parents=True)
    (folder / "part").write_bytes(b"")
    return folder, hold(cache.root / "other" / "locks" / "shard.9", lambda: 0, 5)


def test_room_is_waited_for_while_another_download_grows(tmp_path):
    cache = ShardCache(tmp_path / "cache", limit=100, seconds=0.4)
    folder, lock = on_the_way(cache, 80)

    def grow():
        for size in range(1, 12):
            (folder / "part").write_bytes(bytes(size))
            time.sleep(0.1)
        shutil.rmtree(folder)

    with lock:
        thread = threading.Thread(target=grow)
        thread.start()
        begun = time.monotonic()
        assert cache.make_room(cache.root / "mine/partial/shard.1", 50).is_dir()
        thread.join()
    assert time.monotonic() - begun > 2 * cache.seconds


def test_who_holds_the_room_and_gets_no_further_is_named(tmp_path):
    cache = ShardCache(tmp_path / "cache", limit=100, seconds=0.2)
    folder, lock = on_the_way(cache, 80)
    mine = cache.root / "mine/partial/shard.1"
    with lock, pytest.raises(DataError, match=r"80 are held by .*shard\.9 of process 777"):
        cache.make_room(mine, 50)
    assert folder.exists()
    with pytest.raises(ConfigError, match="may hold 100 bytes, and 101 are needed"):
        cache.make_room(mine, 101)
    cache.make_room(mine, 50)  # whoever was killed holds no lock, and no room
    assert not folder.exists()
