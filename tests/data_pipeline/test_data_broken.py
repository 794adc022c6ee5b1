"""What of a corpus cannot be used, and what is said of it."""

from __future__ import annotations

import json

import pytest

from shoal.configs.errors import DataError
from shoal.data_pipeline.manifest import verify
from shoal.data_pipeline.shards import prepare

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
        ({"train": "empty file"}, "the corpus holds no documents", "x.jsonl"),
        ({"train": "empty folder"}, "no documents there", "folder"),
        ({"train": "missing"}, "no documents there", "gone"),
        ({"validation": "empty file"}, "validation split holds no documents", "x.jsonl"),
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


def test_cut_archive_stops_everything(make_config, corpus_file, tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(corpus_file.read_bytes()[:-20])
    config = make_config(tmp_path / "c", train=[{"path": str(tmp_path / "x.jsonl.gz")}])
    with pytest.raises(DataError, match="cannot be read") as caught:
        prepare(config)
    assert caught.value.where == str(tmp_path / "x.jsonl.gz")
    assert not (tmp_path / "c").exists()
