"""Shards as they are written: byte for byte MDSWriter's, the same from any number of processes."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from shoal.configs.corpus import PackingConfig
from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline import layout as layouts
from shoal.data_pipeline.layout import (
    ShardPlan,
    WriteShards,
    choose_form,
    count_lengths,
    plan_split,
)
from shoal.data_pipeline.manifest import hash_file, read_manifest
from shoal.data_pipeline.mds import import_streaming, open_mds, row_columns, row_type, write_mds
from shoal.data_pipeline.rows import Rows
from shoal.data_pipeline.shards import prepare
from shoal.data_pipeline.tokenizer import Tokenizer
from shoal.data_pipeline.tokens import Split, chunk_files, save_array


def make_rows(count, context, dtype, seed=0):
    values = np.random.default_rng(seed)
    rows = np.zeros(count, row_type(context, dtype))
    rows["ends"] = values.integers(0, 256, rows["ends"].shape)
    rows["length"] = values.integers(1, context + 2, count)
    rows["tokens"] = values.integers(0, 2**16, rows["tokens"].shape)
    return rows


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize(
    ("count", "context", "dtype"),
    [(1, 1, "<u2"), (50, 16, "<u2"), (7, 64, "<u4"), (3, 2047, "<u2")],
)
def test_shards_are_those_of_mdswriter(count, context, dtype, compression, tmp_path):
    """Ours are written in one go, its are written row by row."""
    dtype = np.dtype(dtype)
    rows = make_rows(count, context, dtype)
    with import_streaming().MDSWriter(
        out=str(tmp_path / "theirs"),
        columns=row_columns(context, dtype),
        compression=compression,
        hashes=["sha256"],
        size_limit=None,
    ) as writer:
        for row in rows:
            writer.write({name: row[name] for name in ("ends", "length", "tokens")})
    (expected,) = json.loads((tmp_path / "theirs" / "index.json").read_text())["shards"]
    entry = write_mds(tmp_path, 0, rows, compression)
    assert entry["raw_data"] == expected["raw_data"]
    name = "shard.00000.mds" if compression is None else "shard.00000.mds.zstd"
    if compression is None:
        assert entry == expected
        assert (tmp_path / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    else:  # the same content; the packed bytes are those of another zstd
        assert entry | {"zip_data": None} == expected | {"zip_data": None}
        assert entry["zip_data"]["hashes"]["sha256"] == hash_file(tmp_path / name)
    matrix = open_mds(
        tmp_path / name, count, entry["raw_data"]["bytes"], context, dtype, compression
    )
    assert matrix.tobytes() == rows.tobytes()


@pytest.fixture
def plan(prepared, make_config, tmp_path):
    """A split of a few shards, whose rows are planned and not written."""
    tokenizer = Tokenizer.load(prepared.tokenizer)
    texts = [f"the cell fires {number} times when light falls" for number in range(200)]
    split = Split("train", chunks=[tmp_path / "a", tmp_path / "b"])
    for chunk, some in zip(split.chunks, (texts[:120], texts[120:]), strict=True):
        encoded = tokenizer.encode_batch(some)
        lengths_file, tokens_file = chunk_files(chunk)
        save_array(lengths_file, np.asarray([len(ids) for ids in encoded], dtype=np.int64))
        save_array(tokens_file, np.concatenate(encoded).astype(np.uint16))
    return plan_split(make_config(tmp_path / "c"), split, tokenizer, tmp_path / "plan")


def list_written(plan: ShardPlan):
    return {
        file.name: file.read_bytes()
        for file in plan.folder.iterdir()
        if file.suffix in (".mds", ".json") or file.stem.isdigit()
    }


def test_stage_writes_shards_in_any_order(plan):
    stage = pickle.loads(
        pickle.dumps(WriteShards(plan, "write shards"))
    )  # as it goes to another process
    assert stage.tasks == plan.shards == 2
    assert stage.name == "write shards"
    assert not any(stage.is_done(task) for task in range(stage.tasks))
    for task in range(stage.tasks):
        stage.run(task)
    first = list_written(plan)
    assert all(stage.is_done(task) for task in range(stage.tasks))
    for file in plan.folder.glob("*.mds"):
        file.unlink()
    stage.run(0)  # it is done, whatever became of the shard
    assert not list(plan.folder.glob("*.mds"))
    for task in reversed(range(stage.tasks)):
        plan.part_file(task).unlink()
        stage.run(task)
    assert list_written(plan) == first


def test_shard_killed_half_way_is_written_anew(plan, monkeypatch):
    """The index entry says that a shard is done, and is written last."""
    monkeypatch.setattr(layouts, "save_entry", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        WriteShards(plan, "write shards").run(1)
    monkeypatch.undo()
    assert not WriteShards(plan, "write shards").is_done(1)
    broken = plan.folder / "shard.00001.mds"
    broken.write_bytes(broken.read_bytes()[:50])
    WriteShards(plan, "write shards").run(1)
    entry = json.loads(plan.part_file(1).read_text())
    assert entry["raw_data"]["hashes"]["sha256"] == hash_file(broken)


@pytest.mark.parametrize("method", ["concatenate", "best_fit", "window"])
def test_processes_do_not_show(method, make_config, prepared, tree, tmp_path):
    trees = []
    for processes in (1, 2):
        config = make_config(
            tmp_path / str(processes),
            processes=processes,
            packing={"method": method},
            tokenizer={"path": str(prepared.tokenizer)},
        )
        trees.append(tree(prepare(config).output))
    assert trees[0] == trees[1]


@pytest.mark.parametrize("method", ["best_fit", "window"])
def test_packed_corpus_is_whole(method, make_config, prepared, tmp_path):
    """Through every stage: the documents of the rows are those of a concatenated corpus."""
    config = make_config(tmp_path / "c", packing={"method": method}, context=32)
    found = {}
    for folder in (prepare(config).train, prepared.train):
        rows = Rows.open(folder)
        tokenizer, batch = Tokenizer.load(rows.tokenizer_folder), rows.gather(np.arange(len(rows)))
        assert (batch.targets >= 0).sum() == rows.manifest.tokens
        found[folder] = int(tokenizer.token_bytes[batch.targets[batch.targets >= 0]].sum())
        assert found[folder] == rows.manifest.text_bytes
    facts = read_manifest(tmp_path / "c" / "train").packing
    assert facts.padding_tokens == facts.rows * 32 - facts.tokens
    assert facts.padding_share > 0
    assert (facts.method, facts.separator) == (method, "end_of_text")
    assert len(set(found.values())) == 1


def test_separator_is_one_token(prepared, make_config, tmp_path):
    tokenizer = Tokenizer.load(prepared.tokenizer)
    with pytest.raises(
        ConfigError, match="'no such' is 7 tokens of this tokenizer, not one"
    ) as caught:
        choose_form(PackingConfig(separator="no such"), 16, tokenizer)
    assert caught.value.where == "packing.separator"
    form = choose_form(PackingConfig(separator="a", piece_tokens=9), 16, tokenizer)
    assert tokenizer.decode([form.separator]) == "a"
    assert (form.leads, form.piece_tokens) == (False, 9)
    assert choose_form(PackingConfig(separator="none"), 16, tokenizer).separator is None
    with pytest.raises(ConfigError, match="not one"):
        prepare(make_config(tmp_path / "c", packing={"separator": "no such"}))
    assert not (tmp_path / "c").exists()


def test_rows_of_the_paper_from_a_corpus(prepared, make_config, tmp_path):
    """The first rows hold no separator, and each batch of documents begins a row."""
    packing = {"separator": "none", "batch_documents": 10, "overlap": False}
    folder = prepare(make_config(tmp_path / "c", packing=packing)).train
    rows = Rows.open(folder)
    manifest, batch = rows.manifest, rows.gather(np.arange(len(rows)))
    assert manifest.packing.separator == "none"
    assert not np.any(batch.targets == manifest.eot_id)
    assert np.all(batch.targets[:, -1] < 0)  # context tokens a row, of which the first is no target
    padded = batch.targets[:, -2] < 0
    assert 0 < padded.sum() <= -(-manifest.documents // 10)


def test_lengths_are_counted_by_powers_of_two():
    lengths = np.asarray([0, 1, 2, 3, 4, 7, 8, 1023, 1024, 2**40])
    assert count_lengths(lengths) == {
        "0": 1, "1": 1, "2": 2, "4": 2, "8": 1, "512": 1, "1024": 1, str(2**40): 1,
    }  # fmt: skip


def test_shards_of_the_first_format_are_refused(prepared, tmp_path):
    tree = json.loads((prepared.train / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(tree | {"schema_version": 1}))
    with pytest.raises(DataError, match="schema version 1") as caught:
        Rows.open(tmp_path)
    assert "prepare the corpus again" in str(caught.value.fix)
