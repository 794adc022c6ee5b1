"""`prepare`: what a manifest says is true, and what cannot be read or written is named."""

from __future__ import annotations

import errno
import hashlib
import json
import resource
import shutil
from collections import Counter

import numpy as np
import pytest

from shoal.configs.errors import DataError
from shoal.data_pipeline import pieces, tokens
from shoal.data_pipeline.manifest import hash_file, read_manifest
from shoal.data_pipeline.mds import import_streaming
from shoal.data_pipeline.proof import verify
from shoal.data_pipeline.provenance import SourceHashes
from shoal.data_pipeline.rows import Rows
from shoal.data_pipeline.shards import prepare
from shoal.data_pipeline.tokenizer import Tokenizer


def read_back(folder, tokenizer):
    """The documents in a split's rows, in packing order."""
    rows = Rows.open(folder)
    targets = rows.gather(np.arange(len(rows))).targets.ravel()
    targets = targets[targets >= 0]
    ends = np.flatnonzero(targets == tokenizer.eot_id)
    assert ends[-1] == len(targets) - 1
    return [tokenizer.decode(part[part != tokenizer.eot_id]) for part in np.split(targets, ends)][
        :-1
    ]


def held_out(record, share):
    digest = hashlib.blake2b(record["id"].encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < share


@pytest.mark.parametrize("name", ["train", "validation"])
def test_manifest_is_true(name, prepared, corpus_file, records):
    folder = prepared.output / name
    manifest = verify(folder)
    tokenizer = Tokenizer.load(prepared.tokenizer)
    expected = [r for r in records(240) if held_out(r, 0.1) == (name == "validation")]
    texts = [r["text"] for r in expected]
    assert Counter(read_back(folder, tokenizer)) == Counter(texts)
    size = sum(len(text.encode()) for text in texts)
    count = sum(len(ids) + 1 for ids in tokenizer.encode_batch(texts))
    assert manifest.documents == len(texts)
    assert manifest.text_bytes == size
    assert manifest.tokens == count
    assert manifest.rows == -(-count // 16) == sum(shard.rows for shard in manifest.shards)
    assert manifest.domains == dict(Counter(r["domain"] for r in expected))
    assert (manifest.context, manifest.vocab_size, manifest.dtype) == (16, 320, "uint16")
    assert manifest.tokenizer_fingerprint == tokenizer.fingerprint
    assert manifest.tokenizer_files == {
        file.name: hash_file(file) for file in prepared.tokenizer.iterdir()
    }
    (source,) = manifest.sources
    assert (source.documents, source.bytes, source.dropped) == (len(texts), size, 0)
    facts = f"{corpus_file.name}\n{hash_file(corpus_file)}\n".encode()
    assert (source.files, source.sha256) == (1, hashlib.sha256(facts).hexdigest())
    assert manifest.dropped.total == 0
    assert (folder / "dropped.jsonl").read_bytes() == b""


def test_shards_are_as_stated(prepared):
    manifest = read_manifest(prepared.train)
    index = json.loads((prepared.train / "index.json").read_text())["shards"]
    assert len(manifest.shards) == len(index) > 3
    for shard, entry in zip(manifest.shards, index, strict=True):
        file = prepared.train / shard.file
        assert shard.bytes == shard.raw_bytes == file.stat().st_size <= 9000 + 300
        assert shard.sha256 == shard.raw_sha256 == hash_file(file)
        assert entry["raw_data"]["basename"] == shard.file
        assert entry["samples"] == shard.rows
    hashes = "\n".join(shard.raw_sha256 for shard in manifest.shards).encode()
    assert manifest.shards_hash == hashlib.sha256(hashes).hexdigest()


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_streaming_reads_equal_rows(compression, prepared, make_config, tmp_path):
    output = tmp_path / "corpus"
    folder = prepare(make_config(output, compression=compression)).train
    rows = Rows.open(folder)
    shutil.copytree(folder, tmp_path / "remote")
    data = import_streaming().StreamingDataset(
        remote=str(tmp_path / "remote"), local=str(tmp_path / "local"), batch_size=1
    )
    expected = rows.gather(np.arange(len(rows))).tokens
    plain = Rows.open(prepared.train).gather(np.arange(len(rows))).tokens
    assert np.array_equal(expected, plain)
    assert len(data) == len(rows)
    assert np.array_equal(np.stack([data[i]["tokens"] for i in range(len(data))]), expected)


def test_chunks_do_not_show(make_config, prepared, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", 1500)
    assert tree(prepare(make_config(tmp_path / "c")).output) == tree(prepared.output)


def test_progress_is_told(make_config, tmp_path):
    told = []
    prepare(make_config(tmp_path / "c"), lambda *facts: told.append(facts))
    shards = len(read_manifest(tmp_path / "c" / "train").shards)
    assert ("write train shards", shards, shards) in told
    assert "train tokenizer: find merges" in {what for what, _, _ in told}


@pytest.mark.parametrize("damage", [b"", b'{"a": [1', b"[]", b'{"PATH": 5}', b"\xff"])
def test_damaged_memory_of_hashes_is_no_hindrance(damage, make_config, corpus_file, tmp_path):
    """It only saves time: sources are hashed again."""
    source = make_config(tmp_path / "c").train[0]
    known = tmp_path / "known.json"
    known.write_bytes(damage.replace(b"PATH", str(corpus_file.resolve()).encode()))
    assert SourceHashes(known).hash_source(source) == SourceHashes().hash_source(source)


@pytest.mark.parametrize("file", [None, "/elsewhere/x"])
def test_full_disk_is_named_and_what_is_done_is_kept(
    file, make_config, prepared, tree, tmp_path, monkeypatch
):
    def fill(what, done, total):
        if what.startswith("write"):  # a failed write names no file, a failed open does
            raise OSError(errno.ENOSPC, "No space left on device", file)

    monkeypatch.chdir(tmp_path)
    config = make_config("c")
    with pytest.raises(OSError, match="No space left") as caught:
        prepare(config, fill)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == (file or "c")
    assert not (tmp_path / "c").exists()
    told = []
    prepare(config, lambda what, done, total: told.append(what))
    assert {what.split()[0] for what in told} == {"write"}
    assert tree(tmp_path / "c") == tree(prepared.output)


def test_array_that_cannot_be_written_says_why(tmp_path):
    """numpy's own error has no number, so a full disk would look like a bug."""
    array = np.arange(5000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            tokens.save_array(tmp_path / "x.npy", array)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert not (tmp_path / "x.npy").exists()
    tokens.save_array(tmp_path / "x.npy", array)
    assert np.array_equal(np.load(tmp_path / "x.npy"), array)


def test_validation_share_is_disjoint_and_stable(make_config, lines, records, tmp_path):
    """Documents added later move none of the others to another split."""
    splits = []
    for name, count in (("small", 60), ("large", 200)):
        documents = [{"id": r["id"], "text": f"{r['id']}."} for r in records(count)]
        file = lines(tmp_path / f"{name}.jsonl", reversed(documents))
        config = make_config(
            tmp_path / name,
            train=[{"path": str(file)}],
            validation_share=0.25,
            tokenizer={"vocab_size": 262},
        )
        done = prepare(config)
        tokenizer = Tokenizer.load(done.tokenizer)
        splits.append([set(read_back(f, tokenizer)) for f in (done.train, done.validation)])
        assert not splits[-1][0] & splits[-1][1]
        assert splits[-1][0] | splits[-1][1] == {d["text"] for d in documents}
    assert splits[0][0] < splits[1][0]
    assert splits[0][1] < splits[1][1]
    assert 30 <= len(splits[1][1]) <= 70  # 50 expected, 3 standard deviations


def test_validation_sources(make_config, lines, records, tmp_path):
    file = lines(tmp_path / "v.jsonl", [b"broken", *records(50, seed=9)])
    done = prepare(
        make_config(
            tmp_path / "c",
            validation=[{"path": str(file), "domains": ["law"]}],
            validation_share=0.0,
            max_dropped_share=0.1,
        )
    )
    manifest = read_manifest(done.validation)
    texts = [r["text"] for r in records(50, seed=9) if r["domain"] == "law"]
    assert Counter(read_back(done.validation, Tokenizer.load(done.tokenizer))) == Counter(texts)
    assert manifest.domains == {"law": 25}
    assert manifest.sources[0].unwanted == 25
    assert [source.unwanted for source in read_manifest(done.train).sources] == [0]
    assert manifest.dropped.total == 1
    assert read_manifest(done.train).dropped.total == 0
    assert read_manifest(done.train).documents == 240


def test_no_validation(make_config, tmp_path):
    done = prepare(make_config(tmp_path / "c", validation_share=0.0))
    assert done.validation is None
    assert not (done.output / "validation").exists()


def test_datasets_source_is_identified_by_what_was_read(make_config, records, tmp_path):
    import datasets

    datasets.Dataset.from_list(records(30)).save_to_disk(str(tmp_path / "saved"))
    source = {"path": str(tmp_path / "saved"), "format": "datasets"}
    done = prepare(make_config(tmp_path / "c", train=[source], validation_share=0.0))
    (facts,) = read_manifest(done.train).sources
    assert (facts.documents, facts.files) == (30, 3)
    assert len(facts.sha256) == 64


BROKEN = [b'{"text": "cut', '{"text": "café"}'.encode("latin-1"), rb'{"text": "\ud83d"}']


def test_dropped_records_are_listed(make_config, lines, records, tmp_path):
    file = lines(tmp_path / "x.jsonl", [*records(10), *BROKEN, *records(87, seed=1)])
    settings = {"train": [{"path": str(file)}], "validation_share": 0.0}
    done = prepare(make_config(tmp_path / "c", max_dropped_share=0.03, **settings))
    manifest = verify(done.train)
    reasons = {"not JSON": 1, "not UTF-8": 1, "not Unicode text: lone surrogates": 1}
    assert manifest.dropped.reasons == reasons
    assert manifest.dropped.total == manifest.sources[0].dropped == 3
    assert manifest.documents == 97
    listed = [json.loads(line) for line in (done.train / "dropped.jsonl").open()]
    assert [(r["place"], r["reason"]) for r in listed] == [
        ("x.jsonl:11", "not JSON"),
        ("x.jsonl:12", "not UTF-8"),
        ("x.jsonl:13", "not Unicode text: lone surrogates"),
    ]
    assert {r["source"] for r in listed} == {str(file)}
    assert manifest.dropped.examples[0] == "x.jsonl:11: not JSON"
    with pytest.raises(DataError, match="3 of 100 records are broken") as caught:
        prepare(make_config(tmp_path / "d", max_dropped_share=0.029, **settings))
    assert caught.value.exit_code == 3
    assert caught.value.where == str(file)
    for place in ("x.jsonl:11", "x.jsonl:12", "x.jsonl:13"):
        assert place in caught.value.cause
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("given", [True, False])
def test_nothing_but_broken_records(given, make_config, prepared, lines, tmp_path):
    """Also where the tokenizer is trained first, the places are named."""
    file = lines(tmp_path / "x.jsonl", BROKEN)
    changes = {"tokenizer": {"path": str(prepared.tokenizer)}} if given else {}
    with pytest.raises(DataError, match=r"x\.jsonl:2: not UTF-8") as caught:
        prepare(make_config(tmp_path / "c", train=[{"path": str(file)}], **changes))
    assert caught.value.where == str(file)


@pytest.mark.parametrize(
    ("changes", "message", "where"),
    [
        ({"train": "empty file"}, "the source holds no documents", "x.jsonl"),
        ({"train": "empty folder"}, "no documents there", "folder"),
        ({"train": "missing"}, "no documents there", "gone"),
        ({"validation": "empty file"}, "the source holds no documents", "x.jsonl"),
        ({"validation_share": 1e-9}, "validation split holds no documents", "validation_share"),
        ({"validation_share": 1.0}, "the corpus holds no documents", "documents.jsonl.gz"),
    ],
)
def test_empty_corpora(changes, message, where, make_config, lines, tmp_path):
    lines(tmp_path / "x.jsonl", [])
    (tmp_path / "folder").mkdir()
    paths = {"empty file": "x.jsonl", "empty folder": "folder", "missing": "gone"}
    changed = {
        key: [{"path": str(tmp_path / paths[value])}] if value in paths else value
        for key, value in changes.items()
    }
    if "validation" in changed:
        changed["validation_share"] = 0.0
    with pytest.raises(DataError, match=message) as caught:
        prepare(make_config(tmp_path / "c", **changed))
    assert where in str(caught.value.where)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_source_of_other_domains_alone_is_refused(
    split, make_config, corpus_file, lines, records, tmp_path
):
    """Though the other sources of its split fill it; the labels that are there are named."""
    file = lines(tmp_path / "x.jsonl", [*records(20), {"text": "x", "domain": "\udc00"}])
    wanted = {"path": str(corpus_file)}
    sources = [wanted, {"path": str(file), "domains": ["Law", "biology"]}]
    changes = {split: sources, "validation_share": 0.0 if split == "validation" else 0.1}
    with pytest.raises(DataError) as caught:
        prepare(make_config(tmp_path / "c", **changes))
    assert caught.value.cause == (
        "the source holds no documents of the domains 'Law', 'biology': 21 records are of others, "
        "such as 'bio', 'law', '\\udc00'"
    )
    assert caught.value.where == str(file)
    assert not (tmp_path / "c").exists()


def test_unwanted_records_are_counted_over_all_parts(
    make_config, lines, records, tmp_path, monkeypatch
):
    monkeypatch.setattr(pieces, "MIN_PART_BYTES", 3000)
    file = lines(tmp_path / "x.jsonl", records(240))
    done = prepare(make_config(tmp_path / "c", train=[{"path": str(file), "domains": ["law"]}]))
    (train,), (held,) = (read_manifest(f).sources for f in (done.train, done.validation))
    assert (train.documents + held.documents, train.unwanted, held.unwanted) == (120, 120, 0)


def test_cut_archive_stops_everything(make_config, corpus_file, tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(corpus_file.read_bytes()[:-20])
    config = make_config(tmp_path / "c", train=[{"path": str(tmp_path / "x.jsonl.gz")}])
    with pytest.raises(DataError, match="cannot be read") as caught:
        prepare(config)
    assert caught.value.where == str(tmp_path / "x.jsonl.gz")
    assert not (tmp_path / "c").exists()
