"""A forecast agrees with what preparing the corpus comes to, and says when GPUs would wait."""

from __future__ import annotations

import csv
import random

import pyarrow
import pyarrow.parquet
import pytest

from shoal.configs.corpus import SourceConfig
from shoal.configs.errors import DataError
from shoal.data_pipeline import probing, windows
from shoal.data_pipeline.forecast import Feed, Forecast, forecast_corpus, forecast_feed
from shoal.data_pipeline.manifest import read_manifest
from shoal.data_pipeline.probing import Probe, probe_corpus
from shoal.data_pipeline.shards import prepare


def silent(what: str, done: int, total: int | None) -> None:
    pass


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, lines, records, make_config):
    """A corpus of several files, much larger than the sample that is taken."""
    folder = tmp_path_factory.mktemp("forecast")
    for number in range(12):
        lines(folder / "text" / f"{number}.jsonl", records(400, seed=number))
    lines(folder / "text" / "rest.jsonl.gz", records(400, seed=99))
    trained = prepare(make_config(folder / "first"))
    return make_config(
        folder / "corpus",
        train=[{"path": str(folder / "text")}],
        validation_share=0.0,
        tokenizer={"path": str(trained.tokenizer)},
        compression="zstd",
        shard_bytes=100_000,
    )


def test_a_sample_tells_what_the_corpus_comes_to(corpus, tmp_path) -> None:
    probe = probe_corpus(corpus, tmp_path, silent, sample_bytes=120_000)
    (source,) = probe.sources
    assert probe.sample_bytes < source.text_bytes / 4
    forecast = forecast_corpus(corpus, probe, processes=2)
    manifest = read_manifest(prepare(corpus).train)
    assert forecast.text_bytes == pytest.approx(manifest.text_bytes, rel=0.15)
    assert forecast.tokens == pytest.approx(manifest.tokens, rel=0.15)
    assert forecast.rows == pytest.approx(manifest.rows, rel=0.15)
    assert forecast.documents == pytest.approx(manifest.documents, rel=0.15)
    stored = sum(shard.bytes for shard in manifest.shards)
    assert forecast.shard_bytes == pytest.approx(stored, rel=0.2)
    assert forecast.seconds > 0
    assert {"tokenise documents"} <= {stage.name for stage in forecast.stages}


def write_table(file, rows):
    if file.suffix == ".parquet":
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, file, row_group_size=100, compression="none")
    else:
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.parquet", "limited.jsonl"]
)
def test_text_is_told_from_what_lies_beside_it(
    name, corpus, lines, records, tmp_path, monkeypatch
) -> None:
    """Fields that are not read, and domains that are not wanted, are most of the file."""
    # zstd is unpacked by whole blocks of 128 KB.
    monkeypatch.setattr(windows, "WINDOW_BYTES", 300_000 if name.endswith("zst") else 100_000)
    noise = random.Random(0)
    rows = [
        record | {"other": noise.randbytes(300).hex()}
        for number in range(5)
        for record in records(300, seed=number)
    ]
    if name.endswith((".csv", ".parquet")):
        write_table(tmp_path / name, rows)
    else:
        lines(tmp_path / name, rows)
    real = sum(len(row["text"].encode()) for row in rows if row["domain"] == "bio")
    limit = real // 3 if name.startswith("limited") else None
    source = {"path": str(tmp_path / name), "domains": ["bio"], "max_bytes": limit}
    config = corpus.model_copy(update={"train": (SourceConfig.model_validate(source),)})
    (tmp_path / "work").mkdir()
    (size,), taken = probing._write_sample(config, tmp_path / "work", 10**9, silent)
    assert size.text_bytes == pytest.approx(limit or real, rel=0.2)
    assert 0 < taken < real
    assert not size.exact


def test_more_processes_take_less_time_but_for_what_one_does_alone(corpus, tmp_path) -> None:
    probe = probe_corpus(corpus, tmp_path, silent, sample_bytes=60_000)
    probe.stages = {"start": 1.0, "tokenise documents": 10.0, "merge candidates": 2.0}
    one, four = (forecast_corpus(corpus, probe, n) for n in (1, 4))
    alone = {stage.name: stage.seconds for stage in four.stages}
    assert alone["start"] == 1.0
    before = {stage.name: stage.seconds for stage in one.stages}
    assert alone["tokenise documents"] == pytest.approx(before["tokenise documents"] / 4)
    assert alone["merge candidates"] == before["merge candidates"]


def test_a_source_of_unknown_size_is_refused(corpus, tmp_path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    config = corpus.model_copy(
        update={"train": (corpus.train[0].model_copy(update={"path": str(empty)}),)}
    )
    with pytest.raises(DataError, match="size of the corpus"):
        probe_corpus(config, tmp_path, silent)


@pytest.fixture
def probe(corpus, tmp_path) -> Probe:
    return probe_corpus(corpus, tmp_path, silent, sample_bytes=60_000)


@pytest.mark.parametrize(
    ("share", "bandwidth", "waits_for"),
    [(0.5, None, "nothing"), (2.0, None, "gathering rows"), (0.5, 10.0, "downloads")],
)
def test_gpus_wait_for_what_is_slowest(share, bandwidth, waits_for, corpus, probe: Probe) -> None:
    forecast: Forecast = forecast_corpus(corpus, probe, 1)
    rate = share * probe.gather_tokens_per_second
    fed = forecast_feed(forecast, probe, Feed(8, rate, 2, bandwidth))
    assert fed.cause == waits_for
    assert (fed.stalled_share > 0) == (waits_for != "nothing")
    if bandwidth:
        assert fed.download_bytes == -(-forecast.shard_bytes // 2)
        assert fed.stalled_share == pytest.approx(1 - bandwidth / fed.demand_bytes)
