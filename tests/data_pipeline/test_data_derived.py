"""Shards made of shards, and the commands that look at them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline import derived
from shoal.data_pipeline.derived import merge, sample, take_rows
from shoal.data_pipeline.manifest import read_manifest, token_counts
from shoal.data_pipeline.proof import verify
from shoal.data_pipeline.rows import Rows
from shoal.data_pipeline.shards import prepare
from shoal.launcher.cli import app
from shoal.launcher.shards_cli import describe_rows


def gather(folder, numbers=None):
    rows = Rows.open(folder)
    return rows.gather(np.arange(len(rows)) if numbers is None else numbers)


def assert_same_rows(found, expected):
    for name in ("tokens", "segments", "targets"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))


@pytest.fixture(params=["raw", "zstd"])
def corpus(request, prepared, make_config, tmp_path):
    """The corpus, in raw or in compressed shards."""
    if request.param == "raw":
        return prepared
    return prepare(make_config(tmp_path / "packed", compression="zstd"))


def test_merged_rows_follow_each_other(corpus, tmp_path):
    parts = [corpus.validation, corpus.train]
    out = tmp_path / "all" / "train"
    merged = merge(out, parts)
    assert verify(out) == merged == read_manifest(out)
    found, first = gather(out), gather(parts[0])
    size = len(first.tokens)
    assert np.array_equal(found.tokens[:size], first.tokens)
    assert np.array_equal(found.targets[size:], gather(parts[1]).targets)
    manifests = [read_manifest(part) for part in parts]
    for name in ("rows", "tokens", "documents", "text_bytes"):
        assert getattr(merged, name) == sum(getattr(m, name) for m in manifests)
    for name in ("domains", "lengths"):
        assert sum(getattr(merged, name).values()) == merged.documents
    padding = [m.packing.padding_tokens for m in manifests]
    assert merged.packing.padding_tokens == sum(padding)
    assert merged.derived_from == tuple(m.shards_hash for m in manifests)
    assert np.array_equal(token_counts(out), token_counts(parts[0]) + token_counts(parts[1]))
    assert (out / merged.shards[0].file).stat().st_ino == (
        parts[0] / manifests[0].shards[0].file
    ).stat().st_ino  # no second copy


def test_merged_files_are_copied_where_they_cannot_be_linked(prepared, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(derived.os, "link", refuse)
    out = tmp_path / "all" / "train"
    merge(out, [prepared.train])
    assert_same_rows(gather(out), gather(prepared.train))
    assert (out / "shard.00000.mds").stat().st_nlink == 1


def test_sets_that_do_not_go_together(prepared, make_config, tmp_path):
    changes = {
        "tokenizer": {"tokenizer": {"vocab_size": 300}},
        "context": {"context": 15},
        "packing": {"packing": {"method": "best_fit"}},
        "compression": {"compression": "zstd"},
    }
    for name, change in changes.items():
        given = {} if name == "tokenizer" else {"tokenizer": {"path": str(prepared.tokenizer)}}
        other = prepare(make_config(tmp_path / name, **change | given)).train
        with pytest.raises(DataError, match=f"has another {name} than") as caught:
            merge(tmp_path / "all" / "train", [prepared.train, other])
        assert caught.value.where == str(other)
    with pytest.raises(ConfigError, match="rows of another one named"):
        merge(tmp_path / "all" / "train", [prepared.train, prepared.train])
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge(tmp_path / "all" / "train", [])
    assert not list((tmp_path / "all").glob("*")) if (tmp_path / "all").exists() else True


def test_sample_takes_rows_once(corpus, tmp_path):
    out, total = tmp_path / "some" / "train", read_manifest(corpus.train).rows
    manifest = sample(out, corpus.train, 300, seed=1)
    assert verify(out) == manifest
    assert (manifest.rows, manifest.compression) == (300, read_manifest(corpus.train).compression)
    assert manifest.config["sample"] == {"rows": 300, "seed": 1}
    assert manifest.derived_from == (read_manifest(corpus.train).shards_hash,)
    whole = {row.tobytes(): number for number, row in enumerate(gather(corpus.train).tokens)}
    taken = [whole[row.tobytes()] for row in gather(out).tokens]
    assert len(set(taken)) == 300 and taken == sorted(taken)
    assert abs(np.mean(taken) / total - 0.5) < 0.1
    again = sample(tmp_path / "again" / "train", corpus.train, 300, seed=1)
    other = sample(tmp_path / "other" / "train", corpus.train, 300, seed=2)
    assert again == manifest
    assert other.shards_hash != manifest.shards_hash


@pytest.mark.parametrize(
    "packing",
    [
        {},
        {"method": "best_fit"},
        {"method": "window"},
        {"separator": "none", "batch_documents": 7, "overlap": False},
    ],
    ids=lambda packing: "-".join(map(str, packing.values())) or "plain",
)
def test_all_rows_are_the_shards_themselves(packing, make_config, tmp_path):
    """What is counted anew is what was counted when they were packed."""
    train = prepare(make_config(tmp_path / "c", packing=packing)).train
    whole, out = verify(train), tmp_path / "d" / "train"
    found = sample(out, train, whole.rows, seed=0)
    assert [s.sha256 for s in found.shards] == [s.sha256 for s in whole.shards]
    same = ["rows", "tokens", "documents", "shards_hash"]
    if "separator" not in packing:  # without one the first tokens of rows are no targets
        same.append("text_bytes")
    assert [getattr(found, name) for name in same] == [getattr(whole, name) for name in same]
    assert found.packing == whole.packing.model_copy(update={"cut_documents": None})
    assert sum(whole.lengths.values()) == whole.documents


def test_rows_may_be_chosen_freely(corpus, tmp_path):
    numbers = np.asarray([900, 3, 3, 500, 0])
    manifest = take_rows(tmp_path / "d" / "train", corpus.train, numbers, {"why": "a test"})
    assert_same_rows(gather(tmp_path / "d" / "train"), gather(corpus.train, numbers))
    assert manifest.config["why"] == "a test"


def test_what_is_there_stays(prepared, tmp_path):
    out = tmp_path / "d" / "train"
    sample(out, prepared.train, 5, seed=0)
    before = {file: file.read_bytes() for file in out.iterdir()}
    for make in (lambda: sample(out, prepared.train, 6, 0), lambda: merge(out, [prepared.train])):
        with pytest.raises(ConfigError, match="is there already") as caught:
            make()
        assert caught.value.where == str(out)
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    for rows in (0, -1, 10**6):
        with pytest.raises(ConfigError, match="cannot be taken"):
            sample(tmp_path / "e", prepared.train, rows, 0)


def test_damaged_shards_give_nothing(prepared, tmp_path):
    shutil.copytree(prepared.output, tmp_path / "c")
    train = tmp_path / "c" / "train"
    file = train / "shard.00002.mds"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    for make in (
        lambda: sample(tmp_path / "d" / "train", train, 1, 0),
        lambda: merge(tmp_path / "d" / "train", [train]),
    ):
        with pytest.raises(DataError) as caught:
            make()
        assert caught.value.where == str(file)
    assert not (tmp_path / "d").exists()


def test_half_made_shards_leave_nothing(prepared, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(derived, "write_mds", fail)
    with pytest.raises(OSError, match="No space"):
        sample(tmp_path / "d" / "train", prepared.train, 5, 0)
    monkeypatch.undo()
    assert sorted(f.name for f in (tmp_path / "d").iterdir()) == [".train.lock", "tokenizer"]
    sample(tmp_path / "d" / "train", prepared.train, 5, 0)


def test_another_tokenizer_beside_is_refused(prepared, make_config, tmp_path):
    other = prepare(make_config(tmp_path / "c", tokenizer={"vocab_size": 300}))
    with pytest.raises(DataError, match="not the one the shards were written with"):
        sample(other.output / "some", prepared.train, 5, 0)
    assert not (other.output / "some").exists()


def test_rows_as_text(make_config, corpus_file, lines, tmp_path):
    texts = ["the cell fires", "café\nnaïve \x1b[31m", "stimuli in cortex"]
    file = lines(tmp_path / "t.jsonl", [{"id": str(i), "text": t} for i, t in enumerate(texts)])
    config = make_config(
        tmp_path / "c",
        train=[{"path": str(file)}],
        validation_share=0,
        context=64,
        packing={"method": "best_fit"},
        tokenizer={"vocab_size": 280},
    )
    train = prepare(config).train
    shown = list(describe_rows(train, 0, 9))
    manifest = read_manifest(train)
    assert shown[0] == (
        f"row 0: {manifest.tokens + 1} tokens, 3 documents, {64 - manifest.tokens - 1} of padding"
    )
    printed = "\n".join(shown)
    assert "    the cell fires\n" in printed + "\n"
    assert "    café\n    naïve �[31m" in printed
    assert "endoftext" not in printed


def test_commands(prepared, tmp_path):
    run = CliRunner()

    def shoal(*words):
        result = run.invoke(app, ["shards", *map(str, words)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert "all as written" in shoal("verify", prepared.train)
    shown = shoal("show", prepared.train)
    assert "concatenate, separator end_of_text" in shown and "padding" in shown
    assert shoal("show", prepared.train, "--rows", 2, "--first", 3).startswith("row 3: 17 tokens")
    out = tmp_path / "d" / "train"
    assert "20 rows" in shoal("sample", out, prepared.train, "--rows", 20, "--seed", 1)
    assert "verified" in shoal("merge", tmp_path / "e" / "train", out, prepared.train)
    assert json.loads((tmp_path / "e" / "train" / "manifest.json").read_text())["derived_from"]
