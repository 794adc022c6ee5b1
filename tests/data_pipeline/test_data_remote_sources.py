"""Sources and outputs by URL, on a local S3 server: as local ones; what fails says where."""

from __future__ import annotations

import functools
import os
import random
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shoal.configs.corpus import SourceConfig
from shoal.configs.errors import ConfigError, DataError, PreflightError
from shoal.data_pipeline import files
from shoal.data_pipeline.documents import DroppedLog
from shoal.data_pipeline.files import exists, hash_file, open_file, read_bytes, redact, stat
from shoal.data_pipeline.parts import list_parts, read_part
from shoal.data_pipeline.provenance import SourceHashes
from shoal.data_pipeline.sources import list_files, read_documents
from shoal.data_pipeline.transfers import download_folder, upload_folder


@pytest.fixture(scope="module")
def s3():
    """A local S3 server with one bucket, the environment that leads there, and a client."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "a-secret-key-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="corpora")
        yield client
    server.stop()


@pytest.fixture
def memory():
    """The storage in memory of fsspec, empty."""
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    return fs


def read(path, **settings):
    dropped = DroppedLog()
    source = SourceConfig(path=str(path), **settings)
    return [(d.id, d.text, d.domain) for d in read_documents(source, dropped)], dropped


def read_by_parts(path, part_bytes):
    dropped = DroppedLog()
    source = SourceConfig(path=str(path))
    parts = list_parts(source, 0, part_bytes)
    found = [(d.id, d.text, d.domain) for part in parts for d in read_part(source, part, dropped)]
    return found, dropped, len(parts)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, lines, records):
    """A folder with every format and some broken records."""
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    lines(folder / "a" / "x.jsonl.zst", records(30))
    lines(folder / "a" / "y.jsonl.gz", records(30, 1))
    lines(folder / "b.jsonl", [*({"text": t["text"]} for t in records(40, 2)), b"broken", b"{}"])
    pq.write_table(pa.Table.from_pylist(records(50, 3)), folder / "c.parquet", row_group_size=10)
    (folder / "d.csv").write_text('id,text\n1,"two\nlines"\n2,one,more\n')
    (folder / "e.txt").write_text("plain")
    (folder / ".hidden.txt").write_text("unseen")
    return folder


@pytest.fixture(scope="module")
def remote(s3, corpus):
    """The same in the bucket."""
    for file in corpus.rglob("*"):
        if file.is_file():
            s3.upload_file(str(file), "corpora", f"in/{file.relative_to(corpus).as_posix()}")
    s3.put_object(Bucket="corpora", Key="in/empty/")  # as web consoles make folders
    return "s3://corpora/in"


@pytest.mark.parametrize(
    "path", ["", "/", "/a/x.jsonl.zst", "/b.jsonl", "/c.parquet", "/a/*.jsonl.zst", "/**/*.jsonl.*"]
)
def test_a_bucket_reads_like_a_folder(path, remote, corpus):
    here, there = read(f"{corpus}{path}"), read(f"{remote}{path}")
    assert here[0] and there[0] == here[0]
    assert there[1] == here[1]


def test_parts_of_a_bucket(remote):
    whole, dropped = read(remote)
    found, dropped_too, count = read_by_parts(remote, 2000)
    assert (found, dropped_too) == (whole, dropped)
    assert count > 8
    assert [place for place, _ in dropped.places] == ["b.jsonl:41", "b.jsonl:42", "d.csv:4"]


def test_only_what_changed_is_hashed_again(s3, remote, corpus, tmp_path, monkeypatch):
    source = SourceConfig(path=remote)
    hashes = SourceHashes()
    found = hashes.hash_source(source)
    assert found == SourceHashes().hash_source(SourceConfig(path=str(corpus)))
    hashes.save(tmp_path / "known")
    read_again = []
    monkeypatch.setattr(
        "shoal.data_pipeline.provenance.hash_contents",
        lambda path: read_again.append(path) or hash_file(path),
    )
    assert SourceHashes(tmp_path / "known").hash_source(source) == found
    assert read_again == []
    s3.put_object(Bucket="corpora", Key="in/e.txt", Body=b"other")
    try:
        changed = SourceHashes(tmp_path / "known").hash_source(source)
    finally:
        s3.put_object(Bucket="corpora", Key="in/e.txt", Body=b"plain")
    assert read_again == [f"{remote}/e.txt"]
    assert changed[0] != found[0] and changed[1:] == found[1:]


def test_an_object_that_is_replaced_while_it_is_read(s3):
    put = functools.partial(s3.put_object, Bucket="corpora", Key="changing/x.jsonl")
    put(Body=b'{"text": "a"}\n' * 9)
    source = SourceConfig(path="s3://corpora/changing")
    cut = list_parts(source, 0, 30)
    assert len(list(read_part(source, cut[0], DroppedLog()))) == 3
    put(Body=b'{"text": "b"}\n' * 9)
    with pytest.raises(DataError, match="was changed while the corpus was read") as caught:
        list(read_part(source, cut[1], DroppedLog()))
    assert caught.value.where == "s3://corpora/changing/x.jsonl"


@pytest.mark.parametrize(
    ("before", "now", "changed"),
    [
        ("5 ETag=a", "5 ETag=a", False),
        ("5 ETag=a", "5 ETag=b", True),
        ("5 ETag=a", "6 ETag=a", True),
        ("5 ETag=a", "5 updated=x y", False),
        ("5 ETag=a", "6 updated=x y", True),
        ("", "5 ETag=a", False),
        ("5 ETag=a", "", False),
    ],
)
def test_only_like_stamps_compare(before, now, changed, monkeypatch):
    monkeypatch.setattr(files, "stat", lambda path: files.FileFacts(path, "x", 5, now))
    assert files.is_changed("s3://bucket/x", before) is changed


def test_ranges_of_an_object_larger_than_its_blocks(s3, monkeypatch):
    monkeypatch.setattr(files, "_REMOTE_BLOCK", 1 << 16)
    data = random.Random(0).randbytes(300_000)
    s3.put_object(Bucket="corpora", Key="large", Body=data)
    with open_file("s3://corpora/large") as raw:
        assert raw.read() == data
        raw.seek(150_000)
        assert raw.read(70_000) == data[150_000:220_000]
        raw.seek(10)
        assert raw.read(5) == data[10:15]
    assert stat("s3://corpora/large").bytes == 300_000


def test_a_folder_goes_up_and_comes_back(s3, corpus, tmp_path, tree):
    folder = tmp_path / "out"
    for name in ("tokenizer/tokenizer.json", "train/manifest.json", "train/00000.mds", "index"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / ".known").write_text("of this machine")
    told = []
    assert not exists("s3://corpora/out")
    upload_folder(folder, "s3://corpora/out", told=told.append)
    assert exists("s3://corpora/out/train/manifest.json") and exists("s3://corpora/out")
    assert sum(told) == sum(file.stat().st_size for file in folder.rglob("[!.]*.*")) + 5
    download_folder("s3://corpora/out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(folder)
    assert not (tmp_path / "back" / ".known").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_manifests_go_up_when_all_else_is_there(memory, tmp_path, monkeypatch):
    for name in ("manifest.json", "train/manifest.json", "train/z.mds", "a.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    order = []
    put = type(memory).put_file

    def note(self, here, there, **settings):
        order.append(there)
        if there.endswith(fail):
            raise ConnectionError("the line is down")
        return put(self, here, there, **settings)

    monkeypatch.setattr(type(memory), "put_file", note)
    fail = "z.mds"
    with pytest.raises(DataError, match="the line is down") as caught:
        upload_folder(tmp_path, "memory://out")
    assert caught.value.where == "memory://out"
    assert not [path for path in memory.find("/out") if path.endswith("manifest.json")]
    order.clear()
    fail = "nothing"
    upload_folder(tmp_path, "memory://out")
    names = ["a.json", "train/z.mds", "train/manifest.json", "manifest.json"]
    assert order == [f"/out/{name}" for name in names]


def test_an_upload_that_arrives_short_is_an_error(memory, tmp_path, monkeypatch):
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "x.mds").write_text("many bytes")
    monkeypatch.setattr(
        type(memory), "put_file", lambda self, _, there, **__: self.pipe(there, b"?")
    )
    with pytest.raises(DataError, match="1 bytes arrived of 10") as caught:
        upload_folder(tmp_path, "memory://out")
    assert caught.value.where == "memory://out/x.mds"
    assert not exists("memory://out/manifest.json")


def test_a_download_that_fails_leaves_nothing(memory, tmp_path, monkeypatch):
    memory.pipe({"/out/a": b"1", "/out/b": b"22"})
    get = type(memory).get_file

    def cut(self, there, here, **settings):
        get(self, there, here, **settings)
        if there.endswith("b"):
            os.truncate(here, 1)

    monkeypatch.setattr(type(memory), "get_file", cut)
    with pytest.raises(DataError, match="1 bytes arrived of 2"):
        download_folder("memory://out", tmp_path / "back")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="nothing is there"):
        download_folder("memory://gone", tmp_path / "back")


def test_a_download_stays_in_its_folder(memory, tmp_path, monkeypatch):
    memory.pipe("/out/x", b"1")
    listing = {"/out/../../escaped": memory.info("/out/x")}
    monkeypatch.setattr(type(memory), "find", lambda *_, **__: listing)
    with pytest.raises(DataError, match="leads out of the folder"):
        download_folder("memory://out", tmp_path / "deep" / "back")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["gone.jsonl", "gone/*.jsonl", "gone/"])
def test_nothing_in_the_bucket(path, s3):
    with pytest.raises(DataError, match="no documents there") as caught:
        read(f"s3://corpora/{path}")
    assert caught.value.where == f"s3://corpora/{path}"


def test_what_a_bucket_says_names_the_url(s3, remote, monkeypatch):
    with pytest.raises(DataError) as caught:
        read("s3://no-such-bucket/x.jsonl")
    assert caught.value.where == "s3://no-such-bucket/x.jsonl"
    with pytest.raises(DataError, match="is not there") as caught:
        read_bytes(f"{remote}/gone")
    assert caught.value.where == f"{remote}/gone"
    with pytest.raises(DataError, match="no such file"):
        stat(f"{remote}/gone")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(DataError, match="cannot be reached") as caught:
        exists(f"{remote}/b.jsonl")
    assert "AWS_ENDPOINT_URL" in str(caught.value.fix)


def test_damage_in_a_bucket_is_named(s3, corpus):
    data = (corpus / "a" / "x.jsonl.zst").read_bytes()
    s3.put_object(Bucket="corpora", Key="cut/x.jsonl.zst", Body=data[:-20])
    with pytest.raises(DataError, match="damaged or cut short") as caught:
        read("s3://corpora/cut")
    assert caught.value.where == "s3://corpora/cut/x.jsonl.zst"


@pytest.mark.parametrize("name", ["b.jsonl", "a/x.jsonl.zst", "a/y.jsonl.gz", "c.parquet"])
def test_a_line_that_breaks_is_an_error_of_its_url(name, memory, corpus, monkeypatch):
    memory.pipe(f"/in/{name}", (corpus / name).read_bytes())

    class Broken:
        def __init__(self, raw):
            self.raw = raw

        def read(self, size):
            raise ConnectionError("reset by peer")

        def __getattr__(self, name):
            return getattr(self.raw, name)

    whole = type(memory)._open
    monkeypatch.setattr(
        type(memory), "_open", lambda self, *args, **given: Broken(whole(self, *args, **given))
    )
    with pytest.raises(DataError, match="reset by peer") as caught:
        read(f"memory://in/{name}")
    assert caught.value.where == f"memory://in/{name}"


def test_absent_drivers_and_unknown_kinds(monkeypatch):
    from fsspec.registry import _registry

    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    files._connect.cache_clear()
    with pytest.raises(PreflightError, match="not installed") as caught:
        list_files(SourceConfig(path="s3://bucket/x.jsonl"))
    assert caught.value.fix == "pip install 'shoal[s3]'"
    with pytest.raises(ConfigError, match="Protocol not known"):
        list_files(SourceConfig(path="nonsense://bucket/x.jsonl"))


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEY:hushhush@bucket/x.jsonl",
        "https://host/x.jsonl?X-Amz-Signature=hushhush&a=1",
        "https://host/x.jsonl?a=1&token=hushhush",
    ],
)
def test_secrets_are_refused_and_not_repeated(url):
    with pytest.raises(ConfigError, match="a secret stands in the URL") as caught:
        list_files(SourceConfig(path=url))
    assert "hushhush" not in str(caught.value)


def test_secrets_of_the_environment_are_not_repeated(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hushhush+key")
    assert redact("signed with hushhush+key at s3://a:b@c/d") == "signed with *** at s3://***@c/d"
