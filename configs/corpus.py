"""What `shoal prepare` reads and writes: sources, tokenizer, row length, limits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from shoal.configs.schema import Count, Section, Share


class SourceConfig(Section):
    """Documents in files, local or by URL, or a `datasets` source.

    `path` is a file, a folder, a glob or a URL of one of them (`s3://bucket/corpus/*.jsonl.zst`),
    or for format `datasets` what `load_dataset` takes. `{samples}` at its start stands for the
    corpus shipped with the project.
    """

    path: str
    format: Literal["auto", "jsonl", "parquet", "csv", "text", "datasets"] = "auto"
    text_key: str | tuple[str, ...] = Field(
        "text",
        description="field that holds the text; several are joined by a line break, those that "
        "are missing or empty left out",
    )
    id_key: str = Field("id", description="missing ids are made from file and line")
    domain_key: str = Field("domain", description="missing domains are the empty label")
    domain: str | None = Field(None, description="one label for all documents of this source")
    domains: tuple[str, ...] | None = Field(None, description="keep only these domain labels")
    subset: str | None = Field(None, description="datasets: configuration name")
    split: str = Field("train", description="datasets: split name")
    max_bytes: Count | None = Field(None, description="stop after this many bytes of text")


class NormalizeConfig(Section):
    """What is done to every text before anything judges it."""

    unicode: Literal["NFC", "NFKC", "none"] = "NFC"
    whitespace: bool = Field(
        True,
        description="line ends to \\n, no control characters, no blanks at line ends, at most one "
        "empty line in a row, none around the text",
    )


class GopherQualityConfig(Section):
    """Whole-document rules of Gopher (Rae et al. 2021, table A1)."""

    min_words: int = Field(50, ge=0)
    max_words: int = Field(100_000, ge=1)
    min_mean_word_length: float = Field(3, ge=0)
    max_mean_word_length: float = Field(10, gt=0)
    max_symbol_word_ratio: float = Field(0.1, ge=0, description="of # and of ellipses, each")
    max_bullet_lines: Share = Field(0.9, description="lines that start with a bullet")
    max_ellipsis_lines: Share = Field(0.3, description="lines that end with an ellipsis")
    min_alphabetic_words: Share = Field(0.8, description="words with a letter")
    min_stop_words: int = Field(
        2, ge=0, description="different ones of the, be, to, of, and, that, have, with"
    )


class GopherRepetitionConfig(Section):
    """Repetition within a document (Rae et al. 2021, table A1)."""

    max_duplicate_lines: Share = 0.3
    max_duplicate_paragraphs: Share = 0.3
    max_duplicate_line_characters: Share = 0.2
    max_duplicate_paragraph_characters: Share = 0.2
    max_top_ngrams: dict[int, Share] = Field(
        {2: 0.20, 3: 0.18, 4: 0.16},
        description="characters in the most frequent n-gram of so many words",
    )
    max_duplicate_ngrams: dict[int, Share] = Field(
        {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10},
        description="characters in n-grams of so many words that occur more than once",
    )


class C4Config(Section):
    """Line and document rules of C4 (Raffel et al. 2020, section 2.2).

    Lines are removed, so it suits web pages and harms tables, code and headings.
    """

    terminal_punctuation: bool = Field(True, description="keep only lines that end a sentence")
    min_line_words: int = Field(3, ge=0)
    min_sentences: int = Field(5, ge=0, description="what must be left of a document")
    curly_brackets: bool = Field(True, description="drop documents with a curly bracket")
    boilerplate: bool = Field(
        True, description="drop documents with lorem ipsum, and lines on javascript and cookies"
    )


class FineWebConfig(Section):
    """What FineWeb adds to Gopher and C4 (Penedo et al. 2024, section 3.6)."""

    min_punctuated_lines: Share = Field(0.12, description="lines that end with punctuation")
    max_short_lines: Share = Field(0.67, description="lines of at most short_line characters")
    short_line: int = Field(30, ge=1)
    max_duplicate_line_characters: Share = 0.01
    max_newline_word_ratio: float = Field(0.3, ge=0)


class FilterConfig(Section):
    """Quality filters, each with the thresholds it was published with; null turns one off."""

    gopher_quality: GopherQualityConfig | None = GopherQualityConfig()
    gopher_repetition: GopherRepetitionConfig | None = GopherRepetitionConfig()
    c4: C4Config | None = None
    fineweb: FineWebConfig | None = None


class ScrubConfig(Section):
    """Personal data that is replaced by a mark such as <email>."""

    emails: bool = True
    phones: bool = True
    numbers: bool = Field(
        True, description="card, account and social security numbers, and IP addresses"
    )


class DecontaminationConfig(Section):
    """Documents that share a sequence of words with an evaluation set are removed.

    Words are compared in lower case without punctuation; numbers stay as they are.
    """

    against: tuple[str, ...] = Field(
        (
            "{samples}/brainbench_human.jsonl.gz",
            "{samples}/brainbench_gpt4.jsonl.gz",
            "{samples}/medical_abstracts.jsonl.gz",
        ),
        min_length=1,
        description="files whose every text field is an evaluation text; by default those shipped",
    )
    ngram: int = Field(13, ge=2, description="words of a sequence (Brown et al. 2020, appendix C)")


class NearDuplicatesConfig(Section):
    """Near duplicates by MinHash-LSH (Broder 1997), each candidate verified.

    Of two documents whose sets of word n-grams are truly so similar (Jaccard), the later one is
    removed. A tenth of the words changed leaves a similarity of about 0.68 in pairs of words (0.57
    in triples), so the default finds such copies.
    """

    similarity: float = Field(0.6, gt=0, le=1)
    ngram: int = Field(2, ge=1, description="words of a shingle")
    bands: int = Field(32, ge=1, description="more find more candidates")
    band_hashes: int = Field(4, ge=1, description="more find fewer")
    keep_renamed: bool = Field(
        True,
        description="keep pages of one template that are about different things: each repeats a "
        "word, three times at least, that the other does not have",
    )


class CleanConfig(Section):
    """What happens to documents between reading and tokenising, in this order."""

    normalize: NormalizeConfig | None = NormalizeConfig()
    scrub: ScrubConfig | None = None
    filters: FilterConfig | None = FilterConfig()
    decontaminate: DecontaminationConfig | None = DecontaminationConfig()
    exact_duplicates: bool = True
    near_duplicates: NearDuplicatesConfig | None = NearDuplicatesConfig()


class PackingConfig(Section):
    """How documents become rows of `context` input tokens."""

    method: Literal["concatenate", "best_fit", "window"] = Field(
        "concatenate",
        description="concatenate: one stream, cut anywhere; best_fit: documents are cut only where "
        "they are longer than a row, and rows padded; window: a row holds text of one document",
    )
    separator: str = Field(
        "end_of_text",
        description="between documents: end_of_text, none, or the text of one token (concatenate)",
    )
    piece_tokens: Count | None = Field(
        None,
        description="concatenate: documents are cut into pieces of so many tokens, and the "
        "separator follows each piece (the spt variants of arXiv:2405.09395 have 1023)",
    )
    batch_documents: Count | None = Field(
        None,
        description="concatenate: begin a new row after so many documents, the last one padded "
        "(arXiv:2405.09395 has 1000)",
    )
    overlap: bool = Field(
        True,
        description="rows share a token, so that each token is a target once; false: rows of "
        "context tokens side by side, whose first tokens are no targets (arXiv:2405.09395)",
    )

    @model_validator(mode="after")
    def _fits(self) -> PackingConfig:
        if self.method == "concatenate":
            return self
        plain = PackingConfig(method="concatenate")
        for key in ("separator", "piece_tokens", "batch_documents", "overlap"):
            if getattr(self, key) != getattr(plain, key):
                raise ValueError(f"packing.{key} goes with method concatenate alone")
        return self


class SlurmConfig(Section):
    """How datatrove's Slurm executor submits the tasks of a stage, one job array a stage."""

    partition: str
    tasks_at_once: Count = 100
    cpus: Count = 1
    memory_gb: Count = 4
    time: str = Field("04:00:00", description="limit of one task")
    qos: str | None = None
    account: str | None = None
    setup: str = Field("", description="shell line run first in every task")
    options: dict[str, str] = Field({}, description="further options of sbatch")


class ExecutorConfig(Section):
    """Where the tasks of preparing run; the shards are the same bytes."""

    kind: Literal["local", "slurm", "ray"] = "local"
    slurm: SlurmConfig | None = None
    ray_address: str | None = Field(None, description="of a cluster; None: one on this machine")

    @model_validator(mode="after")
    def _described(self) -> ExecutorConfig:
        if self.kind == "slurm" and self.slurm is None:
            raise ValueError("executor.kind slurm needs executor.slurm.partition")
        return self


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
    output: str = Field(
        "data/corpus", description="folder, or URL of a prefix, that receives tokenizer and shards"
    )
    train: tuple[SourceConfig, ...] = Field(min_length=1)
    validation: tuple[SourceConfig, ...] = ()
    validation_share: Share = Field(
        0.0, description="share of the training documents held out, by a hash of their id"
    )
    tokenizer: TokenizerConfig
    clean: CleanConfig | None = Field(None, description="None: documents are taken as they are")
    packing: PackingConfig = PackingConfig()
    context: Count = Field(1024, description="tokens a row gives to the model")
    seed: int = Field(0, ge=0, description="order of documents before packing")
    executor: ExecutorConfig = ExecutorConfig()
    processes: Literal["auto"] | Count = "auto"
    shard_bytes: Count = Field(64_000_000, description="size of one MDS shard before compression")
    compression: Literal["zstd"] | None = None
    max_dropped_share: Share = Field(
        0.01, description="stop when more than this share of the records is broken"
    )
