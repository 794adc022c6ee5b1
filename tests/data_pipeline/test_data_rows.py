"""Rows and manifests: damage to a folder of shards is named by the call that meets it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline import mds
from shoal.data_pipeline import rows as rows_module
from shoal.data_pipeline.manifest import (
    check_context,
    read_manifest,
    token_counts,
)
from shoal.data_pipeline.mapped import MappedShards, Room, choose_files
from shoal.data_pipeline.proof import verify
from shoal.data_pipeline.rows import Rows
from shoal.data_pipeline.shards import prepare
from shoal.data_pipeline.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def packed(tmp_path_factory, make_config):
    """As `prepared`, with compressed shards."""
    return prepare(make_config(tmp_path_factory.mktemp("packed") / "c", compression="zstd"))


@pytest.fixture(params=["plain", "zstd"])
def folder(request, prepared, packed, tmp_path):
    """A training split that the test may damage."""
    whole = prepared if request.param == "plain" else packed
    shutil.copytree(whole.output, tmp_path / "c")
    return tmp_path / "c" / "train"


def test_rows_come_in_the_order_asked_for(folder, prepared):
    rows, original = Rows.open(folder), Rows.open(prepared.train)
    numbers = np.random.default_rng(0).integers(0, len(rows), 500)
    found = rows.gather(numbers)
    assert found.tokens.dtype == np.int64 and found.tokens.shape == (500, 17)
    expected = original.gather(np.arange(len(rows)))
    for name in ("tokens", "segments", "targets"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)[numbers])
    tokens = expected.tokens
    assert np.array_equal(tokens[1:, 0], tokens[:-1, -1])  # rows share their borders
    begins = (tokens[:-1, 1:-1] == rows.manifest.eot_id) * 1  # none but the last row is padded
    assert np.array_equal(np.diff(expected.segments[:-1], axis=1), begins)


def test_no_rows_and_no_such_row(prepared):
    rows = Rows.open(prepared.train)
    none = rows.gather(np.asarray([], dtype=np.int64))
    assert none.tokens.shape == (0, 17) and none.segments.shape == (0, 16)
    for number in (-1, len(rows)):
        with pytest.raises(IndexError, match=f"from 0 to {len(rows) - 1}"):
            rows.gather(np.asarray([0, number]))


def swap_ids(tokenizer):
    """Exchange the ids of two words: a tokenizer of equal size that means something else."""
    file = tokenizer / "tokenizer.json"
    tree = json.loads(file.read_text())
    vocab = tree["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(tree))


REPLACEMENTS = {
    "other": (swap_ids, "not the one the shards were written with"),
    "trained": (
        lambda tokenizer: Tokenizer.train(["ab ab " * 9], 259).save(tokenizer),
        "not the one the shards were written with",
    ),
    "broken": (lambda t: (t / "tokenizer.json").write_text("{"), "cannot be loaded: not a tok"),
    "missing": (shutil.rmtree, "cannot be loaded: no tokenizer there"),
}


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_tokenizer_that_is_not_that_of_the_rows_is_refused(kind, noted, folder):
    """Also of shards from before the tokenizer's files were noted in the manifest."""
    replace, message = REPLACEMENTS[kind]
    if not noted:
        rewrite(folder, {"tokenizer_files": {}})
    Rows.open(folder)
    verify(folder)
    replace(folder.parent / "tokenizer")
    for call in (Rows.open, verify):
        with pytest.raises(DataError, match=message) as caught:
            call(folder)
        assert caught.value.where == str(folder.parent / "tokenizer")
        assert caught.value.exit_code == 3
        assert "prepare it again" in str(caught.value.fix)


def test_refused_tokenizer_is_told_by_its_fingerprint(folder):
    swap_ids(folder.parent / "tokenizer")
    with pytest.raises(DataError) as caught:
        Rows.open(folder)
    for fingerprint in (
        Tokenizer.load(folder.parent / "tokenizer").fingerprint,
        read_manifest(folder).tokenizer_fingerprint,
    ):
        assert fingerprint[:12] in caught.value.cause


def test_tokenizer_saved_anew_is_the_same(folder):
    file = folder.parent / "tokenizer" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    (file.parent / "notes.txt").write_text("mine")
    assert len(Rows.open(folder)) == verify(folder).rows


def test_tokenizer_as_prepared_is_not_loaded(folder, monkeypatch):
    """Loading takes most of a second for a large vocabulary, hashing its files milliseconds."""
    monkeypatch.delattr(Tokenizer, "load")
    Rows.open(folder)


def test_folder_may_be_given_as_a_dot(folder, monkeypatch):
    monkeypatch.chdir(folder)
    tokenizer = Rows.open(".").tokenizer_folder
    assert Tokenizer.load(tokenizer).fingerprint == read_manifest(".").tokenizer_fingerprint


def flip(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "missing": (lambda file: file.unlink(), "missing"),
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes instead of"),
    "empty": (lambda file: file.write_bytes(b""), "0 bytes instead of"),
    "longer": (lambda file: file.write_bytes(file.read_bytes() + b"x"), "bytes instead of"),
    "flipped": (flip, "corrupt"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shard_is_named_by_the_gather_that_meets_it(damage, folder):
    ruin, message = DAMAGES[damage]
    shards = read_manifest(folder).shards
    file = folder / shards[3].file
    ruin(file)
    rows = Rows.open(folder)
    first = sum(shard.rows for shard in shards[:3])
    rows.gather(np.arange(first))
    after = first + shards[3].rows
    rows.gather(np.arange(after, len(rows)))
    for numbers in ([first], [0, after - 1, len(rows) - 1]):
        with pytest.raises(DataError, match=message) as caught:
            rows.gather(np.asarray(numbers))
        assert caught.value.where == str(file)
        assert caught.value.exit_code == 3
    with pytest.raises(DataError, match=message) as caught:
        verify(folder)
    assert caught.value.where == str(file)


def rewrite(folder, change):
    """Change the facts of a manifest and sign it again, as a forger or an older version would."""
    manifest = read_manifest(folder)
    (folder / "manifest.json").write_text(manifest.model_copy(update=change).to_json())


def test_shard_of_another_layout_is_refused(folder):
    """The hash fits, the content does not: no row of it is given out."""
    shards = list(read_manifest(folder).shards)
    shards[0] = shards[0].model_copy(update={"rows": shards[0].rows + 1})
    shards[1] = shards[1].model_copy(update={"rows": shards[1].rows - 1})
    rewrite(folder, {"shards": tuple(shards)})
    with pytest.raises(DataError, match=r"holds \d+ rows, not") as caught:
        Rows.open(folder).gather(np.asarray([0]))
    assert caught.value.where == str(folder / shards[0].file)


def test_rows_of_another_size_are_refused(folder):
    rewrite(folder, {"context": 15})
    with pytest.raises(DataError, match="rows of another size"):
        Rows.open(folder).gather(np.asarray([0]))


def test_compressed_shard_of_another_content_is_refused(packed, tmp_path):
    shutil.copytree(packed.output, tmp_path / "c")
    folder = tmp_path / "c" / "train"
    shards = list(read_manifest(folder).shards)
    shards[0] = shards[0].model_copy(update={"raw_bytes": 5})
    rewrite(folder, {"shards": tuple(shards)})
    with pytest.raises(DataError, match="unpacks to another size"):
        Rows.open(folder).gather(np.asarray([0]))


def test_verify_proves_a_sound_folder(folder):
    assert verify(folder) == read_manifest(folder)


@pytest.mark.parametrize("name", ["index.json", "counts.npy", "dropped.jsonl"])
@pytest.mark.parametrize("missing", [True, False])
def test_verify_covers_the_other_files(name, missing, folder):
    file = folder / name
    if missing:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(DataError, match="is missing" if missing else "was altered") as caught:
        verify(folder)
    assert caught.value.where == str(file)


def test_verify_names_what_does_not_belong(folder):
    (folder / "shard.99999.mds").write_bytes(b"")
    with pytest.raises(DataError, match="not in its manifest") as caught:
        verify(folder)
    assert caught.value.where == str(folder / "shard.99999.mds")


@pytest.mark.parametrize("change", [{"rows": 5}, {"shards_hash": "0" * 64}])
def test_verify_counts(change, folder):
    rewrite(folder, change)
    with pytest.raises(DataError, match="do not agree with its shards"):
        verify(folder)


@pytest.mark.parametrize(
    ("key", "value"), [("rows", 3), ("context", 8), ("shards", []), ("config", {}), ("extra", 1)]
)
def test_altered_manifest(key, value, folder):
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    for call in (Rows.open, verify, token_counts, read_manifest):
        with pytest.raises(DataError, match="altered after it was written") as caught:
            call(folder)
        assert caught.value.where == str(file)


@pytest.mark.parametrize(
    "text", ["", "{", "{}", "[]", "[1]", '"x"', "null", "5", "\xff", '{"manifest_sha256": 1']
)
def test_not_a_manifest(text, tmp_path):
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="not a manifest") as caught:
        Rows.open(tmp_path)
    assert caught.value.where == str(tmp_path / "manifest.json")


def test_other_schema_version(folder):
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": 1}))
    with pytest.raises(DataError, match="schema version 1; this Shoal reads 2"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["../x.mds", "/etc/passwd", "a/b.mds", ".hidden"])
def test_shard_outside_its_folder_is_refused(name, folder):
    shard = read_manifest(folder).shards[0].model_copy(update={"file": name})
    rewrite(folder, {"shards": (shard,)})
    with pytest.raises(DataError, match="outside its folder"):
        read_manifest(folder)


def test_folder_without_shards(tmp_path, prepared):
    for folder in (tmp_path, tmp_path / "gone", prepared.output):
        with pytest.raises(DataError, match="no shards there") as caught:
            Rows.open(folder)
        assert caught.value.where == str(folder)


def test_context_must_fit(prepared):
    manifest = read_manifest(prepared.train)
    check_context(manifest, 16)
    for context in (17, 15):
        with pytest.raises(ConfigError, match=f"context {context} does not fit .* 16") as caught:
            check_context(manifest, context)
        assert caught.value.where == "model.context"
        assert "model.context=16" in str(caught.value.fix)
        assert f"with context={context}" in str(caught.value.fix)


def test_token_counts_are_the_targets(folder):
    rows = Rows.open(folder)
    targets = rows.gather(np.arange(len(rows))).targets
    counts = token_counts(folder)
    expected = np.bincount(targets[targets >= 0], minlength=rows.manifest.vocab_size)
    assert np.array_equal(counts, expected)
    assert counts[rows.manifest.eot_id] == rows.manifest.documents
    (folder / "counts.npy").write_bytes(b"other")
    with pytest.raises(DataError, match="missing or were altered"):
        token_counts(folder)


def count_open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("few", [True, False])
def test_mapped_shards_hold_no_more_files_than_told(few, folder, monkeypatch):
    rows, others = Rows.open(folder), Rows.open(folder)
    expected = rows.gather(np.arange(len(rows))).tokens
    shards = len(rows.manifest.shards)
    assert shards > 3
    room = Room(files=3, unpacked=10**9)
    rows._mapped, others._mapped = MappedShards(room), MappedShards(room)
    hashed = []
    check = rows_module.check_shard
    monkeypatch.setattr(rows_module, "check_shard", lambda *given: hashed.append(check(*given)))
    before = count_open_files()
    numbers = np.random.default_rng(0).permutation(len(rows))
    for wanted in np.array_split(numbers, len(rows) // shards if few else 2):
        for source in (rows, others):
            assert np.array_equal(source.gather(wanted).tokens, expected[wanted])
            assert len(rows._mapped) + len(others._mapped) <= 3
            assert count_open_files() <= before + 3
    assert len(hashed) == shards  # `rows` had checked all; one mapped again is not hashed again


def test_unpacked_shards_are_let_go_by_their_bytes_the_oldest_first():
    shards = MappedShards(Room(files=99, unpacked=80))
    for number in range(8):
        shards.put(number, np.zeros(1), 10)
    shards.touch([0])
    shards.put(8, np.zeros(1), 10)
    assert shards.numbers == [0, 3, 4, 5, 6, 7, 8]
    shards.put(9, np.zeros(1), 500)
    assert shards.numbers == [9]
    shards.put(10, np.zeros(1))
    assert 10 in shards.numbers
    assert [choose_files(most) for most in (1, 1024, 10**6)] == [1, 256, 1024]


def test_a_shard_that_cannot_be_opened_or_unpacked_is_named(folder, monkeypatch):
    rows = Rows.open(folder)

    def fail(*_, **__):
        raise OSError(24, os.strerror(24))

    monkeypatch.setattr(mds, "_map", fail)
    with pytest.raises(DataError, match="cannot be read: Too many open files") as caught:
        rows.gather(np.asarray([0]))
    assert caught.value.where == str(folder / rows.manifest.shards[0].file)
    assert "ulimit -n" in str(caught.value.fix)
