"""`prepare`: what a manifest says is true, doing it again does nothing, and changes are refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline import tokens
from shoal.data_pipeline.manifest import hash_file, read_manifest, verify
from shoal.data_pipeline.packing import find_targets
from shoal.data_pipeline.provenance import SourceHashes
from shoal.data_pipeline.rows import Rows
from shoal.data_pipeline.shards import import_streaming, prepare
from shoal.data_pipeline.tokenizer import Tokenizer


def read_back(folder, tokenizer):
    """The documents in a split's rows, in packing order."""
    rows = Rows.open(folder)
    numbers, _ = rows.gather(np.arange(len(rows)))
    targets = find_targets(numbers, tokenizer.eot_id).ravel()
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
        assert shard.bytes == shard.raw_bytes == file.stat().st_size <= 9000 + 200
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
    expected, _ = rows.gather(np.arange(len(rows)))
    plain, _ = Rows.open(prepared.train).gather(np.arange(len(rows)))
    assert np.array_equal(expected, plain)
    assert len(data) == len(rows)
    assert np.array_equal(np.stack([data[i]["tokens"] for i in range(len(data))]), expected)


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.parent.rglob("*"))}


def test_second_call_does_nothing(make_config, tmp_path):
    config = make_config(tmp_path / "corpus")
    first = prepare(config)
    assert first.built
    before = snapshot(first.output)
    told = []
    for same in (config, make_config(tmp_path / "corpus", processes=3, max_dropped_share=0.5)):
        assert prepare(same, lambda *facts: told.append(facts)) == replace(first, built=False)
    assert snapshot(first.output) == before
    assert told == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [".corpus.lock", "corpus"]


def test_chunks_do_not_show(make_config, prepared, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK_BYTES", 1500)
    assert tree(prepare(make_config(tmp_path / "c")).output) == tree(prepared.output)


def test_progress_is_told(make_config, tmp_path):
    told = []
    prepare(make_config(tmp_path / "c"), lambda *facts: told.append(facts))
    shards = len(read_manifest(tmp_path / "c" / "train").shards)
    assert ("write train shards", shards, shards) in told
    assert "train tokenizer: find merges" in {what for what, _, _ in told}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("context", 32),
        ("seed", 5),
        ("tokenizer", {"vocab_size": 300}),
        ("validation_share", 0.2),
        ("shard_bytes", 10_000),
        ("compression", "zstd"),
        ("train", [{"path": "{corpus}", "domains": ["bio"]}]),
    ],
)
def test_changed_config_is_refused_and_named(name, value, prepared, make_config, corpus_file):
    if name == "train":
        value = [value[0] | {"path": str(corpus_file)}]
    before = snapshot(prepared.output)
    with pytest.raises(ConfigError, match=f"another corpus: {name} changed") as caught:
        prepare(make_config(prepared.output, **{name: value}))
    assert caught.value.where == str(prepared.output)
    assert f"rm -r {prepared.output}" in str(caught.value.fix)
    assert snapshot(prepared.output) == before


def test_changed_source_is_refused_a_touched_one_is_not(make_config, lines, records, tmp_path):
    file = lines(tmp_path / "x.jsonl", records(30))
    settings = {"train": [{"path": str(file)}], "validation_share": 0.0}
    config = make_config(tmp_path / "out" / "c", **settings)
    prepare(config)
    os.utime(file, ns=(1, 1))
    prepare(config)
    lines(file, records(31))
    with pytest.raises(ConfigError, match="a source file changed"):
        prepare(config)


@pytest.mark.parametrize("damage", [b"", b'{"a": [1', b"[]", b'{"PATH": 5}', b"\xff"])
def test_damaged_memory_of_hashes_is_no_hindrance(damage, make_config, corpus_file, tmp_path):
    """It only saves time: sources are hashed again."""
    source = make_config(tmp_path / "c").train[0]
    known = tmp_path / "known.json"
    known.write_bytes(damage.replace(b"PATH", str(corpus_file.resolve()).encode()))
    assert SourceHashes(known).hash_source(source) == SourceHashes().hash_source(source)


def test_changed_tokenizer_is_refused(make_config, prepared, tmp_path):
    shutil.copytree(prepared.tokenizer, tmp_path / "given")
    config = make_config(tmp_path / "out" / "c", tokenizer={"path": str(tmp_path / "given")})
    done = prepare(config)
    assert Tokenizer.load(done.tokenizer).fingerprint == Tokenizer.load(
        prepared.tokenizer
    ).fingerprint  # fmt: skip
    Tokenizer.train(["other words"], 300).save(tmp_path / "given")
    with pytest.raises(ConfigError, match="files of the tokenizer or a source changed"):
        prepare(config)
    shutil.rmtree(tmp_path / "given")
    with pytest.raises(DataError, match="no tokenizer there"):
        prepare(config)


@pytest.mark.parametrize("kind", ["folder", "file", "split"])
def test_output_that_holds_something_else_is_refused(kind, make_config, prepared, tmp_path):
    output = tmp_path / "mine"
    if kind == "file":
        output.write_text("notes")
    elif kind == "folder":
        output.mkdir()
        (output / "thesis.tex").write_text("years")
    else:
        shutil.copytree(prepared.train, output)
    before = snapshot(output)
    with pytest.raises(ConfigError, match="holds no prepared corpus") as caught:
        prepare(make_config(output))
    assert caught.value.where == str(output)
    assert snapshot(output) == before


def test_empty_output_is_filled(make_config, tmp_path):
    (tmp_path / "c").mkdir()
    verify(prepare(make_config(tmp_path / "c")).train)


@pytest.mark.parametrize("name", ["tokenizer", "validation"])
def test_corpus_with_a_folder_removed_is_refused(name, make_config, prepared, tmp_path):
    shutil.copytree(prepared.output, tmp_path / "c")
    prepare(make_config(tmp_path / "c"))
    shutil.rmtree(tmp_path / "c" / name)
    with pytest.raises(DataError, match="is missing") as caught:
        prepare(make_config(tmp_path / "c"))
    assert caught.value.where == str(tmp_path / "c" / name)


def test_stale_work_on_this_output_is_removed(make_config, tmp_path):
    stale = tmp_path / f".partial-c-{'0' * 16}"
    other = tmp_path / f".partial-d-{'0' * 16}"
    for folder in (stale, other):
        (folder / "tokens").mkdir(parents=True)
    prepare(make_config(tmp_path / "c"))
    assert not stale.exists()
    assert other.exists()


def test_replaced_tokenizer_is_no_prepared_corpus(make_config, prepared, tmp_path):
    shutil.copytree(prepared.output, tmp_path / "c")
    Tokenizer.train(["other words"], 320).save(tmp_path / "c" / "tokenizer")
    with pytest.raises(DataError, match="not the one the shards were written with") as caught:
        prepare(make_config(tmp_path / "c"))
    assert caught.value.where == str(tmp_path / "c" / "tokenizer")


@pytest.mark.parametrize("file", [None, "/elsewhere/x"])
def test_full_disk_is_named_and_what_is_done_is_kept(file, make_config, prepared, tree, tmp_path):
    def fill(what, done, total):
        if what.startswith("write"):  # a failed write names no file, a failed open does
            raise OSError(errno.ENOSPC, "No space left on device", file)

    config = make_config(tmp_path / "c")
    with pytest.raises(OSError, match="No space left") as caught:
        prepare(config, fill)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == (file or str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()
    told = []
    prepare(config, lambda what, done, total: told.append(what))
    assert "train tokenizer: find merges" not in told
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
        done = prepare(
            make_config(tmp_path / name, train=[{"path": str(file)}], validation_share=0.25)
        )
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
