"""What `shoal prepare` reads and writes: sources, tokenizer, row length, limits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from shoal.configs.schema import Count, Section, Share


class SourceConfig(Section):
    """Documents in files or a `datasets` source.

    `path` is a file, a folder, a glob, or for format `datasets` what `load_dataset` takes.
    `{samples}` at its start stands for the corpus shipped with the project.
    """

    path: str
    format: Literal["auto", "jsonl", "parquet", "text", "datasets"] = "auto"
    text_key: str = "text"
    id_key: str = Field("id", description="missing ids are made from file and line")
    domain_key: str = Field("domain", description="missing domains are the empty label")
    domains: tuple[str, ...] | None = Field(None, description="keep only these domain labels")
    subset: str | None = Field(None, description="datasets: configuration name")
    split: str = Field("train", description="datasets: split name")
    max_bytes: Count | None = Field(None, description="stop after this many bytes of text")


class TokenizerConfig(Section):
    """A byte-level BPE tokenizer: given, or trained on the training documents."""

    path: str | None = Field(None, description="folder or tokenizer.json of a given tokenizer")
    vocab_size: int | None = Field(None, ge=257, description="train one with this many entries")
    max_train_bytes: Count = Field(200_000_000, description="text the training looks at")

    @model_validator(mode="after")
    def _one_way(self) -> TokenizerConfig:
        if (self.path is None) == (self.vocab_size is None):
            raise ValueError("give either tokenizer.path or tokenizer.vocab_size")
        return self


class PrepareConfig(Section):
    """corpus -> tokenizer -> shards: output/tokenizer, output/train, output/validation."""

    name: str = Field("corpus", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output: str = Field("data/corpus", description="folder that receives tokenizer and shards")
    train: tuple[SourceConfig, ...] = Field(min_length=1)
    validation: tuple[SourceConfig, ...] = ()
    validation_share: Share = Field(
        0.0, description="share of the training documents held out, by a hash of their id"
    )
    tokenizer: TokenizerConfig
    context: Count = Field(1024, description="tokens a row gives to the model")
    seed: int = Field(0, ge=0, description="order of documents before packing")
    processes: Literal["auto"] | Count = "auto"
    shard_bytes: Count = Field(64_000_000, description="size of one MDS shard before compression")
    compression: Literal["zstd"] | None = None
    max_dropped_share: Share = Field(
        0.01, description="stop when more than this share of the records is broken"
    )
