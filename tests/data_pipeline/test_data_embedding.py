"""Texts to vectors: by words, and by a sentence-transformers model that may run no code."""

from __future__ import annotations

import json

import numpy as np
import pytest

from shoal.configs.clusters import EmbeddingConfig
from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline.embedding import (
    FACTS,
    TfidfEmbed,
    fit_tfidf,
    hash_folder,
    normalise,
    open_sentence_model,
)
from shoal.data_pipeline.keywords import count_rows_with, rank_words

TEXTS = ["neuron cortex spike", "spike cortex neuron neuron"]
TEXTS += ["court judge appeal", "appeal judge", ""]
CONFIG = EmbeddingConfig(dimensions=3, buckets=256)


@pytest.fixture
def embed(tmp_path):
    return fit_tfidf([TEXTS[:2], TEXTS[2:]], CONFIG, 0, tmp_path / "embedder")


def test_alike_texts_have_alike_vectors(embed):
    vectors = embed(TEXTS)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), [1, 1, 1, 1, 0])
    alike = vectors @ vectors.T
    assert alike[0, 1] > 0.9
    assert alike[2, 3] > 0.7
    assert abs(alike[0, 2]) < 0.1
    assert not embed(["words never seen"])[0].dot(vectors[0]) > 0.5


def test_fitted_alike_in_any_batches(embed, tmp_path):
    again = fit_tfidf([TEXTS], CONFIG, 0, tmp_path / "again")
    for file in embed.folder.iterdir():
        assert file.read_bytes() == (again.folder / file.name).read_bytes()
    assert json.loads((embed.folder / FACTS).read_text())["rows"] == len(TEXTS)


def test_a_sample_without_words(tmp_path):
    with pytest.raises(DataError, match="next to no words"):
        fit_tfidf([["", "."]], CONFIG, 0, tmp_path / "embedder")


def test_an_embedder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        TfidfEmbed(tmp_path)(["text"])
    np.save(tmp_path / "rarity.npy", np.asarray([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        TfidfEmbed(tmp_path)(["text"])


def test_normalise_keeps_zeros():
    assert normalise(np.asarray([[3.0, 4.0], [0.0, 0.0]])).tolist() == [
        pytest.approx([0.6, 0.8]),
        [0, 0],
    ]


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory):
    """A BERT of random weights, saved as sentence-transformers does."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers import models as parts
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("sentences")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    BertModel(shape).save_pretrained(folder / "bert")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    transformer = parts.Transformer(str(folder / "bert"), max_seq_length=32)
    pooling = parts.Pooling(16)
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(folder / "model"))
    return folder / "model"


@pytest.mark.slow
def test_a_sentence_model_embeds(sentence_model):
    embed = open_sentence_model(sentence_model)
    vectors = embed(["a b c", "a b c", "h i j"])
    assert vectors.shape == (3, 16)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
    assert np.allclose(vectors[0], vectors[1], atol=1e-6)
    assert not np.allclose(vectors[0], vectors[2], atol=1e-3)


@pytest.fixture
def model_files(tmp_path):
    """What a folder needs to pass the check, without weights."""
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_models_with_code_or_pickles_are_refused(model_files):
    assert open_sentence_model(model_files).folder == model_files
    (model_files / "config.json").write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    with pytest.raises(DataError, match="auto_map"):
        open_sentence_model(model_files)
    (model_files / "config.json").write_text("{}")
    (model_files / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match="pickled"):
        open_sentence_model(model_files)
    (model_files / "pytorch_model.bin").rename(model_files / "evil.py")
    with pytest.raises(DataError, match="holds code"):
        open_sentence_model(model_files)


@pytest.mark.parametrize("kind", ["evil.Model", None, "sentence_transformersx.Model"])
def test_classes_of_the_folder_are_refused(model_files, kind):
    (model_files / "modules.json").write_text(json.dumps([{"type": kind}]))
    with pytest.raises(DataError, match="code of its own"):
        open_sentence_model(model_files)


def test_names_on_a_hub_are_refused():
    with pytest.raises(ConfigError, match="no sentence-transformers model"):
        open_sentence_model("sentence-transformers/all-MiniLM-L6-v2")


def test_a_changed_model_has_another_hash(model_files):
    before = hash_folder(model_files)
    (model_files / "config.json").write_text("{} ")
    assert hash_folder(model_files) != before


def test_words_that_tell_a_cluster():
    inside = count_rows_with(["neuron neuron spike 12", "neuron paper"])
    assert inside == {"neuron": 2, "spike": 1, "paper": 1}
    outside = count_rows_with(["paper law", "paper court", "paper", "neuron"])
    assert rank_words(inside, 2, outside, 4) == ["neuron", "spike", "paper"]
