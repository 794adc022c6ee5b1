"""The corpus of a run: what a checkpoint remembers of it, and shards by URL beside local ones."""

from __future__ import annotations

from types import SimpleNamespace

import fsspec
import pytest

from shoal.configs.data import DataConfig
from shoal.configs.errors import DataError
from shoal.configs.schema import ModelConfig, RunConfig, TrainConfig
from shoal.launcher import corpus as corpora
from shoal.launcher.corpus import Corpus, wait_for_corpus
from shoal.trainer.identity import check_same_inputs

TWO = {"train": [{"path": "d/general/train"}, {"path": "d/law/train"}]}


def identify(**changes):
    data = DataConfig.model_validate(TWO | changes)
    rows = [SimpleNamespace(manifest=SimpleNamespace(shards_hash=name)) for name in "ab"]
    streams = [(part, stream.share) for part, stream in zip(rows, data.train, strict=True)]
    return Corpus(streams, {}, data).identity()  # type: ignore[arg-type]


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


def test_where_and_how_it_is_read_changes_nothing():
    moved = {"train": [{"path": "s3://b/x", "name": "x"}, {"path": "e/law/train"}]}
    assert identify(**moved, cache="/c", cache_bytes=9, read_ahead_steps=0) == identify()


def test_a_checkpoint_from_before_the_order_was_noted_is_refused(tmp_path):
    now = identify()
    with pytest.raises(DataError, match="was trained on rows in another order: None, now"):
        check_same_inputs({"streams": now["streams"]}, now, tmp_path)


def test_the_mixture_of_a_run_fills_its_last_step():
    data = DataConfig.model_validate({"train": [{"path": "d/x", "repeat": 2}]})
    rows = SimpleNamespace(manifest=SimpleNamespace(context=16))
    corpus = Corpus([(type("R", (), {"__len__": lambda self: 50, **vars(rows)})(), 1.0)], {}, data)
    config = RunConfig(
        data=data, model=ModelConfig(context=16), train=TrainConfig(tokens=1600, batch_rows=32)
    )
    assert config.steps * 32 == 128
    assert corpus.mixture(config).count_rows(100).tolist() == [100]


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
