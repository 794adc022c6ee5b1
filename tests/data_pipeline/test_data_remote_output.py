"""`prepare` with a URL as output: whole there or not at all, and a receipt of it here."""

from __future__ import annotations

import fcntl
import shutil

import fsspec
import pytest

from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline import publishing, receipts, shards
from shoal.data_pipeline.manifest import read_manifest
from shoal.data_pipeline.proof import verify
from shoal.data_pipeline.shards import prepare
from shoal.data_pipeline.transfers import download_folder

URL = "memory://corpora/mine"


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """Object storage in memory, empty, and a folder to work in."""
    monkeypatch.chdir(tmp_path)
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    return fs


def test_corpus_is_there_whole_and_its_receipt_here(make_config, prepared, memory, tree, tmp_path):
    done = prepare(make_config(URL))
    assert done.built
    assert done.url == URL
    download_folder(URL, tmp_path / "got")
    assert tree(tmp_path / "got") == tree(prepared.output)
    verify(tmp_path / "got" / "train")
    receipt = tree(done.output)
    assert receipt == {n: h for n, h in tree(prepared.output).items() if ".mds" not in n}
    left = [path for path in done.output.parent.iterdir() if path.name.startswith(".partial")]
    assert left == []


def test_done_there_is_done_here_also_on_another_machine(make_config, memory, tree):
    first = prepare(make_config(URL))
    before = tree(first.output)
    assert not prepare(make_config(URL)).built
    shutil.rmtree("data")
    again = prepare(make_config(URL))
    assert not again.built
    assert tree(again.output) == before
    with pytest.raises(ConfigError, match="another corpus: context changed") as caught:
        prepare(make_config(URL, context=32))
    assert caught.value.where == URL


def test_upload_that_was_cut_short_is_sent_again(make_config, memory, tree, monkeypatch):
    def fail(folder, url):
        upload(folder / "train", f"{url}/train", last=())
        memory.rm("/corpora/mine/train/manifest.json")
        raise DataError("the line is dead", where=url)

    upload = receipts.upload_folder
    with monkeypatch.context() as patch, pytest.raises(DataError, match="the line is dead"):
        patch.setattr(receipts, "upload_folder", fail)
        prepare(make_config(URL))
    assert memory.exists("/corpora/mine/train/index.json")
    told = []
    done = prepare(make_config(URL), lambda what, *_: told.append(what))
    assert told == ["upload"]  # all else was kept
    assert read_manifest(done.train).documents > 0


def test_killed_after_the_upload_leaves_nothing(make_config, memory, tmp_path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(publishing, "sync_folder", die)
        patch.setattr(shards, "sync_folder", lambda _: None)
        prepare(make_config(URL))
    receipts_here = receipts.receipt_folder(URL).parent
    assert list(receipts_here.glob(".partial-*"))
    assert not prepare(make_config(URL)).built
    assert not list(receipts_here.glob(".partial-*"))


def test_receipt_is_renewed_under_the_lock_alone(make_config, memory, monkeypatch):
    def fetch(*given):
        lock = output.parent / f".{output.name}.lock"
        with lock.open("w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(given)
        return receipts.fetch_receipt(*given)

    seen, output = [], receipts.receipt_folder(URL)
    monkeypatch.setattr(publishing, "fetch_receipt", fetch)
    prepare(make_config(URL))
    prepare(make_config(URL))
    assert len(seen) == 2


def test_prefix_that_holds_something_else_is_refused(make_config, memory):
    memory.pipe("/corpora/mine/thesis.tex", b"years")
    with pytest.raises(ConfigError, match=r"holds something else, such as thesis\.tex") as caught:
        prepare(make_config(URL))
    assert caught.value.where == URL
    assert memory.cat("/corpora/mine/thesis.tex") == b"years"


@pytest.mark.slow
def test_s3(make_config, prepared, tree, tmp_path, monkeypatch):
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.chdir(tmp_path)
    try:
        boto3.client("s3").create_bucket(Bucket="corpora")
        assert prepare(make_config("s3://corpora/mine")).built
        assert not prepare(make_config("s3://corpora/mine")).built
        download_folder("s3://corpora/mine", tmp_path / "got")
    finally:
        server.stop()
    assert tree(tmp_path / "got") == tree(prepared.output)
