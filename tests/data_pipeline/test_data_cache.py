"""Shards by URL: whatever the network, the storage or another job does, rows are right or an error.

A small object store of our own answers as told: slowly, wrongly, not at all. That the real protocol
is met is shown against moto.
"""

from __future__ import annotations

import http.server
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline.cache import RemoteShards, ShardCache
from shoal.data_pipeline.loader import Loader
from shoal.data_pipeline.rows import Rows, bring_together
from shoal.data_pipeline.shards import prepare

fork = multiprocessing.get_context("fork")


class Store(http.server.ThreadingHTTPServer):
    """Serves the files of a folder as bucket `b`, and fails where it is told to."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.hanging: set[str] = set()
        self.failing: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.over = threading.Event()

    def handle_error(self, request, client_address) -> None:
        """Whoever was killed does not hear the rest."""


class Handler(http.server.BaseHTTPRequestHandler):
    """One request for an object."""

    server: Store

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        file = self.server.folder / self.path.removeprefix("/b/").partition("?")[0]
        name = file.name
        if with_body:
            self.server.asked[name] += 1
        if not file.is_file():
            return self._send(404, 0)
        if with_body and self.server.failing[name] > 0:
            self.server.failing[name] -= 1
            return self._send(403 if name.endswith("403") else 400, 0)
        data = file.read_bytes()
        self._send(200, len(data))
        if with_body and name in self.server.hanging:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.server.over.wait(60)
        elif with_body:
            self.wfile.write(data)
        return None

    def _send(self, code: int, length: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", '"x"')
        self.send_header("Last-Modified", "Wed, 25 Nov 2026 10:00:00 GMT")
        self.end_headers()

    def log_message(self, *_) -> None:
        """Say nothing."""


@pytest.fixture(scope="module", params=[None, "zstd"])
def remote(request, tmp_path_factory, make_config):
    """A corpus of some twenty shards, raw or packed; for reading only."""
    folder = tmp_path_factory.mktemp("remote")
    config = make_config(folder / "c", shard_bytes=3000, compression=request.param)
    return prepare(config).output


@pytest.fixture(scope="module")
def credentials():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield


@pytest.fixture
def store(prepared, tmp_path, credentials, monkeypatch):
    """A store that holds a copy of `prepared` as s3://b/c."""
    shutil.copytree(prepared.output, tmp_path / "store" / "c")
    server = Store(tmp_path / "store")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache", seconds=20)


URL = "s3://b/c/train"


def read_all(rows):
    return rows.gather(np.arange(len(rows)))


def assert_same(rows, folder):
    found, expected = read_all(rows), read_all(Rows.open(folder))
    for field in ("tokens", "segments", "targets"):
        assert np.array_equal(getattr(found, field), getattr(expected, field))


def shard_files(cache):
    return sorted(cache.root.glob("*/split/shard.*"))


def test_rows_of_a_file_url_are_those_of_the_folder(remote, cache):
    rows = Rows.open(f"file://{remote}/train", cache)
    assert not shard_files(cache)  # none before it is needed
    assert_same(rows, remote / "train")
    assert len(shard_files(cache)) == len(rows.manifest.shards) > 10
    assert rows.where == f"file://{remote}/train"
    (home,) = cache.root.glob("*/partial")
    assert not list(home.iterdir())
    assert_same(Rows.open(f"file://{remote}/train", cache), remote / "train")


def test_rows_come_from_s3(remote, cache, credentials, monkeypatch):
    """Against moto: the protocol itself, and a mixture with a local stream."""
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="bucket")
        for file in sorted(remote.rglob("*")):
            if file.is_file():
                client.upload_file(str(file), "bucket", f"some/c/{file.relative_to(remote)}")
        rows = Rows.open("s3://bucket/some/c/train", cache)
        local = Rows.open(remote / "train")
        given = {"seed": 0, "batch_rows": 16, "micro_batch_rows": 4, "read_ahead": 2}
        both = Loader([(rows, 1.0), (local, 1.0)], **given)
        plain = Loader([(local, 1.0), (local, 1.0)], **given)
        for step in range(8):
            for ours, theirs in zip(both.microbatches(step), plain.microbatches(step), strict=True):
                assert ours.inputs.equal(theirs.inputs) and ours.targets.equal(theirs.targets)
                assert ours.row_ids.equal(theirs.row_ids)
        both.close()
        plain.close()
        with pytest.raises(DataError, match="no such file") as caught:
            Rows.open("s3://bucket/some/d/train", cache)
        assert caught.value.where == "s3://bucket/some/d/train/manifest.json"
    finally:
        server.stop()


def test_shards_give_way_and_come_back(remote, tmp_path):
    local = Rows.open(remote / "train")
    largest = max(shard.bytes for shard in local.manifest.shards)
    cache = ShardCache(tmp_path / "cache", limit=3 * largest, seconds=20)
    rows = Rows.open(f"file://{remote}/train", cache)
    for first in (*range(0, len(rows), 150), 0):
        numbers = np.arange(first, min(first + 40, len(rows)))
        assert np.array_equal(rows.gather(numbers).tokens, local.gather(numbers).tokens)
        assert sum(file.stat().st_size for file in shard_files(cache)) <= cache.limit
        assert len(rows._mapped) <= 4


def test_a_cache_too_small_for_one_step_is_refused(remote, tmp_path):
    shards = Rows.open(remote / "train").manifest.shards
    limit = max(shard.bytes for shard in shards)
    cache = ShardCache(tmp_path / "cache", limit=limit, seconds=20)
    rows = Rows.open(f"file://{remote}/train", cache)
    with pytest.raises(ConfigError, match=rf"hold {limit:,} bytes, and [\d,]+ are need") as caught:
        read_all(rows)
    assert caught.value.where == "data.cache_bytes"
    needed = sum(shard.bytes for shard in shards)
    assert str(needed) in str(caught.value.fix)
    other = Rows.open(f"file://{remote}/validation", cache)
    loader = Loader([(rows, 1.0), (other, 1.0)], seed=0, batch_rows=8, micro_batch_rows=8)
    with pytest.raises(ConfigError, match="are needed at once"):
        loader.microbatches(0)


def test_missing_and_corrupt_shards_stop_the_step_that_meets_them(store, cache):
    rows = Rows.open(URL, cache)
    names = [shard.file for shard in rows.manifest.shards]
    (store.folder / "c/train" / names[1]).unlink()
    damaged = store.folder / "c/train" / names[2]
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    loader = Loader([(rows, 1.0)], seed=0, batch_rows=2, micro_batch_rows=2, read_ahead=2)
    ends = np.cumsum([shard.rows for shard in rows.manifest.shards])
    met = set()
    for step in range(30):
        touched = set(np.searchsorted(ends, loader.row_ids(step), side="right").tolist())
        if bad := touched & {1, 2}:
            with pytest.raises(
                DataError, match=r"no such file|corrupt where it is stored"
            ) as error:
                loader.microbatches(step)
            assert error.value.where in {f"{URL}/{names[number]}" for number in bad}
            met |= bad
        else:
            loader.microbatches(step)
    assert met == {1, 2}
    loader.close()
    assert store.asked[names[2]] % 2 == 0  # each time once more, in case it was the network
    assert not {file.name for file in shard_files(cache)} & {names[1], names[2]}


def test_a_shard_damaged_in_the_cache_is_downloaded_again(store, cache):
    read_all(Rows.open(URL, cache))
    file = shard_files(cache)[1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    shard_files(cache)[0].write_bytes(b"")
    assert_same(Rows.open(URL, cache), store.folder / "c/train")


def test_a_failure_that_passes_is_tried_again(store, cache):
    rows = Rows.open(URL, cache)
    name = rows.manifest.shards[0].file
    store.failing[name] = 2
    assert_same(rows, store.folder / "c/train")
    assert store.asked[name] == 3


def test_a_download_that_stalls_is_an_error_in_time(store, cache):
    quick = ShardCache(cache.root, seconds=2.0)  # a busy machine takes its time to answer
    rows = Rows.open(URL, quick)
    name = rows.manifest.shards[1].file
    store.hanging.add(name)
    begun = time.monotonic()
    with pytest.raises(DataError, match=r"stalled: not a byte for 2 seconds") as caught:
        read_all(rows)
    assert time.monotonic() - begun < 15
    assert caught.value.where == f"{URL}/{name}"
    assert "data.download_seconds" in str(caught.value.fix)
    store.hanging.clear()
    assert_same(rows, store.folder / "c/train")  # what hangs behind is in nobody's way


def test_other_urls_and_missing_clients_are_named(cache):
    with pytest.raises(ConfigError, match="cannot be read from ftp://"):
        Rows.open("ftp://host/c/train", cache)
    with pytest.raises(DataError, match="no such file"):
        Rows.open("file:///no/such/folder", cache)


def read_and_compare(cache, folder):
    assert_same(Rows.open(URL, cache), folder)


def start(work, *words):
    process = fork.Process(target=work, args=words)
    process.start()
    return process


def test_processes_share_a_cache_and_download_once(store, cache):
    jobs = [start(read_and_compare, cache, store.folder / "c/train") for _ in range(3)]
    for job in jobs:
        job.join(30)
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    shards = {name: asked for name, asked in store.asked.items() if name.startswith("shard")}
    assert set(shards.values()) == {1}


def test_processes_that_crowd_each_other_out_read_right_all_the_same(store, tmp_path):
    local = Rows.open(store.folder / "c/train")
    limit = sum(shard.bytes for shard in local.manifest.shards) + 100
    other = Rows.open(store.folder / "c/validation").manifest
    assert sum(shard.bytes for shard in other.shards) > 100
    cache = ShardCache(tmp_path / "cache", limit=limit, seconds=20)

    def read(split):
        folder = store.folder / "c" / split
        for _ in range(3):
            assert_same(Rows.open(f"s3://b/c/{split}", cache), folder)

    jobs = [start(read, split) for split in ("train", "validation")]
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0]
    assert sum(file.stat().st_size for file in shard_files(cache)) <= limit


def test_what_a_killed_job_left_is_swept_and_disturbs_nobody(store, cache):
    name = Rows.open(URL, cache).manifest.shards[1].file
    store.hanging.add(name)
    job = start(read_and_compare, cache, store.folder / "c/train")
    deadline = time.monotonic() + 20
    while not ((left := list(cache.root.glob(f"*/partial/{name}@*"))) and store.asked[name]):
        assert time.monotonic() < deadline and job.is_alive()
        time.sleep(0.02)
    Rows.open(URL, cache)
    assert left[0].exists()  # its job lives
    os.kill(job.pid, signal.SIGKILL)
    job.join(10)
    store.hanging.clear()
    rows = Rows.open(URL, cache)
    assert not left[0].exists()
    assert_same(rows, store.folder / "c/train")


def test_a_tokenizer_damaged_in_the_cache_is_downloaded_again(remote, cache):
    url = f"file://{remote}/train"
    Rows.open(url, cache)
    (file,) = cache.root.glob("*/tokenizer/tokenizer.json")
    text = file.read_bytes()
    file.write_bytes(text[:-9])
    Rows.open(url, cache)
    assert file.read_bytes() == text


def test_a_file_that_another_brings_meanwhile_is_checked(remote, cache, monkeypatch):
    rows = Rows.open(f"file://{remote}/train", cache)
    download, brought = RemoteShards._download, []

    def bring_damaged(self, name, target, expected, size):
        if name not in brought:
            brought.append(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(bytes(size))
            return None
        return download(self, name, target, expected, size)

    monkeypatch.setattr(RemoteShards, "_download", bring_damaged)
    assert_same(rows, remote / "train")
    assert len(brought) == len(rows.manifest.shards)


def test_a_file_with_the_number_of_one_that_was_checked_is_checked(remote, cache):
    rows = Rows.open(f"file://{remote}/train", cache)
    read_all(rows)
    rows._mapped.drop(rows._mapped.numbers)
    file = shard_files(cache)[0]
    number = file.stat().st_ino
    file.write_bytes(bytes(file.stat().st_size))
    assert file.stat().st_ino == number
    assert_same(rows, remote / "train")


def test_streams_of_the_same_rows_need_their_shards_once(remote, tmp_path):
    limit = sum(shard.bytes for shard in Rows.open(remote / "train").manifest.shards)
    rows = Rows.open(f"file://{remote}/train", ShardCache(tmp_path / "cache", limit, 20))
    numbers = np.arange(len(rows))
    bring_together([rows, rows], [numbers, numbers[::-1]])
    assert_same(rows, remote / "train")
