"""`shoal cluster`, embedding by a model of ours, and a run that reads what was resampled."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from shoal.configs.errors import ConfigError, DataError
from shoal.configs.load import build_config, load_config
from shoal.configs.schema import RunConfig
from shoal.data_pipeline.clustering import make_clusters
from shoal.launcher import cli
from shoal.launcher.clusters_cli import cluster_corpora
from shoal.launcher.corpus import open_corpus
from shoal.launcher.embedders import ExportEmbed

sys.path.insert(0, str(Path(__file__).parent))
from topics import make_config, prepare_topics


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return prepare_topics(tmp_path_factory.mktemp("topics"))


@pytest.fixture(scope="module")
def clusters(corpora, tmp_path_factory):
    return make_clusters(make_config(corpora, tmp_path_factory.mktemp("clusters") / "out"))


@pytest.fixture(scope="module")
def export(corpora, tmp_path_factory):
    """A small Llama of random weights with the corpora's tokenizer."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    shape = hf.LlamaConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(shape)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 1)
    folder = tmp_path_factory.mktemp("model") / "export"
    model.save_pretrained(folder)
    shutil.copytree(corpora / "generic" / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def test_the_command_shows_what_it_made(corpora, tmp_path, capsys):
    config = make_config(corpora, tmp_path / "out", processes=1)
    file = tmp_path / "clusters.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    for _ in range(2):  # the second time it is there
        with pytest.raises(SystemExit) as caught:
            cli.main(["cluster", str(file), "--rows", "500"])
        assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "8 clusters, 0 empty" in out
    assert "resampled: 500 rows" in out
    assert "clusters of domain" in out
    entries = [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").open()]
    assert [entry["kind"] for entry in entries] == ["cluster"]


def test_vectors_of_a_model_do_not_depend_on_their_batch(export):
    embed = ExportEmbed(export)
    texts = ["bkalob bmineb", "dpurad " * 5, "", "fsotif " * 60]
    together = embed(texts)
    assert together.shape == (4, 32)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    alone = np.concatenate([embed([text]) for text in texts])
    assert np.allclose(together, alone, atol=1e-5)  # sums of other shapes


def test_a_model_of_ours_embeds(corpora, export, tmp_path):
    embedding = {"method": "export", "path": str(export)}
    config = make_config(corpora, tmp_path / "out", embedding=embedding)
    made = cluster_corpora(config)
    assert made.built
    assert made.manifest.model_hash
    assert made.manifest.dimensions == 32
    assert not (made.folder / "embedder").exists()
    # Its states tell the words apart although it has learned nothing.
    assert made.facts("domain").total_variation > 0.5
    assert not cluster_corpora(config).built


def make_run(corpora, folder, **sample):
    stream = {"path": str(corpora / "generic" / "train"), "name": "sampled"}
    if sample:
        stream["sample"] = {"clusters": str(folder), "domain": "domain"} | sample
    model = {"context": 64, "width": 32, "num_layers": 1, "num_heads": 2}
    data = {"train": [stream], "validation": None}
    config = load_config(RunConfig, "default.yaml").model_dump(mode="json")
    config["model"] |= model
    return build_config(RunConfig, config | {"data": data, "prepare": None}, "test")


def test_a_run_remembers_what_it_samples(corpora, clusters):
    plain, full, half = (
        open_corpus(make_run(corpora, clusters.folder, **sample))
        for sample in ({}, {"temper": 1.0}, {"temper": 0.5})
    )
    assert plain.orders(0) == {}
    assert "sampled" not in plain.identity()["order"]
    assert full.identity() != plain.identity()
    assert full.identity() != half.identity()
    positions = np.arange(3000)
    drawn = [corpus.orders(0)[0].rows(positions) for corpus in (full, half)]
    histogram = clusters.histogram("domain")
    of_domain = [np.mean(histogram[clusters.assignments("generic")[rows]] > 0) for rows in drawn]
    assert of_domain[0] == 1
    assert np.array_equal(open_corpus(make_run(corpora, clusters.folder, temper=1)).orders(0)[0]
                          .rows(positions), drawn[0])  # fmt: skip
    assert not np.array_equal(full.orders(1)[0].rows(positions), drawn[0])


def test_a_run_refuses_wrong_clusters(corpora, clusters, tmp_path):
    with pytest.raises(ConfigError, match="no corpus 'law'"):
        open_corpus(make_run(corpora, clusters.folder, domain="law"))
    with pytest.raises(DataError, match="no clusters there"):
        open_corpus(make_run(corpora, tmp_path, temper=1.0))
    changed = make_run(corpora, clusters.folder, temper=1.0)
    stream = changed.data.train[0].model_copy(update={"path": str(corpora / "domain" / "train")})
    data = changed.data.model_copy(update={"train": (stream,)})
    with pytest.raises(DataError, match="other shards"):
        open_corpus(changed.model_copy(update={"data": data}))
