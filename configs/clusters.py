"""What `shoal cluster` reads and writes: corpora, embedding, number of clusters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from shoal.configs.corpus import ExecutorConfig
from shoal.configs.section import Count, Section


class ClusterCorpus(Section):
    """Shards of one split whose rows are put in clusters."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="what tables and streams call it"
    )
    path: str = Field(description="folder of shards written by shoal prepare, or its URL")


class EmbeddingConfig(Section):
    """How the text of a row becomes a vector of length one."""

    method: Literal["tfidf", "sentence_transformers", "export"] = Field(
        "tfidf",
        description="tfidf: words, weighted by their rarity, reduced by a singular value "
        "decomposition; sentence_transformers: a model in a local folder; export: mean of the last "
        "hidden states of an export of ours, or of any Hugging Face folder",
    )
    path: str | None = Field(
        None, description="folder of the model, safetensors only; nothing is downloaded"
    )
    dimensions: Count = Field(128, description="tfidf: numbers of a vector, at most")
    buckets: Count = Field(
        2**16, description="tfidf: words are hashed to so many, so that no vocabulary is held"
    )
    sample_rows: Count = Field(
        32_768, description="tfidf: rows the rarity of words and the decomposition are taken from"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="export: of the weights")

    @model_validator(mode="after")
    def _has_model(self) -> EmbeddingConfig:
        if (self.method == "tfidf") != (self.path is None):
            raise ValueError("embedding.path goes with sentence_transformers and export")
        return self


class ClusterConfig(Section):
    """Generic and domain shards -> clusters, assignments, histograms (arXiv:2402.01093)."""

    name: str = Field("clusters", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output: str = Field("data/clusters", description="folder that receives the clusters")
    generic: ClusterCorpus = Field(description="what is clustered, and what will be sampled from")
    domains: tuple[ClusterCorpus, ...] = Field(
        min_length=1, description="training splits only: weights must not know evaluation text"
    )
    embedding: EmbeddingConfig = EmbeddingConfig()
    clusters: int = Field(
        64,
        ge=4,
        le=65_536,
        description="over 1,024 in two levels: about the square root of them, each divided again",
    )
    method: Literal["auto", "lloyd", "minibatch"] = Field(
        "auto",
        description="of k-means; auto: lloyd where sampled rows x "
        "clusters (of one level) is below 10 million",
    )
    restarts: Count = Field(3, description="k-means runs; the one with the least inertia is taken")
    sample_rows: Count = Field(
        131_072, description="generic rows k-means sees; what memory grows with"
    )
    task_rows: Count = Field(65_536, description="rows of one task")
    words: int = Field(8, ge=0, description="that name a cluster in the table")
    seed: int = Field(0, ge=0)
    executor: ExecutorConfig = ExecutorConfig()
    processes: Literal["auto"] | Count = "auto"
    cache: str | None = Field(
        None, description="folder for shards read by URL; None: one in the user's cache folder"
    )
    cache_bytes: Count | None = Field(None, description="most bytes of that folder; None: no limit")
    download_seconds: float = Field(
        60, gt=0, description="without a byte for so long, a download has failed"
    )

    @model_validator(mode="after")
    def _named_once(self) -> ClusterConfig:
        names = [self.generic.name, *(corpus.name for corpus in self.domains)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two corpora are called {twice[0]}")
        return self

    @property
    def corpora(self) -> tuple[ClusterCorpus, ...]:
        """The generic corpus, then the domains."""
        return self.generic, *self.domains
