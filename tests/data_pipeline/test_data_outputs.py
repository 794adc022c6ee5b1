"""`prepare` into a folder that holds something: again does nothing, changes are refused."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest

from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline.proof import verify
from shoal.data_pipeline.shards import prepare
from shoal.data_pipeline.tokenizer import Tokenizer


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
