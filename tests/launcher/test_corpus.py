"""The corpus of a run: what a checkpoint remembers of it, and shards by URL beside local ones."""

from __future__ import annotations

import json
from types import SimpleNamespace

import fsspec
import pytest

from shoal.configs.data import DataConfig
from shoal.configs.errors import DataError
from shoal.configs.schema import ModelConfig, RunConfig, TrainConfig
from shoal.data_pipeline.rows import Rows
from shoal.launcher import corpus as corpora
from shoal.launcher.corpus import Corpus, open_corpus, wait_for_corpus
from shoal.launcher.exports import _describe_run
from shoal.trainer.identity import check_same_inputs

TWO = {"train": [{"path": "d/general/train"}, {"path": "d/law/train"}]}


def identify(run_rows=1000, **changes):
    data = DataConfig.model_validate(TWO | changes)
    rows = [SimpleNamespace(manifest=SimpleNamespace(shards_hash=name)) for name in "ab"]
    streams = [(part, stream.share) for part, stream in zip(rows, data.train, strict=True)]
    return Corpus(streams, {}, data, run_rows=run_rows).identity()  # type: ignore[arg-type]


CHANGES = {
    "weight": {"train": [{"path": "d/general/train", "weight": 2}, {"path": "d/law/train"}]},
    "repeat": {"train": [{"path": "d/general/train"}, {"path": "d/law/train", "repeat": 1}]},
    "choose": {"train": [{"path": "d/general/train"}, {"path": "d/law/train", "choose": 1}]},
    "block": {"shuffle_block_rows": 64},
    "schedule": {"schedule": [{"from_tokens": 9, "weights": {"law/train": 1}}]},
    "later": {"schedule": [{"from_tokens": 8, "weights": {"law/train": 1}}]},
    "other": {"schedule": [{"from_tokens": 9, "weights": {"general/train": 1}}]},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoint_of_another_mixture_or_order_is_refused(name, tmp_path):
    stored, now = identify(), identify(**CHANGES[name])
    with pytest.raises(DataError, match=r"was trained on (other rows|rows in another order)"):
        check_same_inputs(stored, now, tmp_path)
    check_same_inputs(stored, now, tmp_path, ("streams", "order"))
    for other in CHANGES.keys() - {name}:
        assert identify(**CHANGES[other]) != now


@pytest.mark.parametrize("name", ["repeat", "choose"])
def test_counted_rows_are_spread_over_the_run_and_know_its_length(name, tmp_path):
    """Streams by weight go on as they were; with `repeat` every position moves."""
    stored, longer = (identify(rows, **CHANGES[name]) for rows in (1000, 2000))
    with pytest.raises(DataError, match=r"rows in another order.*run_rows.*1000.*2000") as caught:
        check_same_inputs(stored, longer, tmp_path, ("train.tokens", "streams"))
    assert "checkpoint.allow_changes=[order]" in str(caught.value.fix)
    check_same_inputs(stored, longer, tmp_path, ("order",))
    assert identify(1000) == identify(2000)


def test_where_and_how_it_is_read_changes_nothing():
    moved = {"train": [{"path": "s3://b/x", "name": "x"}, {"path": "e/law/train"}]}
    assert identify(**moved, cache="/c", cache_bytes=9, read_ahead_steps=0) == identify()


def test_a_checkpoint_from_before_the_order_was_noted_is_refused(tmp_path):
    now = identify()
    with pytest.raises(DataError, match="was trained on rows in another order: None, now"):
        check_same_inputs({"streams": now["streams"]}, now, tmp_path)


def make_rows(name, count=50):
    facts = SimpleNamespace(manifest=SimpleNamespace(context=16, shards_hash=name))
    return type("R", (), {"__len__": lambda self: count, **vars(facts)})()


def test_an_export_says_all_that_went_into_a_model(tmp_path):
    data = DataConfig.model_validate(TWO | {"validation": {"law": "d/law/validation"}})
    train = [(make_rows(name), 1.0) for name in "ab"]
    corpus = Corpus(train, {"law": make_rows("c")}, data)  # type: ignore[arg-type]
    config = RunConfig(
        data=data, model=ModelConfig(context=16), train=TrainConfig(tokens=16 * 99, batch_rows=32)
    )
    manifest = SimpleNamespace(step=2, position={"passed_over": 1})
    facts = _describe_run(tmp_path, config, manifest, corpus)  # type: ignore[arg-type]
    provenance = facts["provenance"]
    assert provenance["shards_hash"] == "a"
    assert provenance["data"] == corpus.identity() | {"validation": {"law": "c"}}
    assert [hash for hash, _ in provenance["data"]["streams"]] == ["a", "b"]
    assert provenance["streams_total"] == {"general/train": 48, "law/train": 48}
    assert json.loads(json.dumps(facts)) == facts


def test_the_mixture_of_a_run_fills_its_last_step():
    data = DataConfig.model_validate({"train": [{"path": "d/x", "repeat": 2}]})
    corpus = Corpus([(make_rows("a"), 1.0)], {}, data)  # type: ignore[arg-type]
    config = RunConfig(
        data=data, model=ModelConfig(context=16), train=TrainConfig(tokens=1600, batch_rows=32)
    )
    assert config.steps * 32 == 128
    assert corpus.mixture(config).count_rows(100).tolist() == [100]


class Opened:
    """Stands in for rows: opened once per split, of `rows` rows."""

    opened: list[str] = []
    rows = 9

    def __init__(self, path):
        self.where = path
        self.opened.append(path)
        empty = "empty" in path
        self.manifest = SimpleNamespace(
            rows=self.rows, tokens=0 if empty else 99, context=16, tokenizer_fingerprint="f"
        )


@pytest.fixture
def opened(monkeypatch):
    monkeypatch.setattr(Rows, "open", lambda path, cache: Opened(path))
    monkeypatch.setattr(Opened, "opened", [])
    return Opened.opened


def run_config(**data):
    return RunConfig(
        data=DataConfig.model_validate(data),
        model=ModelConfig(context=16),
        train=TrainConfig(tokens=9),
    )


def test_a_split_that_several_streams_read_is_opened_once(opened):
    train = [{"path": path, "name": str(n)} for n, path in enumerate(("d/x", "./d/x", "s3://b/x"))]
    corpus = open_corpus(run_config(train=train, validation={"v": "s3://b/x/", "w": "d/y"}))
    assert opened == ["d/x", "s3://b/x", "d/y"]
    assert corpus.train[0][0] is corpus.train[1][0]
    assert corpus.validations["v"] is corpus.train[2][0]


def test_a_validation_split_with_nothing_to_score_is_refused(opened):
    with pytest.raises(DataError, match="'law' holds nothing to score: 9 rows, 0 tok") as caught:
        open_corpus(
            run_config(train=[{"path": "d/x"}], validation={"all": "d/y", "law": "d/empty"})
        )
    assert caught.value.where == "d/empty"


@pytest.mark.parametrize("url", [False, True])
@pytest.mark.parametrize(("rank", "local_rank"), [(0, 0), (1, 1), (2, 0), (3, 1)])
def test_who_prepares_and_who_waits(url, rank, local_rank, tmp_path, monkeypatch):
    """Manifests appear one after another while the others wait."""
    output = "memory://waited" if url else str(tmp_path / "c")
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    words = f"output: {output}\ntrain: [{{path: x.jsonl}}]\ntokenizer: {{vocab_size: 300}}\n"
    (tmp_path / "c.yaml").write_text(words)
    train, validation = f"{output}/train", f"{output}/validation"
    config = RunConfig(
        data=DataConfig.model_validate({"train": [{"path": train}], "validation": validation}),
        prepare=str(tmp_path / "c.yaml"),
        model=ModelConfig(context=16),
        train=TrainConfig(tokens=1600, batch_rows=32),
    )
    done = []

    def appear(seconds):
        done.append("wait")
        path = [train, validation][len(done) - 1]
        with fsspec.open(f"{path}/manifest.json", "w", auto_mkdir=True) as file:
            file.write("{}")

    monkeypatch.setattr(corpora.time, "sleep", appear)
    monkeypatch.setattr(corpora, "ensure_prepared", lambda _: done.append("prepare"))
    monkeypatch.setattr(corpora, "open_corpus", lambda _: done.append("open"))
    wait_for_corpus(config, SimpleNamespace(rank=rank, local_rank=local_rank))
    prepares = rank == 0 if url else local_rank == 0
    opens = ["open"] if local_rank == 0 else []
    assert done == (["prepare"] if prepares else ["wait", "wait"]) + opens
