"""The sample corpus as benchmarks read it: its text in one file, and prepared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoal.configs.corpus import PrepareConfig, SourceConfig

SOURCES = ("{samples}/general_train.jsonl.gz", "{samples}/domain_train.jsonl.gz")
VOCAB_SIZE = 16384  # as in corpus.yaml


def write_text(file: Path, copies: int) -> int:
    """Write the sample documents `copies` times as plain JSON lines; return the bytes of text."""
    from shoal.data_pipeline.sources import DroppedLog, read_documents

    size = 0
    with file.open("w", encoding="utf-8") as stream:
        for copy in range(copies):
            for source in SOURCES:
                for document in read_documents(SourceConfig(path=source), DroppedLog()):
                    record = {"id": f"{copy}/{document.id}", "text": document.text}
                    stream.write(json.dumps(record) + "\n")
                    size += len(document.text.encode())
    return size


def make_config(
    output: Path,
    context: int,
    *,
    sources: tuple[str, ...] = SOURCES,
    tokenizer: Path | None = None,
    vocab_size: int = VOCAB_SIZE,
    max_bytes: int | None = None,
    processes: int = 1,
) -> PrepareConfig:
    """Return what prepares `sources`; without a tokenizer one is trained, on little text."""
    settings: dict[str, Any] = {"vocab_size": vocab_size, "max_train_bytes": 4_000_000}
    return PrepareConfig.model_validate(
        {
            "output": str(output),
            "train": [{"path": path, "max_bytes": max_bytes} for path in sources],
            "tokenizer": {"path": str(tokenizer)} if tokenizer else settings,
            "context": context,
            "processes": processes,
        }
    )
