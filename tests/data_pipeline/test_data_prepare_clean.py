"""`prepare` with cleaning: what is left is in the rows, what is not is listed and accounted for."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from shoal.configs.corpus import CleanConfig
from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline import pieces
from shoal.data_pipeline.documents import Document
from shoal.data_pipeline.manifest import hash_file, read_manifest, token_counts
from shoal.data_pipeline.pieces import held_out
from shoal.data_pipeline.proof import verify
from shoal.data_pipeline.shards import prepare, training_texts
from shoal.data_pipeline.tokenizer import Tokenizer

SHARE = 0.1
EVALUATION = "the tide gauge at the old harbour was read twice a day by the same patient keeper"


def is_held(name):
    return held_out(Document(name, "", "", ""), SHARE)


TWIN = next(f"twin{i}" for i in range(9) if not is_held(f"twin{i}"))


@pytest.fixture
def evaluation(lines, tmp_path):
    return lines(tmp_path / "test.jsonl", [{"question": EVALUATION}])


@pytest.fixture
def clean(evaluation):
    """Short documents pass; what is removed is planted."""
    return {
        "filters": {"gopher_quality": {"min_words": 3, "min_stop_words": 0,
                                       "min_alphabetic_words": 0.5, "min_mean_word_length": 1},
                    "gopher_repetition": None},
        "decontaminate": {"against": [str(evaluation)]},
        "near_duplicates": None,
    }  # fmt: skip


@pytest.fixture
def planted(records):
    """Distinct documents, and between them some of every kind that is removed."""
    documents = [r | {"text": f"{r['text']} number {i}."} for i, r in enumerate(records(200))]
    short = {"id": "short", "text": "too few", "domain": "bio"}
    seen = {"id": "seen", "text": f"They say that {EVALUATION}, all year.", "domain": "law"}
    twin = documents[20] | {"id": TWIN}
    documents[50:50] = [short]
    documents[90:90] = [twin, seen]
    return documents


def removed(folder):
    return [json.loads(line) for line in (folder / "removed.jsonl").open()]


def test_removals_are_listed_and_add_up(make_config, lines, planted, clean, evaluation, tmp_path):
    file = lines(tmp_path / "x.jsonl", planted)
    config = make_config(tmp_path / "c", train=[{"path": str(file)}], clean=clean)
    done = prepare(config)
    found = {"train": verify(done.train), "validation": verify(done.validation)}
    gone = {"short": "gopher_quality: too few words", "seen": "decontamination"}
    gone |= {TWIN: "exact_duplicate"}
    order = [d["id"] for d in planted]
    for name, manifest in found.items():
        facts = manifest.cleaning
        mine = [d for d in planted if is_held(d["id"]) == (name == "validation")]
        expected = [(i, gone[i]) for i in order if i in gone and is_held(i) == (name != "train")]
        assert [(r["id"], r["reason"]) for r in removed(done.output / name)] == expected
        assert facts.removed == dict(Counter(reason for _, reason in expected))
        assert facts.documents_read == len(mine) == manifest.sources[0].documents
        assert facts.documents_kept == manifest.documents == len(mine) - len(expected)
        kept = [d["text"] for d in mine if d["id"] not in gone]
        assert facts.bytes_kept == manifest.text_bytes == sum(len(t.encode()) for t in kept)
        assert facts.bytes_read == sum(len(d["text"].encode()) for d in mine)
        assert manifest.domains == Counter(d["domain"] for d in mine if d["id"] not in gone)
        assert facts.evaluation_sets == {str(evaluation): hash_file(evaluation)}
        tokenizer = Tokenizer.load(done.tokenizer)
        tokens = sum(len(ids) + 1 for ids in tokenizer.encode_batch(kept))
        assert token_counts(done.output / name).sum() == manifest.tokens == tokens
    assert sum(len(removed(done.output / name)) for name in found) == 3
    (twin,) = [r for name in found for r in removed(done.output / name) if r["id"] == TWIN]
    assert planted[20]["id"] in twin["match"]
    texts = Counter(training_texts(config))
    assert not any("tide gauge" in text or text == "too few" for text in texts)


def test_training_copy_of_a_held_out_document_goes(make_config, lines, planted, clean, tmp_path):
    """Though it comes first in the file: else training would see what validation asks."""
    first = next(d for d in planted if not is_held(d["id"]))
    late = next(f"v{i}" for i in range(100) if is_held(f"v{i}"))
    file = lines(tmp_path / "x.jsonl", [*planted, first | {"id": late}])
    done = prepare(make_config(tmp_path / "c", train=[{"path": str(file)}], clean=clean))
    assert first["id"] in [r["id"] for r in removed(done.train)]
    assert late not in [r["id"] for r in removed(done.validation)]


def test_near_duplicate_names_its_twin(make_config, lines, clean, tmp_path):
    """Also where the two lie in different pieces of different parts."""
    chooser = random.Random(5)
    documents = [
        {"id": f"n{i}", "text": " ".join(f"w{chooser.randrange(3000)}" for _ in range(120))}
        for i in range(60)
    ]
    first = next(d for d in documents if not is_held(d["id"]))
    words = first["text"].split()
    words[60] = "changed"
    file = lines(tmp_path / "x.jsonl", [*documents, {"id": TWIN, "text": " ".join(words)}])
    settings = {"train": [{"path": str(file)}], "clean": clean | {"near_duplicates": {}}}
    done = prepare(make_config(tmp_path / "c", context=64, **settings))
    (gone,) = removed(done.train)
    assert (gone["id"], gone["reason"]) == (TWIN, "near_duplicate")
    assert first["id"] in gone["match"]
    assert 0.8 < gone["similarity"] < 1
    assert read_manifest(done.train).cleaning.removed == {"near_duplicate": 1}


def test_pieces_do_not_show(make_config, lines, planted, clean, tree, tmp_path, monkeypatch):
    file = lines(tmp_path / "x.jsonl", planted)
    settings = {"train": [{"path": str(file)}], "clean": clean | {"near_duplicates": {}}}
    one = prepare(make_config(tmp_path / "a", **settings))
    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", 1500)
    monkeypatch.setattr(pieces, "MIN_PART_BYTES", 5000)
    told = []
    many = prepare(make_config(tmp_path / "b", **settings), lambda *facts: told.append(facts))
    assert tree(one.output) == tree(many.output)
    assert {done for what, done, _ in told if what == "clean documents (bytes)"}
    assert sum(what == "clean documents (bytes)" for what, _, _ in told) > 10


def test_nothing_left_is_an_error_that_says_why(make_config, lines, planted, clean, tmp_path):
    file = lines(tmp_path / "x.jsonl", planted)
    clean["filters"]["gopher_quality"]["min_words"] = 5000
    with pytest.raises(DataError, match=r"removed all \d+ documents .*too few words") as caught:
        prepare(make_config(tmp_path / "c", train=[{"path": str(file)}], clean=clean))
    assert caught.value.where == "clean"
    assert not (tmp_path / "c").exists()


def test_missing_evaluation_set_stops_before_anything(make_config, clean, evaluation, tmp_path):
    evaluation.unlink()
    told = []
    with pytest.raises(DataError, match="no evaluation set") as caught:
        prepare(make_config(tmp_path / "c", clean=clean), lambda *facts: told.append(facts))
    assert caught.value.where == str(evaluation)
    assert told == []


def test_changed_evaluation_set_is_another_corpus(make_config, clean, evaluation, tmp_path):
    config = make_config(tmp_path / "c", clean=clean)
    prepare(config)
    assert not prepare(config).built
    evaluation.write_text(json.dumps({"question": EVALUATION + " in winter"}))
    with pytest.raises(ConfigError, match="another corpus"):
        prepare(config)


def test_without_cleaning_nothing_is_said_of_it(prepared):
    assert read_manifest(prepared.train).cleaning is None
    assert not (prepared.train / "removed.jsonl").exists()
    assert CleanConfig().exact_duplicates
