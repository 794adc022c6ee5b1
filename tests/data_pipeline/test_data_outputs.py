"""`prepare` into a folder that holds something: again does nothing, changes are refused."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest

from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline import publishing
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
    Tokenizer.train(["other words"], 260).save(tmp_path / "given")
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
    Tokenizer.train(["other words"], 260).save(tmp_path / "c" / "tokenizer")
    with pytest.raises(DataError, match="not the one the shards were written with") as caught:
        prepare(make_config(tmp_path / "c"))
    assert caught.value.where == str(tmp_path / "c" / "tokenizer")


@pytest.mark.parametrize("name", ["train/shard.00001.mds", "train/index.json", "tokenizer"])
def test_damage_before_publishing_heals(name, make_config, prepared, tree, tmp_path, monkeypatch):
    def damage(folder):
        if folder.name == "train":
            file = folder.parent / name
            file = file / "tokenizer.json" if name == "tokenizer" else file
            file.write_bytes(file.read_bytes()[:-1] + b"?")
        return verify(folder)

    config = make_config(tmp_path / "c")
    with monkeypatch.context() as patch, pytest.raises(DataError, match="was damaged") as caught:
        patch.setattr(publishing, "verify", damage)
        prepare(config)
    assert f"makes only {name.split('/')[0]} anew" in str(caught.value.fix)
    assert not (tmp_path / "c").exists()
    told = set()
    prepare(config, lambda what, *_: told.add(what.split()[0]))
    assert tree(tmp_path / "c") == tree(prepared.output)
    assert "tokenise" not in told and ("write" in told) == name.startswith("train")


def test_cleaning_up_cut_short_is_gone_on_with(make_config, prepared, tree, tmp_path, monkeypatch):
    """A folder that is half removed is none."""

    def cut(folder):
        if folder.name.startswith("read"):
            next(folder.glob("*.arrow")).unlink()
            raise OSError(5, "Input/output error")
        whole(folder)

    config, whole = make_config(tmp_path / "c"), shutil.rmtree
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(publishing.shutil, "rmtree", cut)
        prepare(config)
    (work,) = tmp_path.glob(".partial-c-*")
    assert (work / "read.gone").is_dir()
    shutil.rmtree(work / "train")
    prepare(config)
    assert tree(tmp_path / "c") == tree(prepared.output)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == sorted(
        path.name for path in prepared.output.iterdir()
    )


def test_source_that_changes_while_it_is_read_is_refused(make_config, lines, records, tmp_path):
    def append(what, done, total):
        if what.startswith("tokenise"):
            lines(file, records(31))

    file = lines(tmp_path / "x.jsonl", records(30))
    settings = {"train": [{"path": str(file)}], "validation_share": 0.0}
    config = make_config(tmp_path / "out" / "c", **settings)
    with pytest.raises(DataError, match="changed while it was read") as caught:
        prepare(config, append)
    assert caught.value.where == str(file)
    assert not (tmp_path / "out" / "c").exists()
    lines(file, records(30))  # what was read is not taken for this
    told = []
    assert prepare(config, lambda what, *_: told.append(what)).built
    assert any(what.startswith("read") for what in told)
    assert [path.name for path in (tmp_path / "out").glob(".partial*")] == []


@pytest.mark.parametrize("number", [1, 18, 95])  # EPERM, EXDEV, EOPNOTSUPP
def test_disk_without_hard_links(number, make_config, prepared, tree, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(number, os.strerror(number), source)

    monkeypatch.setattr(os, "link", refuse)
    assert tree(prepare(make_config(tmp_path / "c")).output) == tree(prepared.output)
