"""Small corpora of made-up text, and one prepared corpus that no test may change."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from shoal.configs.corpus import PrepareConfig

TEXT = """
the cell fires when light falls on it and its rate depends on contrast neurons in cortex respond to
stimuli we found that inhibition increased while excitation fell naïve café α-motor 神経 Ωmega it's
3.14 don't
"""
WORDS = TEXT.split()


def write_text(count: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 60 words."""
    chooser = random.Random(seed)
    return [" ".join(chooser.choices(WORDS, k=chooser.randint(1, 60))) for _ in range(count)]


def write_lines(file: Path, records: Iterable[Any]) -> Path:
    """Write JSON lines, packed as the name says; a record of type bytes is written as it is."""
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    data = b"".join(line + b"\n" for line in lines)
    if file.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    if file.suffix == ".zst":
        data = zstandard.ZstdCompressor().compress(data)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


def make_records(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Documents of two domains."""
    return [
        {"id": f"d{seed}-{i}", "text": text, "domain": ("bio", "law")[i % 2]}
        for i, text in enumerate(write_text(count, seed))
    ]


def hash_tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, hidden ones left out."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    }


@pytest.fixture(scope="session")
def lines() -> Callable[[Path, Iterable[Any]], Path]:
    return write_lines


@pytest.fixture(scope="session")
def records() -> Callable[..., list[dict[str, str]]]:
    return make_records


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, str]]:
    return hash_tree


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 documents, about 50 KB."""
    folder = tmp_path_factory.mktemp("corpus")
    return write_lines(folder / "documents.jsonl.gz", make_records(240))


@pytest.fixture(scope="session")
def make_config(corpus_file: Path) -> Callable[..., PrepareConfig]:
    """A config with a small tokenizer, short rows and many shards, altered as asked."""

    def make(output: Path, **changes: Any) -> PrepareConfig:
        tree = {
            "output": str(output),
            "train": [{"path": str(corpus_file)}],
            "validation_share": 0.1,
            "tokenizer": {"vocab_size": 320},
            "context": 16,
            "shard_bytes": 9000,
        }
        return PrepareConfig.model_validate(tree | changes)

    return make


@pytest.fixture(scope="session")
def prepared(
    tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., PrepareConfig]
) -> Any:
    """The corpus, prepared; for reading only."""
    from shoal.data_pipeline.shards import prepare

    return prepare(make_config(tmp_path_factory.mktemp("prepared") / "corpus"))
